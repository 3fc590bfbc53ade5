"""Many deltas on one frozen base, trained side by side: K runs in the time of few.

The trained weights of K models get a leading K (`stack`); a batch holds the rows of run k in the k-th of K equal ranges (`side_by_side`).
So the base's matrices see one large batch, and a delta's are one batched product (rt.model.linear). Every run keeps its own data order,
dropout, learning rate, loss weights, early stop and best-on-dev, and gets what it would get alone, to rounding: its gradient is that of
its own loss, clipped by its own norm, and its dropout is a function of its own seed (kernels/dropout.py).
"""
import copy
import itertools
import os
import time
from dataclasses import dataclass, field, replace
from typing import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from rt.data import Encoded, side_by_side
from rt.errors import InputError
from rt.losses import Loss, TeacherCache, Weights, task_loss
from rt.model import Batch, Classifier, Trace
from rt.optim import Watch, autocast, is_out_of_memory, schedule
from rt.runs.log import loss_text, progress
from rt.speed.graphs import BUCKET, GraphedStep
from rt.speed.throughput import Pace
from rt.tune import TaskData, TuneResult, TuneSettings, evaluate, metrics, score, training_batch

CPU_BYTES = 2**29       # of a group on a CPU: a dozen runs of the mini preset, beyond which a run's time grows again


EVAL_TOKENS = 16384     # a forward pass over dev, all runs together


@dataclass
class GridRun:
    """One of the runs. Those with one start, or one sample of examples, may share `model` and `data`: nothing here changes either.
    The loss must be without gamma and itp; all runs' losses have a teacher, or none has."""
    model: Classifier
    data: TaskData
    settings: TuneSettings
    loss: Loss
    rows: list[dict] = field(default_factory=list)  # {'step', 'loss', 'dev'} of every evaluation
    result: TuneResult = field(default_factory=lambda: TuneResult(0, {}, {}))
    best: Weights = field(default_factory=dict)     # of what is trained, where dev was best


def trained(model: nn.Module) -> Weights:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def reweighted(model: Classifier, weights: Weights) -> Classifier:
    """`model` with `weights` in place of those it trains, of whatever shape; what is frozen is shared."""
    other = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    for name, w in weights.items():
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, nn.Parameter(w))
    return other


def stack(models: list[Classifier]) -> Classifier:
    """One model whose trained weights (K, ...) are those of `models`, which have one base and kind of delta."""
    weights = [trained(model) for model in models]
    return reweighted(models[0], {name: torch.stack([w[name].detach() for w in weights]) for name in weights[0]})


def keep(grid: Classifier, runs: list[int]) -> Classifier:
    """The grid of those runs alone."""
    return reweighted(grid, {name: p.detach()[runs] for name, p in trained(grid).items()})


def load(model: Classifier, weights: Weights) -> Classifier:
    """`model`, holding `weights` from now on in what it trains."""
    with torch.no_grad():
        for name, p in trained(model).items():
            p.copy_(weights[name])
    return model


