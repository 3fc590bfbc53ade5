"""Pre-train a base on a stream of domains, tune a delta on a task, score it.

    python train.py                                                     # M0, M1, M2 under runs/demo, on embedded text
    python train.py --mode tune --base runs/demo/M0 --task math --delta full
    python train.py --mode eval --base runs/demo/M0 --task math --delta_dir runs/demo/deltas/M0-math-full-s0
    torchrun --nproc_per_node=8 train.py ...                            # pre-training on several GPUs

A stream (--stream python,math,dl) makes M0 on the first domain, M1 out of M0 on the second, and so on; --init starts from a
checkpoint, a Hugging Face folder or a hub id instead, whose upgrade is then the first domain.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from data.sources import corpus_path, task_path
from rt.data import Rows, few_shot
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.checkpoint import save_base
from rt.formats.corpora import build_corpus, split_documents
from rt.formats.delta_files import delta_folder, write_delta
from rt.formats.files import write_json
from rt.formats.hub import NAMING, open_base, place_of_delta
from rt.formats.tasks import load_task
from rt.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from rt.kinds import DeltaConfig
from rt.losses import Loss
from rt.model import PRESETS, EncoderConfig, MaskedLM, new_masked_lm, set_dropout
from rt.optim import derive_seed
from rt.pretrain import PretrainSettings, Stage, evaluate_mlm
from rt.runs.config import parse, record, require_not_negative, require_positive, require_seeds, require_seq_len, require_share, run
from rt.runs.log import Log
from rt.runs.predict import open_tuned
from rt.runs.resume import check_content, forget_last, has_work, is_done_again, sample_of, stage_of, table_of
from rt.runs.signals import Interrupted, Stop
from rt.runs.summary import forgetting_table
from rt.speed.device import make_deterministic, pick_device, pick_precision
from rt.speed.dist import Ranks, join, launched
from rt.speed.graphs import check_graphs
from rt.tune import TuneSettings, encode_task, evaluate, say_changed, say_truncated, shown, tune


@dataclass
class Config:
    """python train.py --mode pretrain|tune|eval [--flag value ...]"""
    mode: str = "pretrain"  # pretrain, tune or eval
    out: str | None = None  # folder to write: default runs/demo, tune: beside the base
    cache: str = "runs/cache"  # tokenized corpora and the embedded data
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # bf16, fp32, or auto: bf16 where the device does it fast
    deterministic: bool = False  # the same bits from the same command on a GPU too; on a CPU they are so anyway
    seed: int = 0  # of weights, data order, masks and dropout
    # pretrain (seq_len, lr, warmup, weight_decay and graphs: tune as well)
    stream: tuple[str, ...] = ("python", "math", "dl")  # domains in order: embedded names, or text files or folders
    init: str | None = None  # continue from this base: checkpoint, Hugging Face folder or hub id
    preset: str = "mini"  # size of a new base: tiny, mini, small, base, large
    tokenizer: str | None = None  # tokenizer.json, or a folder with vocab.json and merges.txt; default: trained
    vocab_size: int = 4096  # of a tokenizer trained on the first domain
    steps: tuple[int, ...] = (600, 500, 350)  # optimizer steps of each stage; the last number serves all further ones
    batch_tokens: int = 1024  # tokens an optimizer step, all ranks and accumulation together
    accumulation: int = 1  # parts in which each rank computes its share of a batch
    seq_len: int | None = None  # longest sequence or text in tokens, <s> and </s> counted; default 128, to eval the delta's own
    mask_rate: float = 0.3  # share of tokens predicted; RoBERTa: 0.15, but more learns faster (Wettig et al., 2023)
    lr: float | None = None  # peak learning rate; default 1e-3 to pretrain, by kind of delta to tune
    warmup: float = 0.1  # share of the steps with rising learning rate, anew in every stage
    dropout: float = 0.0  # while pre-training; 0 learns faster from few epochs (tuning uses the checkpoint's 0.1)
    weight_decay: float = 0.01  # on matrices only
    snapshots: int = 2  # checkpoints M_i(t) kept along a stage, evenly spaced
    save_every: int = 100  # steps between resumable checkpoints
    stop_after: int | None = None  # end after so many steps in all, as a time limit would; --resume goes on
    resume: bool = False  # go on from the last resumable checkpoint in --out
    eval_tokens: int = 16384  # held-out tokens scored a domain
    compile: bool = False  # torch.compile of the blocks; for a GPU, on a CPU it does not pay
    graphs: bool = False  # forward and backward as a CUDA graph; one GPU
    zero: bool = False  # optimizer state shared out among the ranks of torchrun (ZeRO-1)
    log_every: int | None = None  # steps between looks at the loss (every step gets its row); default 1, on CUDA 10
    # tune, eval
    base: str | None = None  # the base: checkpoint, Hugging Face folder or hub id
    task: str | None = None  # embedded domain, or a folder with train, dev and test
    delta: str = "adapter"  # full, adapter, lora, bitfit or prefix
    shots: int | None = None  # examples a label for train and for dev; default: all
    tune_steps: int = 300  # optimizer steps of tuning
    batch_size: int = 16  # sequences a tuning step
    eval_every: int = 25  # steps between scores on dev
    bottleneck: int = 24  # adapter
    r: int = 8  # lora
    lora_alpha: float = 16.0  # lora
    target_modules: tuple[str, ...] = ("query", "value")  # lora
    prefix_len: int = 16  # prefix
    delta_dir: str | None = None  # eval: the delta; a folder of recycle.py: its best by dev, mean over seeds


NOT_SETTINGS = ("resume", "stop_after", "save_every", "cache", "device", "out", "accumulation", "compile", "graphs", "zero",
                "log_every", "deterministic")     # may differ when a run is resumed
HELDOUT_MASK_RATE = 0.15    # whatever --mask_rate is, so that held-out losses compare
SEQ_LEN = 128
PRETRAIN_LR = 1e-3
TUNE_LR = {"full": 5e-4, "adapter": 5e-3, "lora": 5e-3, "bitfit": 5e-3, "prefix": 1e-2}     # of the mini preset


def main() -> None:
    config = parse(Config, sys.argv[1:])
    modes = {"pretrain": pretrain_stream, "tune": tune_delta, "eval": eval_delta}
    if config.mode not in modes:
        raise InputError(f"--mode {config.mode}: not one of {', '.join(modes)}")
    if launched() > 1 and config.mode != "pretrain":
        raise InputError(f"--mode {config.mode} is for one process: leave torchrun out")
    for mode, wrong, right in (("tune", "steps", "tune_steps"), ("pretrain", "tune_steps", "steps")):
        if config.mode == mode and getattr(config, wrong) != getattr(Config, wrong):
            raise InputError(f"--{wrong} says nothing to --mode {mode}: did you mean --{right}?")
    require_positive(config, "steps", "batch_tokens", "accumulation", "seq_len", "vocab_size", "save_every", "tune_steps",
                     "batch_size", "eval_every", "shots", "bottleneck", "r", "prefix_len", "mask_rate", "lr", "stream", "log_every",
                     "stop_after")
    require_share(config, "warmup", "mask_rate")
    require_seeds(config.seed)
    if not 0 <= config.dropout < 1:
        raise InputError(f"--dropout {config.dropout}: must be at least 0 and below 1")
    require_not_negative(config, "weight_decay", "snapshots")
    if config.mode != "eval":
        config.seq_len = config.seq_len or SEQ_LEN
    if config.seq_len:
        require_seq_len(config.seq_len)
    if config.deterministic:
        make_deterministic()
    modes[config.mode](config)


# --- pretrain ---------------------------------------------------------------------------------------------------------

def pretrain_stream(c: Config) -> None:
    """M0, M1, ... of a stream: each stage continues the last one's weights with a fresh optimizer and schedule."""
    if c.zero and launched() == 1:
        raise InputError("--zero shares the optimizer's state out among ranks, and there is one: start several with torchrun")
    ranks = join(c.device)
    ranks.agree({f"--{k}": v for k, v in record(c).items()})
    check_graphs(c.graphs, ranks)
    out = Path(c.out or "runs/demo")
    with locked(out, ranks.from_main):
        interrupted = train_stages(c, out, ranks)
    ranks.leave()
    if interrupted:
        raise interrupted


