"""What no one thought of: real files, cut, flipped, doubled, spliced and with fields exchanged, and flags, grids and rows made up by
hypothesis. Every outcome is success, or one sentence and exit code 2; within seconds and bounded memory. Longer: pytest -m marathon."""
import contextlib
import copy
import gzip
import io
import json
import lzma
import random
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import bounded, random_base, write_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import recycle
import train
from rt.data import encode, encode_task
from rt.deltas import apply, attach, extract
from rt.errors import InputError
from rt.formats.atomic import seal
from rt.formats.checkpoint import load_base, read_file, save_base
from rt.formats.corpora import split_documents
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import read_json, write_json
from rt.formats.hf import export_hf
from rt.formats.hub import open_base, open_delta
from rt.formats.peft import export_peft
from rt.formats.tasks import load_task, read_examples
from rt.formats.tokenizer import load_tokenizer
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.report import inspect, plot
from rt.runs.config import parse, run
from rt.runs.results import best_delta
from rt.runs.resume import RESUMABLE, has_work, is_done_again, newest_checkpoint
from rt.runs.sweep import expand

MUTATED, LONG_MUTATED = 24, 4000         # cases a target, in CI and in the long run
EXAMPLES, LONG_EXAMPLES = 30, 2000       # of each that hypothesis makes
SECONDS, MEGABYTES = 10, 1024           # that a case may take
PIECES = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", "\u2028".encode(), b"\xed\xa0\x80", b"\r\n", b"\r", b"\n", b'"', b"\\",
          b"\\ud800", b"{", b"[" * 3000, b"NaN", b"-1", b"1e999", b"9" * 5000, b"null", b"true", b"[]", b"{}",
          b",", b"\t", b"\x1b[31m", b"../../", b" " * 99]
VALUES = [None, True, 0, -1, 1, 10**9, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x", "\n", "../../x", "9" * 99, [], [[]], {},
          {"a": 1}, [1, "a"], ["query"] * 2]


def outcome(call: Callable[[], object]) -> str:
    """'read' or, where it was refused in one sentence, that. Anything else is an error, a traceback as well as a hang."""
    error, out = io.StringIO(), io.StringIO()
    with bounded(SECONDS, MEGABYTES), contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        try:
            run(call)
        except SystemExit as end:
            assert end.code in (0, 2)       # 0: --help
    said = error.getvalue()
    if not said.startswith("error: "):
        return "read"
    assert said.count("\n") == 1 and len(said) < 1200, said
    assert "allocat" not in said, said      # or it was memory that ended it, not a look at the file
    return said


# --- mutations of real files ------------------------------------------------------------------------------------------

def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to three changes of a file's bytes."""
    for _ in range(draw.randint(1, 3)):
        a, b = sorted(draw.randint(0, len(data)) for _ in range(2))
        b = min(b, a + draw.choice([1, 8, 100, len(data)]))
        how = draw.randrange(7)
        if how == 0 and data:                       # bits
            at = draw.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]
        elif how == 1:                              # cut off
            data = data[:a]
        elif how == 2:                              # doubled
            data = data[:b] + data[a:b] + data[b:]
        elif how == 3:                              # something strange in it
            data = data[:a] + draw.choice(PIECES) + data[a:]
        elif how == 4:                              # a part gone
            data = data[:a] + data[b:]
        elif how == 5:                              # lines exchanged
            lines = data.splitlines(keepends=True)
            draw.shuffle(lines)
            data = b"".join(lines)
        else:                                       # zeros
            data = data[:a] + b"\0" * (b - a) + data[b:]
    return data


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """A JSON file with one to three of its values, at any depth, absurd, gone, exchanged or there twice."""
    value = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        places = list(inside(value))
        if not places:
            break
        (holder, key), (other, their) = draw.choice(places), draw.choice(places)
        how = draw.randrange(5)
        if how < 2:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif how == 2:
            del holder[key]
        elif how == 3:
            holder[key] = copy.deepcopy(other[their])
        elif isinstance(holder, dict):
            holder[draw.choice(["x", key + "x", "../x", "\n", ""])] = holder.pop(key)
    text = json.dumps(value)
    if draw.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]          # every name twice
    return text.encode()


