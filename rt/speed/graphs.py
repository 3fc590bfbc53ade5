"""Faster steps: batches prepared on another thread, torch.compile of the blocks, CUDA graphs of forward and backward.

A compiled or captured step needs batches of few shapes: `static_batch` in pre-training, rt.speed.multi_run.side_by_side in tuning.
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Callable, Iterable, Iterator, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rt.model
from kernels import attention_qkv
from kernels.common import uses_triton
from rt.data import Rows
from rt.errors import InputError
from rt.model import Batch, MaskedLM
from rt.optim import memory_for
from rt.pretrain import MLMLoss, PretrainSettings, mlm_loss
from rt.speed.dist import Ranks

WARM_UP = 3     # runs before a capture: by then everything is compiled, allocated or chosen
DEPTH = 3       # batches prepared before they are asked for
T = TypeVar("T")


# --- batches ----------------------------------------------------------------------------------------------------------

def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items, made on another thread up to DEPTH ahead. An error of the thread is raised here; closing this ends the thread."""
    items, end, pool = iter(items), object(), ThreadPoolExecutor(1, "prefetch")
    waiting = deque(pool.submit(next, items, end) for _ in range(DEPTH))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def staged(batches: Iterable[Batch], rows: Rows, device: torch.device, static: bool) -> Iterator[Batch]:
    """The same batches, of static shapes if `static` or for a CUDA device, for which they are pinned."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)     # of this thread: pinning must not touch another GPU
    for batch in batches:
        batch = static_batch(rows, batch) if static or cuda else batch
        yield replace(batch, **{k: v.pin_memory() for k, v in tensors(batch).items()}) if cuda else batch


def static_batch(rows: Rows, batch: Batch) -> Batch:
    """The same batch in shapes that a compiled or captured step can rely on: max_seqlen is seq_len, and cu_seqlens ends in repeated N,
    empty sequences. There is room for the mean number of sequences and six standard deviations more (renewal theory), which about one batch
    in a billion exceeds; such a batch gets more, in steps of 64. A bound for all would be far higher, and each sequence costs a block."""
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
    """Inside, the blocks' forward is compiled, once for all blocks of one shape; evaluate outside, where shapes vary. If the kernels run on
    `device`, a block is one graph, our ops inside. Otherwise attention stays out of it: its reference loops over the sequences in Python,
    and would be compiled anew for the lengths of every batch."""
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


# --- gradients --------------------------------------------------------------------------------------------------------

def make_gradient(model: MaskedLM, s: PretrainSettings, ranks: Ranks, precision: torch.dtype, graphs: bool = False,
                  loss: Callable[[MaskedLM, Batch], Tensor] = mlm_loss) -> Callable[[Batch, int], Tensor]:
    """gradient(batch, part) adds the gradient of `loss` on the `part`-th microbatch of a step to the model's, which part 0 clears, and
    returns the loss; the last part averages over the ranks. `graphs`: by CUDA graphs. Raises InputError if memory runs out."""
    share = MLMLoss(model, s.accumulation, precision, loss)
    if ranks.world > 1:     # gradients are averaged over the ranks, and rank 0's weights go to all
        share = DistributedDataParallel(share, gradient_as_bucket_view=True)

    def plain(batch: Batch) -> Tensor:
        value = share(batch.to(ranks.device))
        value.backward()
        return value.detach()

    def eager(batch: Batch, part: int) -> Tensor:
        if part == 0:
            model.zero_grad(set_to_none=True)
        with share.no_sync() if ranks.world > 1 and part < s.accumulation - 1 else nullcontext():
            return plain(batch)

    gradient_of = CudaGraphs(plain, [*model.parameters()], ranks.device, adds=s.accumulation > 1) if graphs else eager

    def gradient(batch: Batch, part: int) -> Tensor:
        lower = f"`batch_tokens` ({s.batch_tokens}), or raise `accumulation` ({s.accumulation})"
        with memory_for(f"a share of {len(batch.ids)} tokens", lower):
            return gradient_of(batch, part=part)

    return gradient


class CudaGraphs:
    """gradient(batch, *more), a forward and backward pass, as a CUDA graph for each of the few shapes of its arguments: one launch in place
    of about a thousand. A graph reads and writes at fixed addresses: arguments come from the host and are copied into its own tensors. The
    parameters' gradients lie in the first graph's memory. Graphs of other shapes copy theirs there and reuse their own memory. With `adds`
    each shape has a second graph that adds to the gradients."""
    def __init__(self, gradient: Callable[..., Tensor], parameters: list[nn.Parameter], device: torch.device, adds: bool = False):
        self.gradient, self.parameters, self.device, self.adds = gradient, parameters, device, adds
        self.captured: dict[tuple, tuple] = {}      # by shape: inputs, and (graph, loss) to overwrite and to add
        self.gradients: list[Tensor | None] = []    # of the parameters, in the first graph's memory
        self.shape: tuple = ()                      # of the last call

    def __call__(self, batch: Batch, *more: Tensor, part: int = 0) -> Tensor:
        """The loss, on the device until the next call. Part 0 of a step overwrites the gradients, the others add to them; one of another
        shape than part 0 (`static_batch`: next to never) is computed without a graph, into the same memory."""
        new = [*tensors(batch).values(), *more]
        shape = (batch.max_seqlen, *(x.shape for x in new))
        if part and shape != self.shape:
            return self.gradient(batch, *more)
        if shape not in self.captured:
            self.captured[shape] = self._capture(batch.to(self.device), *(x.to(self.device) for x in more))
        self.shape, (inputs, graphs) = shape, self.captured[shape]
        for own, x in zip(inputs, new):
            own.copy_(x, non_blocking=True)
        self._share()
        graph, loss = graphs[part > 0]
        graph.replay()
        return loss

    def _capture(self, batch: Batch, *more: Tensor) -> tuple:
        def clear() -> None:
            for p in self.parameters:
                p.grad = None

        warm_up(lambda: self.gradient(batch, *more), clear, self.device)
        graphs, pool = [], next((graphs[0][0].pool() for _, graphs in self.captured.values()), None)
        for add in range(1 + self.adds):
            graph = torch.cuda.CUDAGraph()
            # thread_local: the thread that prepares batches may pin memory meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss = self.gradient(batch, *more)
                if self.gradients and not add:
                    own = [(g, p.grad) for g, p in zip(self.gradients, self.parameters) if g is not None]
                    torch._foreach_copy_(*map(list, zip(*own)))
            self.gradients = self.gradients or [p.grad for p in self.parameters]
            self._share()
            graphs.append((graph, loss))
            pool = graph.pool()
        return [*tensors(batch).values(), *more], graphs

    def _share(self) -> None:
        for p, g in zip(self.parameters, self.gradients):
            p.grad = g


def warm_up(run: Callable[[], object], clear: Callable[[], None], device: torch.device) -> None:
    """`run` a few times on a stream of its own, as capturing wants it. `clear` drops the gradients before each and at the end, so that the
    captured backward allocates them in the graph's memory."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            clear()
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    clear()


def check_graphs(wanted: bool, ranks: Ranks) -> None:
    """Raises InputError if CUDA graphs are wanted and not possible."""
    if wanted and ranks.device.type != "cuda":
        raise InputError(f"--graphs captures CUDA graphs, and the device is {ranks.device}: leave it out, or use --device cuda")
    if wanted and ranks.world > 1:
        raise InputError("--graphs is for one GPU: a captured backward cannot wait for the other ranks' gradients; use --compile")
    if wanted and not kernels_run(ranks.device):
        raise InputError("--graphs captures the kernels, and the references would run: install Triton, or leave RT_KERNELS=ref out")
