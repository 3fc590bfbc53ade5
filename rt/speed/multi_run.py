"""Many deltas on one frozen base, trained side by side.

The trained weights of K models are stacked along a leading dimension K. A batch holds the rows of run k in the k-th of K equal ranges
(`side_by_side`). So the base's matrices see one large batch, and the deltas' matrices make one batched product (rt.model.linear). Every run
keeps its own data order, dropout seed, learning rate, loss, clipping, early stop and best-on-dev. Its result is as if alone, to rounding.
"""
import copy
import itertools
import os
import time
from dataclasses import dataclass, field, replace
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rt.data import Encoded, TaskData
from rt.errors import InputError
from rt.kinds import KINDS
from rt.losses import TERMS, DistillConfig, Loss, Reweighted, TeacherCache, Weights, patience, task_loss, trained_weights
from rt.model import Activations, Batch, Classifier
from rt.optim import EPS, TUNING_BETAS, SkipTracker, autocast, is_out_of_memory
from rt.recycling import MODES, NEEDS_TEACHER, TRAINED, Recycling, check, start, training_data
from rt.speed.graphs import CudaGraphs
from rt.tune import Gradient, Scores, TuneResult, TuneSettings, evaluate, metrics, plain_gradient, training_batch, training_loop

CPU_BYTES = 2**29       # for a group on a CPU: a dozen runs of the mini preset; in larger groups each run takes longer
EVAL_TOKENS = 16384     # tokens per forward pass over dev, all runs together
BUCKET = 128            # tokens: batches grow in steps of this size if each shape has its own CUDA graph
PAD_SEQUENCES = 8       # roughly how many sequences pad a range: the cost of attention grows with the square of their length


@dataclass
class SideRun:
    """One run. Several may share `model` and `data`, which nothing changes. No loss has gamma or itp; all have a teacher or none."""
    model: Classifier
    data: TaskData
    settings: TuneSettings
    loss: Loss
    rows: list[dict] = field(default_factory=list)  # {'step', 'loss', 'dev'} of every evaluation
    result: TuneResult = field(default_factory=TuneResult)
    best: Weights = field(default_factory=dict)     # the trained weights where dev was best


def reweighted(model: Classifier, weights: Weights) -> Classifier:
    """A copy of `model` with `weights` in place of its trained weights; frozen weights are shared."""
    return copy.deepcopy(model, memo={id(p): nn.Parameter(weights[k]) if k in weights else p for k, p in model.named_parameters()})


def matrices_first(weights: Weights) -> list[str]:
    """Names in the order in which weights are flattened: only matrices decay, so weight decay is one operation on one slice."""
    return sorted(weights, key=lambda k: weights[k].dim() < 2)


def flatten(weights: Weights) -> Tensor:
    """(P,), a copy."""
    return torch.cat([weights[k].detach().flatten() for k in matrices_first(weights)])


def unflatten(flat: Tensor, like: Weights) -> Weights:
    """`flat` (P,) as weights like these; (K, P), of K runs, with a leading K. They are views, through which gradients flow to `flat`."""
    names = matrices_first(like)
    parts = flat.split([like[k].numel() for k in names], dim=-1)
    return {k: part.view(*flat.shape[:-1], *like[k].shape) for k, part in zip(names, parts)}