def inside(value: object):
    """(object, name) or (list, index) of every value in a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from inside(value[key])


@pytest.fixture(scope="module")
def home(tokenizer, graphs, tmp_path_factory) -> Path:
    """Real files of each kind, small."""
    home, base = tmp_path_factory.mktemp("fuzz"), random_base(tokenizer)
    save_base(home / "base", MaskedLM(base.encoder, base.head), tokenizer, {"name": "M0", "number": 0, "step": 1, "parent": None,
                                                                           "stage": {"heldout": {"a": {"loss": 2.5, "accuracy": 0.1}}}})
    info = {"task": "t", "labels": ["no", "yes"], "dev": {"accuracy": 0.5}, "config": {"base": str(home / "base")}, "argv": ["train.py"]}
    for kind in ("adapter", "lora", "full"):
        save_delta(home / kind, extract(attach(base, DeltaConfig(kind), 2, 0), base, DeltaConfig(kind), info))
    export_hf(home / "hf", base)
    export_hf(home / "tuned", base, load_delta(home / "full"))
    export_peft(home / "peft", base, "M0", load_delta(home / "lora"))
    for folder, name in (("base", "meta.json"), ("adapter", "delta.json"), ("lora", "delta.json")):
        shutil.copytree(home / folder, home / f"sealed {folder}")
        unsealed(home / folder / name)
    (home / "bin").mkdir()
    torch.save(load_file(home / "adapter" / "delta.safetensors"), home / "bin" / "new.bin")
    torch.save(load_file(home / "adapter" / "delta.safetensors"), home / "bin" / "old.bin", _use_new_zipfile_serialization=False)
    texts = [json.loads(line)["text"] for line in (graphs / "corpus" / "heldout.jsonl").open()][:12]
    rows = [{"text": text[:200], "text_pair": "y", "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    write_task(home / "jsonl", dict.fromkeys(("train", "dev", "test"), rows))
    write_task(home / "numbers", dict.fromkeys(("train", "dev", "test"), [{"text": "x", "label": i / 4} for i in range(6)]))
    for ending, mark in (("csv", ","), ("tsv", "\t")):
        (home / ending).mkdir()
        table = mark.join(("text", "label")) + "\n" + "".join(f"{'word ' * i}x{mark}{i % 2}\n" for i in range(12))
        for part in ("train", "dev", "test"):
            (home / ending / f"{part}.{ending}").write_text(table)
    (home / "corpus").mkdir()
    plain = "\n".join(text.replace("\n", " ") for text in texts)
    (home / "corpus" / "a.txt").write_text(plain)
    (home / "corpus" / "b.txt.gz").write_bytes(gzip.compress(plain.encode()))
    (home / "corpus" / "c.txt.xz").write_bytes(lzma.compress(plain.encode(), preset=0))
    (home / "corpus" / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (home / "vocabulary").mkdir()
    facts = json.loads((home / "base" / "tokenizer.json").read_text())["model"]
    (home / "vocabulary" / "vocab.json").write_text(json.dumps(facts["vocab"]))
    (home / "vocabulary" / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in facts["merges"]))
    (home / "vocabulary" / "tokenizer_config.json").write_text('{"add_prefix_space": true, "added_tokens_decoder": {}}')
    runs(home)
    return home


def runs(home: Path) -> None:
    """What the scripts leave for rt.plot, rt.inspect and themselves."""
    heldout = {"a": {"loss": 2.0, "accuracy": 0.2}}
    stages = [{"name": f"M{i}", "domain": "a", "steps": 2, "heldout": heldout} for i in range(2)]
    rows = [{"stage": f"M{i}", "step": s, "loss": 2.0, "lr": 0.1} for i in range(2) for s in (1, 2)]
    rows.append({"stage": "M1", "step": 2, "heldout": heldout})
    write_json(home / "stream" / "summary.json", {"stages": stages, "argv": ["train.py"]})
    write_json(home / "stream" / "config.json", {"lr": 0.1, "stream": ["a"]})
    recycled = [{"run": f"{mode}-s{seed}-0", "mode": mode, "seed": seed, "lr": 1e-3, "task": "t", "delta": "full", "shots": 4,
                 "dev": {"accuracy": 0.5}, "test": {"accuracy": 0.5}, "curve": [[0, 0.2], [5, 0.5]], "settings": {"base": "M1"},
                 "seconds": 1.0}
                for mode in ("scratch", "init") for seed in (0, 1)]
    write_json(home / "recycled" / "summary.json", {"rows": recycled, "argv": ["recycle.py"]})
    for name in ("scratch-s0-0", "init-s0-0"):
        shutil.copytree(home / "adapter", home / "recycled" / "deltas" / name)
    (home / "tuning").mkdir()
    tuned = [{"step": s, "loss": 1.0, "dev": {"accuracy": s / 9}} for s in (0, 2, 4)]
    study = [{"study": "connectivity", "task": "t", "pair": "M0-M1", "path": "linear", "seed": s, "mu": mu, "loss": 1.0, "accuracy": 0.5}
             for s in (0, 1) for mu in (0.0, 0.5, 1.0)]
    (home / "study").mkdir()
    for name, lines in (("stream/metrics", rows), ("tuning/metrics", tuned), ("study/rows", study),
                        ("recycled/metrics", [{"run": "x", "mode": "init", "step": 0, "dev": {"accuracy": 0.1}}])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(home / "stream", home / "unfinished", ignore=lambda *_: ["summary.json"])
    last = home / "unfinished" / "resume" / "M1-t00001"
    last.mkdir(parents=True)
    for name in RESUMABLE:
        (last / name).write_text(name)
    seal(last, "meta.json", {"name": "M1", "step": 1}, RESUMABLE)


def unsealed(path: Path) -> None:
    """Without the hashes, which would refuse nearly all before it is looked at; a stranger makes them anew."""
    write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"})


def shown(folder: Path) -> None:
    print(plot.report(folder).text)
    inspect.main([str(folder)])


def verified(folder: Path) -> None:
    if any("DIFFERS" in verdict for verdict in inspect.verified(folder).values()):
        raise InputError("the hashes say so")


def begun(folder: Path) -> None:
    has_work(folder, {"lr": 0.1, "stream": ["a"]}, resume=True)
    newest = newest_checkpoint(folder)
    facts = read_json(newest / "meta.json") if newest else {}
    for row in plot.read_rows(folder / "metrics.jsonl"):
        is_done_again(row, folder, facts)


def used(folder: Path, tokenizer) -> None:
    found = load_tokenizer(folder)
    found.decode([i for ids in found.encode(["A graph, x\u00fc\0", ""]) for i in ids])
    found.framed()


# what is mutated (of a folder of `home`), and how it is read
TARGETS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "jsonl": (("train.jsonl", "dev.jsonl"), lambda f, t, b: encode_task(load_task(f), t, 32)),
    "numbers": (("train.jsonl", "test.jsonl"), lambda f, t, b: encode_task(load_task(f), t, 32)),
    "csv": (("train.csv",), lambda f, t, b: encode_task(load_task(f), t, 32)),
    "tsv": (("train.tsv", "dev.tsv"), lambda f, t, b: encode_task(load_task(f), t, 32)),
    "corpus": (("a.txt", "b.txt.gz", "c.txt.xz", "d.jsonl"), lambda f, t, b: t.encode([text for _, text in split_documents(f)])),
    "vocabulary": (("vocab.json", "merges.txt", "tokenizer_config.json"), lambda f, t, b: used(f, t)),
    "base": (("meta.json", "model.safetensors", "tokenizer.json"), lambda f, t, b: load_base(f)),
    "sealed base": (("meta.json", "model.safetensors", "tokenizer.json"), lambda f, t, b: load_base(f)),
    "sealed adapter": (("delta.json", "delta.safetensors"), lambda f, t, b: (verified(f), load_delta(f))),
    "sealed lora": (("delta.json", "delta.safetensors"), lambda f, t, b: (inspect.main([str(f)]), verified(f))),
    "hf": (("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"), lambda f, t, b: open_base(str(f))),
    "tuned": (("config.json", "model.safetensors"), lambda f, t, b: apply(b, open_delta(str(f), b))),
    "adapter": (("delta.json", "delta.safetensors"), lambda f, t, b: apply(b, load_delta(f), stale_ok=True)),
    "lora": (("delta.json",), lambda f, t, b: (inspect.main([str(f)]), apply(b, load_delta(f), stale_ok=True))),
    "peft": (("adapter_config.json", "adapter_model.safetensors", "labels.json"), lambda f, t, b: open_delta(str(f), b)),
    "bin": (("new.bin", "old.bin"), lambda f, t, b: [read_file(f / name) for name in ("new.bin", "old.bin")]),
    "stream": (("summary.json", "metrics.jsonl", "config.json"), lambda f, t, b: (begun(f), shown(f))),
    "unfinished": (("metrics.jsonl", "config.json", "resume/M1-t00001/meta.json"), lambda f, t, b: (begun(f), shown(f))),
    "tuning": (("metrics.jsonl",), lambda f, t, b: shown(f)),
    "study": (("rows.jsonl",), lambda f, t, b: shown(f)),
    "recycled": (("summary.json", "metrics.jsonl"), lambda f, t, b: (shown(f), best_delta(f, "0"))),
}


def fuzz(target: str, cases: range, home: Path, tmp_path: Path, tokenizer) -> None:
    names, read = TARGETS[target]
    base, refused = random_base(tokenizer), 0
    folder = shutil.copytree(home / target, tmp_path / target)
    assert outcome(lambda: read(folder, tokenizer, base)) == "read"         # as it is
    for case in cases:
        draw = random.Random(f"{target} {case}")
        name = draw.choice(names)
        whole = (folder / name).read_bytes()
        by_field = name.endswith(".json") and draw.random() < 0.7 and len(whole) < 10**5
        (folder / name).write_bytes((mutated_json if by_field else mutated)(whole, draw))
        try:
            refused += outcome(lambda: read(folder, tokenizer, base)) != "read"
        except BaseException as error:
            kept = shutil.copytree(folder, tmp_path / "kept", dirs_exist_ok=True)
            raise AssertionError(f"case {case} of {target}, {name} in {kept}: {type(error).__name__}: {error}") from error
        (folder / name).write_bytes(whole)
    assert refused      # or nothing was mutated


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_are_read_or_refused_in_one_sentence(target, home, tmp_path, tokenizer):
    fuzz(target, range(MUTATED), home, tmp_path, tokenizer)


@pytest.mark.marathon
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_the_long_version(target, home, tmp_path, tokenizer):
    fuzz(target, range(MUTATED, LONG_MUTATED), home, tmp_path, tokenizer)


# --- made up ----------------------------------------------------------------------------------------------------------

VALUE = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) |
                     st.dictionaries(st.text(), inner), max_leaves=5)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
ROW = st.dictionaries(st.sampled_from(["text", "text_pair", "label", "sentence", "question", "score"]) | TEXT, VALUE | TEXT, max_size=4)
GOOD = st.fixed_dictionaries({"text": TEXT, "label": st.sampled_from(["a", "b", 1, 2, 0.5, "1"]) | TEXT})
NUMBER = st.integers().map(str) | st.floats().map(str) | st.sampled_from(["", ",", "1e4", "1e999", "nan", "0x9", "1_0", "a,b", "-", "true"])
FLAG = st.sampled_from([f.name for f in (*fields(train.Config), *fields(recycle.Config)) if f.name not in ("out", "cache")])
ARGUMENT = st.builds("--{}={}".format, FLAG, NUMBER | TEXT) | st.builds("--{}".format, FLAG) | st.builds("--no_{}".format, FLAG) | \
    NUMBER | TEXT
GRID = st.lists(st.builds("{}={}".format, st.sampled_from(["seed", "lr", "alpha", "beta", "T", "steps", "gamma", "itp", "sed"]) | TEXT,
                          st.lists(NUMBER, max_size=3).map(",".join)), max_size=3).map(" ".join)


def checked(cls: type, argv: list[str]) -> None:
    config = parse(cls, argv)
    if cls is recycle.Config:
        recycle.checked_modes(config)
    elif config.mode == "pretrain":
        raise InputError("read far enough")
    else:
        train.required(config, "base", "task")


FACTS = st.sampled_from([(folder, name, key) for folder, name, keys in (
    ("base", "meta.json", ("encoder", "vocab_size", "num_layers", "pad_id", "layer_norm_eps", "fingerprint", "number", "stage", "format")),
    ("lora", "delta.json", ("kind", "r", "lora_alpha", "target_modules", "info", "labels", "base", "tokenizer", "encoder", "config")),
    ("tuned", "config.json", ("model_type", "hidden_size", "num_hidden_layers", "id2label", "problem_type", "pad_token_id", "hidden_act")),
    ("peft", "adapter_config.json", ("r", "lora_alpha", "peft_type", "modules_to_save", "use_rslora", "bias"))) for key in keys])


def rows_are_read(rows: list, dev: list, home: Path, tmp_path: Path, tokenizer) -> None:
    folder = write_task(tmp_path / "task", {"train": rows, "dev": dev, "test": dev})
    outcome(lambda: encode_task(load_task(folder), tokenizer, 16))
    outcome(lambda: encode(list(read_examples(folder / "dev.jsonl", labelled=False)), (), tokenizer, 8))
    outcome(lambda: list(split_documents(folder)))


def flags_are_read(argv: list[str], **_) -> None:
    outcome(lambda: checked(train.Config, argv))
    outcome(lambda: checked(recycle.Config, argv))


def grid_is_read(spec: str, **_) -> None:
    outcome(lambda: [recycle.checked_modes(c) for c in expand(recycle.Config(sweep=spec), spec)])


def facts_are_read(place: tuple[str, str, str], value: object, home: Path, tmp_path: Path, tokenizer) -> None:
    folder, name, key = place
    copied = shutil.copytree(home / folder, tmp_path / folder, dirs_exist_ok=True)
    facts = {k: v for k, v in json.loads((home / folder / name).read_text()).items() if k != "sha256"}
    holder = next((facts[k] for k in ("encoder", "info") if key in facts.get(k, ())), facts)
    holder[key] = value
    (copied / name).write_text(json.dumps(facts))
    base = random_base(tokenizer)
    outcome(lambda: TARGETS[folder][1](copied, tokenizer, base))


MADE_UP = {rows_are_read: dict(rows=st.lists(GOOD | ROW, max_size=6), dev=st.lists(GOOD | ROW, max_size=3)),
           flags_are_read: dict(argv=st.lists(ARGUMENT, max_size=4)), grid_is_read: dict(spec=GRID),
           facts_are_read: dict(place=FACTS, value=VALUE)}


def every(examples: int, check: Callable, **known) -> None:
    """`check` on what hypothesis makes up for it, the same at every call."""
    quiet = settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    quiet(given(**MADE_UP[check])(lambda **made: check(**made, **known)))()


@pytest.mark.parametrize("check", MADE_UP, ids=lambda check: check.__name__)
def test_what_hypothesis_makes_up_is_read_or_refused_in_one_sentence(check, home, tmp_path, tokenizer):
    every(EXAMPLES, check, home=home, tmp_path=tmp_path, tokenizer=tokenizer)


@pytest.mark.marathon
@pytest.mark.parametrize("check", MADE_UP, ids=lambda check: check.__name__)
def test_what_hypothesis_makes_up_the_long_version(check, home, tmp_path, tokenizer):
    every(LONG_EXAMPLES, check, home=home, tmp_path=tmp_path, tokenizer=tokenizer)
