"""One dataclass defines a script's settings, its command line, its `--help`, and the record in the files that the script writes.

    @dataclass
    class Config:
        '''What the script does; the first lines of --help.'''
        lr: Positive = 1e-3  # peak learning rate
        # the data
        seeds: Seeds = (0, 1, 2)  # comma-separated
        part: Literal["dev", "test"] = "dev"  # what is scored
        delta: DeltaConfig = DeltaConfig("full")  # full, adapter, ...

    config = parse(Config, sys.argv[1:])        # --lr 3e-4, --lr=3e-4, --flag, --no_flag, --seeds 0,1

The comment after a field is its help line. A comment on its own line is a heading. The annotation gives the type and its limits
(rt/limits.py). A flag without a default is required. The fields of a nested dataclass are flags under their own names, except the field
`kind`: its flag is named after the field that holds the dataclass (--delta).
"""
import argparse
import difflib
import functools
import inspect
import os
import re
import sys
import traceback
import types
import typing
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Annotated, Any, Callable, NamedTuple, NoReturn, TypeVar

from rt.errors import InputError
from rt.formats.files import is_full
from rt.formats.untrusted import is_utf8
from rt.runs.signals import Interrupted, interruptible

C = TypeVar("C")        # a Config
READER_LEFT = 141       # exit code if the reader of standard output has left: the same as after SIGPIPE
MAX_SENTENCE = 1000     # longest error message that is shown, in characters: a message may quote a long text from a file


# --- from flags to a Config --------------------------------------------------------------------------------------------

class Flag(NamedTuple):
    """One setting of a Config. `path` holds the names of the fields that lead to the setting."""
    name: str
    path: tuple[str, ...]
    kind: Any
    default: Any
    help: str
    heading: str | None


@functools.cache
def flags_of(cls: type) -> tuple[Flag, ...]:
    """The flags of a dataclass and of the dataclasses that its fields hold."""
    source, hints, flags = inspect.getsource(cls), typing.get_type_hints(cls, include_extras=True), []
    comments = dict(re.findall(r"^    (\w+):[^#\n]*?#\s*(.*)$", source, re.M))
    headings = {name: text for text, name in re.findall(r"^    # (.*)\n    (\w+):", source, re.M)}
    for field in fields(cls):
        name, default, help, heading = field.name, field.default, comments.get(field.name, ""), headings.get(field.name)
        if not is_dataclass(default):
            flags.append(Flag(name, (name,), hints[name], default, help, heading))
            continue
        for inner in flags_of(type(default)):
            if inner.path == ("kind",):
                inner = inner._replace(name=name, help=help or inner.help)
            flags.append(inner._replace(path=(name, *inner.path), default=functools.reduce(getattr, inner.path, default),
                                        heading=heading or inner.heading))
            heading = None      # the heading stands only above the first flag
    return tuple(flags)


def parse(cls: type[C], argv: list[str], words: str | None = None) -> C:
    """Parse `argv` (without the program's name) into an instance of the dataclass `cls`. Arguments without a flag become the values of the
    field `words`, a tuple of strings, which is then no flag. Without `words` they are an InputError. --help prints the help and exits."""
    flags = {flag.name: flag for flag in flags_of(cls) if flag.name != words}
    switches = {f"--{no}{name}": f"--{name}={not no}" for name, flag in flags.items() if flag.kind is bool for no in ("", "no_")}
    spelled = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument) for argument in argv]   # --a-b as --a_b
    try:
        given, rest = _parser(cls, words).parse_known_args([switches.get(argument, argument) for argument in spelled])
    except argparse.ArgumentError as error:
        flag = flags.get((error.argument_name or "").lstrip("-"))
        raise InputError(f"--{flag.name} needs a value: {_type_name(flag.kind)}" if flag else "--help takes no value") from None
    for argument in rest:
        if words is None or argument.startswith("-"):
            raise _unknown(argument, list(flags), switches.get(dict(zip(spelled[1:], spelled)).get(argument)))
    values = {name: convert(name, text, flags[name].kind) for name, text in vars(given).items() if name != words}
    for name, flag in flags.items():
        if values.get(name) == () and flag.default != ():
            raise InputError(f"--{name}: the list is empty")
        if flag.default is MISSING and name not in values:
            raise InputError(f"--{name} is missing: {flag.help}")
    if words:
        values[words] = (*getattr(given, words, ()), *rest)
    required = {name: values[name] for name, flag in flags.items() if flag.default is MISSING}
    config = replace_flags(cls(**required), **values)
    config.typed = {*values}        # no field: a flag may be typed with its default
    return config


def replace_flags(config: C, **values: Any) -> C:
    """A copy of the config with the flags of these names set, including flags of nested dataclasses."""
    paths = {flag.name: flag.path for flag in flags_of(type(config))}
    for name, value in values.items():
        *outer, last = paths[name]
        while outer:        # first replace the part that holds the flag, then the part around that one
            value = replace(functools.reduce(getattr, outer, config), **{last: value})
            last = outer.pop()
        config = replace(config, **{last: value})
    return config


def record(config: Any) -> dict:
    """{flag: value} in plain JSON. InputError for text that is not UTF-8: a file name can be such a text."""
    values = {}
    for flag in flags_of(type(config)):
        value = functools.reduce(getattr, flag.path, config)
        values[flag.name] = list(value) if isinstance(value, tuple) else value
        if not is_utf8(text := _text(value)):
            raise InputError(f"--{flag.name} {text}: is not UTF-8, and could not be read again from a record; rename the file or folder")
    return values


def changed(config: Any) -> dict:
    """The entries of `record` that differ from the defaults."""
    usual = record(type(config)())
    return {name: value for name, value in record(config).items() if value != usual[name]}


