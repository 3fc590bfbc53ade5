"""Pre-train bases on a stream of domains, tune a delta on a task, score the delta.

    python train.py                                                     # M0, M1, M2 under runs/demo, on embedded text
    python train.py --mode tune --base runs/demo/M0 --task math --delta full
    python train.py --mode eval --base runs/demo/M0 --task math --delta_dir runs/demo/deltas/M0-math-full-s0
    torchrun --nproc_per_node=8 train.py ...                            # pre-training on several GPUs

A stream (--stream python,math,dl) trains M0 on the first domain, M1 from M0 on the second, and so on. With --init, the stream starts from a
checkpoint, a Hugging Face folder or a hub id instead, and the first domain upgrades that base.
"""
import rt.runs  # noqa: F401  isort: skip  before torch: how threads wait, and Ctrl-C while it is imported

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data.sources import corpus_path, domain_names, open_domain, open_task
from rt.data import Rows, encode_task, few_shot
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.corpora import build_corpus, split_documents
from rt.formats.delta_files import delta_folder, place_of_delta, write_delta
from rt.formats.files import write_json
from rt.formats.hub import NAMING, open_base
from rt.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from rt.kinds import DeltaConfig
from rt.limits import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Seed, SeqLen, Share, ShareBelowOne
from rt.losses import Loss
from rt.model import PRESETS, EncoderConfig, MaskedLM, new_masked_lm
from rt.optim import AdamW, adamw, memory_for, not_finite, set_lr, step_unless
from rt.pretrain import PretrainSettings, evaluate_mlm, microbatches
from rt.recipes import Recipe
from rt.runs import upgrade
from rt.runs.build import default_rate, is_tuned
from rt.runs.config import changed, parse, record, run
from rt.runs.log import Log, StepBar, facts_of, load_tensorboard, note_changed_task, note_truncated, scores_text, task_text, tested_text
from rt.runs.predict import open_tuned
from rt.runs.resume import PretrainRun, check_content, has_work, sample_of, table_of
from rt.runs.signals import Interrupted
from rt.runs.upgrade import RecipeConfig, Start
from rt.runs.workers import use_threads
from rt.speed.device import make_deterministic, pick_device, pick_precision, precision_name
from rt.speed.dist import Ranks, join, launched, zero
from rt.speed.graphs import check_graphs, compiled, make_gradient, prefetch, staged
from rt.speed.multi_run import graphed_gradient
from rt.tune import TuneSettings, evaluate, plain_gradient, tune


