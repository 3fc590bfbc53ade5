"""The masked-LM loop, the training of one stage with what it writes, and the evaluation; train.py keeps the policy."""
import math
import queue
import threading
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, TypeVar

import torch
from torch import Tensor, nn

from kernels import linear_cross_entropy
from rt.data import Rows
from rt.errors import Diverged
from rt.formats.checkpoint import load_base, read_torch, save_base
from rt.formats.files import read_json
from rt.formats.tokenizer import Tokenizer
from rt.model import Batch, MaskedLM
from rt.optim import MOST_SKIPPED, adamw, autocast, derive_seed, gather, load_state, memory_for, not_finite, schedule, set_lr, step_unless
from rt.runs.log import Log, loss_text, progress
from rt.runs.signals import Stop
from rt.speed.dist import Ranks
from rt.speed.graphs import GraphedGradient, compiled
from rt.speed.throughput import Pace

AHEAD = 3       # batches prepared before they are asked for


T = TypeVar("T")


@dataclass
class PretrainSettings:
    """One stage of masked-LM training. `steps` are optimizer steps of `batch_tokens` tokens, of all ranks together."""
    steps: int
    batch_tokens: int
    lr: float
    warmup_steps: int
    seed: int
    accumulation: int = 1
    clip: float = 1.0
    log_every: int = 1      # steps between looks at the loss, each of which waits for the device
    compile: bool = False   # torch.compile of each block
    graphs: bool = False    # a CUDA graph of forward and backward


