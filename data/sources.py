"""Names to data: an embedded domain (data/docstrings.py, built on first use) or a path of one's own."""
from pathlib import Path

from data import docstrings
from rt.errors import InputError


def corpus_path(name: str, cache: Path) -> Path:
    """Where the corpus called `name` is: a file or folder that rt.data.build_corpus reads."""
    return _locate(name, cache, "corpus", "a text file, a folder of text files")


def task_path(name: str, cache: Path) -> Path:
    """Where the task called `name` is: a folder that rt.tasks.load_task reads."""
    return _locate(name, cache, "task", "a folder with train, dev and test files")


def _locate(name: str, cache: Path, kind: str, wanted: str) -> Path:
    if name in docstrings.DOMAINS:
        known = (Path(cache) / "docstrings" / name / "meta.json").exists()
        meta = docstrings.build(name, Path(cache) / "docstrings")
        if not known:
            task = [str(sum(meta["task"][part].values())) for part in docstrings.PARTS]
            print(f"embedded domain {name}: docstrings of {meta['package']} {meta['version']}, {meta['corpus']['train']} documents "
                  f"and {meta['corpus']['heldout']} held out; task of {len(meta['task']['train'])} labels, {'/'.join(task)}")
        return Path(cache) / "docstrings" / name / kind
    if not Path(name).exists():
        raise InputError(f"{name}: there is no such {kind}; give {wanted}, or one of {', '.join(docstrings.DOMAINS)}")
    return Path(name)
