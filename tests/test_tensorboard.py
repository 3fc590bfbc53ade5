"""--tensorboard: TensorBoard reads the values of metrics.jsonl from the event files, also after killed runs."""
import shutil
import sys

import numpy as np
import pytest
from conftest import here, write_task

from rt.formats.files import read_rows
from rt.runs.log import Log

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
TINY = ("--seq_len", 32, "--device", "cpu", "--precision", "fp32")


def read(folder) -> dict[str, list]:
    """{tag: (step, number) of its points} as TensorBoard shows them, in its order."""
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(rows: list[dict], before: dict[str, int] = {}) -> dict[str, list]:
    """The same from rows. Stages begin after the given numbers of steps."""
    points: dict[str, list] = {}
    for row in rows:
        todo = [((k,), v) for k, v in row.items() if k not in ("step", "stage", "domain")]
        for path, value in todo:
            if isinstance(value, dict):
                todo += [((*path, k), v) for k, v in value.items()]
            elif value is not None:
                points.setdefault("/".join(path), []).append((row["step"] + before.get(row.get("stage"), 0), float(np.float32(value))))
    return points


@pytest.fixture(scope="module")
def home(graphs, tmp_path_factory):
    """Two corpora and a task."""
    home = tmp_path_factory.mktemp("tensorboard")
    lines = [row["text"].replace("\n", " ") for row in read_rows(graphs / "corpus" / "train.jsonl")]
    (home / "bio.txt").write_text("\n".join(lines[:300]))
    (home / "news.txt").write_text("\n".join(lines[300:600]))
    rows = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(16)]
    write_task(home / "task", {"train": rows, "dev": rows[:8], "test": rows[:8]})
    return home


def pretrain(home, out, *more, code=0):
    return here("train.py", "--preset", "tiny", "--vocab_size", 500, "--batch_tokens", 256, "--stream", f"{home}/bio.txt,{home}/news.txt",
                "--steps", "6,4", "--snapshots", 0, "--save_every", 4, "--eval_tokens", 512, "--cache", home / "cache", "--out", out, *TINY,
                *more, code=code)


def test_what_is_done_again_after_a_kill_is_there_once(home, tmp_path):
    """Killed after M0 was scored and before it was written, with a checkpoint of step 4; and in M1, without a checkpoint."""
    out = tmp_path / "run"
    pretrain(home, out, "--stop_after", 6, "--tensorboard")
    shutil.rmtree(out / "M0")
    pretrain(home, out, "--stop_after", 3, "--tensorboard", "--resume")
    assert len((before := read(out / "tensorboard"))["loss"]) == 7
    shutil.rmtree(out / "resume" / "M1-t00001")
    pretrain(home, out, "--tensorboard", "--resume")
    found = read(out / "tensorboard")
    assert found == expected(read_rows(out / "metrics.jsonl"), {"M1": 6}) and before["loss"][:6] == found["loss"][:6]
    assert [step for step, _ in found["loss"]] == [*range(1, 11)] and [step for step, _ in found["heldout/bio/loss"]] == [6, 10]
    assert "is complete" in pretrain(home, out, "--resume", "--tensorboard") and read(out / "tensorboard") == found


def test_a_delta_and_the_runs_of_recycling_have_their_curves_and_are_the_same_runs_without(home, tmp_path):
    out = tmp_path / "run"
    pretrain(home, out)
    assert not (out / "tensorboard").exists()
    tune = ("train.py", "--mode", "tune", "--base", out / "M0", "--task", home / "task", "--tune_steps", 4, "--eval_every", 2, "--out",
            tmp_path / "delta", *TINY)
    for more in (("--tensorboard",), ("--tensorboard",), ()):       # the second replaces the first
        here(*tune, *more)
        events = tmp_path / "delta" / "tensorboard"
        assert not more or read(events) == expected(read_rows(tmp_path / "delta" / "metrics.jsonl"))
    assert not events.exists() and len(read_rows(tmp_path / "delta" / "metrics.jsonl")) == 3
    recycle = ("recycle.py", "--mode", "scratch,init", "--old_base", out / "M0", "--old_delta", tmp_path / "delta", "--base", out / "M1",
               "--task", home / "task", "--delta", "same", "--steps", 4, "--eval_every", 2, "--out", tmp_path / "recycled", *TINY)
    for more in (("--shots", 4, "--seeds", 0), ("--sweep", "seed=0,1 lr=1e-3,2e-3", "--shots", 5)):
        here(*recycle, *more, "--tensorboard")
        runs = {run: (run / "summary.json").stat().st_mtime_ns for run in (tmp_path / "recycled" / "deltas").iterdir()}
        for run in runs:
            assert read(run / "tensorboard") == expected(read_rows(run / "metrics.jsonl"))
        here(*recycle, *more, "--resume")       # with the same names, and finished
        assert runs == {run: (run / "summary.json").stat().st_mtime_ns for run in (tmp_path / "recycled" / "deltas").iterdir()}
    assert len(runs) == 10


def test_rows_of_a_part_and_of_other_ranks(tmp_path):
    log = Log(tmp_path / "run", tensorboard=True)
    log.row(part="projection", step=3, loss=None, dev={"mean": 0.5}, skipped=2)
    log.row(step=0, loss=0.25, dev={"accuracy": 0.5}, skipped=True)
    log.sync()
    assert read(tmp_path / "run" / "tensorboard") == {"projection/dev/mean": [(3, 0.5)], "projection/skipped": [(3, 2.0)],
                                                      "loss": [(0, 0.25)], "dev/accuracy": [(0, 0.5)]}
    Log(tmp_path / "other", writes=False, tensorboard=True).row(step=1, loss=1.0)
    assert not (tmp_path / "other").exists()


def test_without_the_package_only_the_flag_is_an_error_and_at_once(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)       # importing it, or a part of it, fails
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.delitem(sys.modules, name)
    out = tmp_path / "run"
    for script in ("train.py", "recycle.py"):
        assert here(script, "--tensorboard", "--out", out, code=2) == \
            "error: --tensorboard: TensorBoard is not installed: pip install -e '.[tensorboard]'\n"
    assert not out.exists()
    pretrain(home, out)
