"""Faster steps: batches prepared on another thread, torch.compile of the blocks, CUDA graphs of forward and backward.

A compiled or captured step needs batches of few shapes. `static_batch` makes them in pre-training, rt.speed.multi_run.side_by_side in
tuning.
"""
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Callable, Iterable, Iterator, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rt.model
from kernels.common import uses_triton
from rt.data import Rows
from rt.errors import InputError
from rt.model import Batch, MaskedLM
from rt.optim import autocast, memory_for
from rt.pretrain import PretrainSettings, mlm_loss
from rt.speed.dist import Ranks

WARM_UP = 3     # runs before a capture: after them everything is compiled, allocated and chosen
DEPTH = 3       # batches prepared ahead
T = TypeVar("T")


# --- batches ----------------------------------------------------------------------------------------------------------

def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items, made up to DEPTH ahead on another thread, whose errors are raised in the caller's. Closing ends the thread."""
    items, end, pool = iter(items), object(), ThreadPoolExecutor(1, "prefetch")
    waiting = deque(pool.submit(next, items, end) for _ in range(DEPTH))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def staged(batches: Iterable[Batch], rows: Rows, device: torch.device, static: bool) -> Iterator[Batch]:
    """The same batches, through `static_batch` for a CUDA device or if `static`. For a CUDA device their tensors are pinned, too."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)     # for this thread: pinning must not touch another GPU
    for batch in batches:
        batch = static_batch(rows, batch) if static or cuda else batch
        yield replace(batch, **{k: v.pin_memory() for k, v in tensors(batch).items()}) if cuda else batch


def static_batch(rows: Rows, batch: Batch) -> Batch:
    """The same batch in shapes that a compiled or captured step can rely on: max_seqlen is seq_len, and cu_seqlens is padded with N (empty
    sequences). There is room for the mean number of sequences plus six standard deviations (renewal theory). About one batch in a billion
    exceeds that and gets more room, in steps of 64. A bound for all batches would be far higher, and each sequence costs a block."""
    n, per_row = len(batch.ids), len(batch.ids) // rows.row_tokens
    deviation = rows.length_deviation * (n / rows.mean_length ** 3) ** 0.5
    most = max(n / rows.mean_length + 6 * deviation + 2 * per_row, len(batch.cu_seqlens) - 1)      # the ends of a row cut sequences in two
    room = -(-int(most) // 64) * 64 + 1 - len(batch.cu_seqlens)
    return replace(batch, cu_seqlens=nn.functional.pad(batch.cu_seqlens, (0, room), value=n), max_seqlen=rows.seq_len)


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


# --- torch.compile ----------------------------------------------------------------------------------------------------

@contextmanager
def compiled(blocks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside this context the blocks' forward is compiled, once for all blocks of one shape. Evaluate outside it: there shapes vary. If
    the kernels run on `device`, a block is one graph, including our ops. Otherwise attention is left out of the graph: its reference loops
    over the sequences in Python, and would be compiled again for the lengths of every batch."""
    blocks, attention, whole = list(blocks), rt.model.attention_qkv, kernels_run(device)
    try:
        if blocks:
            torch._dynamo.config.optimize_ddp = False   # it splits graphs at the gradient buckets; blocks are small enough
            rt.model.attention_qkv = attention if whole else torch.compiler.disable(attention)
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=whole, dynamic=False)
        yield
    finally:
        rt.model.attention_qkv = attention
        for block in blocks:
            vars(block).pop("forward", None)        # back to the class's own


def kernels_run(device: torch.device) -> bool:
    """Whether tensors on `device` use the kernels (RT_KERNELS), not the references."""
    return uses_triton(torch.empty(0, device=device))


# --- gradients --------------------------------------------------------------------------------------------------------

class LossShare(nn.Module):
    """One microbatch's share of the loss of a step with `parts` microbatches. A module, because DistributedDataParallel wraps a forward."""
    def __init__(self, model: MaskedLM, parts: int, precision: torch.dtype, loss: Callable[[MaskedLM, Batch], Tensor]):
        super().__init__()
        self.model, self.parts, self.precision, self.loss = model, parts, precision, loss

    def forward(self, batch: Batch) -> Tensor:
        with autocast(batch.ids.device, self.precision):
            return self.loss(self.model, batch) / self.parts


