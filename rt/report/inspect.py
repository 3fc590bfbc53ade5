"""Says in about ten lines what a folder is: a base or delta of ours, a run, a Hugging Face checkpoint, a PEFT adapter.

    python -m rt.report.inspect PATH [PATH ...]
    python -m rt.report.inspect --verify PATH [PATH ...]

It reads JSON and the headers of safetensors files but no tensors, and does not import torch, so it is fast. It prints what the files say
about themselves; `--verify` checks this for every base and delta at or below PATH, and reads each file once.
"""
import json
import math
import shlex
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

from rt.errors import InputError
from rt.formats.atomic import UNFINISHED, differing
from rt.formats.files import FIGURES, other_library, read_json, read_rows
from rt.formats.untrusted import header, shaped
from rt.runs.config import parse, run

WEIGHTS = {"meta.json": "model.safetensors", "delta.json": "delta.safetensors"}     # the weights of a base and of a delta
FORMATS, DIFFERS = ("rt-base-1", "rt-delta-1"), "DIFFERS"
# A delta.json holds the settings of all kinds; each kind uses the settings listed here (rt.kinds.KINDS, without importing torch).
SETTINGS = {"adapter": ("bottleneck",), "lora": ("r", "lora_alpha", "target_modules"), "prefix": ("prefix_len",)}
SHOWN = 8       # labels, deltas or target modules listed by name; the rest are only counted


@dataclass
class Config:
    """python -m rt.report.inspect [--verify] PATH [PATH ...]"""
    paths: tuple[str, ...] = ()  # folders: a base, a delta, a run, a Hugging Face checkpoint or a PEFT adapter
    verify: bool = False  # hash every base and delta there again; exit code 1 if one is not as it was written


def inspect(path: Path) -> dict[str, str]:
    """{name: fact} of a folder; the first fact says what it `is`. Raises InputError if the folder is nothing known."""
    with shaped(path, "its JSON does not hold what it should", also=(OSError,)):
        folder = path.resolve()
        if "encoder" in (meta := read_json(path / "meta.json", {})):
            return base(folder, meta)
        if facts := read_json(path / "delta.json", {}):
            return delta(folder, facts)
        config, adapter = (read_json(path / name, {}) for name in ("config.json", "adapter_config.json"))
        if library := other_library(folder):
            settings = json.dumps(adapter.get("config") or config)
            return {"is": f"an adapter of {library}", "settings": settings, "size": disk(folder.iterdir())}
        if adapter:
            return peft(folder, adapter)
        if {"model_type", "architectures"} & config.keys():
            return hugging_face(folder, config)
        if facts := run_folder(folder, read_json(path / "summary.json", {})):
            return facts
    raise InputError(f"{path}: nothing known here; expected a folder with meta.json (base), delta.json, adapter_config.json (PEFT), "
                     "config.json (Hugging Face), or one that a run left")


def count(tensors: dict[str, dict], *prefixes: str) -> int:
    """The number of elements in the tensors whose names start with one of `prefixes`."""
    return sum(math.prod(t["shape"]) for name, t in tensors.items() if name.startswith(prefixes or ""))


def disk(files: Iterable[Path]) -> str:
    return f"{sum(f.stat().st_size for f in files if f.is_file()) / 1e6:.3g} MB on disk"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def architecture(e: dict) -> str:
    return (f"{e.get('model_type', 'roberta')}, {e.get('num_layers')} layers x {e.get('hidden_size')}, {e.get('num_heads')} heads, "
            f"FFN {e.get('ffn_size')}, {e.get('vocab_size')} words, up to {e.get('max_len')} tokens")


def origin(versions: dict, argv: list[str] | None) -> dict[str, str]:
    return {"versions": ", ".join(f"{k} {v}" for k, v in versions.items()), "made by": shlex.join(argv or ["unknown"])}


# --- ours -------------------------------------------------------------------------------------------------------------