def mlm_loss(model: MaskedLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the predicted rows; the logits over the vocabulary stay in linear_cross_entropy."""
    return linear_cross_entropy(model.features(batch), model.encoder.embeddings.word.weight, model.head.bias, batch.labels)


class Objective(nn.Module):
    """What a share of a batch adds to the loss, as a module of its own: DistributedDataParallel sees nothing outside a forward."""

    def __init__(self, model: MaskedLM, parts: int, precision: torch.dtype):
        super().__init__()
        self.model, self.parts, self.precision = model, parts, precision

    def forward(self, batch: Batch) -> Tensor:
        with autocast(batch.ids.device, self.precision):
            return mlm_loss(self.model, batch) / self.parts


def ahead(items: Iterable[T], depth: int = AHEAD) -> Iterator[T]:
    """The same items, made on another thread up to `depth` before they are asked for. What the thread raises is raised here; when the
    loop over this is left (close it), the thread ends."""
    ready, room, left = queue.SimpleQueue(), threading.Semaphore(depth), threading.Event()
    end = object()

    def work():
        try:
            room.acquire()
            for item in items:
                ready.put((item, None))
                room.acquire()
                if left.is_set():
                    return
            ready.put((end, None))
        except BaseException as error:
            ready.put((end, error))

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            room.release()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        left.set()
        room.release()
        thread.join()


def shares(rows: Rows, s: PretrainSettings, ranks: Ranks, start: int) -> Iterator[Batch]:
    """This rank's batches from step `start` on, `accumulation` of them a step, each with the seed of its dropout masks: a function of
    (seed, step, share), so that ranks and parts can stand in for each other. On CUDA pinned and, as always where the step is compiled,
    of static shapes."""
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.device)     # of this thread: pinning must not touch another GPU
    for step in range(start, s.steps):
        for part in range(s.accumulation):
            batch = rows.batch(step, s.batch_tokens, ranks.rank, ranks.world, part, s.accumulation)
            batch.seeds = torch.tensor([derive_seed(s.seed, step, ranks.rank * s.accumulation + part)])
            if cuda or s.compile:
                batch = rows.static(batch)
            yield pinned(batch) if cuda else batch


def pinned(batch: Batch) -> Batch:
    return replace(batch, **{k: v.pin_memory() for k, v in vars(batch).items() if isinstance(v, Tensor)})


def pretrain(model: MaskedLM, rows: Rows, optimizer: torch.optim.Optimizer, settings: PretrainSettings, *, precision: torch.dtype,
             device: torch.device | None = None, ranks: Ranks | None = None, start: int = 0,
             exact: Callable[[int], bool] = lambda step: False, pace: Pace | None = None) -> Iterator[dict]:
    """Train from step `start` on, yielding {'step', 'loss', 'lr', 'grad_norm'} of every optimizer step.

    Rows come `log_every` at a time, for nothing waits for the device before; so `model` may be ahead of a row, but not at steps that
    `exact` names, nor at the last. Data and dropout are seeded by (seed, step, share), so a loop that is left and entered again
    repeats nothing and leaves nothing out. Every rank runs this; the rows are the same on all. `pace` counts what is trained on.

    A step whose loss or gradient is not finite changes nothing: its row has 'skipped', and None for what is not. Raises Diverged after
    more than MOST_SKIPPED in a row, InputError where a share does not fit into memory.
    """
    s, ranks = settings, ranks or Ranks(device)
    model.train()
    objective, waiting, in_a_row = Objective(model, s.accumulation, precision), [], 0
    with compiled(model.encoder.layers if s.compile else (), ranks.device), closing(ahead(shares(rows, s, ranks, start))) as batches:
        gradient = GraphedGradient(objective, s.accumulation, ranks.device) if s.graphs else PlainGradient(objective, s.accumulation, ranks)
        for step in range(start, s.steps):
            lr = schedule(step, s.steps, s.warmup_steps, s.lr)
            set_lr(optimizer, lr)
            total = torch.zeros((), device=ranks.device)
            for part in range(s.accumulation):
                batch = next(batches)
                with memory_for(f"a share of {len(batch.ids)} tokens", f"--batch_tokens ({s.batch_tokens}), or raise --accumulation "
                                f"({s.accumulation})"):
                    total += gradient(batch, part)
                if pace:
                    pace.count(batch)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            total = ranks.mean(total)       # all skip a step or none; like the gradients' exchange, nothing that the host waits for
            step_unless(optimizer, not_finite(total, norm))
            waiting.append(({"step": step + 1, "lr": lr}, torch.stack([total, norm])))
            if exact(step + 1) or (step + 1) % s.log_every == 0 or step + 1 == s.steps:
                for row in fetched(waiting):
                    in_a_row = in_a_row + 1 if "skipped" in row else 0
                    if in_a_row > MOST_SKIPPED:
                        raise Diverged(f"the loss at step {row['step'] - MOST_SKIPPED} or its gradient is not finite, nor are those of the "
                                       f"{MOST_SKIPPED} steps after it: lower --lr ({s.lr}) or raise --warmup (now {s.warmup_steps} steps)")
                    yield row
                waiting.clear()


class PlainGradient:
    """`objective(batch).backward()`, averaged over the ranks in the last part of a step."""

    def __init__(self, objective: Objective, parts: int, ranks: Ranks):
        self.objective, self.parts, self.ranks = ranks.parallel(objective), parts, ranks

    def __call__(self, batch: Batch, part: int) -> Tensor:
        """The loss of `batch`, the `part`-th of its step."""
        if part == 0:
            self.objective.zero_grad(set_to_none=True)
        alone = self.ranks.world > 1 and part < self.parts - 1
        with self.objective.no_sync() if alone else nullcontext():
            loss = self.objective(batch.to(self.ranks.device))
            loss.backward()
        return loss.detach()


def fetched(waiting: list[tuple[dict, Tensor]]) -> Iterator[dict]:
    """The rows of some steps, completed by their losses and norms, which leave the device in one copy. JSON has no word for what is not
    finite: None, and that the step was skipped."""
    values = torch.stack([pair for _, pair in waiting]).tolist()
    for (row, _), pair in zip(waiting, values):
        loss, norm = (x if math.isfinite(x) else None for x in pair)
        skipped = {"skipped": True} if None in (loss, norm) else {}
        yield {"step": row["step"], "loss": loss, "lr": row["lr"], "grad_norm": norm, **skipped}


@dataclass
class Stage:
    """The training of one M_i in `out`: the loop, with the rows, snapshots and resumable checkpoints that it leaves. Rank 0 writes."""
    out: Path
    model: MaskedLM
    tokenizer: Tokenizer
    rows: Rows
    about: dict             # for meta.json; `name` and `domain` among it
    settings: PretrainSettings
    precision: torch.dtype
    ranks: Ranks
    log: Log
    weight_decay: float
    zero: bool              # the optimizer's state shared out among the ranks
    snapshots: int          # kept along the way, evenly spaced
    save_every: int         # steps between resumable checkpoints
    stop: Stop = field(default_factory=Stop)    # a signal that has asked for the end
    step: int = 0
    seconds: float = 0.0    # of training, those before an interruption too
    skipped: int = 0        # steps whose loss or gradient was not finite
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        self.optimizer = adamw(self.model.parameters(), 0.0, self.weight_decay, zero=self.zero)

    def resume(self) -> None:
        """Go on from the resumable checkpoint, if there is one and it is of this stage."""
        last = self.out / "last"
        if last.exists() and read_json(last / "meta.json").get("name") == self.about["name"]:
            base = load_base(last)
            self.model.load_state_dict(MaskedLM(base.encoder, base.head).state_dict())
            load_state(self.optimizer, read_torch(last / "optim.pt"))
            self.step, self.skipped, self.seconds = base.meta["step"], base.meta.get("skipped", 0), base.meta.get("seconds", 0.0)

    def save(self, folder: str, resumable: bool) -> None:
        if resumable:
            gather(self.optimizer)
        if self.ranks.is_main:
            self.log.sync()
            facts = {**self.about, "step": self.step, **({"seconds": self.seconds} if resumable else {}), **self.note()}
            save_base(self.out / folder, self.model, self.tokenizer, facts, self.optimizer if resumable else None, keep=resumable)

    def note(self) -> dict:
        """How many steps were skipped, where some were."""
        return {"skipped": self.skipped} if self.skipped else {}

    def asked_to_stop(self, step: int) -> bool:
        """Whether a signal has asked for the end, which ranks agree on where they wait for each other anyway."""
        if self.ranks.world == 1:
            return bool(self.stop.number)
        return step % self.settings.log_every == 0 and self.ranks.any(bool(self.stop.number))

    @contextmanager
    def lost(self) -> Iterator[None]:
        """Says of a training that diverged inside what it can begin again from."""
        try:
            yield
        except Diverged as error:
            last = self.out / "last"
            step = read_json(last / "meta.json") if self.ranks.is_main and last.exists() else None
            left = f"{last} is of step {step['step']} of {step['name']}; --init {last} with another --out begins there" if step else \
                f"no checkpoint of it had been written in {self.out}"
            raise Diverged(f"{error}; {left}") from None

    def train(self, allowance: int) -> int:
        """Up to `allowance` steps, fewer where a signal asks for the end; returns how many were done."""
        s, started, first = self.settings, time.perf_counter() - self.seconds, self.step
        end = min(first + allowance, s.steps)
        kept = {round(s.steps * (k + 1) / (self.snapshots + 1)) for k in range(self.snapshots)}

        def resumable(step: int) -> bool:
            return step < s.steps and (step == end or step % self.save_every == 0)

        def exact(step: int) -> bool:
            nonlocal end
            if step < end and self.asked_to_stop(step):
                end = step
            return step in kept or resumable(step)

        pace = Pace(self.model.encoder.config, self.ranks.device, self.precision, world=self.ranks.world)
        steps = pretrain(self.model, self.rows, self.optimizer, s, precision=self.precision, ranks=self.ranks, start=first,
                         exact=exact, pace=pace)
        with progress(s.steps, f"{self.about['name']} {self.about['domain']}", first) as bar, closing(steps), self.lost():
            for row in steps:
                self.step, self.seconds = row["step"], time.perf_counter() - started
                self.skipped += "skipped" in row
                self.log.row(stage=self.about["name"], **row)
                bar.set_postfix_str(f"{loss_text(row['loss'], self.skipped)}, {pace}", refresh=False)
                bar.update()
                if self.step == first + 1:
                    pace.restart()      # what is compiled or captured is so by the first look at the loss
                with pace.pause():
                    if self.step in kept:
                        self.save(f"{self.about['name']}-t{self.step:05d}", resumable=False)
                    if resumable(self.step) and ("skipped" not in row or self.step == end):     # else the one before is better
                        self.save("last", resumable=True)
                if self.step == end:
                    break
        return self.step - first


@torch.no_grad()
def evaluate_mlm(model: MaskedLM, rows: Rows, *, tokens: int, device: torch.device, precision: torch.dtype) -> dict:
    """Loss and accuracy on up to `tokens` tokens of `rows`, masked the same way at every call."""
    model.eval()
    wanted = max(1, min(tokens // rows.row_tokens, rows.per_epoch))
    loss = right = count = 0.0
    for first in range(0, wanted, 8):
        batch = rows.masked(range(first, min(first + 8, wanted))).to(device)
        with autocast(device, precision):
            logits = model(batch).float()
        loss += torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += (logits.argmax(-1) == batch.labels).sum().item()
        count += len(batch.labels)
    model.train()
    return {"loss": loss / count, "accuracy": right / count, "predictions": int(count)}