@dataclass
class Config:
    """python train.py --mode pretrain|tune|eval [--flag value ...]"""
    mode: Literal["pretrain", "tune", "eval"] = "pretrain"  # pretrain, tune or eval
    out: str | None = None  # folder to write; default runs/demo, for tune a folder beside the base
    cache: str = "runs/cache"  # folder for tokenized corpora and the embedded data
    device: str = "auto"  # auto, cpu or cuda
    threads: NonNegativeInt = 0  # threads on a CPU; 0: one per core
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16, fp32, or auto: bf16 if the device is fast at it
    deterministic: bool = False  # the same command gives the same bits on a GPU too; on a CPU it always does
    tensorboard: bool = False  # also write losses and scores for TensorBoard during the run, to tensorboard/ in the output folder
    seed: Seed = 0  # seed of weights, data order, masks, dropout and the sample of --shots
    # pretrain (tune also uses seq_len, lr, warmup, weight_decay and graphs)
    stream: tuple[str, ...] = ("python", "math", "dl")  # domains in order: embedded names, text files or folders, hub:OWNER/NAME, task:NAME
    init: str | None = None  # continue from this base: checkpoint, Hugging Face folder or hub id
    number: NonNegativeInt | None = None  # number of the first new base, M<number>; default 0, with --init one more than that base's number
    preset: Literal["tiny", "mini", "small", "base", "large"] = "mini"  # size of a new base: tiny, mini, small, base, large
    tokenizer: str | None = None  # tokenizer.json, or a folder with vocab.json and merges.txt; default: train one
    vocab_size: PositiveInt = 4096  # vocabulary size of a tokenizer trained on the first domain
    steps: tuple[PositiveInt, ...] = (600, 500, 350)  # optimizer steps per stage; the last number holds for all further stages
    batch_tokens: PositiveInt = 1024  # tokens per optimizer step, over all ranks and microbatches
    accumulation: PositiveInt = 1  # microbatches into which each rank splits its share of a batch
    seq_len: SeqLen | None = None  # longest sequence or text in tokens, with <s> and </s>; default 128, for eval the delta's own
    mask_rate: PositiveShare = 0.3  # share of tokens to predict; RoBERTa uses 0.15, but more learns faster (Wettig et al., 2023)
    lr: Positive | None = None  # peak learning rate; default, for the mini preset: pretrain 1e-3; tune: full 5e-4, prefix 1e-2, others 5e-3
    warmup: Share = 0.1  # share of the steps over which the learning rate rises, per stage
    dropout: ShareBelowOne = 0.0  # dropout in pre-training; 0 learns faster over few epochs (tuning uses the checkpoint's 0.1)
    weight_decay: NonNegative = 0.01  # weight decay, on matrices only
    recipe: RecipeConfig = RecipeConfig()
    # the run
    snapshots: NonNegativeInt = 2  # checkpoints M_i(t) kept per stage, evenly spaced
    save_every: PositiveInt = 100  # steps between resumable checkpoints
    stop_after: PositiveInt | None = None  # stop after this many steps of this command, as a time limit would; --resume continues
    resume: bool = False  # continue from the newest resumable checkpoint in --out
    eval_tokens: PositiveInt = 16384  # held-out tokens scored per domain
    compile: bool = False  # torch.compile the blocks; worth it on a GPU, not on a CPU
    graphs: bool = False  # run forward and backward as a CUDA graph; one GPU only
    zero: bool = False  # shard the optimizer state over the ranks of torchrun (ZeRO-1)
    log_every: PositiveInt | None = None  # steps between reads of the loss (every step still gets its row); default 1, on CUDA 10
    # tune, eval
    base: str | None = None  # the base: checkpoint, Hugging Face folder or hub id
    task: str | None = None  # embedded domain, a folder with train, dev and test, or hub:OWNER/NAME
    delta: DeltaConfig = DeltaConfig("adapter")  # full, adapter, lora, bitfit or prefix
    shots: PositiveInt | None = None  # examples per label (regression: in all) for train and for dev; default: all
    tune_steps: PositiveInt = 300  # optimizer steps of tuning
    batch_size: PositiveInt = 16  # sequences per tuning step
    eval_every: PositiveInt = 25  # steps between scores on dev
    delta_dir: str | None = None  # eval: the delta's folder; from a folder of recycle.py, the best on dev (mean over seeds) is taken


NOT_SETTINGS = ("resume", "stop_after", "save_every", "cache", "device", "out", "accumulation", "compile", "graphs", "zero",
                "log_every", "deterministic", "tensorboard", "threads")     # may differ when a run is resumed
EVAL_READS = ("mode", "cache", "device", "threads", "precision", "deterministic", "seq_len", "base", "task", "delta_dir")
SEQ_LEN, PRETRAIN_LR = 128, 1e-3      # defaults of --seq_len and of pre-training's --lr


def main() -> None:
    c = parse(Config, sys.argv[1:])
    if launched() > 1 and c.mode != "pretrain":
        raise InputError(f"--mode {c.mode} is for one process: start it without torchrun")
    names = [*record(Config())]
    of_pretrain, of_tune = names.index("stream"), names.index("base")      # where their flags begin in Config; eval's delta_dir is last
    read = {"pretrain": names[:of_tune], "eval": EVAL_READS,
            "tune": [*names[:of_pretrain], "seq_len", "lr", "warmup", "weight_decay", "graphs", *names[of_tune:-1]]}[c.mode]
    if unread := [name for name in changed(c) if name not in read]:
        meant = {"steps": ": did you mean --tune_steps?", "tune_steps": ": did you mean --steps?"}.get(unread[0], "")
        raise InputError(f"--{unread[0]} has no effect with --mode {c.mode}{meant}")
    for name in {"tune": ("base", "task"), "eval": ("task", "base", "delta_dir")}.get(c.mode, ()):
        if getattr(c, name) is None:
            raise InputError(f"--mode {c.mode} needs --{name}: see --help")
    for name in c.delta.check().idle:
        raise InputError(f"--{name} has no effect with --delta {c.delta.kind}")
    if c.mode != "eval":
        c.seq_len = c.seq_len or SEQ_LEN
    make_deterministic(c.deterministic)
    if c.tensorboard:
        load_tensorboard()      # before anything is trained
    if launched() == 1 and not (torch.cuda.is_available() and c.device != "cpu"):
        use_threads(c.threads)
    {"pretrain": pretrain, "tune": tune_delta, "eval": eval_delta}[c.mode](c)


# --- pretrain ---------------------------------------------------------------------------------------------------------