def base(folder: Path, meta: dict) -> dict[str, str]:
    tensors, stage, is_resumable = header(folder / "model.safetensors"), meta.get("stage", {}), (folder / "optim.pt").exists()
    heldout = [f"{domain} {s['loss']:.3f} ({s['accuracy']:.3f})" for domain, s in stage.get("heldout", {}).items()]
    return {"is": f"a base ({meta.get('format')})" + ", with the optimizer's state: training can go on from it" * is_resumable,
            "size": f"{count(tensors):,} parameters (encoder {count(tensors, 'encoder.'):,}), {disk(folder.iterdir())}",
            "architecture": architecture(meta.get("encoder", {})),
            "lineage": lineage(folder, meta),
            "trained": f"on {meta.get('domain')}, {meta.get('step')} steps" + (f" of {stage['steps']}" if stage.get("steps") else ""),
            **({"recipe": ", ".join(f"{k} {listed(v) if isinstance(v, list) else v}" for k, v in meta["recipe"].items())}
               if meta.get("recipe") else {}),
            "held out": f"loss (accuracy): {listed(heldout)}" if heldout else "not scored",
            "fingerprint": f"{meta.get('fingerprint')}, of the tokenizer {meta.get('tokenizer')}",
            **origin(meta.get("versions", {}), meta.get("argv"))}


def lineage(folder: Path, meta: dict) -> str:
    """The names of this base, its parent, and so on; the last parent's fingerprint if that parent is not beside them."""
    beside, names = bases_in([folder.parent, folder.parent.parent]), [folder.name]      # RUN/resume/M1-t00250 is one folder below M0
    while meta.get("parent") in beside and len(names) <= len(beside):
        parent, meta = beside[meta["parent"]]
        names.append(parent.name)
    return " <- ".join([*names, meta["parent"] + " (not beside it)" if meta.get("parent") else "a random start"])


def bases_in(folders: Iterable[Path]) -> dict[str, tuple[Path, dict]]:
    """{fingerprint: (folder, meta.json)} of the bases in `folders`. Bases that cannot be read are left out."""
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*/meta.json")) if path.parent.suffix not in UNFINISHED):
        with suppress(InputError):
            meta = read_json(path)
            if meta.get("format") == "rt-base-1":
                found.setdefault(meta.get("fingerprint"), (path.parent, meta))
    return found


def delta(folder: Path, facts: dict) -> dict[str, str]:
    info, tensors = facts.get("info", {}), header(folder / "delta.safetensors")
    encoder, labels, trained = info.get("encoder") or {}, info.get("labels") or [], count(tensors, "diffs.", "modules.")
    settings = "".join(f", {name} {listed(v) if isinstance(v, list) else v}" for name, v in settings_of(facts).items())
    share = f", {trained / encoder_count(encoder):.2%} of the encoder's" if encoder else ""
    few = f"{info['shots']} examples{' a label' * bool(labels)}" if info.get("shots") else "all examples"
    how = "by tuning" if info.get("mode") is None else f"by recycling, {info['mode']}"
    how = f"{how}, seed {info['seed']}, {few}" if "seed" in info else "not recorded (a sum of deltas, for example)"
    dev, test = (", ".join(f"{k} {'undefined' if v is None else f'{v:.3f}'}" for k, v in (info.get(part) or {}).items()
                           if v is None or isinstance(v, float)) or "not scored" for part in ("dev", "test"))
    return {"is": f"a delta ({facts.get('format')}): {facts.get('kind')}{settings}",
            "size": f"{trained:,} parameters{share}, and a head of {count(tensors, 'head.'):,}; {disk(folder.iterdir())}",
            "task": f"{info.get('task')}: " + (f"{len(labels)} labels: {listed(labels)}" if labels else "a regression"),
            "learned": f"elsewhere, imported from {info['source']}" if "source" in info else how,
            "dev": dev + (f", at step {info['step']}" if info.get("step") is not None else ""), "test": test,
            "base": f"{base_of(folder, info)}; {architecture(encoder)}",
            "fingerprints": f"of the base {info.get('base')}, of the tokenizer {info.get('tokenizer')}",
            **origin(facts.get("versions", {}), info.get("argv"))}


