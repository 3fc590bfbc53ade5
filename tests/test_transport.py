"""Maps from text: exact where the answer is known, one sentence where there is none."""
import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import random_base

from experiments.twin import permuted_twin
from rt.data import sequences_batch
from rt.deltas import Base, apply, attach, extract
from rt.errors import InputError
from rt.formats.checkpoint import fingerprint
from rt.kinds import KINDS, TARGETS, DeltaConfig
from rt.model import Encoder, EncoderConfig, MaskedLM, new_masked_lm
from rt.transport import assignment, check_carry, maps, match_layers, moved, pairs_of, transport

TEXTS = [" ".join(f"{chr(97 + (i * j + k) % 26)}{(7 * i + j * k) % 97}" for k in range(12)) for i in range(12) for j in range(1, 5)]


def tuned(base, kind, labels=3, size=0.1):
    """A delta as of tuning: every trained weight moved at random."""
    config = DeltaConfig(kind, r=4, bottleneck=8, prefix_len=4, target_modules=tuple(TARGETS))
    model, generator = attach(base, config, labels, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return extract(model, base, config, {"task": "t", "labels": [str(i) for i in range(labels)]})


def logits(base, delta, batch):
    with torch.no_grad():
        return apply(base, delta).eval()(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["ridge", "orthogonal", "permutation"])
def test_between_identical_bases_nothing_changes(base, batch, kind, how):
    delta = tuned(base, kind)
    carried, about = transport(base, base, delta, TEXTS, how, 64)
    close = dict(atol=0, rtol=0) if how == "permutation" else dict(atol=1e-4, rtol=1e-4)
    print(kind, how, (logits(base, carried, batch)- logits(base, delta, batch)).abs().max().item())
    torch.testing.assert_close(logits(base, carried, batch), logits(base, delta, batch), **close)
    assert carried.config == delta.config and about["layers"] == [(0, 0), (1, 1)] and about["texts"] == 48


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["ridge", "orthogonal", "permutation"])
def test_a_permuted_twin_is_undone(base, batch, kind, how):
    delta, twin = tuned(base, kind), permuted_twin(base, 3)
    with torch.no_grad():
        torch.testing.assert_close(MaskedLM(twin.encoder, twin.head)(batch), MaskedLM(base.encoder, base.head)(batch), atol=1e-4, rtol=1e-4)
    right = logits(base, delta, batch)
    carried, _ = transport(base, twin, delta, TEXTS, how, 64)
    found = logits(twin, carried, batch)            # a delta of the twin: not stale
    print(kind, how, (found-right).abs().max().item(), right.abs().max().item())
    with torch.no_grad():
        assert (apply(twin, delta, stale_ok=True).eval()(batch) - right).abs().max() > 0.3      # as it stands it is worth nothing
    assert (found - right).abs().max() < 1e-5