def pretrain(c: Config) -> None:
    """Train M0, M1, ... on a stream. Each stage continues from the last stage's weights with a fresh optimizer and schedule."""
    if c.zero and launched() == 1:
        raise InputError("--zero shares the optimizer state out among the ranks, and there is only one: start several with torchrun")
    ranks, out = join(c.device), Path(c.out or "runs/demo")
    ranks.assert_same({f"--{k}": v for k, v in record(c).items()})
    check_graphs(c.graphs, ranks)
    stages = 1 if c.recipe.mix else len(c.stream)
    if "steps" in changed(c) and len(c.steps) > stages:
        raise InputError(f"--steps {','.join(map(str, c.steps))}: are for {len(c.steps)} stages, and --stream makes {stages}")
    c.recipe.check(domain_names("stream", c.stream), c.warmup, min(c.steps[:stages]), c.snapshots,
                   sum(entry.startswith("task:") for entry in c.stream), is_new=not c.init)
    if c.compile and c.recipe.by_need:
        raise InputError("--mix need evaluates batches of many shapes, and --compile would recompile for each: leave --compile out")
    settings = {k: v for k, v in record(c).items() if k not in NOT_SETTINGS}
    interrupted = None
    with locked(out, ranks.from_main):
        if ranks.from_main(lambda: has_work(out, settings, c.resume, record(Config()))):
            with PretrainRun(c, out, ranks, settings) as this_run:
                interrupted = train_stages(c, this_run, ranks)
        else:
            if c.init and Path(c.init).exists():
                ranks.from_main(lambda: check_content(out, {"--init": upgrade.go_on_from(c, Path(c.init).resolve(), open_base(c.init))[1]}))
            print(f"{out} is complete; remove it to train anew\n{table_of(out)}")
    ranks.leave()
    if interrupted:
        raise interrupted


def train_stages(c: Config, this_run: PretrainRun, ranks: Ranks) -> Interrupted | None:
    """Train the stages that are not finished yet. Returns the exception to raise if a signal asked the run to end."""
    r = c.recipe
    found = ranks.main_first(lambda: [open_domain(entry, c.cache, r.template, r.select, r.keep) for entry in c.stream])
    paths, places = (dict(zip(domain_names("stream", c.stream), column)) for column in zip(*found))     # places: for meta.json
    model, tokenizer, (parent, number, domains, moments, contents) = start_model(c, this_run.out, next(iter(paths.values())), ranks)
    earlier = upgrade.earlier_domains(c, domains, places)
    paths = ranks.main_first(lambda: {name: corpus_path(place, c.cache) for name, place in earlier.items()}) | paths
    corpora = ranks.main_first(lambda: {name: build_corpus(name, path, tokenizer, c.cache) for name, path in paths.items()})
    groups = [tuple(places)] if r.mix else [(name,) for name in places]
    contents = upgrade.contents_of(corpora, contents, earlier, groups)
    where = {"device": ranks.device, "precision": pick_precision(c.precision, ranks.device)}
    targets = {f"--{flag}": base.fingerprint for flag in ("mix_reference", "preserve_to")
               if (base := upgrade.target(c, flag, tokenizer, model.encoder.config, ranks))}
    inputs = {"--precision": precision_name(where["precision"]), "tokenizer": tokenizer.fingerprint, "--init": parent,
              **targets, **{f"corpus {k}": v["train"].content for k, v in corpora.items()}}
    ranks.assert_same(inputs)
    training, heldout = upgrade.rows_of(c, corpora, groups, [*earlier], tokenizer, number + 1, ranks)
    this_run.begin(inputs, tokenizer)
    for i, (domain, rows) in enumerate(training.items()):
        name, number, domains = f"M{number + 1}", number + 1, domains | {d: places[d] for d in groups[i]}
        if base := this_run.finished(name, parent):      # finished before an interruption
            model, parent, moments = upgrade.go_on_from(c, this_run.out / name, base)
            continue
        steps = c.steps[min(i, len(c.steps) - 1)]
        s = PretrainSettings(steps, c.batch_tokens, c.lr or PRETRAIN_LR, max(1, round(c.warmup * steps)), rows.seed, c.accumulation,
                             rates=r.rates, held=bool(parent) and not (r.rates.rewarm and i == 0))
        upgrade.set_dropout(model.to(ranks.device), c.dropout)      # a module is moved in place
        optimizer = adamw(model.parameters(), 0.0, c.weight_decay, make=zero if c.zero else AdamW)
        recipe = upgrade.start_recipe(c, model, rows, [corpora[name]["train"] for name in groups[i]], tokenizer, ranks, where,
                              this_run.out / f"M{number - 1}" if i else c.init)
        about = {"name": name, "domain": domain, "number": number, "parent": parent, "domains": domains,
                 "recipe": upgrade.used(r, rows, parent), "contents": {k: v for k, v in contents[i].items() if k in domains},
                 "precision": inputs["--precision"]}
        first = this_run.start_stage(about, s, rows, model, optimizer, where["precision"], recipe, moments)
        if not this_run.stages and first == 0:
            print(sample_of(rows, tokenizer))
        if train_stage(model, rows, optimizer, s, this_run, ranks, where["precision"], first, c.compile, c.graphs, recipe):
            return this_run.suspended(f"in {name} after step {this_run.step} of {steps}")
        this_run.finish_stage(lambda: {d: evaluate_mlm(model, unseen, tokens=c.eval_tokens, **where) for d, unseen in heldout.items()})
        if i + 1 < len(training) and this_run.stops_between_stages():
            return this_run.suspended(f"after {name}")
        model, parent, moments = upgrade.go_on_from(c, this_run.out / name, this_run.finished(name, parent))
    this_run.complete()
    return None


