"""The README: its commands run as written (with tiny sizes added), and the files it points at exist."""
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, here, random_base, write_task

from rt.deltas import attach, extract
from rt.formats.adapters import export_peft
from rt.formats.checkpoint import save_base
from rt.formats.delta_files import save_delta
from rt.formats.hf import export_hf
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.runs.config import flags_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LABELS = ("no", "yes")
# added to a command so that it takes seconds; if a flag occurs twice, the last one counts
PRETRAIN = "--preset tiny --vocab_size 500 --seq_len 32 --batch_tokens 256 --steps 3 --snapshots 1 --eval_tokens 512"
TINY = {"pretrain": PRETRAIN, "demo": PRETRAIN + " --stream papers.txt.xz,news,more.txt",
        "tune": "--tune_steps 2 --eval_every 1 --seq_len 32 --shots 4", "eval": "--seq_len 32",
        "rt.runs.predict": "--seq_len 32 --device cpu",
        "bench.cell": "--sweep seed=0,1 --ways 'side by side' --steps 2 --shots 4 --sample 1",
        "recycle.py": "--steps 2 --eval_every 1 --seq_len 32 --seeds 0,1",
        "analyze.py": "--tasks my_task --seq_len 32 --tune_steps 2"}
DEMO = "--task my_task --old_delta runs/demo/deltas/M0-math-full-s0 --out runs/recycle/demo-M1-math-full-k16"
DEVICE = {"train.py": ("--device", "cpu"), "recycle.py": ("--device", "cpu"), "analyze.py": ("--device", "cpu")}
LEFT = {"Two commands to a result": ("runs/demo/M2/model.safetensors", "runs/recycle/*/summary.json", "runs/analyze/*/rows.jsonl"),
        "Whole steps against others": ("out.jsonl",), "Your own model, text and task": ("runs/mine/recycled/deltas/*/delta.json",),
        "Deltas from transformers and PEFT, and back": ("recycled-roberta/config.json", "recycled-lora/adapter_config.json")}


def blocks() -> list[tuple[str, str, str, str]]:
    """(section, marker above the block, language, code) of every fenced block with a language, in the README and docs/."""
    found = []
    for section in (part for page in PAGES for part in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)):
        for marker, language, code in re.findall(r"(?:<!-- (.*?) -->\n)?```(\w+)\n(.*?)```", section, flags=re.S):
            found.append((section.splitlines()[0], marker, language, code))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a block as lists of words, without comments."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [w for w in words if w]


def mode_of(words: list[str]) -> str:
    """The key of TINY for a command."""
    if words[1] != "train.py":
        return words[2] if words[1] == "-m" else words[1]
    return words[words.index("--mode") + 1] if "--mode" in words else "pretrain" if "--stream" in words else "demo"


def type_in(words: list[str], folder: Path) -> str:
    """Run one command of the README in `folder`. Returns its output."""
    added = shlex.split(TINY.get(mode_of(words), ""))
    if words[1] != "-m" or words[2].startswith("rt.runs."):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return here(*words[1:], *added, *DEVICE.get(words[1], ()))
    words = [sys.executable, *words[1:], *added]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_is_run_or_says_why_not():
    for section, marker, language, code in blocks():
        assert marker, f"{section}: a block without a marker:\n{code}"
        by = marker.removeprefix("run by ").split(", ")
        if marker.startswith("run by "):
            text = "".join((ROOT / name).read_text() for name in by)
            for words in commands(code):
                module = words[words.index("-m") + 1]
                assert module in text or module.replace("bench.", "bench import ") in text, (section, module)
        else:
            assert marker == "run" or marker.startswith("not run: "), (section, marker)


@pytest.fixture(scope="module")
def corpus(graphs) -> list[str]:
    return [json.loads(line)["text"].replace("\n", " ") for line in (graphs / "corpus" / "train.jsonl").open()]


@pytest.mark.parametrize("sections", [("Two commands to a result", "The method"), ("Whole steps against others",),
                                      ("Your own model, text and task",), ("Deltas from transformers and PEFT, and back",)])
