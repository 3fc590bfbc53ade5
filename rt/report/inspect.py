"""Tells in about ten lines what a folder is: a base or a delta of ours, a run, a Hugging Face checkpoint, a PEFT adapter.

    python -m rt.report.inspect PATH [PATH ...]
    python -m rt.report.inspect --verify PATH [PATH ...]

It reads JSON and the headers of safetensors files, no tensor, and does not import torch, so it answers at once. What the files say of
themselves is repeated, not checked: `--verify` does that for every base and delta at or below PATH, reading each file once.
"""
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

from rt.errors import InputError
from rt.formats.atomic import differing
from rt.formats.files import FIGURES, read_json, read_rows
from rt.formats.untrusted import header, shaped
from rt.runs.config import parse, run

SETTINGS = {"adapter": ("bottleneck",), "lora": ("r", "lora_alpha", "target_modules"), "prefix": ("prefix_len",)}  # = rt.deltas.USED


DELTAS = ("*/delta.json", "deltas/*/delta.json")      # where a run's folder has them


SEALED, FORMATS = {"meta.json": "model.safetensors", "delta.json": "delta.safetensors"}, ("rt-base-1", "rt-delta-1")


SHOWN = 8       # labels, deltas or target modules that are named; of more, how many


@dataclass
class Config:
    """python -m rt.report.inspect [--verify] PATH [PATH ...]"""
    paths: tuple[str, ...] = ()  # folders: a base, a delta, a run, a Hugging Face checkpoint or a PEFT adapter
    verify: bool = False  # hash every base and delta there again; exit code 1 where one is not as it was written


def count(tensors: dict[str, dict], *prefixes: str) -> int:
    """Numbers in the tensors whose names begin so."""
    return sum(math.prod(t["shape"]) for name, t in tensors.items() if name.startswith(prefixes or ""))


def disk(files: Iterable[Path]) -> str:
    return f"{sum(f.stat().st_size for f in files if f.is_file()) / 1e6:.3g} MB on disk"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def scores(values: dict | None) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in (values or {}).items() if isinstance(v, float)) or "not scored"


def sizes(e: dict) -> str:
    """Of an encoder, by our names of its sizes."""
    return (f"{e.get('model_type', 'roberta')}, {e.get('num_layers')} layers x {e.get('hidden_size')}, {e.get('num_heads')} heads, "
            f"FFN {e.get('ffn_size')}, {e.get('vocab_size')} words, up to {e.get('max_len')} tokens")


def encoder_count(e: dict) -> int:
    """Numbers in the weights of rt.model.Encoder."""
    d, ffn, is_bert = e["hidden_size"], e["ffn_size"], e.get("model_type") == "bert"
    rows = e["vocab_size"] + e["max_len"] + (1 if is_bert else e["pad_id"] + 1) + 2     # of BERT the second token type; the layer norm
    return rows * d + e["num_layers"] * (4 * d * d + 2 * d * ffn + 9 * d + ffn)


def made_by(facts: dict) -> dict[str, str]:
    """The lines that bases and deltas end with."""
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    return {"versions": versions, "made by": shlex.join(facts["argv"]) if facts.get("argv") else "unknown"}


# --- ours -------------------------------------------------------------------------------------------------------------

def bases_in(folders: Iterable[Path]) -> dict[str, tuple[Path, dict]]:
    """{fingerprint: (folder, meta.json)} of the bases that lie in `folders`; what cannot be read is none."""
    found = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/meta.json")):
        try:
            meta = read_json(path)
        except InputError:
            continue
        if meta.get("format") == "rt-base-1":
            found.setdefault(meta.get("fingerprint"), (path.parent, meta))
    return found


def lineage(folder: Path, meta: dict) -> str:
    """This base, its parent, and so on: by name where they lie beside it, the last one by fingerprint where it does not."""
    beside, names = bases_in([folder.parent]), [folder.name]
    while meta.get("parent") in beside and len(names) <= len(beside):
        parent, meta = beside[meta["parent"]]
        names.append(parent.name)
    return " <- ".join([*names, meta["parent"] + " (not beside it)" if meta.get("parent") else "a random start"])


def base(folder: Path) -> dict[str, str]:
    meta, tensors = read_json(folder / "meta.json"), header(folder / "model.safetensors")
    stage, going = meta.get("stage", {}), (folder / "optim.pt").exists()
    heldout = {domain: f"{s['loss']:.3f} ({s['accuracy']:.3f})" for domain, s in stage.get("heldout", {}).items()}
    return {"is": f"a base ({meta.get('format')})" + (", with the optimizer's state: training can go on from it" if going else ""),
            "size": f"{count(tensors):,} parameters (encoder {count(tensors, 'encoder.'):,}), {disk(folder.iterdir())}",
            "architecture": sizes(meta.get("encoder", {})),
            "lineage": lineage(folder, meta),
            "trained": f"on {meta.get('domain')}, {meta.get('step')} steps" + (f" of {stage['steps']}" if stage.get("steps") else ""),
            "held out": "loss (accuracy): " + listed(f"{k} {v}" for k, v in heldout.items()) if heldout else "not scored",
            "fingerprint": f"{meta.get('fingerprint')}, of the tokenizer {meta.get('tokenizer')}", **made_by(meta)}


