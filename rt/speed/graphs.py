"""Ways to take a step faster: batches prepared ahead on another thread, torch.compile of the blocks, and CUDA graphs of forward and
backward.

A compiled or captured step needs batches of few shapes: `static_batch` in pre-training, rt.speed.multi_run.side_by_side with a bucket in
tuning.
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Callable, Iterable, Iterator, TypeVar

import torch
from torch import Tensor, nn

import rt.model
from kernels import attention_qkv
from kernels.common import uses_triton
from rt.data import Rows
from rt.errors import InputError
from rt.model import Batch, MaskedLM
from rt.optim import memory_for
from rt.pretrain import MLMLoss, PretrainSettings
from rt.speed.dist import Ranks

WARM_UP = 3     # runs before a capture: by then everything is compiled, allocated or chosen
DEPTH = 3       # batches prepared before they are asked for
T = TypeVar("T")


# --- batches ----------------------------------------------------------------------------------------------------------

def prefetch(items: Iterable[T], depth: int = DEPTH) -> Iterator[T]:
    """The same items, made on another thread up to `depth` before they are asked for. An error of the thread is raised here; when the loop
    over this is left (close it), the thread ends."""
    items, end, pool = iter(items), object(), ThreadPoolExecutor(1, "prefetch")
    waiting = deque(pool.submit(next, items, end) for _ in range(depth))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def staged(batches: Iterable[Batch], rows: Rows, device: torch.device, static: bool) -> Iterator[Batch]:
    """The same batches, pinned for a CUDA device, and there or if `static` of static shapes."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)     # of this thread: pinning must not touch another GPU
    for batch in batches:
        batch = static_batch(rows, batch) if static or cuda else batch
        yield replace(batch, **{k: v.pin_memory() for k, v in tensors(batch).items()}) if cuda else batch


