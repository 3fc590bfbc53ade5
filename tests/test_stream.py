"""The folder of a stream: when a run may start or continue there, which rows it redoes, and its table."""
import json
import os
import signal
import time

import pytest
import torch

import train
from rt.errors import InputError
from rt.formats.checkpoint import save_base
from rt.formats.files import write_json
from rt.formats.hub import open_base
from rt.model import MaskedLM
from rt.optim import adamw
from rt.pretrain import PretrainSettings
from rt.recipes import Recipe
from rt.runs import resume
from rt.runs.resume import PretrainRun, checkpoints, has_work, is_done_again, table_of
from rt.runs.signals import Interrupted
from rt.runs.summary import forgetting_table
from rt.speed.dist import Ranks


def test_a_run_begins_goes_on_or_is_complete_and_overwrites_nothing(tmp_path):
    settings = {"lr": 0.1, "stream": ["a", "b"]}
    out = tmp_path / "run"
    assert has_work(out, settings, defaults={}, resume=False) and has_work(out, settings, defaults={}, resume=True)
    write_json(out / "config.json", settings)
    with pytest.raises(InputError, match="unfinished run: add --resume"):
        has_work(out, settings, defaults={}, resume=False)
    assert has_work(out, settings, defaults={}, resume=True)
    later = {"came_later": "hf"}
    assert has_work(out, settings | later, resume=True, defaults=later)      # a flag that did not exist yet had its default
    with pytest.raises(InputError, match="begun with --came_later None, not hf"):
        has_work(out, settings | later, resume=True, defaults={"came_later": None})
    with pytest.raises(InputError, match=r"begun with --stream \['a', 'b'\], not \['a'\]"):
        has_work(out, settings | {"stream": ["a"]}, resume=True, defaults={})
    write_json(out / "summary.json", {})
    assert not has_work(out, settings, defaults={}, resume=False) and not has_work(out, settings, defaults={}, resume=True)
    with pytest.raises(InputError, match="files that are not part of a stream"):
        has_work(tmp_path, settings, resume=True, defaults={})


def test_a_signal_is_remembered_only_once_a_loop_asks_for_it(tmp_path, tokenizer):
    before = signal.getsignal(signal.SIGTERM)
    with pretrain_run(tmp_path / "run") as run:
        assert signal.getsignal(signal.SIGTERM) is before       # while corpora are tokenized, a signal ends the process at once
        run.begin({}, tokenizer)
        assert signal.getsignal(signal.SIGTERM) == run.on_signal
    assert signal.getsignal(signal.SIGTERM) is before


def pretrain_run(out, resume=False) -> PretrainRun:
    return PretrainRun(train.Config(resume=resume, snapshots=0, save_every=1), out, Ranks(torch.device("cpu")), {})


def test_a_refused_run_leaves_no_lock(tmp_path):
    """With torchrun nothing unwinds after the error: a job on another node would take the lock's text for that of a run."""
    write_json(tmp_path / "run" / "config.json", {})
    with pytest.raises(InputError, match="unfinished run"):
        train.pretrain(train.Config(out=str(tmp_path / "run"), device="cpu"))
    assert not (tmp_path / "run.lock").exists()


def test_a_stage_does_not_go_on_from_another_base(tmp_path, base, tokenizer):
    """M0 was trained again and is another one: neither M1 nor its checkpoint belongs to it."""
    model, out = MaskedLM(base.encoder, base.head), tmp_path / "run"
    optimizer = adamw(model.parameters(), 1e-3, 0.0)
    for p in model.parameters():
        p.grad = p.detach() * 0.0
    optimizer.step()
    optimizer.zero_grad()
    meta = {"name": "M1", "number": 1, "domain": "b", "parent": "old", "step": 2}
    save_base(out / "resume" / "M1-t00002", model, tokenizer, meta, optimizer)
    write_json(out / "config.json", {})
    with pretrain_run(out, resume=True) as run:
        run.begin({}, tokenizer)
        with pytest.raises(InputError, match=r"resume was trained from another base than the present one: move it away to redo the stage"):
            run.start_stage(meta | {"parent": "new"}, PretrainSettings(4, 64, 1e-3, 1, 0), None, model, optimizer, torch.float32)
        assert run.start_stage(meta, PretrainSettings(4, 64, 1e-3, 1, 0), None, model, optimizer, torch.float32) == 2
        for stage in ({}, {"stage": {}}):
            save_base(out / "M1", model, tokenizer, meta | stage)
            with pytest.raises(InputError, match="M1 is not the final base of a stage: move it away"):
                run.finished("M1", "old")
        save_base(out / "M1", model, tokenizer, meta | {"stage": {"heldout": {}}})
        with pytest.raises(InputError, match="M1 was trained from another base"):
            run.finished("M1", "new")
        assert run.finished("M1", "old").meta["step"] == 2 and run.stages == [{"heldout": {}}]


