"""From names to data: an embedded domain (data/docstrings.py, built on first use), a data set of the hub, or your own path."""
import os
import re
from dataclasses import replace
from pathlib import Path

from data import docstrings
from data.select import made_of, select, write
from rt.data import Example, Task
from rt.errors import InputError
from rt.formats.corpora import training_files
from rt.formats.files import note
from rt.formats.hub import find_dataset
from rt.formats.tasks import load_task, read_examples


def corpus_path(name: str, cache: Path) -> Path:
    """The path of the corpus called `name`: a file or folder that rt.formats.corpora.build_corpus reads."""
    return _locate(name, cache, "corpus", "a text file, a folder of text files")


def domain_names(flag: str, entries: tuple[str, ...]) -> list[str]:
    """The names of the domains that --`flag` lists, for tables and files: an embedded name, a file's or folder's name without endings, or
    task-NAME for a task. InputError if two are equal."""
    paths = [os.path.abspath(entry.removeprefix("task:")) for entry in entries]       # . has no name of its own
    names = ["task-" * entry.startswith("task:") + Path(path).name.lstrip(".").split(".")[0] for entry, path in zip(entries, paths)]
    if len({*names}) < len(names):
        raise InputError(f"--{flag} {','.join(entries)}: two domains have the same name; rename one of the files")
    return names


def open_domain(name: str, cache: Path, template: str, like: str | None, keep: float) -> tuple[Path, str]:
    """A domain of a stream: (path of its texts, a name for `corpus_path` that is valid from any folder). task:NAME means the texts of that
    task, put into `template`. If the task `like` is given, any other corpus is cut to the share `keep` that is most like its texts."""
    if name.startswith("task:"):
        path = task_corpus(open_task(name.removeprefix("task:"), cache), template, cache)
    else:
        path = corpus_path(name, cache)
        if like is None and (name in docstrings.DOMAINS or name.startswith("hub:")):
            return path, name
        path = select(path, open_task(like, cache), keep, cache) if like else path
    return path, str(path.resolve())


def task_corpus(task: Task, template: str, cache: Path) -> Path:
    """A task's training texts as documents, with its dev texts held out. Each is put into `template`: {text}, {text_pair} and {label}."""
    fields = {*re.findall(r"\{(\w+)\}", template)}
    if "text" not in fields or fields - {"text", "text_pair", "label"}:
        raise InputError(f"`template` {template}: must say where the {{text}} goes, and may hold {{text_pair}} and {{label}}; nothing else "
                         "is known in braces")
    folder = made_of(Path(cache) / "tasks", task, template)
    if not folder.exists():
        write(folder, ((part, filled(template, e)) for part, name in (("train", "train"), ("heldout", "dev")) for e in task.parts[name]))
    return folder


def filled(template: str, e: Example) -> str:
    values = {"text": e.text, "text_pair": e.text_pair or "", "label": str(e.label)}
    return re.sub(r"\{(text|text_pair|label)\}", lambda field: values[field[1]], template).strip()


def open_task(name: str, cache: Path) -> Task:
    """The task called `name`. A task of the hub is named after its config, or else after its repository."""
    task = load_task(_locate(name, cache, "task", "a folder with train, dev and test files"))
    return replace(task, name=name.rpartition("/")[2]) if name.startswith("hub:") else task


def open_texts(name: str, cache: str) -> list[Example]:
    """Texts without their labels: of a file, of the training part of the task called `name`, or of a folder of text files."""
    path = Path(name) if Path(name).is_file() else _locate(name, cache, "task", "a file of texts, a folder of text files or of a task")
    return [example for file in training_files(path) for example in read_examples(file, labelled=False)]


def _locate(name: str, cache: Path, kind: str, wanted: str) -> Path:
    if name.startswith("hub:"):
        folder, about = find_dataset(name)
        print(f"{name}: folder {about} is read")
        return folder
    if name in docstrings.DOMAINS:
        if Path(name).exists():
            note(f"{name}: the embedded domain is read; give ./{name} to read what is here under this name")
        known = (Path(cache) / "docstrings" / name / "meta.json").exists()
        meta = docstrings.build(name, Path(cache) / "docstrings")
        if not known:
            task = [str(sum(meta["task"][part].values())) for part in docstrings.PARTS]
            print(f"embedded domain {name}: docstrings of {meta['package']} {meta['version']}, {meta['corpus']['train']} documents "
                  f"and {meta['corpus']['heldout']} held out; task of {len(meta['task']['train'])} labels, {'/'.join(task)}")
        return Path(cache) / "docstrings" / name / kind
    if not Path(name).exists():
        raise InputError(f"{name}: there is no such {kind}; give {wanted}, hub:OWNER/NAME, or one of {', '.join(docstrings.DOMAINS)}")
    return Path(name)
