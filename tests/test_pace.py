"""What a progress bar says: the FLOPs of a step against PyTorch's own count, peaks by name, time that does not count; and that it says
nothing without a terminal."""
import io
import sys
from functools import partial

import pytest
import torch
from conftest import pretrained, random_base
from test_pretrain import rows  # noqa: F401  (a fixture)
from test_tune import toy  # noqa: F401  (the same)
from torch.utils.flop_counter import FlopCounterMode

from rt.deltas import attach
from rt.kinds import DeltaConfig
from rt.losses import Loss
from rt.model import PRESETS, EncoderConfig, MaskedLM, new_masked_lm
from rt.optim import adamw
from rt.pretrain import PretrainSettings, mlm_loss
from rt.runs import log
from rt.runs.log import StepBar
from rt.speed import throughput as pace
from rt.speed.device import make_deterministic, peak_flops, pick_precision
from rt.speed.throughput import Throughput, step_flops
from rt.tune import TuneSettings, tune

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def counted(compute) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def test_flops_are_those_that_pytorch_counts(tokenizer, batch):
    """Of the encoder alone, forward and backward."""
    base, lengths = random_base(tokenizer), batch.cu_seqlens.diff().tolist()
    config = base.encoder.config
    assert counted(lambda: base.encoder(batch).sum().backward()) == step_flops(config, lengths)
    frozen = attach(base, DeltaConfig("bitfit"), 2, seed=0)
    full = counted(lambda: base.encoder(batch).sum().backward())
    less = counted(lambda: frozen.encoder(batch).sum().backward())
    assert less == step_flops(config, lengths, frozen=True) < full


def test_the_head_counts_predicted_rows_only(tokenizer, batch):
    base, config = random_base(tokenizer), random_base(tokenizer).encoder.config
    batch.predict, batch.labels = torch.tensor([3, 9, 20]), torch.tensor([7, 8, 9])
    found = counted(lambda: mlm_loss(MaskedLM(base.encoder, base.head), batch).backward())
    assert found == step_flops(config, batch.cu_seqlens.diff().tolist(), predicted=3)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5),
    ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3090 Ti", 80),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla V100-SXM2-16GB", None)])
def test_peaks_by_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, torch.bfloat16) == (peak and pytest.approx(peak * 1e12))
    assert peak_flops(CUDA, torch.float32) is None and peak_flops(CPU, torch.bfloat16) is None


def test_tokens_a_second_and_mfu_without_the_pauses(tokenizer, batch, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    config = random_base(tokenizer).encoder.config
    flops = step_flops(config, batch.cu_seqlens.diff().tolist())
    monkeypatch.setattr(pace, "peak_flops", lambda device, precision: flops)        # a step per second is the maximum
    p = Throughput(config, CUDA, torch.bfloat16, world=2)
    assert str(p) == "- tok/s"
    p.count(batch)
    clock[0] += 2.0
    with p.pause():
        clock[0] += 50.0
    clock[0] += 2.0
    assert str(p) == f"{2 * len(batch.ids) / 4:,.0f} tok/s, MFU 25.0%"
    p.restart()
    assert str(p) == "- tok/s"
    monkeypatch.setattr(pace, "peak_flops", lambda device, precision: None)
    p = Throughput(config, CPU, torch.float32)
    p.count(batch)
    clock[0] += 1.0
    assert str(p) == f"{len(batch.ids):,} tok/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pretraining(tokenizer, toy, rows, tmp_path) -> None:  # noqa: F811
    model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), seed=0)
    settings = PretrainSettings(steps=4, batch_tokens=512, lr=1e-3, warmup_steps=1, seed=0)
    folder, optimizer = tmp_path / str(len(list(tmp_path.iterdir()))), adamw(model.parameters(), 0.0, 0.01)
    found = pretrained(folder, model, rows["train"], optimizer, settings, tokenizer)
    assert [row["step"] for row in found] == [1, 2, 3, 4]


def tuning(tokenizer, toy, rows, tmp_path) -> None:  # noqa: F811
    model = attach(random_base(tokenizer), DeltaConfig("lora"), 2, seed=0)
    with StepBar(4, "tuning", model.encoder.config, CPU, torch.float32, frozen=True) as bar:
        tune(model, toy, Loss(), TuneSettings(4, 16, 1e-3, 2, seed=0), device=CPU, precision=torch.float32, on_step=bar.on_step,
             on_eval=bar.on_eval)


@pytest.mark.parametrize("loop", [pretraining, tuning])
def test_a_bar_on_a_terminal_and_nothing_elsewhere(loop, tokenizer, toy, rows, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(pace, "peak_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(log, "tqdm", partial(log.tqdm, mininterval=0))
    loop(tokenizer, toy, rows, tmp_path)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    loop(tokenizer, toy, rows, tmp_path)
    *_, last, cleared, end = screen.getvalue().split("\r")
    assert not cleared.strip() and not end      # it leaves no line behind
    for words in ("4/4 [", "<00:00", "loss ", " tok/s, MFU "):     # steps, time left, ...
        assert words in last


def test_the_bar_shows_the_best_score_so_far(base):
    with StepBar(4, "x", base.encoder.config, CPU, torch.float32, False) as bar:
        for step, dev in ((0, 0.1), (1, 0.8), (2, 0.5)):
            bar.on_eval({"step": step, "loss": 1.0, "dev": {"accuracy": dev}})
        assert "best dev 0.800" in bar.bar.postfix


@pytest.mark.parametrize("capability, fast", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)])
def test_bf16_is_for_gpus_with_matrix_units_for_it(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", CUDA) == (torch.bfloat16 if fast else torch.float32)
    assert (pick_precision("bf16", CUDA), pick_precision("fp32", CUDA)) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("flags, fast", [("fma avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_tile amx_bf16", True)])
def test_bf16_is_for_cpus_with_matrix_units_for_it(flags, fast, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr("rt.speed.device.Path", lambda path: tmp_path / "cpuinfo")
    assert pick_precision("auto", CPU) == (torch.bfloat16 if fast else torch.float32)


def test_determinism_only_where_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    make_deterministic(False)
    assert asked == [] and torch.utils.deterministic.fill_uninitialized_memory
    make_deterministic(True)
    assert asked == [True] and not torch.utils.deterministic.fill_uninitialized_memory


def test_a_batch_counts_with_its_predicted_rows_and_as_frozen(tokenizer, batch, monkeypatch):
    monkeypatch.setattr(pace, "peak_flops", lambda device, precision: 1.0)
    config, lengths = random_base(tokenizer).encoder.config, batch.cu_seqlens.diff().tolist()
    batch.predict = torch.tensor([3, 9, 20])
    for frozen in (False, True):
        p = Throughput(config, CPU, torch.float32, frozen)
        p.count(batch)
        assert p.flops == step_flops(config, lengths, 3, frozen)
