"""The folder of a stream: when a run may start or continue there, which rows it redoes, and its table."""
import signal

import pytest
import torch

from rt.errors import InputError
from rt.formats.files import write_json
from rt.runs.resume import PretrainRun, has_work, is_done_again, stage_of, table_of
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
    with PretrainRun(tmp_path / "run", Ranks(torch.device("cpu")), {}, resume=False, snapshots=0, save_every=1, log_every=1,
                     stop_after=None) as run:
        assert signal.getsignal(signal.SIGTERM) is before       # while corpora are tokenized, a signal ends the process at once
        run.begin({}, tokenizer)
        assert signal.getsignal(signal.SIGTERM) == run.on_signal
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_complete_run_does_not_hold_is_said(tmp_path):
    stage = {"name": "M0", "domain": "a", "heldout": {"a": {"loss": 2.0, "accuracy": 0.5}}}
    write_json(tmp_path / "summary.json", {"stages": [stage]})
    assert "2.000 (0.500)" in table_of(tmp_path) and stage_of({"stage": stage}, tmp_path) == stage
    for stages in (3, [], [3], [{"heldout": {"a": {"loss": "x"}}}], [stage | {"heldout": {"a": {"loss": "x", "accuracy": 1}}}], None):
        write_json(tmp_path / "summary.json", {"stages": stages})
        with pytest.raises(InputError, match="does not hold the stages"):
            table_of(tmp_path)
    for meta in ({}, {"stage": 3}, {"stage": {}}):
        with pytest.raises(InputError, match="is not the final base of a stage"):
            stage_of(meta, tmp_path)


def test_rows_past_the_resumable_checkpoint_are_done_again(tmp_path):
    rows = [{"stage": "M0", "step": 9}, {"stage": "M0", "step": 10, "heldout": {}}, {"stage": "M1", "step": 4}, {"stage": "M1", "step": 5},
            {"stage": "M1", "step": 4, "heldout": {}}]
    assert all(is_done_again(row, tmp_path, {}) for row in rows)
    (tmp_path / "M0").mkdir()
    (tmp_path / "M0" / "meta.json").touch()
    newest = {"name": "M1", "step": 4}
    assert [is_done_again(row, tmp_path, newest) for row in rows] == [False, False, False, True, True]
    for stage in ("../x", "M" * 5000, "M0/../..", "", None, "M-1"):
        with pytest.raises(InputError, match="a row that belongs to no step of a stage"):
            is_done_again({"stage": stage, "step": 1}, tmp_path, newest)


def test_the_table_has_a_line_a_base_and_a_column_a_domain():
    stages = [{"name": f"M{i}", "domain": d, "heldout": {e: {"loss": i + 1.5, "accuracy": 0.25} for e in "ab"}} for i, d in enumerate("ab")]
    lines = forgetting_table(stages).splitlines()
    assert [line.split() for line in lines[1:]] == [["after", "a", "b"], ["M0", "(a)", *["1.500", "(0.250)"] * 2],
                                                    ["M1", "(b)", *["2.500", "(0.250)"] * 2]]
