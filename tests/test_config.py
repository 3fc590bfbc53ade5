"""The command line: conversion, help out of comments, errors that name the nearest flag."""
from dataclasses import dataclass

import pytest
from conftest import command

from rt.config import UsageError, help_text, parse, record


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
    with pytest.raises(UsageError) as error:
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
        with pytest.raises(UsageError, match=words):
            parse(Files, argv, "files")
    with pytest.raises(UsageError, match="unexpected argument 'a'"):
        parse(Files, ["a"])
    lines = help_text(Files, "files").splitlines()
    assert lines[2].split() == ["FILES", "one", "or", "more"] and lines[3].split() == ["--out", "None", "where", "to"]


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
