"""Training speed: tokens per second and MFU (model FLOPs utilisation; Chowdhery et al., 2022). MFU is the share of the device's peak that
the algorithm's matrix products use, forward and backward on real tokens, without padding or recomputation."""
import time
from contextlib import contextmanager
from typing import Iterator

import torch

from rt.model import Batch, EncoderConfig
from rt.speed.device import peak_flops


def step_flops(config: EncoderConfig, lengths: list[int], predicted: int = 0, frozen: bool = False) -> float:
    """FLOPs of a training step on sequences of these lengths; `predicted` of their rows go through the masked-LM head. A multiply-add is 2
    forward and twice that backward; a frozen base's matrices have no gradients. Deltas and task heads are left out."""
    d, V, N = config.hidden_size, config.vocab_size, sum(lengths)
    linears = 2 * N * (4 * d * d + 2 * d * config.ffn_size)
    attention = 4 * d * sum(n * n for n in lengths)
    head = 2 * predicted * d * (d + V)
    return config.num_layers * ((2.0 if frozen else 3.0) * linears + 3.0 * attention) + 3.0 * head


class Throughput:
    """The speed of a loop: count its batches, then call str(throughput). All `world` ranks are assumed to be as fast as this one."""
    def __init__(self, config: EncoderConfig, device: torch.device, precision: torch.dtype, frozen: bool = False, world: int = 1):
        self.config, self.frozen, self.world, self.peak = config, frozen, world, peak_flops(device, precision)
        self.restart()

    def restart(self) -> None:
        self.tokens, self.flops, self.since = 0, 0.0, time.perf_counter()

    def count(self, batch: Batch) -> None:
        """Count a batch that is trained on; it must be on the host."""
        self.tokens += len(batch.ids)
        if self.peak:
            predicted = 0 if batch.predict is None else len(batch.predict)
            self.flops += step_flops(self.config, batch.cu_seqlens.diff().tolist(), predicted, self.frozen)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not counted: evaluations, checkpoints."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def __str__(self) -> str:
        if not self.tokens:
            return "- tok/s"
        seconds = time.perf_counter() - self.since
        mfu = f", MFU {self.flops / seconds / self.peak:.1%}" if self.peak else ""
        return f"{self.world * self.tokens / seconds:,.0f} tok/s{mfu}"