def train_stage(model: MaskedLM, rows: Rows, optimizer: torch.optim.Optimizer, s: PretrainSettings, this_run: PretrainRun, ranks: Ranks,
                precision: torch.dtype, first: int = 0, compile: bool = False, graphs: bool = False, recipe: Recipe = Recipe()) -> bool:
    """The pre-training loop from step `first` on. Returns whether it stops before the end of the stage. Data and dropout are functions of
    (seed, step, microbatch), so a resumed loop repeats nothing and skips nothing."""
    model.train()
    batches = prefetch(staged(microbatches(rows, s, ranks.rank, ranks.world, first), rows, ranks.device, static=compile))
    with compiled(model.encoder.layers if compile else (), ranks.device), closing(batches):
        gradient = make_gradient(model, s, ranks, precision, graphs, recipe.loss)     # recipe.loss and its backward pass
        for step in range(first, s.steps):
            lr = set_lr(optimizer, s.lr_at(step))
            loss = torch.zeros((), device=ranks.device)
            model.zero_grad(set_to_none=True)
            for part in range(s.accumulation):
                batch = next(batches)
                loss += gradient(batch, part)
                this_run.throughput.count(batch)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            loss = ranks.mean(loss)                                     # either all ranks skip a step or none does
            step_unless(optimizer, not_finite(loss, norm))
            recipe.after_step(step + 1)
            if this_run.after_step(step + 1, lr, loss, norm):           # rows, checkpoints, signals
                return True
    return False


@memory_for("the model", "`preset` or `max_len`")
def start_model(c: Config, out: Path, first_corpus: Path, ranks: Ranks) -> tuple[MaskedLM, Tokenizer, Start]:
    """(model, tokenizer, lineage so far): a new base of size --preset, or the base that --init names. InputError if they do not fit."""
    if c.init:
        if c.tokenizer:
            raise InputError("--tokenizer has no effect with --init: that base has its own tokenizer")
        base = ranks.main_first(lambda: open_base(c.init))
        config, tokenizer = base.encoder.config, base.tokenizer
        if "preset" in changed(c) and PRESETS[c.preset]["hidden_size"] != config.hidden_size:
            raise InputError(f"--preset {c.preset}: is for a new base, and {c.init} has hidden states of {config.hidden_size} numbers")
        if base.head is None:
            print(f"{c.init} has no complete masked-LM head; it gets a fresh one")
            if c.recipe.preserve and c.recipe.preserve_by == "predictions":
                raise InputError(f"--preserve_by predictions: {c.init} predicts nothing without its masked-LM head; use hidden")
        model, parent, moments = upgrade.go_on_from(c, Path(c.init).resolve(), base)
        start = Start(parent, base.meta.get("number", 0), base.meta.get("domains", {}), moments, base.meta.get("contents", {}))
        if c.recipe.max_len and c.recipe.max_len != config.max_len:     # the optimizer's moments do not fit a longer table
            model, start = upgrade.lengthen(model, c.recipe.max_len), start._replace(moments=None)
    else:
        tokenizer = ranks.from_main(lambda: start_tokenizer(c, out, first_corpus))
        sizes = PRESETS[c.preset] | ({"max_len": c.recipe.max_len} if c.recipe.max_len else {})
        config, start = EncoderConfig(tokenizer.vocab_size, pad_id=tokenizer.pad_id, **sizes), Start()
        model = new_masked_lm(config, c.seed)
    if (c.init or c.tokenizer) and c.vocab_size not in (Config.vocab_size, tokenizer.vocab_size):
        print(f"--vocab_size {c.vocab_size} has no effect: the tokenizer of {c.init or c.tokenizer} has {tokenizer.vocab_size} entries")
    if c.seq_len > (most := model.encoder.config.max_len):
        raise InputError(f"--seq_len {c.seq_len}: the model has positions for {most} tokens; --max_len makes more")
    return model, tokenizer, start if c.number is None else start._replace(number=c.number - 1)


