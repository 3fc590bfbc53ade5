"""The command line: conversion, help from comments, errors that name the nearest flag."""
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT, here

from rt import limits
from rt.errors import InputError
from rt.runs.config import _parser, convert, parse, record, replace_flags


@dataclass
class Config:
    """What it does."""
    lr: float = 1e-3  # peak learning rate
    steps: int = 10  # how many
    name: str | None = None  # of the run
    # the data
    seeds: tuple[int, ...] = (0, 1)  # comma-separated
    fast: bool = False  # hurry
    warm: bool = True  # up


def test_values_are_converted():
    c = parse(Config, ["--lr=1", "--steps", "1e4", "--name", "a=b", "--seeds", "3,4", "--fast", "--no_warm"])
    assert c == Config(1.0, 10000, "a=b", (3, 4), True, False)
    assert isinstance(c.lr, float)
    assert parse(Config, ["--name", "none", "--lr", "-2"]) == Config(lr=-2.0)
    assert record(c)["seeds"] == [3, 4] and convert("labels", " no, not yes,", tuple[str, ...]) == ("no", "not yes")


@pytest.mark.parametrize("argv, words", [
    (["--learning", "1"], "there is no flag --learning"), (["--setps", "1"], "did you mean --steps"),
    (["--steps", "many"], "--steps many: not a whole number"), (["--lr"], "--lr needs a value"),
    (["--lr", "--fast"], "--lr needs a value"), (["3"], "unexpected argument '3'"), (["--seeds", "1,x"], "--seeds x"),
    (["--help=1"], "--help takes no value"), (["-help"], "--help takes no value"),
    (["--name", ""], "--name is empty"), (["--name="], "--name is empty"),
    (["--fast=maybe"], "not a switch (true or false)"), (["3", "--fast"], "every setting is written --name value"),
    (["--no_warm", "False"], "unexpected argument 'False': --warm is a switch, written --warm or --no_warm")])
def test_errors_are_one_sentence(argv, words):
    with pytest.raises(InputError) as error:
        parse(Config, argv)
    assert words in str(error.value) and "\n" not in str(error.value)


@dataclass(frozen=True)
class Kind:
    """A nested part."""
    kind: str = "adapter"  # which
    size: limits.PositiveInt = 24  # of it


@dataclass
class Limited:
    """Values with limits, in parts."""
    part: Literal["dev", "test"] = "dev"  # scored
    parts: tuple[Literal["dev", "test"], ...] = ("dev",)  # several
    rate: limits.Positive | None = None  # of learning
    rates: tuple[limits.Positive, ...] = ()  # some
    shots: limits.PositiveInt | None = 16  # a label
    mask: limits.PositiveShare = 0.3  # share
    # the rest
    delta: Kind = Kind("full")  # full or other
    seed: limits.Seed = 0  # one
    seeds: limits.Seeds = (0, 1)  # many
    share: limits.Share = 0.5  # all or nothing
    dropout: limits.ShareBelowOne = 0.0  # while training
    decay: limits.NonNegative = 0.0  # of weights
    seq_len: limits.SeqLen = 64  # tokens


@pytest.mark.parametrize("argument, words", [
    ("part=all", "--part all: not one of dev, test"), ("parts=dev,all", "--parts all: not one of dev, test"),
    ("parts=,", "--parts: the list is empty"), ("rate=0", "--rate 0.0: must be above zero"), ("rate=x", "--rate x: not a number"),
    ("rates=", "--rates is empty: give a value, or leave the flag out"), ("rate=", "--rate is empty: give a value, none, or leave"),
    ("part=", "--part is empty"), ("seeds=", "--seeds is empty"), ("rates=1,-1", "--rates -1.0: must be above zero"),
    ("shots=0", "--shots 0: must be above zero"),
    ("mask=0", "--mask 0.0: must be above zero"), ("mask=1.5", "--mask 1.5: must lie between 0 and 1"),
    ("size=0", "--size 0: must be above zero"), ("kind=x", "there is no flag --kind"),
    ("seed=-1", "seeds [-1]: must be whole numbers from 0 on, at least one"), ("seeds=,", "seeds []: must be whole numbers from 0"),
    ("seeds=3,-1", "seeds [3, -1]: must be"), ("share=-0.1", "--share -0.1: must lie between 0 and 1"),
    ("dropout=1", "--dropout 1.0: must be at least 0 and below 1"), ("decay=-1", "--decay -1.0: must not be negative"),
    ("seq_len=7", "--seq_len 7: must be 8 or more")])
