"""A dataclass is the config, the `--help` and the record in the checkpoint.

A script declares one dataclass; the trailing `#` comment of a field is its help line, the annotation its type:

    @dataclass
    class Config:
        '''What the script does; the first lines of --help.'''
        lr: float = 1e-3  # peak learning rate
        seeds: tuple[int, ...] = (0, 1, 2)  # comma-separated

    config = parse(Config, sys.argv[1:])        # --lr 3e-4, --lr=3e-4, --flag, --no_flag

An unknown flag is an error that names the nearest one.
"""
import difflib
import inspect
import os
import re
import sys
import traceback
import types
import typing
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any, Callable, NoReturn, TypeVar

from rt.errors import InputError
from rt.formats.untrusted import is_utf8
from rt.runs.signals import Interrupted, handled, raise_interrupted

C = TypeVar("C")      # a script's Config


READER_LEFT = 141       # as of a process that SIGPIPE ends


SENTENCE = 1000     # characters of an error that are shown: what it quotes from a file may be long


def sentence(error: Exception | str) -> str:
    """What is said of an error: one line, whatever a file that it quotes has put into it."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error)[:SENTENCE + 1])
    return text if len(text) <= SENTENCE else text[:SENTENCE] + "..."


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a InputError ends it with its sentence on stderr and exit code 2, Ctrl-C with 130, SIGTERM with 143. Of
    several ranks each ends at once and in one sentence, whatever it raised, and torchrun then ends the others. Where standard output
    cannot be written, that is a InputError; where its reader has left, as `head` does, it ends without a word."""
    open_streams()
    try:
        with handled(raise_interrupted):
            printed(main)
    except InputError as error:
        say(f"error: {sentence(error)}")
        end(2)
    except Interrupted as stopped:
        say(str(stopped))
        end(stopped.code)
    except Exception as error:
        if not among_ranks():
            raise
        rank, where = os.environ.get("RANK"), traceback.extract_tb(error.__traceback__)[-1]
        if re.search(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset)", str(error)):
            said = "another rank has ended or does not answer; the cause is what that one, or torchrun, says. --resume goes on"
        else:
            said = f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
        say(f"error: rank {rank}: {sentence(said)}")
        end(1)


def open_streams() -> None:
    """Standard output and errors go nowhere where whoever started the process has closed them; what the encoding of output has no
    character for is written as its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """On stderr, where that can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        to_nowhere(sys.stderr)


def to_nowhere(stream: typing.TextIO) -> None:
    """What it holds, and what is written to it from now on: it would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printed(main: Callable[[], None]) -> None:
    """`main`, and what it prints written out."""
    try:
        main()
    except (OSError, SystemExit) as error:
        # of an error that names no file a line more tells whether it is output that failed, which may be unbuffered and hold nothing
        write_out("\n" if isinstance(error, OSError) and error.filename is None else "")
        if isinstance(error, BrokenPipeError) and not among_ranks():
            end(READER_LEFT)
        raise
    write_out()


def write_out(more: str = "") -> None:
    """What standard output still holds, and `more`, is written: InputError where it cannot be."""
    try:
        print(end=more, flush=True)
    except OSError as error:
        to_nowhere(sys.stdout)
        if isinstance(error, BrokenPipeError):
            end(READER_LEFT)
        raise InputError(f"standard output: cannot be written ({error.strerror})") from None


def among_ranks() -> bool:
    """Whether this process has joined others (rt/dist.py)."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end(code: int) -> NoReturn:
    """Exit; as one of several ranks without taking the process group down, which could wait for what the others never answer."""
    with suppress(InputError, SystemExit):
        write_out()
    if among_ranks():
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(cls: type[C], argv: list[str], words: str | None = None) -> C:
    """`argv` (without the program's name) as an instance of the dataclass `cls`. Words without a flag are an error, or the values of
    the field `words` (a tuple of text), which then is no flag. Raises InputError."""
    types_of = typing.get_type_hints(cls)
    values: dict = {}
    if words:
        del types_of[words]
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if flag in ("-h", "--help"):
            print(help_text(cls, words))
            sys.exit(0)
        if words and not flag.startswith("-"):
            values[words] = (*values.get(words, ()), flag)
            continue
        if not flag.startswith("--"):
            raise InputError(f"unexpected argument '{flag}': every setting is written --name value")
        name, eq, text = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and types_of.get(name[3:]) is bool and not eq:
            values[name[3:]] = False
        elif name not in types_of:
            near = difflib.get_close_matches(name, types_of, n=1, cutoff=0.5)
            hint = f"did you mean --{near[0]}?" if near else "see --help for all of them"
            raise InputError(f"there is no flag --{name}: {hint}")
        elif types_of[name] is bool and not eq:
            values[name] = True
        else:
            if not eq and (not rest or rest[0].startswith("--")):
                raise InputError(f"--{name} needs a value: {_type_name(types_of[name])}")
            values[name] = convert(name, text if eq else rest.pop(0), types_of[name])
    return cls(**values)