def test_rows_that_are_lost_are_counted(tmp_path, base, tokenizer, capsys):
    model, out = MaskedLM(base.encoder, base.head), tmp_path / "run"
    save_base(out / "resume" / "M0-t00003", model, tokenizer, {"name": "M0", "step": 3}, adamw(model.parameters(), 1e-3, 0.0))
    write_json(out / "config.json", {})
    for rows, lost in (([1, 2, 3], None), ([3], 2), ([], 3)):
        (out / "metrics.jsonl").write_text("".join(json.dumps({"stage": "M0", "step": step}) + "\n" for step in rows))
        with pretrain_run(out, resume=True) as run:
            run.begin({}, tokenizer)
        said = capsys.readouterr().err
        assert f"lacks {lost} rows of M0" in said if lost else not said


def test_what_a_complete_run_does_not_hold_is_said(tmp_path):
    stage = {"name": "M0", "domain": "a", "heldout": {"a": {"loss": 2.0, "accuracy": 0.5}}}
    write_json(tmp_path / "summary.json", {"stages": [stage]})
    assert "2.000 (0.500)" in table_of(tmp_path)
    for stages in (3, [], [3], [{"heldout": {"a": {"loss": "x"}}}], [stage | {"heldout": {"a": {"loss": "x", "accuracy": 1}}}], None):
        write_json(tmp_path / "summary.json", {"stages": stages})
        with pytest.raises(InputError, match="does not hold the stages"):
            table_of(tmp_path)


def test_rows_past_the_resumable_checkpoint_are_done_again(tmp_path):
    rows = [{"stage": "M0", "step": 9}, {"stage": "M0", "step": 10, "heldout": {}}, {"stage": "M1", "step": 4}, {"stage": "M1", "step": 5},
            {"stage": "M1", "step": 4, "heldout": {}}]
    assert all(is_done_again(row, tmp_path, {}) for row in rows)
    (tmp_path / "M0").mkdir()
    (tmp_path / "M0" / "meta.json").touch()
    newest = {"M1": 4}
    assert [is_done_again(row, tmp_path, newest) for row in rows] == [False, False, False, True, True]
    for stage in ("../x", "M" * 5000, "M0/../..", "", None, "M-1"):
        with pytest.raises(InputError, match="a row that belongs to no step of a stage"):
            is_done_again({"stage": stage, "step": 1}, tmp_path, newest)


def test_the_table_has_a_line_a_base_and_a_column_a_domain():
    stages = [{"name": f"M{i}", "domain": d, "heldout": {e: {"loss": i + 1.5, "accuracy": 0.25} for e in "ab"}} for i, d in enumerate("ab")]
    lines = forgetting_table(stages).splitlines()
    assert [line.split() for line in lines[1:]] == [["after", "a", "b"], ["M0", "(a)", *["1.500", "(0.250)"] * 2],
                                                    ["M1", "(b)", *["2.500", "(0.250)"] * 2]]