def test_limits_of_the_annotations(argument, words):
    with pytest.raises(InputError) as error:
        parse(Limited, ["--" + argument])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_limits_let_everything_else_through_and_a_flag_needs_its_value():
    c = parse(Limited, "--part test --rate none --rates , --shots none --share 1 --mask 1 --seeds 7 --decay 0".split())
    assert (c.part, c.rate, c.rates, c.shots, c.share, c.seeds) == ("test", None, (), None, 1.0, (7,))
    for name, kind in (("part", "one of dev, test"), ("rates", "comma-separated list of number"), ("shots", "whole number")):
        with pytest.raises(InputError, match=f"--{name} needs a value: {kind}"):
            parse(Limited, ["--" + name])


def test_fields_of_a_nested_dataclass_are_flags_of_their_own_names():
    c = parse(Limited, ["--delta", "lora", "--size=3"])
    assert c.delta == Kind("lora", 3) and parse(Limited, []).delta == Kind("full", 24)
    assert list(record(c)) == ["part", "parts", "rate", "rates", "shots", "mask", "delta", "size", "seed", "seeds", "share", "dropout",
                               "decay", "seq_len"] and (record(c)["delta"], record(c)["size"]) == ("lora", 3)
    again = replace_flags(c, size=5, delta="same", seed=4)
    assert (again.delta, again.seed, c.delta) == (Kind("same", 5), 4, Kind("lora", 3))
    assert "\n\nthe rest:\n  --delta full" in _parser(Limited).format_help()
    assert [line.split() for line in _parser(Limited).format_help().splitlines() if "size" in line or "delta" in line] == [
        ["--delta", "full", "full", "or", "other"], ["--size", "24", "of", "it"]]


@dataclass
class Needed:
    """One flag has no default."""
    base: str  # where the base is
    delta: Kind = Kind()  # which


def test_a_flag_without_a_default_must_be_given():
    assert parse(Needed, ["--size", "3", "--base", "M0"]) == Needed("M0", Kind(size=3))
    with pytest.raises(InputError, match="--base is missing: where the base is"):
        parse(Needed, ["--size", "3"])
    assert ["--base", "BASE", "where", "the", "base", "is"] in map(str.split, _parser(Needed).format_help().splitlines())


@dataclass
class Files:
    """What it does to files."""
    files: tuple[str, ...] = ()  # one or more
    out: str | None = None  # where to


def test_words_without_a_flag_are_one_field_where_a_script_says_so():
    assert parse(Files, ["a", "--out", "x", "b", "--out=y"], "files") == Files(("a", "b"), "y")
    assert parse(Files, [], "files") == Files()
    for argv, words in ((["--files", "a"], "there is no flag --files"), (["a", "-o"], "unexpected argument '-o'"),
                        (["a", "--out"], "--out needs a value")):
        with pytest.raises(InputError, match=words):
            parse(Files, argv, "files")
    with pytest.raises(InputError, match="unexpected argument 'a'"):
        parse(Files, ["a"])
    lines = _parser(Files, "files").format_help().splitlines()
    assert lines[2].split() == ["FILES", "one", "or", "more"] and lines[3].split() == ["--out", "None", "where", "to"]


def test_what_is_not_utf_8_is_not_recorded():
    for argv in (["--name", "c\udcff"], ["--name=\udc80/M0"]):
        with pytest.raises(InputError, match="--name .*: is not UTF-8, and could not be read again"):
            record(parse(Config, argv))


def test_help_has_every_flag_with_its_default_and_comment():
    text = _parser(Config).format_help()
    assert text.startswith("What it does.")
    assert "\n\nthe data:\n  --seeds" in text
    for words in ("--lr 0.001", "peak learning rate", "--seeds 0,1", "comma-separated", "--warm True", "hurry (switch: --fast)",
                  "up (switch: --no_warm)"):
        assert words in text


@pytest.mark.parametrize("script", ["train.py", "recycle.py"])
def test_scripts_teach_and_refuse(script):
    lines = [line for line in here(script, "--help").splitlines() if line.startswith("  --")]
    assert len(lines) > 20 and all(len(line.split(None, 2)) == 3 for line in lines)     # each has a comment
    error = here(script, "--seds", "1", code=2)
    assert error == "error: there is no flag --seds: did you mean --seed" + ("s?\n" if script == "recycle.py" else "?\n")