def train_stages(c: Config, out: Path, ranks: Ranks) -> Interrupted | None:
    """The stages that `out` does not hold yet, up to --stop_after steps of them, or until a signal asks for the end, which is returned."""
    where = {"device": ranks.device, "precision": pick_precision(c.precision, ranks.device)}
    settings = {k: v for k, v in record(c).items() if k not in NOT_SETTINGS}
    if not ranks.from_main(lambda: has_work(out, settings, c.resume)):
        print(f"{out} is complete; remove it to train anew")
        print(table_of(out))
        return None
    model, tokenizer, about, training, heldout = prepare_stream(c, out, ranks)
    if ranks.is_main:
        write_json(out / "config.json", settings | {"content": about.pop("content")})
        tokenizer.save(out)
    log = Log(out, keep=lambda row: c.resume and not is_done_again(row, out), writes=ranks.is_main)
    stages, allowance = [], c.stop_after or sys.maxsize
    with Stop() as stop:
        for i, (domain, rows) in enumerate(training.items()):
            number = about["number"] = about["number"] + 1
            name, steps = f"M{number}", c.steps[min(i, len(c.steps) - 1)]
            if (out / name / "meta.json").exists():     # finished before an interruption
                base = open_base(str(out / name))
                model, about["parent"] = MaskedLM(base.encoder, base.head), base.fingerprint
                set_dropout(model, c.dropout)
                stages.append(stage_of(base.meta, out / name))
                continue
            about.update(name=name, domain=domain, config=settings, argv=sys.argv)
            stage = Stage(out, model.to(ranks.device), tokenizer, rows, about, stage_settings(c, steps, rows, ranks), where["precision"],
                          ranks, log, c.weight_decay, c.zero, c.snapshots, c.save_every, stop)
            if c.resume:
                stage.resume()
            if not stages and stage.step == 0:
                print(sample_of(rows, tokenizer))
            allowance -= stage.train(allowance)
            if stage.step < steps:
                return stopped(f"in {name} after step {stage.step} of {steps}", stop)
            scores = ranks.from_main(lambda: {d: evaluate_mlm(model, r, tokens=c.eval_tokens, **where) for d, r in heldout.items()})
            stages.append({"name": name, "domain": domain, "steps": steps, "seconds": round(stage.seconds, 1), "heldout": scores,
                           "packing": rows.packing(), "ranks": ranks.world, **stage.note()})
            log.row(stage=name, step=steps, heldout=scores)
            if ranks.is_main:
                log.sync()
                about["parent"] = save_base(out / name, model, tokenizer, {**about, "step": steps, "stage": stages[-1]})
            if len(stages) < len(training) and (allowance == 0 or ranks.any(bool(stop.number))):
                return stopped(f"after {name}", stop)
    if ranks.is_main:
        write_json(out / "summary.json", {"stages": stages, "config": settings, "argv": sys.argv})
        forget_last(out)
    print(forgetting_table(stages))
    return None