def static_batch(rows: Rows, batch: Batch) -> Batch:
    """The same batch in shapes that a compiled or captured step can rely on: cu_seqlens ends in repeated N, which are sequences without
    tokens and change nothing; max_seqlen is seq_len.

    There is room for the mean number of sequences and six standard deviations more (renewal theory), which about one batch in a billion
    exceeds; that one gets more, in steps of 64. A bound that no batch can exceed would be far higher, and every sequence, empty or not,
    costs attention a launched block.
    """
    n, per_row = len(batch.ids), len(batch.ids) // rows.row_tokens
    deviation = rows.length_deviation * (n / rows.mean_length ** 3) ** 0.5
    most = max(n / rows.mean_length + 6 * deviation + 2 * per_row, len(batch.cu_seqlens) - 1)      # a row's ends cut sequences in two
    room = -(-int(most) // 64) * 64 + 1
    padded = torch.full((room,), n, dtype=torch.int32)
    padded[:len(batch.cu_seqlens)] = batch.cu_seqlens
    return replace(batch, cu_seqlens=padded, max_seqlen=rows.seq_len)


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


# --- torch.compile ----------------------------------------------------------------------------------------------------

@contextmanager
def compiled(blocks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the blocks' forward is compiled, once for all blocks of one shape; evaluation, which has other shapes, is for outside. Names
    in their state_dict stay as they are.

    If the kernels run on `device`, a block is one graph, our ops inside. Otherwise attention stays outside the graph: its reference loops
    over the sequences in Python, and would be compiled anew for the lengths of every batch.
    """
    blocks, attention, whole = list(blocks), rt.model.attention_qkv, kernels_run(device)
    if blocks:
        torch._dynamo.config.optimize_ddp = False   # it cuts what it compiles at the gradients' buckets; blocks are small enough
        rt.model.attention_qkv = attention_qkv if whole else torch.compiler.disable(attention_qkv)
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=whole, dynamic=False)
    try:
        yield
    finally:
        rt.model.attention_qkv = attention
        for block in blocks:
            del block.forward       # the class's own again


def kernels_run(device: torch.device) -> bool:
    """Whether tensors on `device` take the kernels (RT_KERNELS), not the references."""
    return uses_triton(torch.empty(0, device=device))


# --- gradients of a pre-training step ---------------------------------------------------------------------------------

def make_gradient(model: MaskedLM, s: PretrainSettings, ranks: Ranks, precision: torch.dtype,
                  graphs: bool = False) -> Callable[[Batch, int], Tensor]:
    """gradient(batch, part) adds the gradient of the `part`-th microbatch of a step to the model's, which part 0 clears, and returns the
    loss; the last part averages over the ranks. `graphs`: by CUDA graphs. Raises InputError if memory runs out."""
    loss = MLMLoss(model, s.accumulation, precision)
    gradient_of = GraphedGradient(loss, s.accumulation, ranks.device) if graphs else PlainGradient(loss, s.accumulation, ranks)

    def gradient(batch: Batch, part: int) -> Tensor:
        with memory_for(f"a share of {len(batch.ids)} tokens",
                        f"`batch_tokens` ({s.batch_tokens}), or raise `accumulation` ({s.accumulation})"):
            return gradient_of(batch, part)

    return gradient


class PlainGradient:
    """`loss(batch).backward()`, averaged over the ranks in the last part of a step."""

    def __init__(self, loss: MLMLoss, parts: int, ranks: Ranks):
        self.loss, self.parts, self.ranks = ranks.parallel(loss), parts, ranks

    def __call__(self, batch: Batch, part: int) -> Tensor:
        if part == 0:
            self.loss.zero_grad(set_to_none=True)
        alone = self.ranks.world > 1 and part < self.parts - 1
        with self.loss.no_sync() if alone else nullcontext():
            loss = self.loss(batch.to(self.ranks.device))
            loss.backward()
        return loss.detach()


class GraphedGradient:
    """`loss(batch).backward()` as a CUDA graph: one launch in place of about a thousand.

    Everything a graph reads or writes keeps its address. A batch is copied into the buffers of the first one. The gradients are the graph's
    own memory: the first part of a step overwrites the step before, the others are added. A batch of another shape (`static_batch`: next to
    never) is computed without the graph, into the same memory.
    """

    def __init__(self, loss: nn.Module, parts: int, device: torch.device):
        self.loss, self.parts, self.device = loss, parts, device
        self.batch: Batch | None = None

    def __call__(self, batch: Batch, part: int) -> Tensor:
        """The loss of `batch`, pinned and on the host. The next call overwrites it."""
        if self.batch is None:
            self._capture(batch)
        ours, new = tensors(self.batch), tensors(batch)
        if any(ours[name].shape != new[name].shape for name in ours):
            if part == 0:
                self.loss.zero_grad(set_to_none=False)
            loss = self.loss(batch.to(self.device))
            loss.backward()
            return loss.detach()
        for name in ours:
            ours[name].copy_(new[name], non_blocking=True)
        graph, loss = self.overwriting if part == 0 else self.adding
        graph.replay()
        return loss

    def _capture(self, batch: Batch) -> None:
        self.batch = batch.to(self.device)
        warm_up(lambda: self.loss(self.batch).backward(), lambda: self.loss.zero_grad(set_to_none=True), self.device)
        self.overwriting = self._record(None)
        self.adding = self._record(self.overwriting[0].pool()) if self.parts > 1 else None

    def _record(self, pool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that prepares batches may pin memory meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = self.loss(self.batch)
            loss.backward()
        return graph, loss.detach()


def warm_up(run: Callable[[], object], clear: Callable[[], None], device: torch.device) -> None:
    """`run` a few times on a stream of its own, as capturing wants it. `clear` drops the gradients, before each and at the end, so that the
    captured backward allocates them in the graph's memory and each replay overwrites them."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            clear()
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    clear()


class GraphedStep:
    """gradient(batch, shares), a forward and backward pass, as a CUDA graph for each of the few shapes that batches have: otherwise a small
    batch waits for a thousand launches.

    Batch and shares come from the host and are copied into the graph's own. Each graph has gradients of its own, which `parameters` get
    when it is replayed, and which the next replay overwrites. The value of `gradient` is on the device and lasts as long.
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

        warm_up(lambda: self.gradient(batch, shares), clear, self.device)
        graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph, *_ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            value = self.gradient(batch, shares)
        return graph, [*tensors(batch).values(), shares], [p.grad for p in self.parameters], value


def check_graphs(wanted: bool, ranks: Ranks) -> None:
    """Raises InputError if --graphs is not possible."""
    if wanted and ranks.device.type != "cuda":
        raise InputError(f"--graphs captures CUDA graphs, and the device is {ranks.device}: leave it out, or use --device cuda")
    if wanted and ranks.world > 1:
        raise InputError("--graphs is for one GPU: with several, the gradients' exchange runs beside the backward, which a captured one "
                         "cannot wait for; use --compile")
    if wanted and not kernels_run(ranks.device):
        raise InputError("--graphs captures the kernels, and the references would run: install Triton, or leave RT_KERNELS=ref out")
