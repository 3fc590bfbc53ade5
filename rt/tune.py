"""The supervised loop: train a Classifier on a task, evaluate on dev every so often, keep the best, report test once. The loop of many
runs side by side is in rt/grid.py."""
import math
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Callable, TextIO

import numpy as np
import torch
from torch import Tensor

from rt.data import Encoded, Task, encode, sequences_batch, side_by_side, training_indices
from rt.errors import Diverged
from rt.formats.tokenizer import Tokenizer
from rt.losses import Loss
from rt.model import Batch, Classifier
from rt.optim import MOST_SKIPPED, Watch, adamw, autocast, derive_seed, memory_for, schedule, set_lr, step_unless
from rt.runs.log import loss_text, progress
from rt.speed.graphs import BUCKET, GraphedStep
from rt.speed.throughput import Pace


@dataclass
class TuneSettings:
    """One run of `tune`. Learning rate: linear warm-up over `warmup` (a share of `steps`), then linear decay."""
    steps: int
    batch_size: int
    lr: float
    eval_every: int
    seed: int
    weight_decay: float = 0.01
    warmup: float = 0.06
    clip: float = 1.0
    graphs: bool = False    # a CUDA graph of forward and backward for each bucket of tokens
    early_stop: int = 0     # end when so many evaluations in a row have brought nothing better; 0: never

    def stops(self, result: "TuneResult", step: int) -> bool:
        """Whether a run that has been evaluated after `step` ends there."""
        return bool(result.diverged) or 0 < self.early_stop * self.eval_every <= step - result.best_step


@dataclass
class TaskData:
    """A task, encoded: what the loop reads. `labels` is empty for a regression; without `test` a run is not scored on it,
    as in a search, where only dev may choose."""
    name: str
    labels: tuple[str, ...]
    train: Encoded
    dev: Encoded
    test: Encoded | None
    hash: str = ""      # Task.hash; "" of what is made of no task

    @property
    def num_outputs(self) -> int:
        return max(1, len(self.labels))

    def truncated(self) -> tuple[int, int]:
        """(texts that were cut, all texts)."""
        parts = [part for part in (self.train, self.dev, self.test) if part]
        return sum(part.truncated for part in parts), sum(map(len, parts))


def encode_task(task: Task, tokenizer: Tokenizer, max_len: int) -> TaskData:
    """All parts of a task as ids, texts cut to `max_len` tokens. InputError where a label or text does not fit (rt/tasks.py: encode)."""
    parts = {part: encode(examples, task.labels, tokenizer, max_len) for part, examples in task.parts.items()}
    return TaskData(task.name, task.labels, **parts, hash=task.hash)


def say_truncated(truncated: int, count: int, seq_len: int, file: TextIO | None = None) -> None:
    if truncated:
        print(f"{truncated} of {count} texts are longer than --seq_len {seq_len} and were cut", file=file)


def say_changed(info: dict, task: Task) -> None:
    """On stderr, where a delta (of which `info` tells) was learned on a task of other content than `task`."""
    if info.get("task_hash", task.hash) != task.hash:
        print(f"note: the delta was learned on task {info.get('task')} of content {info['task_hash']}; {task.name} is of content "
              f"{task.hash}: it has other texts or labels", file=sys.stderr)


@dataclass
class TuneResult:
    """`curve`: (step, dev score) pairs; scores are dicts whose first entry is the one that runs are compared by."""
    best_step: int
    dev: dict[str, float]
    test: dict[str, float]
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0        # steps whose loss or gradient was not finite
    diverged: int = 0       # of runs side by side: the step after which too many in a row were not; 0: never


def metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """accuracy, macro_f1, micro_f1 of (n, C) logits and (n,) classes; pearson and spearman of (n, 1) and (n,) floats."""
    if targets.is_floating_point():
        prediction, truth = logits.squeeze(-1).double().numpy(), targets.double().numpy()
        return {"pearson": _correlation(prediction, truth), "spearman": _correlation(_ranks(prediction), _ranks(truth))}
    predicted = logits.argmax(-1)
    C = logits.shape[-1]
    confusion = torch.bincount(targets * C + predicted, minlength=C * C).view(C, C).double()    # truth x prediction
    right, truth, said = confusion.diag(), confusion.sum(1), confusion.sum(0)
    occurs = truth + said > 0   # as scikit-learn: classes in neither truth nor prediction do not count
    f1 = (2 * right / (truth + said))[occurs].mean().item()
    accuracy = (right.sum() / confusion.sum()).item()
    return {"accuracy": accuracy, "macro_f1": f1, "micro_f1": accuracy}  # one label a text: micro-F1 is accuracy


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean, as Spearman's coefficient wants them."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


@torch.no_grad()
def predict(model: Classifier, sequences: list[list[int]], device: torch.device, precision: torch.dtype,
            batch_size: int = 64) -> Tensor:
    """(n, C) fp32 logits on the CPU, in the order of `sequences`; batches are made by length."""
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    chunks = []
    for i in range(0, len(order), batch_size):
        batch = sequences_batch([sequences[j] for j in order[i:i + batch_size]]).to(device)
        with memory_for(f"{len(batch.cu_seqlens) - 1} texts of up to {batch.max_seqlen} tokens", "--seq_len"), autocast(device, precision):
            chunks.append(model(batch).float().cpu())
    logits = torch.cat(chunks)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def evaluate(model: Classifier, data: Encoded, device: torch.device, precision: torch.dtype) -> dict[str, float]:
    """`metrics` of the model, without dropout, on all of `data`."""
    return metrics(predict(model, data.sequences, device, precision), data.targets)