def stopped(where: str, stop: Stop) -> Interrupted | None:
    """Say where training has ended and how it goes on; where a signal asked for it, as what is to be raised."""
    said = f"stopped {where}; the same command with --resume goes on"
    if stop.number:
        return Interrupted(stop.number, said)
    print(said)
    return None


def stage_settings(c: Config, steps: int, rows: Rows, ranks: Ranks) -> PretrainSettings:
    log_every = c.log_every or (10 if ranks.device.type == "cuda" else 1)
    return PretrainSettings(steps, c.batch_tokens, c.lr or PRETRAIN_LR, max(1, round(c.warmup * steps)), rows.seed, c.accumulation,
                            log_every=log_every, compile=c.compile, graphs=c.graphs)


def prepare_stream(c: Config, out: Path, ranks: Ranks) -> tuple[MaskedLM, Tokenizer, dict, dict[str, Rows], dict[str, Rows]]:
    """(model, tokenizer, what is known of them, training rows and held-out rows of every domain); writes nothing to `out`."""
    paths = ranks.main_first(lambda: {domain_name(entry): corpus_path(entry, c.cache) for entry in c.stream})
    if len(paths) < len(c.stream):
        raise InputError(f"--stream {','.join(c.stream)}: two domains have the same name; rename one of the files")
    model, tokenizer, about = start_model(c, out, next(iter(paths.values())), ranks)
    corpora = ranks.main_first(lambda: {name: build_corpus(name, path, tokenizer, c.cache) for name, path in paths.items()})
    training = {name: Rows(parts["train"], tokenizer, seq_len=c.seq_len, mask_rate=c.mask_rate, seed=derive_seed(c.seed, i))
                for i, (name, parts) in enumerate(corpora.items(), about["number"] + 1)}
    for rows in training.values():
        rows.check_batch(c.batch_tokens, ranks.world * c.accumulation)
    content = {"tokenizer": tokenizer.fingerprint, "--init": about["parent"],
               **{f"corpus {name}": parts["train"].content for name, parts in corpora.items()}}
    ranks.agree(content)
    ranks.from_main(lambda: check_content(out, content))
    heldout = {name: Rows(parts["heldout"], tokenizer, seq_len=c.seq_len, mask_rate=HELDOUT_MASK_RATE, seed=0, sequences=1)
               for name, parts in corpora.items()}
    return model, tokenizer, about | {"content": content}, training, heldout


def domain_name(entry: str) -> str:
    """What a domain is called in tables and files: an embedded name, or that of the file or folder without endings."""
    return Path(entry).name.split(".")[0]


