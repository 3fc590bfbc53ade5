"""How fast training goes: the arithmetic of a step, tokens per second and MFU, as a progress bar says them.

MFU (model FLOPs utilisation; Chowdhery et al., 2022) is the share of the device's peak that the algorithm's own arithmetic takes: matrix
products on real tokens, forward and backward, nothing twice. What fills a batch up, or is computed again, does not count.
"""
import time
from contextlib import contextmanager
from typing import Iterator

import torch

from rt.model import Batch, EncoderConfig
from rt.speed.device import peak_flops


def step_flops(config: EncoderConfig, lengths: list[int], predicted: int = 0, frozen: bool = False) -> float:
    """Of a training step on sequences of these lengths: 2 a multiply-add forward, twice that backward; `predicted` rows go through the
    masked-LM head. On a frozen base no gradients of its matrices are computed. A delta's own products and the task head are left out."""
    d, V, N = config.hidden_size, config.vocab_size, sum(lengths)
    linears = 2 * N * (4 * d * d + 2 * d * config.ffn_size)
    attention = 4 * d * sum(n * n for n in lengths)
    head = 2 * predicted * d * (d + V)
    return config.num_layers * ((2.0 if frozen else 3.0) * linears + 3.0 * attention) + 3.0 * head


class Throughput:
    """What a bar says of the speed of a loop: count its batches, then str(pace). `world` ranks are taken to go as fast as this one."""

    def __init__(self, config: EncoderConfig, device: torch.device, precision: torch.dtype, frozen: bool = False, world: int = 1):
        self.config, self.frozen, self.world, self.peak = config, frozen, world, peak_flops(device, precision)
        self.restart()

    def restart(self) -> None:
        self.tokens, self.flops, self.since = 0, 0.0, time.perf_counter()

    def count(self, batch: Batch) -> None:
        """A batch, still on the host, that is trained on."""
        self.tokens += len(batch.ids)
        if self.peak:
            predicted = 0 if batch.predict is None else len(batch.predict)
            self.flops += step_flops(self.config, batch.cu_seqlens.diff().tolist(), predicted, self.frozen)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count: evaluations, checkpoints."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def __str__(self) -> str:
        if not self.tokens:
            return "- tok/s"
        seconds = time.perf_counter() - self.since
        said = f"{self.world * self.tokens / seconds:,.0f} tok/s"
        return said + (f", MFU {self.flops / seconds / self.peak:.1%}" if self.peak else "")
