"""The model card (README.md) of an exported folder. Its header has the form of modelcard.md in github.com/huggingface/hub-docs."""
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rt.deltas import Base, Delta
from rt.formats.checkpoint import versions
from rt.formats.hub import is_hub_id
from rt.formats.untrusted import is_number
from rt.losses import DistillConfig
from rt.recycling import NEEDS_TEACHER, TRAINED

TAG = "recyclable-tuning"       # marks a card, and its folder, as one that we wrote
METRICS = {"macro_f1": "f1", "micro_f1": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}      # ours -> the hub's, if they differ


def card(out: str, source: str, base: Base, delta: Delta | None = None, is_adapter: bool = False) -> str:
    """The card of `out`, a folder with the base that the user calls `source`, base + delta merged, or, for PEFT, only the delta."""
    name, record, is_ours = Path(out).resolve().name, delta.info if delta else base.meta, "format" in base.meta
    init = None if delta else (base.meta.get("config") or {}).get("init")
    hub_id = next((each for each in (source, init) if each and is_hub_id(each)), None)
    called = code(hub_id or Path(source).resolve().name)
    pipeline, auto = ("text-classification", "AutoModelForSequenceClassification") if delta else \
        ("fill-mask", "AutoModelForMaskedLM") if base.head else ("feature-extraction", "AutoModel")
    parts = {(record.get("task"), part): record.get(part) for part in ("dev", "test")} if delta else \
        {(domain, "heldout"): found for domain, found in (record.get("stage") or {}).get("heldout", {}).items()}
    scores = {(str(data), part): numbers for (data, part), found in parts.items()
              if (numbers := {k: round(v, 4) for k, v in (found or {}).items() if is_number(v) and k != "predictions"})}
    results = [{"task": {"type": pipeline}, "dataset": {"type": data, "name": data, "split": part}, "metrics": [
        {"type": METRICS.get(k, k), "name": k, "value": v} for k, v in found.items()]} for (data, part), found in scores.items()]
    header = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": pipeline,
              "base_model": hub_id, "tags": [TAG, *filter(None, (delta and delta.config.kind, record.get("mode")))],
              "model-index": [{"name": name, "results": results}] if results else None}
    columns = [*dict.fromkeys(k for found in scores.values() for k in found)]
    table = [["", *columns], ["---"] * (1 + len(columns)),
             *([f"{code(data)}, {part}", *(found.get(k, "") for k in columns)] for (data, part), found in scores.items())]
    place = quoted(name if not is_adapter else f"{name}/base" if is_ours else local(source))     # export_peft writes our bases to /base
    count = f", num_labels={delta.num_outputs}" if is_adapter and not is_ours else ""
    load = [f"from transformers import {auto}, AutoTokenizer", "from peft import PeftModel" * is_adapter,
            f"model = {auto}.from_pretrained({place}{count})", f"model = PeftModel.from_pretrained(model, {quoted(name)})" * is_adapter,
            f"tokenizer = AutoTokenizer.from_pretrained({place})"]
    what = f"A LoRA adapter for the base {called}" if is_adapter else f"The base {called}" + " with a delta merged in" * bool(delta)
    words, *facts = history(called, base, delta)
    missing = "" if hub_id else " and, because the base was not named by a hub id, no `base_model`"
    return "\n".join([
        "---", *(f"{key}: {quoted(value)}" for key, value in header.items() if value), "---", f"# {code(name)}", "",
        f"{what}{words}. The metadata give no `license`{missing}: add what is missing before you publish it.", "",
        "## How to load it", "", f"{code(name)} is this folder; {code(f'hf download OWNER/{name} --local-dir {name}')} fetches it.", "",
        "```python", *filter(None, load), "```", "",
        *(["## Scores", "", *(f"| {' | '.join(map(str, row))} |" for row in table), ""] if scores else []),
        "## How it was made", "", *(f"- {fact}" for fact in facts if fact), ""])


def history(called: str, base: Base, delta: Delta | None) -> list[str]:
    """What the base or its delta has learned, followed by what the records say about how."""
    meta, info, own = base.meta, delta.info if delta else base.meta, base.meta.get("domain")
    init, line = (meta.get("config") or {}).get("init"), [*((meta.get("stage") or {}).get("heldout") or ())]     # the domains of its stream
    if own not in line or init and "replay" in (meta.get("recipe") or {}):      # a mixture's domains have one name; some were only replayed
        line = [own] if own else []
    line = line[:line.index(own) + 1] if line else []
    trained = (f", continued from {code(local(init))}" if init else "") + (
        f", pre-trained on {', then '.join(map(code, line))} for {meta.get('step')} steps" if line else "")
    config, mode, origin, facts = info.get("config") or {}, info.get("mode"), info.get("origin"), [trained]
    old = origin and config.get("old_base")     # None: a file taught
    if delta:
        labels = f"{len(delta.labels)} labels: {', '.join(map(code, delta.labels[:9]))}{', ...' * (len(delta.labels) > 9)}"
        how = (f"tuned elsewhere, as {code(local(config.get('tuned', info['source'])))}" if "source" in info else
               "learned on this base" if mode in (None, "scratch") or not old else
               f"learned on an older base and recycled ({code(mode)}) for this one, its upgrade")
        numbers = {"shots": info.get("shots"), "seed": info.get("seed"), "learning rate": info.get("lr", config.get("lr")),
                   "steps": config.get("steps" if mode in TRAINED else "tune_steps")}
        teacher = {name: local(str(config[name])) for name in ("teacher", *(f.name for f in fields(DistillConfig))) if config.get(name)}
        facts = [f", for the task {code(info.get('task'))} ({labels if delta.labels else 'a regression'}). The delta was {how}",
                 listed("Delta", delta.config.used | numbers), listed("Distillation", teacher if mode in NEEDS_TEACHER else {}),
                 mode != "scratch" and old and f"Recycled from: a delta (hash {origin[2]}) of the base {code(local(old))} "
                 f"(fingerprint {origin[0]})"]
    parent = f", of its parent {meta['parent']}" if meta.get("parent") else ""
    return [*facts, f"Base: {called}{trained}; fingerprint {base.fingerprint}{parent}", listed("Exported with", versions()),
            "argv" in info and f"Command: {code(shlex.join(map(local, info['argv'])))}"]


def listed(what: str, facts: dict) -> str:
    words = [f"{name} {' '.join(value) if isinstance(value, tuple) else value}" for name, value in facts.items() if value is not None]
    return f"{what}: {', '.join(words)}" if words else ""


def quoted(value: Any) -> str:
    """JSON that is also valid YAML. For a string, it is valid Python, too. Unprintable characters are written as their numbers."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))


def code(text: Any) -> str:
    """Code in Markdown that also works inside a table."""
    return "`" + "".join(c if c.isprintable() and c not in "`|" else " " for c in str(text)) + "`"


def local(text: str) -> str:
    """A name or a word of a command, with absolute paths cut to their last part: the folders above mean nothing on another machine."""
    return re.sub(r"(^|[=,])(?:[A-Za-z]:)?[/\\](?:[^,]*[/\\])?(?=[^,/\\])", r"\1", text)