def start_model(c: Config, out: Path, first_corpus: Path, ranks: Ranks) -> tuple[MaskedLM, Tokenizer, dict]:
    """(model, tokenizer, what is known of them): a new base of --preset, or --init."""
    if c.init:
        if c.tokenizer:
            raise InputError("--tokenizer: a base of --init comes with its own")
        base = ranks.main_first(lambda: open_base(c.init))
        config, tokenizer = base.encoder.config, base.tokenizer
        head = base.head
        if head is None:
            print(f"{c.init} has no masked-LM head; it gets a fresh one")
            head = new_masked_lm(config, c.seed).head
        model = MaskedLM(base.encoder, head)
        about = {"parent": base.fingerprint, "number": base.meta.get("number", 0)}
    else:
        if c.preset not in PRESETS:
            raise InputError(f"--preset {c.preset}: not one of {', '.join(PRESETS)}")
        tokenizer = ranks.from_main(lambda: start_tokenizer(c, out, first_corpus))
        config = EncoderConfig(tokenizer.vocab_size, pad_id=tokenizer.pad_id, **PRESETS[c.preset])
        model, about = new_masked_lm(config, c.seed), {"parent": None, "number": -1}
    if c.seq_len > config.max_len:
        raise InputError(f"--seq_len {c.seq_len}: the model has positions for {config.max_len} tokens")
    set_dropout(model, c.dropout)
    return model, tokenizer, about


def start_tokenizer(c: Config, out: Path, first_corpus: Path) -> Tokenizer:
    """Loaded, or trained on the first domain only: later domains are the future."""
    if c.tokenizer:
        return load_tokenizer(Path(c.tokenizer))
    if c.resume and (out / "tokenizer.json").exists():
        return load_tokenizer(out)
    return train_tokenizer((text for part, text in split_documents(first_corpus) if part == "train"), c.vocab_size)


# --- tune, eval ----------------------------------------------------------------------------------------------------

def delta_config(c: Config) -> DeltaConfig:
    return DeltaConfig(c.delta, c.bottleneck, c.r, c.lora_alpha, c.target_modules, c.prefix_len)


def required(c: Config, *names: str) -> None:
    for name in names:
        if getattr(c, name) is None:
            raise InputError(f"--mode {c.mode} needs --{name}: see --help")


def tune_delta(c: Config) -> None:
    """Tune a fresh delta on a task. The folder it is written to holds the run's metrics and summary as well, and appears, or takes the
    place of an earlier one, when all is done; until then metrics.jsonl is in OUT.part."""
    required(c, "base", "task")
    device = pick_device(c.device)
    where = {"device": device, "precision": pick_precision(c.precision, device)}
    base, task, config = open_base(c.base).to(device), load_task(task_path(c.task, c.cache)), delta_config(c)
    base.require_length(c.seq_len)
    about = {"task": task.name, "task_hash": task.hash, "labels": list(task.labels), "shots": c.shots, "seed": c.seed}
    if c.shots:
        task = few_shot(task, c.shots, c.seed)
    encoded = encode_task(task, base.tokenizer, c.seq_len)
    few = f"-k{c.shots}" if c.shots else ""
    out = Path(c.out or place_of_delta(c.base, task.name, c.delta, few, c.seed))
    say_truncated(*encoded.truncated(), c.seq_len)
    model = attach(base, config, encoded.num_outputs, c.seed)
    check_graphs(c.graphs, Ranks(device))
    settings = TuneSettings(c.tune_steps, c.batch_size, c.lr or TUNE_LR[c.delta], c.eval_every, c.seed,
                            c.weight_decay, c.warmup, graphs=c.graphs)
    about |= {"config": record(c), "argv": sys.argv}
    with locked(out), delta_folder(out, sum(p.nbytes for p in model.parameters() if p.requires_grad)) as new:
        log = Log(new)
        result = tune(model, encoded, Loss(task.is_regression), settings, **where, on_eval=lambda row: log.row(**row),
                      what=f"{task.name} {c.delta}")
        about |= {"step": result.best_step, "dev": result.dev, "test": result.test}
        write_delta(new, extract(model, base, config, about))
        write_json(new / "summary.json", about | {"base": base.fingerprint, "delta": c.delta, "seconds": round(result.seconds, 1)})
    print(f"{task.name}, {c.delta}: dev {shown(result.dev)} at step {result.best_step}; test {shown(result.test)}; "
          f"{result.seconds:.0f} s; delta in {out}")


def eval_delta(c: Config) -> None:
    """Score a base + delta on dev and test of a task."""
    required(c, "task", "base", "delta_dir")
    task = load_task(task_path(c.task, c.cache))
    base, delta, model, seq_len, where = open_tuned(c, task.labels)
    if task.labels != delta.labels:
        raise InputError(f"{c.delta_dir} has the labels {', '.join(delta.labels[:6]) or 'of a regression'}, but {c.task} "
                         f"{', '.join(task.labels[:6]) or 'those of a regression'}: if they are the same under other names, {NAMING}")
    say_changed(delta.info, task)
    encoded = encode_task(task, base.tokenizer, seq_len)
    say_truncated(*encoded.truncated(), seq_len, sys.stderr)
    print(f"{task.name}: dev {shown(evaluate(model, encoded.dev, **where))}; "
          f"test {shown(evaluate(model, encoded.test, **where))}")


if __name__ == "__main__":
    run(main)