class StackedAdamW:
    """AdamW and clipping for the weights of K runs, the rows of `w` (K, P). Each run has its own rate, gradient norm and skipped steps, and
    gets what rt.tune.Fit would give it, to rounding. A step takes the same number of operations for any K. Only matrices decay."""
    def __init__(self, runs: list[Weights], weight_decay: float):
        self.w = w = torch.stack([flatten(weights) for weights in runs]).requires_grad_()
        self.decayed, self.weight_decay = sum(x.numel() for x in runs[0].values() if x.dim() >= 2), weight_decay
        self.m, self.v, self.taken = torch.zeros_like(w), torch.zeros_like(w), w.new_zeros(len(w), 1)
        self.tracker = SkipTracker(w.device, len(w))

    @torch.no_grad()
    def step(self, losses: Tensor, rates: Tensor, clip: float) -> None:
        """One step at the learning rates `rates` (K,). Runs whose loss or gradient is not finite skip it."""
        grad, norm = self.w.grad, self.w.grad.norm(dim=1)
        taken = 1 - self.tracker.count(losses, norm)[:, None]
        grad.mul_(taken * (clip / (norm[:, None] + 1e-6)).clamp(max=1.0)).nan_to_num_(0.0, 0.0, 0.0)      # zero where a run skips
        self.taken += taken
        beta_m, beta_v = TUNING_BETAS
        self.m.mul_(1 - (1 - beta_m) * taken).add_(grad, alpha=1 - beta_m)
        self.v.mul_(1 - (1 - beta_v) * taken).addcmul_(grad, grad, value=1 - beta_v)
        bias_m, bias_v = ((1 - beta ** self.taken).clamp_min(1e-30) for beta in TUNING_BETAS)       # a run may have taken no step yet
        rates = rates[:, None] * taken
        self.w[:, :self.decayed] *= 1 - rates * self.weight_decay
        self.w.sub_(self.v.sqrt().div_(bias_v.sqrt()).add_(EPS).reciprocal_().mul_(self.m).mul_(rates / bias_m))
        self.w.grad = None

    def keep(self, which: list[int]) -> None:
        """Drop the other runs."""
        self.w = self.w.detach()[which].requires_grad_()
        self.m, self.v, self.taken = self.m[which], self.v[which], self.taken[which]
        self.tracker.sums, self.tracker.streak = self.tracker.sums[:, which], self.tracker.streak[which]