def chance(data: TaskData) -> dict[str, float]:
    """The score on test without reading: of always saying the commonest training label, and of guessing ('uniform'); of a
    regression 0."""
    if not data.labels:
        return {"pearson": 0.0, "spearman": 0.0}
    commonest = data.train.targets.bincount().argmax()
    return {"accuracy": (data.test.targets == commonest).float().mean().item(), "uniform": 1 / len(data.labels)}


def score(values: dict[str, float]) -> float:
    """The figure that runs are compared by: accuracy, or Pearson's correlation."""
    return next(iter(values.values()))


def shown(values: dict[str, float]) -> str:
    """Scores in a line of text."""
    return ", ".join(f"{k} {v:.3f}" for k, v in values.items())


def training_batch(data: Encoded, s: TuneSettings, step: int) -> Batch:
    """The examples of one step and its dropout seed: a function of the run's seed and the step."""
    batch = data.batch(training_indices(len(data), s.batch_size, step, s.seed))
    return replace(batch, seeds=torch.tensor([derive_seed(s.seed, step)]))


def gradient_of(model: Classifier, loss: Loss, s: TuneSettings, device: torch.device, precision: torch.dtype) -> Callable[[Batch], Tensor]:
    """What a step computes of a batch on the host: the loss, and the gradient of what is trained. InputError where memory runs out."""
    def plain(batch: Batch, shares: Tensor | None = None) -> Tensor:
        with autocast(device, precision):
            value = loss(model, batch.to(device))
        value.backward()
        return value.detach()

    graphed = GraphedStep(plain, [p for p in model.parameters() if p.requires_grad], device) if s.graphs else None

    def gradient(batch: Batch) -> Tensor:
        what = f"a batch of {s.batch_size} sequences of up to {batch.max_seqlen} tokens"
        with memory_for(what, f"--batch_size ({s.batch_size}) or --seq_len"):
            return graphed(*side_by_side([batch], BUCKET)) if graphed else plain(batch)

    return gradient


def tune(model: Classifier, data: TaskData, loss: Loss, settings: TuneSettings, *, device: torch.device,
         precision: torch.dtype, on_eval: Callable[[dict], None] = lambda row: None, what: str = "tuning") -> TuneResult:
    """Train what requires a gradient in `model`; on return it holds the weights that were best on dev. A step whose loss or gradient is not
    finite is skipped and counted; Diverged after more than MOST_SKIPPED in a row.

    Dev is also scored before the first step (step 0): what the start is worth. `on_eval` gets {'step', 'loss', 'dev'}.
    Test is scored once, at the end, where there is one. Batches and dropout are functions of (seed, step).
    """
    s, started = settings, time.perf_counter()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained.values(), s.lr, s.weight_decay, betas=(0.9, 0.999))
    result = TuneResult(0, {}, {})
    best: dict[str, Tensor] = {}

    def score_dev(step: int, mean_loss: float | None, skipped: int = 0) -> None:
        dev = evaluate(model, data.dev, device, precision)
        result.curve.append((step, score(dev)))
        on_eval({"step": step, "loss": mean_loss, "dev": dev, **({"skipped": skipped} if skipped else {})})
        if not result.dev or score(dev) > score(result.dev):
            result.dev, result.best_step = dev, step
            best.update({k: p.detach().clone() for k, p in trained.items()})

    gradient = gradient_of(model, loss, s, device, precision)
    score_dev(0, None)
    pace = Pace(model.encoder.config, device, precision, frozen=not model.encoder.layers[0].qkv.weight.requires_grad)
    watch = Watch((), device)
    with progress(s.steps, what) as bar:
        for step in range(s.steps):
            torch.manual_seed(derive_seed(s.seed, step))    # of interpolation's points
            set_lr(optimizer, schedule(step, s.steps, max(1, round(s.warmup * s.steps)), s.lr))
            batch = training_batch(data.train, s, step)
            model.train()
            value = gradient(batch)
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), s.clip)
            step_unless(optimizer, watch.count(value, norm))
            optimizer.zero_grad(set_to_none=True)
            pace.count(batch)
            if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
                (mean_loss, skipped, diverged), = watch.look()
                result.skipped += skipped
                if diverged:
                    raise Diverged(f"more than {MOST_SKIPPED} steps in a row before step {step + 2} had no finite loss and gradient: "
                                   f"lower --lr ({s.lr})")
                with pace.pause():
                    score_dev(step + 1, mean_loss, skipped)
                bar.set_postfix_str(f"{loss_text(mean_loss, result.skipped)}, best dev {score(result.dev):.3f}, {pace}")
                if s.stops(result, step + 1):
                    break
            bar.update()
    with torch.no_grad():
        for k, p in trained.items():
            p.copy_(best[k])
    result.test = evaluate(model, data.test, device, precision) if data.test is not None else {}
    result.seconds = time.perf_counter() - started
    return result