def delta(folder: Path) -> dict[str, str]:
    facts, tensors = read_json(folder / "delta.json"), header(folder / "delta.safetensors")
    info, kind = facts.get("info", {}), facts.get("kind")
    settings = "".join(f", {name} {listed(v) if isinstance(v := facts.get(name), list) else v}" for name in SETTINGS.get(kind, ()))
    trained, whole = count(tensors, "diffs.", "modules."), encoder_count(info["encoder"]) if info.get("encoder") else 0
    how = "by tuning" if info.get("mode") is None else f"by recycling, {info['mode']}"
    few = f"{info['shots']} examples a label" if info.get("shots") else "all examples"
    learned = f"elsewhere, imported from {info['source']}" if "source" in info else f"{how}, seed {info.get('seed')}, {few}"
    labels = info.get("labels") or []
    return {"is": f"a delta ({facts.get('format')}): {kind}{settings}",
            "size": f"{trained:,} parameters" + (f", {trained / whole:.2%} of the encoder's" if whole else "")
                    + f", and a head of {count(tensors, 'head.'):,}; {disk(folder.iterdir())}",
            "task": f"{info.get('task')}: " + (f"{len(labels)} labels: {listed(labels)}" if labels else "a regression"),
            "learned": learned, "dev": scores(info.get("dev")) + (f", at step {info['step']}" if info.get("step") is not None else ""),
            "test": scores(info.get("test")),
            "base": f"{base_of(folder, info)}; {sizes(info.get('encoder', {}))}",
            "fingerprints": f"of the base {info.get('base')}, of the tokenizer {info.get('tokenizer')}",
            **made_by({"versions": facts.get("versions", {}), "argv": info.get("argv")})}


def base_of(folder: Path, info: dict) -> str:
    """The folder of the base that a delta was learned on: looked for above it, and where its config says that bases were."""
    config = info.get("config") or {}
    named = [Path(name).parent for name in (config.get("base"), *(config.get("chain") or ())) if name]
    found = bases_in([folder.parent, folder.parent.parent, *named])
    return str(found[info["base"]][0]) if info.get("base") in found else "not found"


def run_folder(folder: Path) -> dict[str, str]:
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    modes = [row.get("mode") for row in summary.get("rows", [])]
    found = {"bases": [path.name for path, _ in sorted(bases_in([folder]).values(), key=lambda pair: pair[0].stat().st_mtime)],
             "deltas": sorted(path.parent.name for glob in DELTAS for path in folder.glob(glob)),
             "stages": [f"{stage.get('name')} ({stage.get('domain')})" for stage in summary.get("stages", [])],
             "runs": [f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes)],
             "rows": [f"{len(read_rows(path))} in {path.name}" for path in sorted(folder.glob("*.jsonl"))],
             "figures": sorted(path.name for path in (folder / FIGURES).glob("*.png"))}
    return {"is": "a run" + (f" of study {summary['study']}" if "study" in summary else "" if summary else ", unfinished or part of one"),
            "size": disk(folder.rglob("*")), **{name: listed(values) for name, values in found.items() if values},
            "made by": shlex.join(summary.get("argv", [])) or "unknown"}


# --- of others --------------------------------------------------------------------------------------------------------

def weight_files(path: Path) -> list[Path]:
    """The file, or the shards beside it that its index names; none where there is neither."""
    index = path.with_name(f"{path.name}.index.json")
    if path.exists() or not index.exists():
        return [path] * path.exists()
    return sorted({path.with_name(Path(name).name) for name in read_json(index)["weight_map"].values()})


def hugging_face(folder: Path) -> dict[str, str]:
    c = read_json(folder / "config.json")
    files = next(filter(None, (weight_files(folder / stem) for stem in ("model.safetensors", "pytorch_model.bin"))), [])
    whole = bool(files) and files[0].suffix == ".safetensors"
    tensors = {name: t for path in files for name, t in header(path).items()} if whole else {}
    parts = [what for what, words in (("masked-LM head", ("lm_head", "cls.predictions")), ("classifier", ("classifier",)),
                                      ("pooler", ("pooler",))) if any(word in name for name in tensors for word in words)]
    labels = listed((c.get("id2label") or {}).values()) if "classifier" in parts else "none"
    texts = sorted(f.name for f in folder.iterdir() if f.name.startswith(("tokenizer", "vocab", "merges", "sentencepiece")))
    ours = {"num_layers": c.get("num_hidden_layers"), "num_heads": c.get("num_attention_heads"), "ffn_size": c.get("intermediate_size"),
            "max_len": c.get("max_position_embeddings")}
    return {"is": f"a Hugging Face checkpoint: {', '.join(c.get('architectures') or ['no architecture named'])}",
            "size": f"{count(tensors):,} parameters, " * whole + f"{disk(files)} in {len(files)} weight file{'s' * (len(files) != 1)}",
            "architecture": sizes(c | ours).replace("tokens", "positions"),
            "holds": ", ".join(["encoder", *parts]) if whole else "unknown: not in safetensors' format" if files else "no weights",
            "stored as": ", ".join(sorted({t["dtype"] for t in tensors.values()})) or "unknown",
            "labels": labels, "tokenizer": listed(texts) or "none",
            "versions": f"transformers {c.get('transformers_version')}"}