def side_by_side(batches: list[Batch], bucket: int = 0) -> tuple[Batch, Tensor]:
    """The batches of K runs as one batch. Each run has its own range; all ranges are as long as the longest, padded with sequences that
    nothing reads. Also returns (K, B), the share of each example in its run's mean: 1 / the run's batch size, and 0 for rows that pad a
    batch to the largest size B. With `bucket`, shapes are few, as CUDA graphs need: the length of a range is a multiple of `bucket`, the
    number of sequences is the maximum (the last ones are empty), and the bound on their length is a multiple of 64."""
    N, B, longest = (max(sizes) for sizes in zip(*((len(b.ids), len(b.index), b.max_seqlen) for b in batches)))
    N = -(-N // bucket) * bucket if bucket else N
    ids, lengths, rows, labels, index, shares = [], [], [], [], [], torch.zeros(len(batches), B)
    for k, batch in enumerate(batches):
        short, n = N - len(batch.ids), len(batch.index)
        size = min(longest, max(16, -(-short // PAD_SEQUENCES)))       # never longer than the model allows
        ids += [batch.ids, batch.ids[:1].expand(short)]
        lengths += batch.cu_seqlens.diff().tolist() + [min(size, short - i) for i in range(0, short, size)]
        for parts, values in ((rows, batch.first + k * N), (labels, batch.labels), (index, batch.index)):
            parts += [values, values[:1].expand(B - n)]
        shares[k, :n] = 1 / n
    if bucket:
        lengths += [0] * (len(batches) * (B + PAD_SEQUENCES) - len(lengths))
        longest = -(-longest // 64) * 64
    fields = {"labels": torch.cat(labels), "index": torch.cat(index), "rows": torch.cat(rows),
              "seeds": None if batches[0].seeds is None else torch.cat([batch.seeds for batch in batches])}
    return Batch(torch.cat(ids), torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), longest, **fields), shares


def graphed_gradient(model: Classifier, loss: Loss, device: torch.device, precision: torch.dtype) -> Gradient:
    """rt.tune.plain_gradient as CUDA graphs, one per bucket of tokens."""
    graphs = CudaGraphs(plain_gradient(model, loss, device, precision), [*trained_weights(model).values()], device)
    return lambda batch: graphs(side_by_side([batch], BUCKET)[0])


class SideLoss:
    """The losses of K runs, each with its own alpha, beta and T."""
    def __init__(self, runs: list[SideRun], device: torch.device):
        losses = [run.loss for run in runs]
        if not all(can_be_stacked(loss.config) for loss in losses):
            raise ValueError("runs with gamma or itp are not trained side by side")
        self.loss, caches = losses[0], {id(loss.teacher): loss.teacher for loss in losses}
        self.is_taught = None not in caches.values()
        if not self.is_taught:
            return
        # one cache holds the teachers' outputs for all runs; run k's examples start at offset[k]
        starts = dict(zip(caches, itertools.accumulate((len(cache.logits) for cache in caches.values()), initial=0)))
        configs = [loss.config for loss in losses]
        self.has_patience = any(c.beta for c in configs)        # a teacher with other sizes, or a black box, has no states to compare
        logits = torch.cat([cache.logits for cache in caches.values()])
        states = torch.cat([cache.states for cache in caches.values()]) if self.has_patience else None
        self.loss = replace(self.loss, teacher=TeacherCache(logits, states))
        self.offset = torch.tensor([[starts[id(loss.teacher)]] for loss in losses], device=device)              # (K, 1), as below
        self.alpha, self.beta, self.T = (torch.tensor([[getattr(c, k)] for c in configs], device=device) for k in ("alpha", "beta", "T"))

    def __call__(self, model: Classifier, batch: Batch, shares: Tensor) -> Tensor:
        """(K,) losses."""
        K, loss = len(shares), self.loss
        logits = model(batch, activations := Activations())
        rows = task_loss(logits, batch.labels, loss.is_regression).view(K, -1)
        if self.is_taught:
            index = (batch.index.view(K, -1) + self.offset).flatten()
            s, t = (x.view(K, -1, x.shape[-1]) / self.T[..., None] for x in (logits, loss.teacher.logits[index]))
            kd = self.T**2 * loss.kd(s.flatten(0, 1), t.flatten(0, 1), 1.0).view(K, -1)        # logits over T at temperature 1
            rows = (1 - self.alpha) * rows + self.alpha * kd
            if self.has_patience:
                rows = rows + self.beta * patience(loss, logits, activations, replace(batch, index=index)).view(K, -1)
        return (rows * shares).sum(1)


def can_be_stacked(c: DistillConfig | None) -> bool:
    """Whether SideLoss covers all terms of a loss: task, KD and patience, without interpolation."""
    return c is None or not c.itp and not any(getattr(c, name, 0) for name in TERMS if name != "beta")


@torch.no_grad()
def predict(stacked: nn.Module, parts: list[Encoded], device: torch.device, precision: torch.dtype) -> list[Tensor]:
    """Per run, the (n, C) fp32 logits of its examples, on the CPU, as in rt.tune.predict."""
    stacked.eval()
    orders = [sorted(range(len(part)), key=lambda i: len(part.sequences[i])) for part in parts]
    longest = max(len(part.sequences[order[-1]]) for part, order in zip(parts, orders))
    size = max(1, EVAL_TOKENS // (longest * len(parts)))
    chunks = [[] for _ in parts]
    for first in range(0, max(map(len, parts)), size):
        # a run with no examples left repeats its last one
        picks = [order[first:first + size] or order[-1:] for order in orders]
        batch, _ = side_by_side([part.batch(pick) for part, pick in zip(parts, picks)])
        with autocast(device, precision):
            logits = stacked(batch.to(device)).float().cpu()
        logits = logits.view(len(parts), -1, logits.shape[-1])
        for k, order in enumerate(orders):
            chunks[k].append(logits[k, :len(order[first:first + size])])
    return [torch.cat(c)[torch.tensor(order).argsort()] for c, order in zip(chunks, orders)]


class SideBySide:
    """The functions of rt.tune.training_loop for the active runs. Each run has its own Scores; everything else is computed together."""
    def __init__(self, runs: list[SideRun], device: torch.device, precision: torch.dtype, graphs: bool):
        self.runs, self.device, self.precision, self.graphs = runs, device, precision, graphs
        self.like, self.scores = trained_weights(runs[0].model), []
        for run in runs:
            run.rows = []       # drops the rows of a failed attempt
            self.scores.append(Scores(run.settings, run.rows.append))
        self.optimizer = optimizer = StackedAdamW([trained_weights(run.model) for run in runs], runs[0].settings.weight_decay)
        like = self.like        # functions that hold no `self`: a group's memory, and a captured graph's, must be freed as soon as it ends
        self.stacked = Reweighted(runs[0].model, lambda: unflatten(optimizer.w, like))
        self.prepare()

    def prepare(self) -> None:
        """Make the gradient function of the active runs. It takes a batch and its shares, both on the host, and returns (K,) losses."""
        plain = plain_gradient(self.stacked, SideLoss(self.runs, self.device), self.device, self.precision)
        self.gradient_of = CudaGraphs(plain, [self.optimizer.w], self.device) if self.graphs else plain

    def gradient(self, step: int) -> Tensor:
        """(K,) losses of a step."""
        alike = {(id(r.data), r.settings.seed): r for r in self.runs}      # runs that read the same examples
        batches = {key: training_batch(r.data.train, r.settings, step) for key, r in alike.items()}
        own = [batches[id(r.data), r.settings.seed] for r in self.runs]
        return self.gradient_of(*side_by_side(own, BUCKET if self.graphs else 0))

    def update(self, step: int, losses: Tensor) -> None:
        rates = torch.tensor([run.settings.lr_at(step) for run in self.runs])
        rates = rates.pin_memory() if self.device.type == "cuda" else rates
        self.optimizer.step(losses, rates.to(self.device, non_blocking=True), self.runs[0].settings.clip)

    def dev_scores(self, step: int) -> list[dict[str, float]]:
        """The dev scores of every run. Before the first step, runs that share start and examples are scored once."""
        if step == 0:
            alike = {(id(r.model), id(r.data)): r for r in self.runs}
            scores = {key: evaluate(r.model, r.data.dev, self.device, self.precision) for key, r in alike.items()}
            return [scores[id(r.model), id(r.data)] for r in self.runs]
        logits = predict(self.stacked, [run.data.dev for run in self.runs], self.device, self.precision)
        return [metrics(own, run.data.dev.targets) for own, run in zip(logits, self.runs)]

    def evaluate(self, step: int) -> bool:
        """Score dev. Returns whether any run continues."""
        going = []
        for i, (run, scores, dev, since) in enumerate(zip(self.runs, self.scores, self.dev_scores(step), self.optimizer.tracker.read())):
            if scores.add(step, dev, {"flat": self.optimizer.w[i]}, *since):
                going.append(i)     # a run that diverged ends; its gradient is separate, so the others continue
            run.result, run.best = scores.result, unflatten(scores.best["flat"], self.like)
        if going and len(going) < len(self.runs):
            self.runs, self.scores = ([all_[i] for i in going] for all_ in (self.runs, self.scores))
            self.optimizer.keep(going)
            self.prepare()
        return bool(going)


def tune(runs: list[SideRun], *, device: torch.device, precision: torch.dtype, graphs: bool = False) -> None:
    """rt.tune.tune for K runs at once. Fills `rows`, `result` (except test) and `best` of each run. Steps, batch size, evaluation interval
    and decay are the same for all. If a run stops early or diverges (`result.diverged`), the others continue without it."""
    started, together = time.perf_counter(), SideBySide(runs, device, precision, graphs)
    training_loop(runs[0].settings, together.gradient, together.update, together.evaluate)
    for run in runs:
        run.result.seconds = (time.perf_counter() - started) / len(runs)


def tune_in_groups(runs: list[SideRun], limit: int, *, device: torch.device, precision: torch.dtype,
                   graphs: bool = False) -> Iterator[SideRun]:
    """`tune` with `limit` runs at once; 0: as many as are estimated to fit into memory. If they do not fit, tries half as many. Yields the
    runs of a group when the group is done. Raises InputError if not even one run fits."""
    size = limit
    while runs:
        try:
            # the first pass of a new shape needs memory besides what earlier graphs keep
            size = size or max(1, free_bytes(device) // (step_bytes(runs[0], device, precision) * (1 + graphs)))
            size = -(-len(runs) // -(-len(runs) // size))      # equal groups: 7 runs by 4 are 4 and 3; 9 by 8 are 5 and 4
            tune(runs[:size], device=device, precision=precision, graphs=graphs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size <= 1:
                raise InputError(f"not even one run fits into the memory of {device}: lower `batch_size` or `seq_len`") from None
            size //= 2
        else:
            yield from runs[:size]
            runs = runs[size:]


def free_bytes(device: torch.device) -> int:
    """Bytes that a group may use: 60 % of the free memory, on a CPU at most CPU_BYTES, to keep the working set near the caches."""
    if device.type == "cuda":
        torch.cuda.empty_cache()        # what PyTorch keeps for later counts as taken
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    known = "SC_AVPHYS_PAGES" in os.sysconf_names       # missing on macOS
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else CPU_BYTES
    return min(CPU_BYTES, int(0.6 * free))


def step_bytes(run: SideRun, device: torch.device, precision: torch.dtype) -> int:
    """Bytes that one run keeps for its backward pass, measured on its first batch, plus its weights with gradients and moments."""
    weights, loss, saved = {k: p[None] for k, p in trained_weights(run.model).items()}, SideLoss([run], device), {}
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch, shares = side_by_side([training_batch(run.data.train, run.settings, 0)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(device, precision):
        loss(Reweighted(run.model, lambda: weights).train(), batch.to(device), shares.to(device)).sum()
    return sum(n for place, n in saved.items() if place not in own) + sum(20 * p.numel() for p in weights.values())


def can_go_together(r: Recycling, mode: str) -> bool:
    """Whether runs like this one can be trained side by side. Full deltas, which share no base, and kinds that do not stack cannot."""
    return mode in TRAINED and KINDS[r.config.kind].stacks and (mode not in NEEDS_TEACHER or can_be_stacked(r.distill))


def recycle_together(rs: list[Recycling], mode: str, limit: int = 0,
                     graphs: bool = False) -> Iterator[tuple[Recycling, Classifier, TuneResult]]:
    """rt.recycling.recycle for runs that differ only in seed, examples, learning rate, alpha, beta and T. The results are the same, except
    that test is not scored. At most `limit` runs at once; 0: as many as fit into memory. Yields each run with its model as soon as its
    group is done, and calls its on_eval then; on_step is not called."""
    for r in rs:
        check(r, mode)
    if not all(can_go_together(r, mode) for r in rs):
        raise ValueError("full deltas, runs with gamma or itp and modes without training are not done side by side")
    starts = {key: start(r, mode) for key, r in {(r.settings.seed, id(r.data)): r for r in rs}.items()}
    datas = {sample: training_data(r, mode) for sample, r in {(id(r.data), id(r.unlabelled)): r for r in rs}.items()}
    runs = [SideRun(starts[r.settings.seed, id(r.data)], datas[id(r.data), id(r.unlabelled)], r.settings, MODES[mode].loss(r)) for r in rs]
    for r, run in zip(rs, tune_in_groups(runs, limit, device=rs[0].device, precision=rs[0].precision, graphs=graphs)):
        for row in run.rows:
            r.on_eval(row)
        yield r, reweighted(run.model, run.best), run.result