def convert(name: str, text: str, kind: Any) -> Any:
    """The text of one flag as a value of its annotation: bool, int, float, str, tuple of one of them, or None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() in ("none", ""):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(convert(name, part, typing.get_args(kind)[0]) for part in text.split(",") if part)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int and re.fullmatch(r"\d+e\d+", text):  # --steps 1e4 is what people type
            text = str(int(float(text)))
        value = kind(text)
        if kind in (int, float) and not abs(value) < 2**63:     # neither infinite nor NaN, nor more than a tensor can hold
            raise ValueError
        return value
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"--{name} {text}: not a {_type_name(kind)}") from None


def _type_name(kind) -> str:
    if typing.get_origin(kind) is tuple:
        return f"comma-separated list of {_type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _type_name(next(k for k in typing.get_args(kind) if k is not type(None)))
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]


def require_positive(config: Any, *names: str) -> None:
    """InputError for the first of these settings (each value of a list; None passes) that is not above zero, or that is an
    empty list or text."""
    for name in names:
        value = getattr(config, name)
        if value == () and type(config).__dataclass_fields__[name].default != ():
            raise InputError(f"--{name}: the list is empty")
        for v in value if isinstance(value, tuple) else (value,):
            if v is not None and not isinstance(v, str) and not v > 0:
                raise InputError(f"--{name} {v}: must be above zero")


def require_not_negative(config: Any, *names: str) -> None:
    """InputError for the first of these settings that is below zero."""
    for name in names:
        if getattr(config, name) < 0:
            raise InputError(f"--{name} {getattr(config, name)}: must not be negative")


def require_share(config: Any, *names: str) -> None:
    """InputError for the first of these settings that does not lie between 0 and 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name} {getattr(config, name)}: must lie between 0 and 1")


def require_seq_len(seq_len: int) -> None:
    """InputError where a text of so many tokens has no room for the special tokens of a pair and some of both texts."""
    if seq_len < 8:
        raise InputError(f"--seq_len {seq_len}: must be 8 or more")


def require_seeds(*seeds: int) -> None:
    """InputError for no seed at all, or a negative one, which NumPy's generators do not take."""
    if not seeds or min(seeds) < 0:
        raise InputError(f"seeds {list(seeds)}: must be whole numbers from 0 on, at least one")


def help_text(cls: type, words: str | None = None) -> str:
    """The docstring of `cls`, then a line a flag with its default and the comment beside it, below the comments that stand alone; the
    field `words` is written as WORDS."""
    source = inspect.getsource(cls)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*?#\s*(.*)$", source, re.M))
    headings = {name: text for text, name in re.findall(r"^    # (.*)\n    (\w+):", source, re.M)}
    lines = [inspect.cleandoc(cls.__doc__ or ""), ""]
    for field in fields(cls):
        lines += ["", f"{headings[field.name]}:"] if field.name in headings else []
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        name = field.name.upper() if field.name == words else f"--{field.name} {default}"
        lines.append(f"  {name:<36} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def record(config: Any) -> dict:
    """The config as plain JSON values, for meta.json and summary.json. InputError for text that is not UTF-8, as a file's name may be: the
    files that hold it could not be read again."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    for name, value in values.items():
        if not is_utf8("".join(map(str, value)) if isinstance(value, list) else str(value)):
            raise InputError(f"--{name} {value}: is not UTF-8, and could not be read again where it is recorded; rename the file or folder")
    return values
