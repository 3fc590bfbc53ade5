"""The settings of an upgrade, and what a stage derives from them: earlier domains, recipe, first weights. `c` is the script's config."""
import math
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Iterable, NamedTuple

import torch
from torch import Tensor, nn

from rt.data import Corpus, MaskUnit, Objective, Rows, Tokenizer
from rt.deltas import Base, check_sizes
from rt.errors import InputError
from rt.formats.atomic import check_seal
from rt.formats.checkpoint import load_base
from rt.formats.hub import open_base
from rt.formats.untrusted import is_utf8
from rt.limits import Limit, NonNegative, NonNegativeInt, PositiveInt, PositiveShare, Share, ShareBelowOne
from rt.model import Encoder, EncoderConfig, MaskedLM, MLMHead, new_masked_lm
from rt.optim import ScheduleConfig, derive_seed
from rt.pretrain import evaluate_mlm, mlm_loss
from rt.recipes import Preserve, PreserveBy, Recipe, mix
from rt.runs.config import changed
from rt.speed.dist import Ranks

HELDOUT_MASK_RATE = 0.15    # does not depend on --mask_rate, so held-out losses can be compared
SAMPLE_TOKENS = 16384       # tokens from which --preserve takes the variances of hidden states


@dataclass(frozen=True)
class RecipeConfig:
    """The switches that change a stage of pre-training. The defaults change nothing."""
    # recipes of an upgrade (docs/recipes.md)
    rates: ScheduleConfig = ScheduleConfig()
    preserve: NonNegative = 0.0  # weight of the distance from the previous base, so that its deltas still work; try 3 to 30
    preserve_by: PreserveBy = "hidden"  # what should not move: hidden states of all layers or of the last, predictions, or attention maps
    preserve_to: str | None = None  # the base to stay near, such as M0 along a chain of upgrades; default: the previous base
    replay: ShareBelowOne = 0.0  # share of the rows that come from earlier domains of the lineage, in equal parts per domain
    select: str | None = None  # keep only the documents of each domain that are most like the training texts of this task
    keep: PositiveShare = 0.3  # select: share of the documents to keep
    template: str = "{text} {text_pair}"  # how a domain task:NAME puts its examples into words; may contain {label}, too
    mix: tuple[str, ...] = ()  # one stage on all domains of the stream, in fixed shares (wiki:0.3,bio:0.7) or by need (need)
    mix_every: Annotated[int, Limit(lambda v: v >= 5, "--{name} {value}: must be 5 or more: batches are made ahead")] = 50  # need: steps
    mix_eta: NonNegative = 1.0  # need: a share is multiplied by exp(eta * excess loss over the reference), if positive
    mix_reference: str | None = None  # need: the base that sets the target losses; default: the base that the stage starts from
    objective: Objective = "mlm"  # mlm; rts: tell original tokens from random ones; slm: predict the tokens that random ones replaced
    mask: MaskUnit = "token"  # what is masked: single tokens, whole words, or names and numbers first (entity)
    max_len: PositiveInt | None = None  # longest sequence of the new base, in tokens; its positions repeat the old ones
    align: NonNegativeInt = 0  # Reptile: after every N steps, the weights move part of the way back
    align_eps: Share = 0.3  # Reptile: share of the way that is kept; 1 is plain training
    average: PositiveInt = 1  # the published base is the mean of the last N snapshots, counting the stage's end

    def check(self, domains: list[str], warmup: float, steps: int, snapshots: int, tasks: int = 0, is_new: bool = False) -> None:
        """InputError for settings that make no sense together or with those of the stage. `tasks`: how many of `domains` are tasks.
        `is_new`: nothing is continued."""
        s = self.rates
        for of, is_there, *names in (
                ("`schedule` wsd or infinite", s.schedule in ("wsd", "infinite"), "cooldown"),
                ("`schedule` infinite", s.schedule == "infinite", "hold", "anneal", "rewarm"),
                ("`mix` need", self.by_need, "mix_every", "mix_eta", "mix_reference"),
                ("`preserve`", self.preserve, "preserve_by", "preserve_to"), ("`align`", self.align, "align_eps"),
                ("`select`", self.select, "keep"),
                ("a corpus in `stream`", tasks < len(domains), "select"), ("task:NAME in `stream`", tasks, "template")):
            if not is_there and (idle := [name for name in names if name in changed(self)]):
                raise InputError(f"`{idle[0]}` has no effect without {of}")
        if self.preserve and self.preserve_by == "predictions" and self.objective == "rts":
            raise InputError("`preserve_by` predictions compares distributions over the vocabulary, and `objective` rts predicts none")
        anneal = s.anneal * (s.schedule == "infinite")
        if s.schedule in ("wsd", "infinite") and warmup + s.cooldown + anneal > 1 + 1e-9:     # .56 + .34 + .1 is above 1
            raise InputError(f"`warmup` {warmup}, `cooldown` {s.cooldown}" + f" and `anneal` {s.anneal}" * bool(anneal)
                             + " add up to more than the whole stage")
        if s.annealing(steps) >= steps:
            raise InputError(f"`anneal` {s.anneal}: nothing is left of {steps} steps to go on from")
        if self.average > min(snapshots, steps - 1) + 1:
            raise InputError(f"`average` {self.average} takes {self.average - 1} snapshots and the end of a stage: raise `snapshots` "
                             f"({snapshots})" + f" and `steps` ({steps})" * (snapshots >= steps))
        if self.mix and len(domains) < 2:
            raise InputError(f"`mix` {','.join(self.mix)}: there is one domain, {domains[0]}; name all of them in `stream`")
        if self.mix and not self.by_need and not (self.shares.keys() == set(domains) and abs(sum(self.shares.values()) - 1) < 0.01):
            raise InputError(f"`mix` {','.join(self.mix)}: must be need, or shares of {', '.join(domains)} that add up to 1, as in "
                             + ",".join(f"{name}:{1 / len(domains):.3g}" for name in domains))
        if self.align > steps:
            raise InputError(f"`align` {self.align}: has its first effect after {self.align} steps, and a stage has {steps}")
        if self.by_need and 2 * self.mix_every >= steps:
            raise InputError(f"`mix_every` {self.mix_every}: shares change first after {2 * self.mix_every} steps, and a stage has {steps}")
        if is_new and self.preserve and (self.mix or len(domains) == 1):
            raise InputError("`preserve`: a new base has no earlier one to stay near; give that one with `init`")
        if is_new and s.rewarm:
            raise InputError("`rewarm` has no effect without `init`: the rate of a new base rises anyway")
        if is_new and self.by_need and not self.mix_reference:
            raise InputError("`mix` need: no loss of a new base rises above that of its random start, so the shares would stay equal; give "
                             "a base that sets the losses to reach as `mix_reference`, or continue one with `init`")

    @property
    def by_need(self) -> bool:
        return self.mix == ("need",)

    @property
    def shares(self) -> dict[str, float]:
        """{domain: fixed share} from `mix`. An unreadable share is NaN."""
        pairs = [entry.rpartition(":") for entry in self.mix]
        return {name: float(share) if share.replace(".", "", 1).isdecimal() and float(share) else math.nan for name, _, share in pairs}

    def start_shares(self, domains: list[str], earlier: int) -> list[float]:
        """The first shares: those of the earlier domains (`earlier` in number), then those of the stage's own domains."""
        replay = self.replay if earlier else 0.0
        total = sum(self.shares.values())       # of shares such as .333 not quite 1
        own = [1 / len(domains) if self.by_need or not self.mix else self.shares[name] / total for name in domains]
        return [replay / earlier for _ in range(earlier)] + [(1 - replay) * share for share in own]


