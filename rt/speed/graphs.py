"""Two ways to spend less time between kernels: torch.compile of the blocks, and a forward and backward pass as one CUDA graph.

Both need shapes that do not change: Rows.static in pre-training, rt.data.side_by_side with a bucket in tuning.
"""
from contextlib import contextmanager
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import rt.model
from kernels import attention_qkv
from kernels.common import uses_triton
from rt.errors import InputError
from rt.model import Batch
from rt.speed.dist import Ranks

BUCKET = 128    # tokens: the steps in which tuning's batches grow where each shape is a graph


WARM_UP = 3     # runs before the capture: what is compiled, allocated or chosen at first use is so by then


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Compile the blocks' forward, once for all blocks of one shape. Names in their state_dict stay as they are.

    Where the kernels run, a block is one graph, our ops inside. Elsewhere the attention stays outside: its reference goes through the
    sequences in Python, and would be compiled anew for the lengths of every batch.
    """
    whole = kernels_run(device)
    torch._dynamo.config.optimize_ddp = False   # it cuts what it compiles at the gradients' buckets; blocks are small enough
    rt.model.attention_qkv = attention_qkv if whole else torch.compiler.disable(attention_qkv)
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=whole, dynamic=False)


@contextmanager
def compiled(blocks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the blocks are compiled; evaluation, which has other shapes, is for outside."""
    blocks, attention = list(blocks), rt.model.attention_qkv
    if blocks:
        compile_blocks(blocks, device)
    try:
        yield
    finally:
        rt.model.attention_qkv = attention
        for block in blocks:
            del block.forward       # the class's own again


def kernels_run(device: torch.device) -> bool:
    """Whether tensors on `device` take the kernels (RT_KERNELS), not the references."""
    return uses_triton(torch.empty(0, device=device))


class GraphedStep:
    """gradient(batch, shares), a forward and backward pass, as a CUDA graph for each of the few shapes that batches have
    (rt.data.side_by_side with a bucket): what a small batch waits for is a thousand launches.

    Batch and shares come from the host and are copied into the graph's own. Each graph has gradients of its own, which `parameters` get
    when it is replayed, and which the next replay overwrites. What `gradient` returns is on the device and lasts as long.
    """

    def __init__(self, gradient: Callable[[Batch, Tensor], Tensor], parameters: list[nn.Parameter], device: torch.device):
        self.gradient, self.parameters, self.device = gradient, parameters, device
        self.graphs: dict[tuple, tuple] = {}

    def __call__(self, batch: Batch, shares: Tensor) -> Tensor:
        new = [*tensors(batch).values(), shares]
        key = (batch.max_seqlen, *(x.shape for x in new))
        if key not in self.graphs:
            self.graphs[key] = self._capture(batch.to(self.device), shares.to(self.device))
        graph, ours, gradients, value = self.graphs[key]
        for mine, x in zip(ours, new):
            mine.copy_(x, non_blocking=True)
        graph.replay()
        for p, g in zip(self.parameters, gradients):
            p.grad = g
        return value

    def _capture(self, batch: Batch, shares: Tensor) -> tuple:
        def clear() -> None:
            for p in self.parameters:
                p.grad = None

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                clear()
                self.gradient(batch, shares)
        torch.cuda.current_stream(self.device).wait_stream(side)
        clear()     # so that the backward allocates gradients, in the graph's memory
        graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph, *_ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            value = self.gradient(batch, shares)
        return graph, [*tensors(batch).values(), shares], [p.grad for p in self.parameters], value


class GraphedGradient:
    """`objective(batch).backward()` as a CUDA graph: one launch in place of about a thousand.

    All that a graph reads or writes stays where it is. A batch is copied into the buffers of the first one. The gradients are the
    graph's own memory: the first share of a step is written over the step before, the others are added. A batch of another shape
    (Rows.static: next to never) is computed without the graph, into the same memory.
    """

    def __init__(self, objective: nn.Module, parts: int, device: torch.device):
        self.objective, self.parts, self.device = objective, parts, device
        self.batch: Batch | None = None

    def __call__(self, batch: Batch, part: int) -> Tensor:
        """The loss of `batch` (pinned, on the host), the `part`-th of its step. Not to be kept: the next call overwrites it."""
        if self.batch is None:
            self._capture(batch)
        ours, new = tensors(self.batch), tensors(batch)
        if any(ours[name].shape != new[name].shape for name in ours):
            if part == 0:
                self.objective.zero_grad(set_to_none=False)
            loss = self.objective(batch.to(self.device))
            loss.backward()
            return loss.detach()
        for name in ours:
            ours[name].copy_(new[name], non_blocking=True)
        graph, loss = self.overwriting if part == 0 else self.adding
        graph.replay()
        return loss

    def _capture(self, batch: Batch) -> None:
        self.batch = batch.to(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.objective.zero_grad(set_to_none=True)
                self.objective(self.batch).backward()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.objective.zero_grad(set_to_none=True)      # so that the backward allocates gradients, which each replay then overwrites
        self.overwriting = self._record(None)
        self.adding = self._record(self.overwriting[0].pool()) if self.parts > 1 else None

    def _record(self, pool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that prepares batches may pin memory meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = self.objective(self.batch)
            loss.backward()
        return graph, loss.detach()


def check_graphs(wanted: bool, ranks: Ranks) -> None:
    """InputError where --graphs cannot be."""
    if wanted and ranks.device.type != "cuda":
        raise InputError(f"--graphs captures CUDA graphs, and the device is {ranks.device}: leave it out, or use --device cuda")
    if wanted and ranks.world > 1:
        raise InputError("--graphs is for one GPU: with several, the gradients' exchange runs beside the backward, which a captured one "
                         "cannot wait for; use --compile")
    if wanted and not kernels_run(ranks.device):
        raise InputError("--graphs captures the kernels, and the references would run: install Triton, or leave RT_KERNELS=ref out")


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
