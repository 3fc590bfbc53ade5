"""The supervised loop: train on a task, score dev at intervals, keep the best weights, score test once.

All supervised training runs `training_loop`: `tune` here, projections (rt/transport.py), curved paths (rt/report/analysis.py), and many
runs side by side (rt/speed/multi_run.py).
"""
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from rt.data import Encoded, TaskData, pad_to_multiple, sequences_batch
from rt.errors import Diverged
from rt.losses import Loss, trained_weights
from rt.model import Batch, Classifier
from rt.optim import MOST_SKIPPED, TUNING_BETAS, SkipTracker, adamw, autocast, derive_seed, linear_rate, memory_for, set_lr, step_unless

Gradient = Callable[[Batch], Tensor]    # takes a batch on the host, returns its loss, and leaves the gradient in the trained weights
Hook = Callable[[Any], None]            # on_step gets each step's Batch; on_eval gets {'step', 'loss', 'dev'}, and 'skipped' if not 0


def ignore(_: Any) -> None:
    """The hook that does nothing."""


@dataclass
class TuneSettings:
    """Settings of one training run. The learning rate warms up linearly over `warmup` (a share of `steps`), then decays linearly."""
    steps: int
    batch_size: int
    lr: float
    eval_every: int
    seed: int
    weight_decay: float = 0.01
    warmup: float = 0.06
    clip: float = 1.0
    early_stop: int = 0     # stop after this many evaluations in a row without a better one; 0: never
    keep_diverged: bool = False     # whether a run that diverges returns its best weights instead of raising Diverged

    def lr_at(self, step: int) -> float:
        return linear_rate(step, self.steps, max(1, round(self.warmup * self.steps)), self.lr)


@dataclass
class TuneResult:
    """`curve` has (step, main dev score) pairs. `dev` and `test` have all scores by name, the main one first (None: undefined)."""
    best_step: int = 0
    dev: dict[str, float | None] = field(default_factory=dict)
    test: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float | None]] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0        # steps with a non-finite loss or gradient
    diverged: int = 0       # the step by which too many in a row were not finite, and the run ended; 0: never


def divergence(step: int, lr: float) -> Diverged:
    return Diverged(f"more than {MOST_SKIPPED} steps in a row before step {step + 1} had no finite loss and gradient: lower `lr` ({lr})")


def training_loop(s: TuneSettings, gradient: Callable[[int], Tensor], update: Callable[[int, Tensor], None],
                  evaluate: Callable[[int], bool]) -> None:
    """gradient(step) computes the gradients and returns the loss, () or (K,) for K runs. update(step, loss) takes the step. evaluate(n) is
    called after n = 0, `eval_every`, ... steps and after the last, and returns whether to go on."""
    evaluate(0)
    for step in range(s.steps):
        torch.manual_seed(derive_seed(s.seed, step))    # for random points: interpolation, curved paths
        update(step, gradient(step))
        if ((step + 1) % s.eval_every == 0 or step + 1 == s.steps) and not evaluate(step + 1):
            break


class Scores:
    """The scores of one run so far, and its best weights."""
    def __init__(self, s: TuneSettings, on_eval: Hook = ignore):
        self.s, self.on_eval, self.result, self.best = s, on_eval, TuneResult(), {}

    def add(self, step: int, dev: dict[str, float] | None, trained: dict[str, Tensor], loss: float | None, skipped: int,
            diverged: bool) -> bool:
        """Record an evaluation of the weights `trained`; the last three arguments come from SkipTracker.read. Returns whether to go on."""
        self.result.skipped += skipped
        if diverged:
            self.result.diverged = step
            return False
        if dev is None:
            return True
        self.result.curve.append((step, next(iter(dev.values()))))
        if not self.result.dev or score(dev) > score(self.result.dev):
            self.result.dev, self.result.best_step = dev, step
            self.best = {k: p.detach().clone() for k, p in trained.items()}
        self.on_eval({"step": step, "loss": loss, "dev": dev, **({"skipped": skipped} if skipped else {})})
        most = self.s.early_stop * self.s.eval_every        # steps without a better score; 0: no limit
        return not most or step - self.result.best_step < most


class Fit(Scores):
    """One run and its optimizer, AdamW on `trained`."""
    def __init__(self, trained: dict[str, Tensor], s: TuneSettings, on_eval: Hook = ignore):
        super().__init__(s, on_eval)
        self.trained, self.optimizer = trained, adamw(trained.values(), s.lr, s.weight_decay, TUNING_BETAS)
        self.tracker = SkipTracker(next(iter(trained.values())).device)

    def update(self, step: int, loss: Tensor) -> None:
        """Clip the gradient and take a step. If the loss or the gradient is not finite, the step is skipped and counted."""
        set_lr(self.optimizer, self.s.lr_at(step))
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.s.clip)
        step_unless(self.optimizer, self.tracker.count(loss, norm))
        self.optimizer.zero_grad(set_to_none=True)


def minimise(trained: dict[str, Tensor], gradient: Callable[[int], Tensor], s: TuneSettings,
             dev_scores: Callable[[], dict | None], on_eval: Hook = ignore) -> TuneResult:
    """`training_loop` for one run. `trained` ends with the best weights by `dev_scores`, or with the last if these are None. Raises
    Diverged after more than MOST_SKIPPED skipped steps in a row, unless the settings say `keep_diverged`."""
    fit = Fit(trained, s, on_eval)
    training_loop(s, gradient, fit.update, lambda step: fit.add(step, dev_scores(), trained, *fit.tracker.read()[0]))
    with torch.no_grad():
        for k, value in fit.best.items():
            trained[k].copy_(value)
    if fit.result.diverged and not s.keep_diverged:
        raise divergence(fit.result.diverged, s.lr)
    return fit.result