class GridLoss:
    """The losses of K runs, with alpha, beta and T of each."""

    def __init__(self, runs: list[GridRun], device: torch.device):
        losses = [run.loss for run in runs]
        if any(loss.gamma or loss.itp for loss in losses):
            raise ValueError("runs with gamma or itp are not trained side by side")
        self.terms, caches = losses[0], {id(loss.teacher): loss.teacher for loss in losses}
        self.taught = None not in caches.values()
        if not self.taught:
            return
        # what the teachers of all runs say in one cache, run k's examples from offset[k] on
        starts = dict(zip(caches, itertools.accumulate((len(cache.logits) for cache in caches.values()), initial=0)))
        merged = TeacherCache(*(torch.cat([getattr(cache, part) for cache in caches.values()]) for part in ("logits", "states")))
        self.terms = replace(self.terms, teacher=merged)
        self.offset = torch.tensor([[starts[id(loss.teacher)]] for loss in losses], device=device)              # (K, 1), and so on
        self.alpha, self.beta = (torch.tensor([[getattr(loss, name)] for loss in losses], device=device) for name in ("alpha", "beta"))
        # runs of one temperature together: (T, which), and where each run is then found
        by_T = {T: [k for k, loss in enumerate(losses) if loss.T == T] for T in dict.fromkeys(loss.T for loss in losses)}
        self.by_T = [(T, torch.tensor(which, device=device)) for T, which in by_T.items()]
        self.place = torch.cat([which for _, which in self.by_T]).argsort()

    def __call__(self, model: Classifier, batch: Batch, shares: Tensor) -> Tensor:
        """(K,)"""
        K, terms = len(shares), self.terms
        logits = model(batch, trace := Trace())
        rows = task_loss(logits, batch.labels, terms.is_regression).view(K, -1)
        if self.taught:
            index = (batch.index.view(K, -1) + self.offset).flatten()
            s, t = (x.view(K, -1, x.shape[-1]) for x in (logits, terms.teacher.logits[index]))
            kd = [terms.kd(s[which].flatten(0, 1), t[which].flatten(0, 1), T).view(len(which), -1) for T, which in self.by_T]
            patience = terms.patience(trace, index).view(K, -1)
            rows = (1 - self.alpha) * rows + self.alpha * torch.cat(kd)[self.place] + self.beta * patience
        return (rows * shares).sum(1)


class GridAdamW:
    """rt.optim.adamw for weights with a leading K, a learning rate and a gradient norm each."""

    def __init__(self, weights: list[Tensor], weight_decay: float, clip: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6):
        self.weights, self.weight_decay, self.clip, self.betas, self.eps = weights, weight_decay, clip, betas, eps
        self.m, self.v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        self.steps = torch.zeros(len(weights[0]), dtype=torch.float64, device=weights[0].device)

    @torch.no_grad()
    def step(self, lr: Tensor, losses: Tensor, watch: Watch) -> None:
        """One step at learning rates `lr` (K,), counted by `watch`. A run whose loss or gradient is not finite keeps weights and moments:
        its gradient is taken for 0, its betas for 1, its rate for 0."""
        grads = [w.grad for w in self.weights]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        skip = watch.count(losses, norms)
        taken, lr = 1 - skip, lr * (1 - skip)
        self.steps += taken
        b1, b2 = (torch.where(skip > 0, 1.0, b) for b in self.betas)
        c1, c2 = (1 - b ** self.steps.clamp(min=1) for b in self.betas)
        torch._foreach_mul_(grads, [self.each((self.clip / (norms + 1e-6)).clamp(max=1.0), g) for g in grads])
        for g in grads:
            g.masked_fill_(self.each(skip > 0, g), 0.0)
        torch._foreach_mul_(self.m, [self.each(b1, m) for m in self.m])
        torch._foreach_add_(self.m, grads, alpha=1 - self.betas[0])
        torch._foreach_mul_(self.v, [self.each(b2, v) for v in self.v])
        torch._foreach_addcmul_(self.v, grads, grads, value=1 - self.betas[1])
        root = torch._foreach_sqrt(self.v)
        torch._foreach_mul_(root, [self.each((c2 ** -0.5).float(), v) for v in self.v])
        torch._foreach_add_(root, self.eps)
        update = torch._foreach_div(self.m, root)
        torch._foreach_mul_(update, [self.each(lr / c1.float(), w) for w in self.weights])
        decayed = [w for w in self.weights if w.dim() > 2]      # matrices, as rt.optim.adamw
        torch._foreach_mul_(decayed, [self.each(1 - lr * self.weight_decay, w) for w in decayed])
        torch._foreach_sub_(self.weights, update)
        for w in self.weights:
            w.grad = None

    @staticmethod
    def each(values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (like.dim() - 1))

    def keep(self, runs: list[int], weights: list[Tensor]) -> None:
        """Go on with `weights`, those of these runs."""
        self.weights, self.m, self.v = weights, [m[runs] for m in self.m], [v[runs] for v in self.v]
        self.steps = self.steps[runs]