def test_the_commands_are_typed_as_they_stand(sections, corpus, tokenizer, tmp_path, forked_builds):
    stage(tmp_path, corpus, tokenizer)
    run = [block for block in blocks() if block[0] in sections and block[1] == "run"]
    assert run
    for section, _, language, code in run:
        if language == "python":
            pytest.importorskip("transformers") if "transformers" in code else None
            type_in(["python", "-m", "snippet"], write_module(tmp_path, code))
            continue
        for words in commands(code):
            if words[0] == "pip":
                continue        # .ci/run does this
            if words[:2] == ["python", "recycle.py"] and "--old_delta" not in words:        # this would tune it for a minute
                type_in("python train.py --mode tune --base runs/demo/M0 --task my_task --delta full --out runs/demo/deltas/M0-math-full-s0"
                        .split(), tmp_path)
                words += DEMO.split()
            printed = type_in(words, tmp_path)
            if "rt.runs.predict" in words:
                assert [json.loads(line)["text"] for line in printed.splitlines()] == corpus[:3]
    for pattern in LEFT[sections[0]]:
        assert list(tmp_path.glob(pattern)), pattern


def write_module(folder: Path, code: str) -> Path:
    (folder / "snippet.py").write_text(code)
    return folder


def stage(folder: Path, corpus: list[str], tokenizer) -> None:
    """What the README assumes: foreign models, texts and a task."""
    texts = iter(corpus)
    (folder / "news").mkdir()
    (folder / "papers.txt.xz").write_bytes(lzma.compress("\n".join(next(texts) for _ in range(300)).encode()))
    (folder / "news" / "a.txt").write_text("\n".join(next(texts) for _ in range(300)))
    (folder / "more.txt").write_text("\n".join(corpus[:300]))
    (folder / "texts.txt").write_text("\n".join(corpus[:3]) + "\n")
    rows = [{"text": text[:100], "label": LABELS[i % 2]} for i, text in enumerate(corpus[:40])]
    write_task(folder / "my_task", {"train": rows[:20], "dev": rows[20:30], "test": rows[30:]})
    old, new = random_base(tokenizer, std=0.02), random_base(tokenizer, seed=1, std=0.02)
    export_hf(folder / "FacebookAI" / "roberta-base", old)
    export_hf(folder / "my-continued-roberta", new)
    for name, kind in (("my-finetuned-roberta", "full"), ("my-peft-lora", "lora")):
        config = DeltaConfig(kind)
        delta = extract(attach(old, config, 2, seed=0), old, config, {"task": "my_task", "labels": list(LABELS)})
        if kind == "full":
            export_hf(folder / name, old, delta)
        else:
            export_peft(folder / name, old, "FacebookAI/roberta-base", delta)
    for name, base in (("M0", old), ("M1", new)):
        save_base(folder / name, MaskedLM(base.encoder, base.head), tokenizer, {})
    adapter = DeltaConfig("adapter")
    save_delta(folder / "DELTA", extract(attach(old, adapter, 2, seed=0), old, adapter, {"task": "TASK", "labels": list(LABELS)}))
    (folder / "TASK").symlink_to(folder / "my_task")


def test_flags_and_functions_that_the_pages_name_are_there():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    place = r"((?:rt|kernels|data|tests|bench|results|docs)/[\w./-]*\w)"
    for path in re.findall(r"(?<![\w/])(?<!--json )" + place, text):      # except what a command will write
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path
    named = re.findall(place + r": (\w+(?:, \w+)*)(?=[`;]|$)", text, re.M)
    assert len(named) >= 3
    for path, names in named:
        for name in names.split(", "):
            assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.M), (path, name)
    import analyze
    import recycle
    import train
    from bench import cell
    from rt.report import inspect
    from rt.runs import convert, predict
    configs = (*(script.Config for script in (train, recycle, analyze, cell, inspect, predict)), convert.Import, convert.Export)
    known = {flag.name for config in configs for flag in flags_of(config)}
    for words in (w for _, marker, language, code in blocks() if language == "sh" and marker == "run" for w in commands(code)):
        for flag in (w[2:] for w in words if w.startswith("--")):
            assert flag in known, (words, flag)


def test_the_readme_is_short_and_its_core_is_the_core():
    assert README.count("\n") <= 180
    section = README.split("## What to read, in which order")[1].split("## ")[0]
    lengths = dict(re.findall(r"`([\w/]+\.py)` \| (\d+) \|", section))
    assert 5 <= len(lengths) <= 8
    for path, lines in lengths.items():
        assert (ROOT / path).read_text(encoding="utf-8").count("\n") == int(lines), path
    for path in (ROOT / "rt").glob("*.py"):
        assert path.name == "__init__.py" or f"rt/{path.name}" in section, path
    for room in (path for path in (ROOT / "rt").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"rt/{room.name}/" in section, room