def settings_of(facts: dict) -> dict:
    """The settings of a delta's kind: all that are not another kind's."""
    others = {name for kind, names in SETTINGS.items() if kind != facts.get("kind") for name in names}
    return {k: v for k, v in facts.items() if k not in {"format", "kind", "info", "versions", "sha256"} | others}


def encoder_count(e: dict) -> int:
    """The number of weights of an rt.model.Encoder."""
    d, ffn, is_bert = e["hidden_size"], e["ffn_size"], e.get("model_type") == "bert"
    rows = e["vocab_size"] + e["max_len"] + (1 if is_bert else e["pad_id"] + 1) + 2     # for BERT the second token type; the layer norm
    return rows * d + e["num_layers"] * (4 * d * d + 2 * d * ffn + 9 * d + ffn)


def base_of(folder: Path, info: dict) -> str:
    """The folder of the base that a delta was learned on, looked for above the delta and where its config says the bases were."""
    config = info.get("config") or {}
    names = [name for name in (config.get("base"), *(config.get("chain") or ())) if name]
    unknown = "not found among our bases" + "".join(f" (learned on {name})" for name in names[-1:])      # such as one of Hugging Face's
    near = [folder.parent, folder.parent.parent, *(Path(name).parent for name in names)]
    return str(bases_in(near).get(info.get("base"), (unknown,))[0])


def run_folder(folder: Path, summary: dict) -> dict[str, str]:
    """The facts of a run; empty if no run left anything in `folder`."""
    rows = {name: read_rows(folder / name) for name in ("metrics.jsonl", "rows.jsonl") if (folder / name).exists()}
    bases = sorted((path for path, _ in bases_in([folder]).values()), key=lambda path: path.stat().st_mtime)
    deltas = sorted(path.parent.name for pattern in ("*/delta.json", "deltas/*/delta.json") for path in folder.glob(pattern)
                    if path.parent.suffix not in UNFINISHED)
    if not (summary or rows or bases or deltas):
        return {}
    modes = Counter(row.get("mode") for row in summary.get("rows", []))
    found = {"bases": [path.name for path in bases], "deltas": deltas,
             "stages": [f"{stage.get('name')} ({stage.get('domain')})" for stage in summary.get("stages", [])],
             "runs": [f"{number} {mode}" for mode, number in modes.items()],
             "rows": [f"{len(lines)} in {name}" for name, lines in rows.items()],
             "figures": sorted({path.name for home in (folder, folder / FIGURES) for path in home.glob("*.png")})}
    return {"is": "a run" + (f" of study {summary['study']}" if "study" in summary else "" if summary else ", unfinished or part of one"),
            "size": disk(folder.rglob("*")), **{name: listed(values) for name, values in found.items() if values},
            "made by": shlex.join(summary.get("argv") or ["unknown"])}


# --- of other libraries -----------------------------------------------------------------------------------------------

