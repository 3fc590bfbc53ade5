"""The real corpora and tasks, if they are next to the checkout: everything in them is read correctly."""
import itertools

import pytest
from conftest import ROOT

from rt.data import few_shot
from rt.formats.corpora import split_documents
from rt.formats.tasks import load_task

REAL = ROOT.parent / "shared" / "realdata"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")

SIZES = {"chemprot": (13, 4169, 2427, 3469), "imdb": (2, 3000, 400, 1200), "rotten_tomatoes": (2, 8530, 1066, 1066),
         "sst2": (2, 6920, 872, 1821), "acl_arc": (6, 1688, 114, 139), "agnews": (4, 4498, 500, 5000),
         "mnli": (3, 7512, 800, 1502), "sick": (3, 4500, 500, 4927)}


@pytest.mark.parametrize("name", SIZES)
def test_tasks(name):
    task = load_task(REAL / "tasks" / name)
    assert (len(task.labels), *(len(task.parts[p]) for p in ("train", "dev", "test"))) == SIZES[name]
    pairs = {e.text_pair is not None for e in itertools.chain(*task.parts.values())}
    assert pairs == {name in ("mnli", "sick")}
    assert len(few_shot(task, 4, 0).parts["train"]) == 4 * SIZES[name][0]


@pytest.mark.parametrize("name", ["wiki", "bio", "rev", "cs", "ns"])
def test_corpora(name):
    some = list(itertools.islice(split_documents(REAL / "corpora" / f"{name}.txt.xz"), 2000))
    heldout = sum(part == "heldout" for part, _ in some)
    assert 15 <= heldout <= 75 and all(text.strip() for _, text in some)