def _text(value: Any) -> str:
    """A value as a user would type it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parser(cls: type, words: str | None = None) -> argparse.ArgumentParser:
    """Splits arguments and prints the help. `convert` parses the values, because argparse would replace our error messages."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=inspect.cleandoc(cls.__doc__ or ""), add_help=False, allow_abbrev=False, exit_on_error=False,
        argument_default=argparse.SUPPRESS, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=40))
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    group = parser.add_argument_group(None)
    for flag in flags_of(cls):
        group = parser.add_argument_group(flag.heading) if flag.heading else group
        switch = f" (switch: --{'no_' * (flag.default is True)}{flag.name})" if flag.kind is bool else ""
        text = flag.help.replace("%", "%%") + switch
        if flag.name == words:
            group.add_argument(words, nargs="*", metavar=words.upper(), help=text)
        else:
            metavar = flag.name.upper() if flag.default is MISSING else _text(flag.default)
            group.add_argument(f"--{flag.name}", metavar=metavar, help=text)
    return parser


def _unknown(argument: str, names: list[str], switch: str | None) -> InputError:
    """The error for an `argument` that is no flag's. `switch` is the switch before it, as --name=True or --name=False, if one is."""
    if not argument.startswith("--"):
        name = (switch or "").partition("=")[0][2:]
        how = f"--{name} is a switch, written --{name} or --no_{name}" if switch else "every setting is written --name value"
        return InputError(f"unexpected argument '{argument}': {how}")
    name = argument[2:].partition("=")[0]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return InputError(f"there is no flag --{name}: " + (f"did you mean --{near[0]}?" if near else "see --help for all of them"))


def convert(name: str, text: str, kind: Any) -> Any:
    """Convert the text of flag `name` to the annotation `kind`. InputError if that fails or the value breaks a limit of an Annotated."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = convert(name, text, inner[0])
        for limit in inner[1:]:
            if not limit.holds(value):
                raise InputError(as_flags(limit.sentence.format(name=name, value=list(value) if isinstance(value, tuple) else value)))
        return value
    is_optional = origin in (typing.Union, types.UnionType)
    if not text:        # a variable of the shell that is not set; an empty list is written as a comma
        raise InputError(f"--{name} is empty: give a value, {'none, ' * is_optional}or leave the flag out")
    if is_optional:
        return None if text.lower() == "none" else convert(name, text, inner[0])
    if origin is tuple:
        return tuple(convert(name, part, inner[0]) for part in map(str.strip, text.split(",")) if part)
    if origin is typing.Literal:
        if text not in inner:
            raise InputError(f"--{name} {text}: not one of {', '.join(inner)}")
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int and re.fullmatch(r"\d+e\d+", text):  # --steps 1e4 is what people type
            text = str(int(float(text)))
        value = kind(text)
        if kind in (int, float) and not abs(value) < 2**63:     # infinite, NaN, or more than a tensor can hold
            raise ValueError
        return value
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"--{name} {text}: not a {_type_name(kind)}") from None


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"comma-separated list of {_type_name(inner[0])}"
    if origin is typing.Literal:
        return "one of " + ", ".join(inner)
    scalars = {bool: "switch (true or false)", int: "whole number", float: "number", str: "text"}
    return scalars[kind] if origin is None else _type_name(inner[0])        # else Annotated or optional


# --- how a script ends -------------------------------------------------------------------------------------------------

def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. An InputError prints one sentence on stderr and exits with code 2. Ctrl-C exits with 130, SIGTERM with 143,
    and a closed pipe on standard output (`head`) silently with 141. With several ranks, any other error prints one sentence, too."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")      # None if the parent process closed it
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # for characters that the encoding lacks
    try:
        with interruptible():
            try:
                main()
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except InputError as error:
        end(2, f"error: {as_flags(sentence(error))}")
    except Interrupted as stopped:
        end(stopped.code, str(stopped))
    except BrokenPipeError:
        end(READER_LEFT)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and is_full(error):
            end(2, f"error: standard output: cannot be written ({error.strerror})")
        if among_ranks():
            end(1, f"error: rank {os.environ.get('RANK')}: {sentence(rank_error(error))}")
        if isinstance(error, OSError) and error.filename:       # no permission, a name that is too long, ...
            end(2, f"error: {sentence(f'{error.filename}: cannot be used ({error.strerror})')}")
        raise


def sentence(error: Exception | str) -> str:
    """The error message as one printable line."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error)[:MAX_SENTENCE + 1])
    return text if len(text) <= MAX_SENTENCE else text[:MAX_SENTENCE] + "..."


def as_flags(text: str) -> str:
    """Replace `lr`, the way rt/*.py names a setting, with the flag --lr, and a sweep's `sweep lr` with --sweep lr."""
    return re.sub(r"`((sweep )?\w+)`", r"--\1", text)


def rank_error(error: Exception) -> str:
    """A rank's message for an error that is not an InputError."""
    if re.search(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset)", str(error)):
        return "another rank has ended or does not answer; that rank, or torchrun, prints the cause. --resume goes on"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def among_ranks() -> bool:
    """Whether this process has joined a process group (rt/speed/dist.py)."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end(code: int, message: str = "") -> NoReturn:
    """Print a line on stderr and exit. With several ranks, exit at once: closing the process group could wait for ever. If a stream cannot
    be written, discard its buffer: flushing it would fail again when Python exits."""
    for stream, text in ((sys.stderr, f"{message}\n" if message else ""), (sys.stdout, "")):
        try:
            print(end=text, file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if among_ranks():
        os._exit(code)
    sys.exit(code)
