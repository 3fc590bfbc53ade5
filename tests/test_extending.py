"""What a reader can add: a kind of delta takes one class and one row of KINDS, a loss term one function and one field. Both are added here,
in the test file, and everything derived from the tables works with them."""
import json
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import here, write_task
from torch import Tensor, nn

from recycle import Config
from rt import losses
from rt.data import Encoded, TaskData
from rt.deltas import apply, attach, extract, merge
from rt.errors import InputError
from rt.formats.checkpoint import save_base
from rt.formats.delta_files import load_delta, save_delta
from rt.kinds import ADDED, KINDS, DeltaConfig, Kind
from rt.losses import TERMS, DistillConfig, Loss, TeacherCache
from rt.model import MaskedLM
from rt.recycling import MODES, TRAINED, Recycling, recycle
from rt.report.inspect import inspect
from rt.runs.plan import learning_rates
from rt.runs.results import Run
from rt.speed.multi_run import can_go_together
from rt.tune import TuneSettings, tune

CPU = {"device": torch.device("cpu"), "precision": torch.float32}


class Shift(nn.Module):
    """x + shift, which starts at zero."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(hidden_size))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.fixture
def shift(monkeypatch) -> DeltaConfig:
    """The new kind, in KINDS for one test."""
    monkeypatch.setitem(KINDS, "shift", Kind(lambda block, c: {"adapter_ffn": Shift(block.qkv.in_features)}, roles={".shift": ADDED}))
    return DeltaConfig("shift")


def task() -> TaskData:
    g = torch.Generator().manual_seed(0)
    sequences = [[0, *torch.randint(5, 500, (int(n),), generator=g).tolist(), 2] for n in torch.randint(1, 20, (12,), generator=g)]
    part = Encoded(sequences, torch.randint(3, (12,), generator=g), 0)
    return TaskData("t", ("a", "b", "c"), part, part, part)


def learned(base, config, seed=0):
    model, data = attach(base, config, 3, seed), task()
    tune(model, data, Loss(), TuneSettings(4, 4, 1e-2, 4, seed), **CPU)
    with torch.no_grad():       # whatever was best on dev: use a delta that has an effect
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval(), extract(model, base, config, {"task": "t", "labels": list(data.labels)})


def test_a_kind_is_one_class_and_one_row(shift, base, batch, tmp_path):
    model, delta = learned(base, shift)
    other = learned(base, shift, seed=1)[1]
    with torch.no_grad():
        assert torch.equal(attach(base, shift, 3, seed=0).eval().encoder(batch), base.encoder(batch))       # identity
        assert [*delta.modules] == ["layers.0.adapter_ffn.shift", "layers.1.adapter_ffn.shift"] and not delta.diffs
        save_delta(tmp_path / "d", delta)                                                                   # round trip
        again = load_delta(tmp_path / "d")
        assert again.config.used == {"kind": "shift"}
        assert torch.equal(apply(base, again).eval()(batch), model(batch)) and "shift" in inspect(tmp_path / "d")["is"]
        for ours, theirs in ((0.5 * delta + 0.5 * delta, delta), (delta + other - other, delta)):           # algebra
            torch.testing.assert_close(apply(base, ours).eval()(batch), apply(base, theirs).eval()(batch))
        changes = [apply(base, d).encoder.layers[0].adapter_ffn.shift for d in (delta, 3.0 * delta)]
        torch.testing.assert_close(changes[1], 3.0 * changes[0])
    with pytest.raises(InputError, match="shift cannot be merged"):
        merge(base, delta)


def test_all_modes_and_the_scripts_take_it(shift, base, other_base, tmp_path):
    r = Recycling(base, learned(base, shift)[1], other_base, task(), shift, TuneSettings(2, 4, 1e-3, 2, 0), DistillConfig(), **CPU)
    for mode in MODES:
        if mode not in ("project", "transport", "gradmask"):
            assert recycle(r, mode)[1].curve
    assert not can_go_together(r, "distill")        # its module takes no weights with a leading K, and the row does not say `stacks`
    for name, one in (("M0", base), ("M1", other_base)):
        save_base(tmp_path / name, MaskedLM(one.encoder, one.head), one.tokenizer, {})
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(8)]
    write_task(tmp_path / "mood", {"train": rows, "dev": rows, "test": rows})
    said = here("train.py", "--mode", "tune", "--base", tmp_path / "M0", "--task", tmp_path / "mood", "--delta", "shift",
                "--tune_steps", "2", "--eval_every", "1", "--seq_len", "16", "--out", tmp_path / "delta", "--device", "cpu")
    assert "\nmood, shift: dev accuracy" in said
    assert json.loads((tmp_path / "delta" / "delta.json").read_text())["kind"] == "shift"
    said = here("recycle.py", "--mode", "scratch,init", "--old_base", tmp_path / "M0", "--old_delta", tmp_path / "delta", "--base",
                tmp_path / "M1", "--task", tmp_path / "mood", "--delta", "shift", "--steps", "2", "--eval_every", "1", "--seq_len", "16",
                "--shots", "2", "--sweep", "seed=0,1", "--out", tmp_path / "recycled", "--device", "cpu")
    assert said.startswith("mood (2 labels, 2 examples a label), shift") and "\ninit " in said


@dataclass(frozen=True)
class ConfigWithSlots(DeltaConfig):
    slots: tuple[str, ...] = ("ffn",)


def test_a_setting_of_a_new_kind_may_be_a_list(shift, base, tmp_path, monkeypatch):
    """A file holds a list, the flag a tuple: `init` compares them."""
    monkeypatch.setitem(KINDS, "shift", Kind(KINDS["shift"].modules, settings=("slots",), roles={".shift": ADDED}))
    monkeypatch.setattr("rt.formats.delta_files.DeltaConfig", ConfigWithSlots)
    config = ConfigWithSlots("shift", slots=("ffn", "attention"))
    save_delta(tmp_path / "d", learned(base, config)[1])
    assert load_delta(tmp_path / "d").config.used == config.used == {"kind": "shift", "slots": ("ffn", "attention")}


def test_a_tensor_that_no_row_names_is_not_scaled_in_silence(shift, base, monkeypatch):
    delta = learned(base, shift)[1]
    monkeypatch.setitem(KINDS, "shift", Kind(KINDS["shift"].modules))
    with pytest.raises(InputError, match="kind shift does not say how its tensor layers.0.adapter_ffn.shift is added and scaled"):
        2.0 * delta


@dataclass(frozen=True)
class Sharp(DistillConfig):
    """DistillConfig with one more term."""
    sharp: float = 0.0      # weight of the entropy of the student's answers


def sharp(loss: Loss, logits: Tensor, activations, batch) -> Tensor:
    """(B,)"""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def test_a_loss_term_is_one_function_and_one_field(base, other_base, batch, monkeypatch):
    monkeypatch.setitem(TERMS, "sharp", sharp)
    student = attach(base, DeltaConfig("adapter"), 3, seed=0).eval()
    batch.index = torch.arange(5)
    cache = TeacherCache(torch.randn(5, 3), torch.randn(5, 2, 64))
    plain, more = (Loss(False, cache, Sharp(sharp=w))(student, batch) for w in (0.0, 2.0))
    expected = plain + 2.0 * torch.special.entr(student(batch).softmax(-1)).sum(-1).mean()
    assert more.item() == pytest.approx(expected.item(), rel=1e-6) and more.item() > plain.item()
    more.backward()
    assert any(p.grad is not None for p in student.parameters())
    config = DeltaConfig("adapter")
    r = Recycling(base, learned(base, config)[1], other_base, task(), config, TuneSettings(2, 4, 1e-3, 2, 0), Sharp(sharp=1.0), **CPU)
    for at_points in ((), ("sharp",)):      # runs side by side refuse it instead of dropping it
        monkeypatch.setattr(losses, "AT_POINTS", ("beta", *at_points))
        assert recycle(r, "distill")[1].curve and not can_go_together(r, "distill")
    monkeypatch.setattr(losses, "RUN_TEACHER", ("gamma", "sharp"))
    with pytest.raises(ValueError, match="teacher_model"):
        Loss(False, cache, Sharp(sharp=1.0))
    assert recycle(replace(r, teacher=None), "distill")[1].curve        # recycling hands over the teacher itself
    with pytest.raises(InputError, match="known by its answers"):
        recycle(replace(r, teacher=TeacherCache(torch.randn(6, 3), None), distill=Sharp(beta=0.0, sharp=1.0)), "distill")


@dataclass
class SharpConfig(Config):
    """recycle.py's Config with the term's weight as a flag."""
    distill: Sharp = Sharp()


def test_runs_keep_their_names_when_a_loss_term_comes():
    def name(distill: DistillConfig, config: type = SharpConfig, mode: str = "distill") -> str:
        return Run(config(distill=distill), mode, 0, 1e-3).name

    assert name(Sharp()) == name(DistillConfig(), Config) != name(Sharp(sharp=1.0))
    assert name(Sharp(sharp=1.0), mode="init") == name(DistillConfig(), Config, "init")


def test_a_mode_that_trains_has_learning_rates(monkeypatch):
    monkeypatch.setattr("rt.runs.plan.TRAINED", (*TRAINED, "half"))
    assert learning_rates(Config(mode=("half",), delta=DeltaConfig("full"), lr=(1e-3, 2e-3)), "half") == (1e-3, 2e-3)
    assert learning_rates(Config(mode=("half",), delta=DeltaConfig("full")), "half") == (5e-4,)