@pytest.mark.parametrize("arguments, words", [
    (("convert",), "python -m rt.runs.convert import|export, not ''"), (("convert", "--tuned", "x"), "import|export, not '--tuned'"),
    (("convert", "import", "--base", "M0"), "--tuned is missing: a ...ForSequenceClassification model"),
    (("convert", "import", "--tuned", "x", "--base", "y", "--to", "hf"), "there is no flag --to"),
    (("convert", "export", "--base", "M0", "--out", "x", "--to", "onnx"), "--to onnx: not one of hf, peft"),
    (("convert", "export", "--base", "M0", "--out", "x", "--to", "peft"), "--to peft needs --delta_dir"),
    (("predict", "--base", "M0", "--delta_dir", "x"), "--input is missing: texts: .txt, .jsonl, .json, .csv or .tsv"),
    (("predict", "--base", "M0", "--delta_dir", "x", "--input", "-", "--seq_len", "3"), "--seq_len 3: must be 8 or more")])
def test_commands_say_what_they_need(arguments, words):
    error = here("-m", f"rt.runs.{arguments[0]}", *arguments[1:], code=2)
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [("convert", "import"), ("convert", "export"), ("predict",)])
def test_commands_teach(arguments):
    lines = [line.split(None, 2) for line in here("-m", f"rt.runs.{arguments[0]}", *arguments[1:], "--help").splitlines()]
    assert all(len(line) == 3 for line in lines if line and line[0].startswith("--")) and ["--base", "BASE"] in [line[:2] for line in lines]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_convert_teaches_its_two_ways(flag):
    said = here("-m", "rt.runs.convert", flag)
    assert said.startswith("Converts models") and "convert import --tuned" in said and "convert export --base" in said


@pytest.mark.parametrize("arguments", [("train.py",), ("recycle.py",), ("-m", "rt.runs.predict")])
def test_ctrl_c_while_a_command_imports_just_ends_it(arguments, tmp_path):
    """Our other modules are imported before torch, for which a stand-in waits here."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT and process.stderr.read() == ""


def shell(line: str, code: str, unbuffered: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of a shell's `line`, in which $RUN is a process that passes `code` as `main` to rt.runs.config.run."""
    main = f"import sys, time\nfrom rt.errors import InputError\nfrom rt.runs.config import run\ndef main():\n    {code}\nrun(main)"
    env = {**os.environ, "PYTHON": sys.executable, "CODE": main, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line.replace("$RUN", '"$PYTHON" -c "$CODE"')], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env=env)
    return done.returncode, done.stdout, done.stderr


FULL = "error: standard output: cannot be written (No space left on device)\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line, code, ends", [
    ("$RUN >&-", "print('a')", (0, "", "")), ("$RUN 2>&-", "print('a', file=sys.stderr)", (0, "", "")),
    ("$RUN 2>&-", "raise InputError('a')", (2, "", "")), ("$RUN 2>/dev/full", "raise InputError('a')", (2, "", "")),
    ("$RUN | true", "time.sleep(0.3), print('a')", (141, "", "")),
    ("$RUN | true", "time.sleep(0.3), print('a'), sys.exit(1)", (141, "", "")),
    ("$RUN | head -n 1", "[print('a') for _ in range(100_000)]", (141, "a\n", "")),
    ("$RUN >/dev/full", "print('a')", (2, "", FULL)), ("$RUN >/dev/full", "print('a'), sys.exit(1)", (2, "", FULL)),
    ("$RUN >/dev/full", "print('a' * 100_000)", (2, "", FULL)), ("$RUN >/dev/full", "raise InputError('b')", (2, "", "error: b\n")),
    ("PYTHONIOENCODING=ascii $RUN", "print('1 \u00b1 2')", (0, "1 \\xb1 2\n", ""))])
def test_streams_that_are_closed_full_or_ascii(line, code, ends, unbuffered):
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    assert shell(line, code, unbuffered) == ends


def test_a_setting_in_backticks_is_printed_as_a_flag():
    assert shell("$RUN", "raise InputError('lower `lr` (0.01) or `batch_size`, not `x y`')", "") == (
        2, "", "error: lower --lr (0.01) or --batch_size, not `x y`\n")


def test_an_error_is_said_though_output_is_lost():
    assert shell("$RUN | true", "time.sleep(0.3); print('a'); raise InputError('b')", "") == (2, "", "error: b\n")


def test_hyphens_in_flags_and_numbers_that_are_none():
    assert parse(Config, ["--no-warm", "--name=a-b"]) == Config(name="a-b", warm=False)
    for argv, words in ((["--lr", "inf"], "--lr inf: not a number"), (["--lr", "nan"], "--lr nan: not a number"),
                        (["--steps", "1e30"], "not a whole number"), (["--steps", "9" * 30], "not a whole number")):
        with pytest.raises(InputError, match=words):
            parse(Config, argv)