def scored_rows(corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> Rows:
    """Rows of `seq_len` tokens for measuring a masked-LM loss, masked in the same way for all bases."""
    return Rows(corpus, tokenizer, seq_len=seq_len, mask_rate=HELDOUT_MASK_RATE, seed=0, sequences=1)


def rows_of(c: Any, corpora: dict[str, dict[str, Corpus]], groups: list[tuple[str, ...]], earlier: list[str], tokenizer: Tokenizer,
            number: int, ranks: Ranks) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """(training rows per stage, held-out rows per domain). The first stage is M`number`; `groups` lists the domains of each stage."""
    training = {}
    for i, group in enumerate(groups, number):
        replayed = [name for name in earlier if name not in group]
        names = [group[0], *replayed, *group[1:]]
        first, *others = [Rows(corpora[name]["train"], tokenizer, seq_len=c.seq_len, mask_rate=c.mask_rate, objective=c.recipe.objective,
                               unit=c.recipe.mask, seed=derive_seed(c.seed, i, j)) for j, name in enumerate(names)]
        first.check_batch(c.batch_tokens, ranks.world * c.accumulation)
        if others:
            mix(first, others, c.recipe.start_shares([*group[1:], group[0]], len(replayed)),
                c.recipe.mix_every * (c.batch_tokens // first.row_tokens) if c.recipe.by_need else 0)
        training["+".join(group)] = first
        earlier = [*dict.fromkeys((*earlier, *group))] if c.recipe.replay else []
    return training, {name: scored_rows(parts["heldout"], tokenizer, c.seq_len) for name, parts in corpora.items()}


class Start(NamedTuple):
    """The parent of a new base."""
    parent: str | None = None       # fingerprint; None: there is no parent
    number: int = -1
    domains: dict[str, str] = {}    # {domain that the parent was trained on: place of its texts}
    moments: Path | None = None     # folder with the optimizer's state to continue with
    contents: dict[str, str] = {}   # {domain that the parent was trained on: hash of its tokens}


def earlier_domains(c: Any, domains: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    """{name: place} of the domains of --init's lineage, which --replay draws from in the stages that do not learn them again. Without
    --replay, none. InputError if one of the stream's `own` domains has the name of an earlier one, which the lineage would lose, or a place
    that meta.json could not give back."""
    for name, place in own.items():
        if not is_utf8(place):      # a path typed as UTF-8 may resolve to one that is not
            raise InputError(f"--stream: {name} ({place}) is not UTF-8, and could not be read again from a record; rename the folder")
    if clash := [name for name, place in own.items() if domains.get(name, place) != place]:
        raise InputError(f"--stream: {clash[0]} ({own[clash[0]]}) has the name of an earlier domain ({domains[clash[0]]}); rename what "
                         "--stream names, or give a link to it that has another name")
    if not c.recipe.replay:
        return {}
    if domains.keys() <= own.keys() and (c.recipe.mix or len(own) == 1):
        raise InputError(f"--replay: {c.init or 'a new base'} has no record (in its meta.json) of domains other than those of this stream")
    for name, place in domains.items():
        if "/" in place and not place.startswith("hub:") and not Path(place).exists():
            raise InputError(f"--replay: {name}, an earlier domain of {c.init}, was read from {place}, which is gone: restore it "
                             "(texts of --select and task: are in that run's --cache)")
    return domains


def contents_of(corpora: dict[str, dict[str, Corpus]], noted: dict[str, str], earlier: dict[str, str],
                groups: list[tuple[str, ...]]) -> list[dict[str, str]]:
    """After each stage, {domain: hash of its tokens} as the lineage learned it: `noted` before, and `corpora` of the stages so far (their
    `groups`). InputError if a domain (`earlier`: its place) that the first stage only replays is not what the lineage learned."""
    found = {name: parts["train"].content for name, parts in corpora.items() if parts["train"].content}     # old caches have none
    for name, place in earlier.items():
        if name in found and name not in groups[0] and noted.get(name, "") not in ("", found[name]):
            raise InputError(f"--replay: {name} ({place}) has changed since the lineage learned it: restore it, or leave --replay out")
    learned = ({name: found[name] for name in some if name in found} for some in (earlier, *groups))
    return [*accumulate(learned, or_, initial=noted)][2:]


def used(recipe: RecipeConfig, rows: Rows, parent: str | None) -> dict:
    """The settings of a recipe that are not the defaults, without those that have no effect because nothing came before the stage."""
    idle = [*["replay"] * (rows.mixture is None), *["preserve", "preserve_by", "preserve_to"] * (parent is None)]
    return {name: value for name, value in changed(recipe).items() if name not in idle}


def target(c: Any, flag: str, tokenizer: Tokenizer, sizes: EncoderConfig, ranks: Ranks) -> Base | None:
    """The base that --mix_reference or --preserve_to names, if it does. InputError if that base cannot score the texts as the new base
    does, or if hidden states of `sizes` cannot stay near its own."""
    if not (place := getattr(c.recipe, flag)):
        return None
    base = ranks.main_first(lambda: open_base(place))
    if base.head is None or base.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"--{flag} {place}: has another tokenizer than the new base, or no masked-LM head")
    if flag == "mix_reference":
        base.require_length(c.seq_len)
    else:       # a shorter base is lengthened as the new base was
        check_sizes(base, replace(sizes, max_len=min(sizes.max_len, base.encoder.config.max_len)), f"--{flag} {place}: the new base has")
    return base


def start_recipe(c: Any, model: MaskedLM, rows: Rows, corpora: list[Corpus], tokenizer: Tokenizer, ranks: Ranks, where: dict,
                 published: str | Path | None) -> Recipe:
    """The recipe of a stage on `corpora`; `rows` come from the first corpus. `published` is the base that is continued (None: a new base,
    with nothing to preserve). `model` may hold its weights before the annealing; deltas were tuned on `published`, so that is preserved,
    unless --preserve_to names another base."""
    r, loss, sizes = c.recipe, mlm_loss, model.encoder.config
    if r.preserve and published:
        most = min(max(1, SAMPLE_TOKENS // rows.row_tokens), rows.per_epoch, rows.mixture.every if r.by_need else rows.per_epoch)
        base = target(c, "preserve_to", tokenizer, sizes, ranks) or ranks.main_first(lambda: open_base(str(published)))
        old = lengthen(MaskedLM(base.encoder, base.head or model.head), sizes.max_len).to(ranks.device)
        sample = rows.masked(range(most)).to(ranks.device)       # by need, later shares are not known yet
        loss = Preserve(old, r.preserve, r.preserve_by, sample)
    if not r.by_need:
        return Recipe(model, r.align, r.align_eps, loss=loss)
    probes = [scored_rows(corpus, tokenizer, c.seq_len) for corpus in (*corpora[1:], corpora[0])]

    def losses(model: MaskedLM = model) -> list[float]:
        return ranks.from_main(lambda: [evaluate_mlm(model, probe, tokens=c.eval_tokens, **where)["loss"] for probe in probes])

    reference = model
    if base := target(c, "mix_reference", tokenizer, sizes, ranks):
        reference = MaskedLM(base.encoder, base.head).to(ranks.device)
    return Recipe(model, r.align, r.align_eps, rows.mixture, r.mix_every, r.mix_eta, losses, losses(reference), loss)


def go_on_from(c: Any, folder: Path, base: Base) -> tuple[MaskedLM, str, Path | None]:
    """(model, fingerprint, folder of the optimizer's state) to continue: `base`, or its state before an infinite schedule's annealing."""
    moments = None
    if c.recipe.rates.schedule == "infinite" and ("trunk" in base.meta or (folder / "optim.pt").is_file()):     # `folder` may be that state
        moments = folder.parent / base.meta.get("trunk", folder.name)
        if moments.parent != folder.parent or not (moments / "optim.pt").is_file():
            raise InputError(f"{folder} was annealed from {moments}, which is gone: restore it to go on, or give another --schedule")
        published, base = base, load_base(moments)
        ours, theirs = ({k: b.meta.get(k) for k in ("parent", "contents")} | b.meta.get("config", {}) for b in (published, base))
        if any(ours[k] != theirs[k] for k in ours.keys() & theirs.keys()):      # a later version of the code has more settings
            raise InputError(f"{moments} is not the state that {folder} was annealed from, but of another run: put that beside it")
        check_seal(moments, "meta.json", base.meta, ("optim.pt",))
    model = MaskedLM(base.encoder, base.head or new_masked_lm(base.encoder.config, c.seed).head)
    return model, base.fingerprint, moments


def set_dropout(model: nn.Module, p: float) -> None:
    """Use dropout `p` everywhere in `model`. The config, and so the checkpoints, keep their own values."""
    for module in model.modules():
        for name in {"dropout", "attention_dropout"} & set(vars(module)):
            setattr(module, name, p)


@torch.no_grad()
def average_into(model: MaskedLM, states: Iterable[dict[str, Tensor]]) -> None:
    """Set the weights of `model` to the mean of these weights and `states`."""
    mean = model.state_dict()
    for n, state in enumerate(states, 2):
        for name, value in mean.items():
            value.lerp_(state[name].to(value), 1 / n)


def lengthen(model: MaskedLM, max_len: int) -> MaskedLM:
    """`model` with positions for `max_len` tokens: RoBERTa's rows before the first position, then the old positions, repeated. `model`
    itself if it has them."""
    config, name = model.encoder.config, "encoder.embeddings.position.weight"
    if max_len == config.max_len:
        return model
    if max_len < config.max_len:
        raise InputError(f"--max_len {max_len}: the base has positions for {config.max_len} tokens, and none are taken away")
    first, table = model.state_dict()[name].split([config.first_position, config.max_len])
    longer = MaskedLM(Encoder(config := replace(config, max_len=max_len)), MLMHead(config))
    tiled = table.repeat(-(-max_len // len(table)), 1)[:max_len]
    longer.load_state_dict(model.state_dict() | {name: torch.cat([first, tiled])})
    return longer