def test_a_stage_that_is_done_again_keeps_its_own_checkpoints_and_those_of_later_stages(tmp_path, base, tokenizer):
    model, later = MaskedLM(base.encoder, base.head), ["M1-t00004", "M1-t00006"]
    optimizer, about = adamw(model.parameters(), 1e-3, 0.0), {"name": "M0", "number": 0, "domain": "a", "parent": None}
    with pretrain_run(tmp_path / "run") as run:
        run.begin({}, tokenizer)
        run.start_stage(about, PretrainSettings(4, 64, 1e-3, 1, 0), None, model, optimizer, torch.float32)
        for name in later:
            (tmp_path / "run" / "resume" / name).mkdir(parents=True)
        for step in (1, 2, 3):
            run.save(tmp_path / "run" / "resume" / f"M0-t{step:05d}", optimizer)
    assert sorted(path.name for path in (tmp_path / "run" / "resume").iterdir()) == ["M0-t00002", "M0-t00003", *later]


def test_what_a_killed_process_left_beside_a_complete_run_is_removed(tmp_path):
    for name in ("config.json", "summary.json"):
        write_json(tmp_path / "run" / name, {})
    (tmp_path / "run" / "resume" / "M0-t00001").mkdir(parents=True)
    assert not has_work(tmp_path / "run", {}, resume=True, defaults={}) and not (tmp_path / "run" / "resume").exists()
    for name in ("M0-t00001", "M0-t00002.part", "deltas/M0-t00001-math-full-s0"):      # tuned on a checkpoint of the unfinished run
        (tmp_path / "run" / "resume" / name).mkdir(parents=True)
    assert not has_work(tmp_path / "run", {}, resume=True, defaults={})
    assert [path.name for path in (tmp_path / "run" / "resume").glob("**/*")] == ["deltas", "M0-t00001-math-full-s0"]


def test_the_seconds_before_an_interruption_count(tmp_path, base, tokenizer):
    model, out = MaskedLM(base.encoder, base.head), tmp_path / "run"
    optimizer, meta = adamw(model.parameters(), 1e-3, 0.0), {"name": "M0", "number": 0, "domain": "a", "parent": None, "step": 2}
    for p in model.parameters():
        p.grad = p.detach() * 0.0
    optimizer.step()
    save_base(out / "resume" / "M0-t00002", model, tokenizer, meta | {"seconds": 10**6}, optimizer)
    write_json(out / "config.json", {})
    with pretrain_run(out, resume=True) as run:
        run.begin({}, tokenizer)
        run.start_stage(meta, PretrainSettings(4, 64, 1e-3, 1, 0), None, model, optimizer, torch.float32)
        assert time.perf_counter() - run.started >= 10**6


def test_rows_are_on_the_disk_before_a_checkpoint(tmp_path, tokenizer, base, monkeypatch):
    model, order, synced = MaskedLM(base.encoder, base.head), [], []
    with pretrain_run(tmp_path / "run") as run:
        run.begin({}, tokenizer)
        run.about, run.model, run.optimizer, run.recipe, run.step, run.skipped = {"number": 0}, model, None, Recipe(), 1, 0
        with monkeypatch.context() as patch:
            patch.setattr(run.log, "sync", lambda: order.append("rows"))
            patch.setattr(resume, "save_base", lambda *_: order.append("checkpoint"))
            run.save(tmp_path / "run" / "M0")
        monkeypatch.setattr(os, "fsync", synced.append)
        run.log.sync()
        assert order == ["rows", "checkpoint"] and synced == [run.log.file.fileno()]


def test_the_second_signal_ends_it_at_once(tmp_path):
    run = pretrain_run(tmp_path / "run")
    run.on_signal(signal.SIGINT, None)
    with pytest.raises(Interrupted, match="^interrupted: what was finished is kept$"):
        run.on_signal(signal.SIGINT, None)


def test_checkpoints_are_ordered_by_numbers_not_names(tmp_path):
    for name in ("M9-t00300", "M10-t99999", "M10-t100000"):
        (tmp_path / "resume" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["M10-t100000", "M10-t99999", "M9-t00300"]


def test_a_run_without_a_finished_base_is_said_to_be_one(tmp_path):
    write_json(tmp_path / "run" / "config.json", {"stream": ["python"]})
    with pytest.raises(InputError, match="run: is a run, not a base; give one of its bases: none is finished yet"):
        open_base(str(tmp_path / "run"))