def make_gradient(model: MaskedLM, s: PretrainSettings, ranks: Ranks, precision: torch.dtype, graphs: bool = False,
                  loss: Callable[[MaskedLM, Batch], Tensor] = mlm_loss) -> Callable[[Batch, int], Tensor]:
    """Returns gradient(batch, part), which adds the gradient of `loss` on a step's microbatch `part` and returns the loss. The last part
    averages over the ranks. With `graphs`, it uses CUDA graphs, and part 0 overwrites the gradients. InputError if memory runs out."""
    share = LossShare(model, s.accumulation, precision, loss)
    if ranks.world > 1:     # averages gradients over the ranks, and sends rank 0's weights to all
        share = DistributedDataParallel(share, gradient_as_bucket_view=True)

    def plain(batch: Batch) -> Tensor:
        value = share(batch.to(ranks.device))
        value.backward()
        return value.detach()

    def eager(batch: Batch, part: int) -> Tensor:
        with share.no_sync() if ranks.world > 1 and part < s.accumulation - 1 else nullcontext():
            return plain(batch)

    gradient_of = CudaGraphs(plain, [*model.parameters()], ranks.device, adds=s.accumulation > 1) if graphs else eager

    def gradient(batch: Batch, part: int) -> Tensor:
        lower = f"`batch_tokens` ({s.batch_tokens}), or raise `accumulation` ({s.accumulation})"
        with memory_for(f"a share of {len(batch.ids)} tokens", lower):
            return gradient_of(batch, part=part)

    return gradient


class CudaGraphs:
    """gradient(batch, *more), a forward and backward pass, as a CUDA graph for each of the few shapes of its arguments: one launch
    instead of about a thousand. A graph reads fixed addresses, so every call copies its arguments, which are on the host, into the
    graph's own tensors. The parameters' gradients are in the first graph's memory. Graphs of other shapes copy their gradients there and
    reuse their own memory. With `adds`, each shape has a second graph that adds to the gradients."""
    def __init__(self, gradient: Callable[..., Tensor], parameters: list[nn.Parameter], device: torch.device, adds: bool = False):
        self.gradient, self.parameters, self.device, self.adds = gradient, parameters, device, adds
        self.captured: dict[tuple, tuple] = {}      # by shape: inputs, and (graph, loss) pairs: one overwrites, one adds
        self.gradients: list[Tensor | None] = []    # of the parameters, in the first graph's memory
        self.shape: tuple = ()                      # of the last call

    def __call__(self, batch: Batch, *more: Tensor, part: int = 0) -> Tensor:
        """The loss, on the device, valid until the next call. Part 0 of a step overwrites the gradients; the others add to them. A part of
        another shape than part 0 (after `static_batch`, about one batch in a billion) is computed without a graph, into the same memory."""
        new = [*tensors(batch).values(), *more]
        shape = (batch.max_seqlen, *tensors(batch), *((x.shape, x.dtype) for x in new))
        if part and shape != self.shape:
            return self.gradient(batch, *more)
        if shape not in self.captured:
            self.captured[shape] = self._capture(batch.to(self.device), *(x.to(self.device) for x in more))
        self.shape, (inputs, graphs) = shape, self.captured[shape]
        for own, x in zip(inputs, new):
            own.copy_(x, non_blocking=True)
        self._share(self.gradients)
        graph, loss = graphs[part > 0]
        graph.replay()
        return loss

    def _capture(self, batch: Batch, *more: Tensor) -> tuple:
        warm_up(lambda: self.gradient(batch, *more), lambda: self._share(itertools.repeat(None)), self.device)
        graphs, pool = [], next((graphs[0][0].pool() for _, graphs in self.captured.values()), None)
        for add in range(1 + self.adds):
            graph = torch.cuda.CUDAGraph()
            # thread_local: the thread that prepares batches may pin memory meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss = self.gradient(batch, *more)
                if self.gradients and not add:
                    own = [(g, p.grad) for g, p in zip(self.gradients, self.parameters, strict=True) if g is not None or p.grad is not None]
                    torch._foreach_copy_(*map(list, zip(*own)))       # raises if a parameter has a gradient for one of the shapes only
                    del own     # so that later graphs reuse this memory
            self.gradients = self.gradients or [p.grad for p in self.parameters]
            self._share(self.gradients)
            graphs.append((graph, loss))
            pool = graph.pool()
        return [*tensors(batch).values(), *more], graphs

    def _share(self, gradients: Iterable[Tensor | None]) -> None:
        for p, g in zip(self.parameters, gradients):
            p.grad = g


def warm_up(run: Callable[[], object], clear: Callable[[], None], device: torch.device) -> None:
    """Call `run` a few times on a separate stream, as capturing requires. `clear` drops the gradients before each call and at the end, so
    the captured backward allocates them in the graph's memory."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            clear()
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    clear()


def check_graphs(wanted: bool, ranks: Ranks) -> None:
    """Raises InputError if CUDA graphs are wanted but not possible."""
    if wanted and ranks.device.type != "cuda":
        raise InputError(f"--graphs captures CUDA graphs, and the device is {ranks.device}: leave it out, or use --device cuda")
    if wanted and ranks.world > 1:
        raise InputError("--graphs is for one GPU: a captured backward cannot wait for the other ranks' gradients; use --compile")
    if wanted and not kernels_run(ranks.device):
        raise InputError("--graphs captures the kernels, and the references would run: install Triton, or leave RT_KERNELS=ref out")