def hugging_face(folder: Path, c: dict) -> dict[str, str]:
    patterns = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")     # whole, or in shards
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    is_known = bool(files) and files[0].suffix == ".safetensors"
    tensors = {name: t for path in files for name, t in header(path).items()} if is_known else {}
    heads = {"masked-LM head": ("lm_head", "cls.predictions"), "classifier": ("classifier",), "pooler": ("pooler",)}
    parts = ["encoder", *(part for part, words in heads.items() if any(word in name for name in tensors for word in words))]
    ours = {"num_layers": c.get("num_hidden_layers"), "num_heads": c.get("num_attention_heads"), "ffn_size": c.get("intermediate_size"),
            "max_len": c.get("max_position_embeddings")}
    texts = sorted(f.name for f in folder.iterdir() if f.name.startswith(("tokenizer", "vocab", "merges", "sentencepiece")))
    return {"is": f"a Hugging Face checkpoint: {', '.join(c.get('architectures') or ['no architecture named'])}",
            "size": f"{count(tensors):,} parameters, " * is_known + f"{disk(files)} in {len(files)} weight file{'s' * (len(files) != 1)}",
            "architecture": architecture(c | ours).replace("tokens", "positions"),
            "holds": ", ".join(parts) if is_known else "unknown: not in safetensors' format" if files else "no weights",
            "stored as": ", ".join(sorted({t["dtype"] for t in tensors.values()})) or "unknown",
            "labels": listed((c.get("id2label") or {}).values()) if "classifier" in parts else "none",
            "tokenizer": listed(texts) or "none", "versions": f"transformers {c.get('transformers_version')}"}


def peft(folder: Path, c: dict) -> dict[str, str]:
    weights, targets = folder / "adapter_model.safetensors", c.get("target_modules") or []
    tensors = header(weights) if weights.exists() else {}
    return {"is": f"a PEFT adapter: {c.get('peft_type')}, {c.get('task_type')}",
            "size": f"{count(tensors):,} parameters, {disk(folder.iterdir())}" if tensors else f"no {weights.name}",
            "settings": f"r {c.get('r')}, lora_alpha {c.get('lora_alpha')}, rsLoRA {bool(c.get('use_rslora'))}, bias {c.get('bias')}",
            "target": f"modules {listed([targets] if isinstance(targets, str) else sorted(targets))}",
            "saved": f"modules_to_save {listed(c.get('modules_to_save') or ['none'])}",
            "base": str(c.get("base_model_name_or_path")), "versions": f"peft {c.get('peft_version', 'unknown')}"}


# --- verify -----------------------------------------------------------------------------------------------------------

def verified(path: Path) -> dict[Path, str]:
    """{folder: verdict} of every base and delta of ours at or below `path`; folders that are still being written are left out."""
    found = {(file.parent, facts) for facts, weights in WEIGHTS.items() for name in (facts, weights) for file in path.rglob(name)
             if not (file.parent / "config.json").exists() and file.parent.suffix != ".part"}       # a config.json: Hugging Face's
    return {folder: words for folder, facts in sorted(found) if (words := verdict(folder, facts))}


def verdict(folder: Path, name: str) -> str:
    """Whether the files beside the facts in `name` are as they were written; empty if the facts describe something else, such as tokens."""
    try:
        facts = read_json(folder / name)
        if facts.get("format") not in FORMATS:
            if not (folder / WEIGHTS[name]).exists():
                return ""
            raise InputError(f"{name} is not of a base or delta (format {facts.get('format')!r})")
        if wrong := differing(folder, name, facts):
            raise InputError(", ".join(wrong))
    except InputError as error:
        return f"{DIFFERS}: {error}"
    return f"as it was written ({len(facts['sha256'])} files)" if "sha256" in facts else "has no hashes: written before there were any"


def main(argv: list[str]) -> None:
    c = parse(Config, argv, words="paths")
    if not c.paths:
        raise InputError("what? python -m rt.report.inspect PATH, the folder of a base, a delta or a run")
    if c.verify:
        found = {path: verified(Path(path)) for path in c.paths}
        verdicts = {folder: words for each in found.values() for folder, words in each.items()}
        print("".join(f"{folder}: {words}\n" for folder, words in verdicts.items()), end="")
        if empty := [path for path, each in found.items() if not each]:
            raise InputError(f"{', '.join(empty)}: no base or delta of ours there")
        if any(words.startswith(DIFFERS) for words in verdicts.values()):
            sys.exit(1)
        return
    for path in c.paths:
        facts = inspect(Path(path))
        print(f"{path}: {facts.pop('is')}")
        print("\n".join(f"  {name:<13} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