def peft(folder: Path) -> dict[str, str]:
    c, weights = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    tensors, targets = header(weights) if weights.exists() else {}, c.get("target_modules") or []
    return {"is": f"a PEFT adapter: {c.get('peft_type')}, {c.get('task_type')}",
            "size": f"{count(tensors):,} parameters, {disk(folder.iterdir())}" if tensors else f"no {weights.name}",
            "settings": f"r {c.get('r')}, lora_alpha {c.get('lora_alpha')}, rsLoRA {bool(c.get('use_rslora'))}, bias {c.get('bias')}",
            "target": f"modules {listed([targets] if isinstance(targets, str) else sorted(targets))}",
            "saved": f"modules_to_save {listed(c.get('modules_to_save') or ['none'])}",
            "base": str(c.get("base_model_name_or_path")), "versions": f"peft {c.get('peft_version', 'unknown')}"}


# what a folder is told by, the first that it has; a config.json may also be that of a run
KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], dict[str, str]]], ...] = (
    (lambda f: (f / "meta.json").is_file() and "encoder" in read_json(f / "meta.json"), base),
    (lambda f: (f / "delta.json").is_file(), delta), (lambda f: (f / "adapter_config.json").is_file(), peft),
    (lambda f: (f / "config.json").is_file() and {"model_type", "architectures"} & read_json(f / "config.json").keys(), hugging_face),
    (lambda f: any((f / name).is_file() for name in ("metrics.jsonl", "rows.jsonl", "summary.json"))
     or bool(bases_in([f])) or any(path for glob in DELTAS for path in f.glob(glob)), run_folder))


def inspect(path: Path) -> dict[str, str]:
    """What there is to say of a folder, a line each; the first says what it `is`. InputError where it is nothing known."""
    with shaped(path, "its JSON does not hold what it should", also=(OSError,)):
        for is_one, facts in KINDS:
            if is_one(path):
                return facts(path.resolve())
    raise InputError(f"{path}: nothing known here; expected a folder with meta.json (base), delta.json, adapter_config.json (PEFT), "
                     "config.json (Hugging Face), or one that a run left")


# --- as it was written? -----------------------------------------------------------------------------------------------

def verified(path: Path) -> Iterator[tuple[Path, str, bool]]:
    """(folder, what there is to say of it, whether it is as it was written) of every base and delta of ours at or below `path`; what is
    still being written is passed over."""
    folders = {(file.parent, fact) for fact, weights in SEALED.items() for name in (fact, weights) for file in path.rglob(name)
               if not (file.parent / "config.json").exists()}       # which Hugging Face's checkpoints have
    for folder, name in sorted(folders):
        if folder.suffix == ".part":
            continue
        try:
            facts = read_json(folder / name)
            if facts.get("format") not in FORMATS:
                if not (folder / SEALED[name]).exists():    # a meta.json of something else, as of tokens
                    continue
                raise InputError(f"{name} is not of a base or delta (format {facts.get('format')!r})")
            wrong = differing(folder, name, facts)
        except InputError as error:
            yield folder, f"DIFFERS: {error}", False
            continue
        said = f"as it was written ({len(facts['sha256'])} files)" if "sha256" in facts else "has no hashes: written before there were any"
        yield folder, f"DIFFERS: {', '.join(wrong)}" if wrong else said, not wrong


def verify(paths: Iterable[str]) -> None:
    """A line a base and delta; the process ends with 1 where one differs."""
    said = [line for path in paths for line in verified(Path(path))]
    if not said:
        raise InputError(f"{', '.join(paths)}: no base or delta of ours there")
    for folder, what, _ in said:
        print(f"{folder}: {what}")
    if not all(same for *_, same in said):
        sys.exit(1)


def main(argv: list[str]) -> None:
    c = parse(Config, argv, words="paths")
    if not c.paths:
        raise InputError("what? python -m rt.report.inspect PATH, the folder of a base, a delta or a run")
    if c.verify:
        return verify(c.paths)
    for path in c.paths:
        facts = inspect(Path(path))
        print(f"{path}: {facts.pop('is')}")
        for name, value in facts.items():
            print(f"  {name:<13} {value}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
