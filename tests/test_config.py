"""The command line: conversion, help out of comments, errors that name the nearest flag."""
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT, command

from rt.errors import InputError
from rt.runs.config import help_text, parse, record


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
    assert record(c)["seeds"] == [3, 4]


@pytest.mark.parametrize("argv, words", [
    (["--learning", "1"], "there is no flag --learning"), (["--setps", "1"], "did you mean --steps"),
    (["--steps", "many"], "--steps many: not a whole number"), (["--lr"], "--lr needs a value"),
    (["--lr", "--fast"], "--lr needs a value"), (["3"], "unexpected argument '3'"), (["--seeds", "1,x"], "--seeds x"),
    (["--fast=maybe"], "not a true or false")])
def test_errors_are_one_sentence(argv, words):
    with pytest.raises(InputError) as error:
        parse(Config, argv)
    assert words in str(error.value) and "\n" not in str(error.value)


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
    lines = help_text(Files, "files").splitlines()
    assert lines[2].split() == ["FILES", "one", "or", "more"] and lines[3].split() == ["--out", "None", "where", "to"]


def test_what_is_not_utf_8_is_not_recorded():
    for argv in (["--name", "c\udcff"], ["--name=\udc80/M0"]):
        with pytest.raises(InputError, match="--name .*: is not UTF-8, and could not be read again"):
            record(parse(Config, argv))


def test_help_has_every_flag_with_its_default_and_comment():
    text = help_text(Config)
    assert text.startswith("What it does.")
    assert "\n\nthe data:\n  --seeds" in text
    for words in ("--lr 0.001", "peak learning rate", "--seeds 0,1", "comma-separated", "--warm True"):
        assert words in text


@pytest.mark.parametrize("script", ["train.py", "recycle.py"])
def test_scripts_teach_and_refuse(script):
    lines = [line for line in command(script, "--help").splitlines() if line.startswith("  --")]
    assert len(lines) > 20 and all(len(line.split(None, 2)) == 3 for line in lines)     # each has a comment
    error = command(script, "--seds", "1", code=2)
    assert error == "error: there is no flag --seds: did you mean --seed" + ("s?\n" if script == "recycle.py" else "?\n")


def shell(line: str, code: str, unbuffered: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of a shell's `line` in which $RUN is a process that gives `code` as `main` to rt.config.run."""
    main = f"import sys, time\nfrom rt.config import InputError, run\ndef main():\n    {code}\nrun(main)"
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


def test_an_error_is_said_though_output_is_lost():
    assert shell("$RUN | true", "time.sleep(0.3); print('a'); raise InputError('b')", "") == (2, "", "error: b\n")