@torch.no_grad()
def predict(grid: Classifier, parts: list[Encoded], device: torch.device, precision: torch.dtype) -> list[Tensor]:
    """For each run the (n, C) fp32 logits on the CPU of its examples, as rt.tune.predict."""
    grid.eval()
    orders = [sorted(range(len(part)), key=lambda i: len(part.sequences[i])) for part in parts]
    longest = max(len(part.sequences[order[-1]]) for part, order in zip(parts, orders))
    size = max(1, EVAL_TOKENS // (longest * len(parts)))
    chunks: list[list[Tensor]] = [[] for _ in parts]
    for first in range(0, max(map(len, parts)), size):
        # a run whose examples are all done shows its last one again
        picks = [order[first:first + size] or order[-1:] for order in orders]
        batch, _ = side_by_side([part.batch(pick) for part, pick in zip(parts, picks)])
        with autocast(device, precision):
            logits = grid(batch.to(device)).float().view(len(parts), -1, grid.head.out.weight.shape[1]).cpu()
        for k, order in enumerate(orders):
            chunks[k].append(logits[k, :len(order[first:first + size])])
    return [torch.cat(c)[torch.tensor(order).argsort()] for c, order in zip(chunks, orders)]


def tune(runs: list[GridRun], *, device: torch.device, precision: torch.dtype, what: str = "tuning") -> None:
    """rt.tune.tune for K runs at once; fills `result` (but for test) and `best` of each. All have the same steps, batch size,
    evaluation interval and decay; seeds, learning rates, warm-ups, losses and data are their own. A run that stops early, or of which
    too many steps in a row were skipped (`result.diverged`), leaves the others to themselves."""
    s, started = runs[0].settings, time.perf_counter()
    grid = stack([run.model for run in runs])
    gradient, optimizer = gradient_of(grid, runs, device, precision), GridAdamW(list(trained(grid).values()), s.weight_decay, s.clip)
    score_starts(runs, device, precision)
    active, watch = list(runs), Watch((len(runs),), device)
    pace = Pace(grid.encoder.config, device, precision, frozen=True)
    with progress(s.steps, f"{what}, {len(runs)} side by side") as bar:
        for step in range(s.steps):
            lr = [schedule(step, s.steps, max(1, round(r.settings.warmup * s.steps)), r.settings.lr) for r in active]
            alike = {(id(r.data), r.settings.seed): r for r in active}      # runs that read the same examples
            batches = {key: training_batch(r.data.train, r.settings, step) for key, r in alike.items()}
            batch, shares = side_by_side([batches[id(r.data), r.settings.seed] for r in active], BUCKET if s.graphs else 0)
            grid.train()
            losses = gradient(batch, shares)
            optimizer.step(torch.tensor(lr, device=device), losses, watch)
            for r in active:
                pace.count(batches[id(r.data), r.settings.seed])
            if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
                seen = watch.look()
                with pace.pause():
                    score_runs(active, grid, step + 1, seen, device, precision)
                going = [k for k, r in enumerate(active) if not r.settings.stops(r.result, step + 1)]
                if not going:
                    break
                if len(going) < len(active):
                    active, grid = [active[k] for k in going], keep(grid, going)
                    gradient = gradient_of(grid, active, device, precision)
                    optimizer.keep(going, list(trained(grid).values()))
                    watch.keep(going)
                found = [loss for loss, *_ in seen if loss is not None]
                losses = loss_text(sum(found) / len(found) if found else None, sum(r.result.skipped for r in runs))
                bar.set_postfix_str(f"{losses}, best dev {max(score(r.result.dev) for r in runs):.3f}, {pace}")
            bar.update()
    for run in runs:
        run.result.seconds = (time.perf_counter() - started) / len(runs)


def gradient_of(grid: Classifier, runs: list[GridRun], device: torch.device, precision: torch.dtype) -> Callable[[Batch, Tensor], Tensor]:
    """What a step computes of a batch and its shares, both on the host: (K,) losses, and every weight's gradient."""
    loss = GridLoss(runs, device)

    def gradient(batch: Batch, shares: Tensor) -> Tensor:
        with autocast(device, precision):
            values = loss(grid, batch.to(device), shares.to(device))
        values.sum().backward()
        return values.detach()

    return GraphedStep(gradient, list(trained(grid).values()), device) if runs[0].settings.graphs else gradient


def tune_in_groups(runs: list[GridRun], limit: int, *, device: torch.device, precision: torch.dtype,
                   what: str = "tuning") -> Iterator[GridRun]:
    """`tune`, `limit` runs at once, or where that is 0 as many as are estimated to fit into memory; half as many where they do not.
    Yields the runs of a group when it is done. InputError where not one fits."""
    size = limit
    while runs:
        try:
            size = size or max(1, room(device) // step_bytes(runs[0], device, precision))
            size = -(-len(runs) // -(-len(runs) // size))      # equal groups: 7 by 4 is 4 and 3, 9 by 8 is 5 and 4
            tune(runs[:size], device=device, precision=precision, what=what)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size <= 1:
                raise InputError(f"not even one run fits into the memory of {device}: lower --batch_size or --seq_len") from None
            for run in runs[:size]:
                run.rows, run.result, run.best = [], TuneResult(0, {}, {}), {}
            size //= 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            yield from runs[:size]
            runs = runs[size:]


def room(device: torch.device) -> int:
    """Bytes that a group may take: 60 % of what is free, and on a CPU no more than keeps its working set near the caches."""
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})       # not on macOS, nor on Windows
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else CPU_BYTES
    return min(CPU_BYTES, int(0.6 * free))


def step_bytes(run: GridRun, device: torch.device, precision: torch.dtype) -> int:
    """What one run keeps for its backward pass, measured on its first batch, and its weights with gradients and moments."""
    grid, loss, saved = stack([run.model]), GridLoss([run], device), {}
    own = {p.untyped_storage().data_ptr() for p in grid.parameters()}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch, shares = side_by_side([training_batch(run.data.train, run.settings, 0)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(device, precision):
        loss(grid.train(), batch.to(device), shares.to(device)).sum()
    return sum(n for place, n in saved.items() if place not in own) + sum(20 * p.numel() for p in trained(grid).values())


def score_starts(runs: list[GridRun], device: torch.device, precision: torch.dtype) -> None:
    """Dev before the first step; runs that share their start and their examples are scored once."""
    for first in {(id(run.model), id(run.data)): run for run in runs}.values():
        dev = evaluate(first.model, first.data.dev, device, precision)
        for run in runs:
            if run.model is first.model and run.data is first.data:
                enter(run, 0, None, dev, {k: p.detach() for k, p in trained(first.model).items()})


def score_runs(runs: list[GridRun], grid: Classifier, step: int, seen: list[tuple[float | None, int, bool]], device: torch.device,
               precision: torch.dtype) -> None:
    for k, (run, (loss, skipped, diverged), logits) in enumerate(
            zip(runs, seen, predict(grid, [run.data.dev for run in runs], device, precision))):
        run.result.skipped += skipped
        if diverged:       # its gradient is its own: the others go on
            run.result.diverged = step
        else:
            weights = {name: p.detach()[k] for name, p in trained(grid).items()}
            enter(run, step, loss, metrics(logits, run.data.dev.targets), weights, skipped)


def enter(run: GridRun, step: int, loss: float | None, dev: dict[str, float], weights: Weights, skipped: int = 0) -> None:
    """Note an evaluation, and the weights (copied) where it is the best so far."""
    run.result.curve.append((step, score(dev)))
    run.rows.append({"step": step, "loss": loss, "dev": dev, **({"skipped": skipped} if skipped else {})})
    if not run.result.dev or score(dev) > score(run.result.dev):
        run.result.dev, run.result.best_step = dev, step
        run.best = {k: w.clone() for k, w in weights.items()}