def training_batch(data: Encoded, s: TuneSettings, step: int) -> Batch:
    """The examples of one step and its dropout seed, both functions of the run's seed and the step."""
    batch = data.batch(data.indices(s.batch_size, step, s.seed))
    return replace(batch, seeds=torch.tensor([derive_seed(s.seed, step)]))


def plain_gradient(model: Classifier, loss: Loss, device: torch.device, precision: torch.dtype) -> Gradient:
    """A Gradient of loss(model, batch, *more), which is summed if it is (K,). The function sets `model` to training mode."""
    def gradient(batch: Batch, *more: Tensor) -> Tensor:
        model.train()
        with autocast(device, precision):
            value = loss(model, pad_to_multiple(batch, device, precision).to(device), *(x.to(device) for x in more))
        value.sum().backward()
        return value.detach()

    return gradient


def train_step(gradient: Gradient, data: Encoded, s: TuneSettings, on_step: Hook, step: int, place: str = "",
               lower: str = " or `seq_len`") -> Tensor:
    """The loss and gradient of one step. Raises InputError if memory runs out; `place` and `lower` complete its message."""
    batch = training_batch(data, s, step)
    what = f"a batch of {s.batch_size} sequences of up to {batch.max_seqlen} tokens{place}"
    with memory_for(what, f"`batch_size` ({s.batch_size}){lower}"):
        loss = gradient(batch)
    on_step(batch)
    return loss


def tune(model: Classifier, data: TaskData, loss: Loss, settings: TuneSettings, *, device: torch.device, precision: torch.dtype,
         on_step: Hook = ignore, on_eval: Hook = ignore, make_gradient: Callable[..., Gradient] = plain_gradient) -> TuneResult:
    """Train the weights of `model` that require a gradient. `model` ends with the weights that were best on dev. Dev is also scored before
    the first step (step 0), which measures the start. Test, if there is one, is scored once at the end. Batches and dropout are functions
    of (seed, step). `make_gradient` may be rt.speed.multi_run.graphed_gradient. Raises as `minimise` does; InputError without memory."""
    started, gradient = time.perf_counter(), make_gradient(model, loss, device, precision)
    step = partial(train_step, gradient, data.train, settings, on_step)
    result = minimise(trained_weights(model), step, settings, lambda: evaluate(model, data.dev, device, precision), on_eval)
    result.test = evaluate(model, data.test, device, precision) if data.test else {}
    result.seconds = time.perf_counter() - started
    return result


@torch.no_grad()
def predict(model: Classifier, sequences: list[list[int]], device: torch.device, precision: torch.dtype, batch_size: int = 64) -> Tensor:
    """(n, C) fp32 logits on the CPU, in the order of `sequences`. Sequences are batched by length."""
    model.eval()
    order, chunks = sorted(range(len(sequences)), key=lambda i: len(sequences[i])), []
    for i in range(0, len(order), batch_size):
        batch = pad_to_multiple(sequences_batch([sequences[j] for j in order[i:i + batch_size]]), device, precision).to(device)
        with memory_for(f"{len(batch.first)} texts of up to {batch.max_seqlen} tokens", "`seq_len`"), autocast(device, precision):
            chunks.append(model(batch).float().cpu())
    return torch.cat(chunks)[torch.tensor(order).argsort()]


def evaluate(model: Classifier, data: Encoded, device: torch.device, precision: torch.dtype) -> dict[str, float | None]:
    """`metrics` of the model, without dropout, on all of `data`."""
    return metrics(predict(model, data.sequences, device, precision), data.targets)


def metrics(logits: Tensor, targets: Tensor) -> dict[str, float | None]:
    """accuracy, macro_f1, micro_f1 for (n, C) logits and (n,) classes; pearson, spearman for (n, 1) and (n,) floats, None if undefined."""
    if targets.is_floating_point():
        pair = torch.stack([logits.squeeze(-1).double(), targets.double()])
        is_defined = pair.isfinite().all() and (pair.amin(1) < pair.amax(1)).all()      # neither logits nor targets are constant
        pairs = {"pearson": pair, "spearman": torch.stack([*map(_ranks, pair)])}
        return {name: torch.corrcoef(xy)[0, 1].item() if is_defined else None for name, xy in pairs.items()}
    if not logits.isfinite().all():     # argmax would take NaN for an answer
        return dict.fromkeys(("accuracy", "macro_f1", "micro_f1"))
    C = logits.shape[-1]
    confusion = torch.bincount(targets * C + logits.argmax(-1), minlength=C * C).view(C, C).double()    # truth x prediction
    right, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    occurs = truth + predicted > 0      # as in scikit-learn: classes in neither truth nor prediction do not count
    f1, accuracy = (2 * right / (truth + predicted))[occurs].mean().item(), (right.sum() / confusion.sum()).item()
    return {"accuracy": accuracy, "macro_f1": f1, "micro_f1": accuracy}  # with one label per text, micro-F1 is accuracy


def _ranks(x: Tensor) -> Tensor:
    """Ranks for Spearman's coefficient; ties share their mean rank."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def score(values: dict[str, float | None]) -> float:
    """The score that runs are compared by: accuracy or Pearson's correlation, -inf if undefined."""
    return float("-inf") if (first := next(iter(values.values()))) is None else first
