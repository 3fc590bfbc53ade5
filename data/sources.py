"""Names to data: an embedded domain (data/docstrings.py, built on first use), a data set of the hub, or a path of one's own."""
from dataclasses import replace
from pathlib import Path

from data import docstrings
from rt.data import Example, Task
from rt.errors import InputError
from rt.formats.corpora import training_files
from rt.formats.hub import find_dataset
from rt.formats.tasks import load_task, read_examples


def corpus_path(name: str, cache: Path) -> Path:
    """Where the corpus called `name` is: a file or folder that rt.formats.corpora.build_corpus reads."""
    return _locate(name, cache, "corpus", "a text file, a folder of text files")


def open_task(name: str, cache: Path) -> Task:
    """The task called `name`. One of the hub is called what its config is, or its repository."""
    task = load_task(_locate(name, cache, "task", "a folder with train, dev and test files"))
    return replace(task, name=name.rpartition("/")[2]) if name.startswith("hub:") else task


def open_texts(name: str, cache: str) -> list[Example]:
    """Texts whose labels are not read: those of a file, of the training part of the task called `name`, or of a folder of text files."""
    path = Path(name) if Path(name).is_file() else _locate(name, cache, "task", "a file of texts, a folder of text files or of a task")
    return [example for file in training_files(path) for example in read_examples(file, labelled=False)]


def _locate(name: str, cache: Path, kind: str, wanted: str) -> Path:
    if name.startswith("hub:"):
        folder, about = find_dataset(name)
        print(f"{name}: folder {about} is read")
        return folder
    if name in docstrings.DOMAINS:
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