def start_tokenizer(c: Config, out: Path, first_corpus: Path) -> Tokenizer:
    """Load the tokenizer, or train it on the first domain only: later domains are still in the future."""
    if c.tokenizer or c.resume and (out / "tokenizer.json").exists():
        return load_tokenizer(Path(c.tokenizer or out))
    return train_tokenizer((text for part, text in split_documents(first_corpus) if part == "train"), c.vocab_size)


# --- tune, eval -------------------------------------------------------------------------------------------------------

def tune_delta(c: Config) -> None:
    """Tune a fresh delta on a task. Its folder also holds the run's metrics and summary. The folder appears, or replaces an earlier one,
    when the run is complete; until then metrics.jsonl is in OUT.part."""
    device, kind = pick_device(c.device), c.delta.kind
    where = {"device": device, "precision": pick_precision(c.precision, device)}
    base, task = open_base(c.base).to(device), open_task(c.task, c.cache)
    base.require_length(c.seq_len)
    about = facts_of(task) | {"seed": c.seed}
    few = few_shot(task, c.shots, c.seed) if c.shots else task
    data = encode_task(few, base.tokenizer, c.seq_len)
    print(task_text(few))
    out = Path(c.out or place_of_delta(c.base, task.name, kind, f"-k{c.shots}" if c.shots else "", c.seed))
    note_truncated(*data.truncated(), c.seq_len)
    model = attach(base, c.delta, data.num_outputs, c.seed)
    check_graphs(c.graphs, Ranks(device))
    c.lr = c.lr or default_rate(kind)
    s = TuneSettings(c.tune_steps, c.batch_size, c.lr, c.eval_every, c.seed, c.weight_decay, c.warmup)
    about |= {"shots": c.shots, "config": record(c), "argv": sys.argv, "precision": precision_name(where["precision"])}
    if c.out is None:
        idle = (*NOT_SETTINGS, *["base"] * Path(c.base).exists())       # a hub id is compared: those of two owners share a place
        asked = {k: v for k, v in about["config"].items() if k not in idle} | {"task": task.hash}
        is_tuned(out, asked, "give --out, or move it away")     # InputError rather than overwriting a delta of other flags
    with locked(out), delta_folder(out, sum(p.nbytes for p in model.parameters() if p.requires_grad)) as new:
        log = Log(new, tensorboard=c.tensorboard)
        with StepBar(s.steps, f"{task.name} {kind}", model.encoder.config, **where, frozen=kind != "full",
                     record=lambda row: log.row(**row)) as bar:
            result = tune(model, data, Loss(task.is_regression), s, **where, on_step=bar.on_step, on_eval=bar.on_eval,
                          make_gradient=graphed_gradient if c.graphs else plain_gradient)
        about |= {"step": result.best_step, "dev": result.dev, "test": result.test}
        write_delta(new, extract(model, base, c.delta, about))
        write_json(new / "summary.json", about | {"base": base.fingerprint, "delta": kind, "seconds": round(result.seconds, 1)})
    print(f"{task.name}, {kind}: dev {scores_text(result.dev)} at step {result.best_step}; {tested_text(result.test)}; "
          f"{result.seconds:.0f} s; delta in {out}")


def eval_delta(c: Config) -> None:
    """Score base + delta on the dev and test parts of a task."""
    task = open_task(c.task, c.cache)
    base, delta, model, seq_len, where = open_tuned(c, task.labels)
    if task.labels != delta.labels:
        raise InputError(f"{c.delta_dir} has the labels {', '.join(delta.labels[:6]) or '(none: a regression)'}, but {c.task} has "
                         f"{', '.join(task.labels[:6]) or 'numbers'}: if only the names differ, {NAMING}")
    note_changed_task(delta.info, task)
    data = encode_task(task, base.tokenizer, seq_len)
    note_truncated(*data.truncated(), seq_len, sys.stderr)
    test = evaluate(model, data.test, **where) if data.test else {}
    print(f"{task.name}: dev {scores_text(evaluate(model, data.dev, **where))}; {tested_text(test)}")


if __name__ == "__main__":
    run(main)
