"""Folders that an earlier version wrote open, are as they were written, and give the numbers that it got from them.

tests/data/74aa969 was written by commit 74aa969, on a CPU with torch 2.13:

    lineage     train.py --preset tiny --vocab_size 300 --seq_len 32 --batch_tokens 256 --steps 8 --stream graphs,arrays; without snapshots
    deltas      train.py --mode tune --base lineage/M0 --task graphs --delta KIND --tune_steps 6 --shots 4, each kind (lora with
                --target_modules query,value,output.dense); then 0.1 times normal noise was added to their tensors, because six steps leave
                hardly anything in them, and save_delta wrote them again
    recycled    recycle.py --mode all from lineage/M0 and deltas/adapter to lineage/M1, --steps 4 --shots 4 --seeds 0,1 --itp 1; two of its
                ten deltas, with noise as well

Folders in the JSON files were made relative, and the files sealed again, by that commit's own functions. expected.json holds what it then
computed: hashes of the tensors, masked-LM logits of one position, logits of two texts by every delta, by its half and its double, the
reports of the rows.
"""
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rt.data import Example, encode, sequences_batch
from rt.deltas import PARTS, Delta, apply
from rt.formats.atomic import differing
from rt.formats.checkpoint import load_base
from rt.formats.delta_files import load_delta
from rt.formats.files import read_json, read_rows
from rt.model import Classifier, MaskedLM
from rt.runs.results import best_delta, summary_rows
from rt.runs.summary import forgetting_table, report
from rt.tune import predict

OLD = Path(__file__).with_name("data") / "74aa969"
EXPECTED = json.loads((OLD / "expected.json").read_text())
BASES = ("lineage/M0", "lineage/M1")


def content(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {list(t.shape)} {t.dtype}".encode() + t.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def logits(model: Classifier) -> Tensor:
    return predict(model, EXPECTED["ids"], torch.device("cpu"), torch.float32)


def opened(name: str) -> tuple:
    """(base, delta) of a delta's folder."""
    delta = load_delta(OLD / name)
    return next(base for base in map(load_base, (OLD / base for base in BASES)) if base.fingerprint == delta.info["base"]), delta


def close(found: Tensor, expected: list) -> None:
    assert (found - torch.tensor(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("name", EXPECTED["tensors"])
def test_it_is_as_it_was_written(name):
    fact = "meta.json" if name in BASES else "delta.json"
    facts = read_json(OLD / name / fact)
    assert len(facts["sha256"]) >= 2 and differing(OLD / name, fact, facts) == []
    if name in BASES:
        base = load_base(OLD / name)
        tensors = {f"{part}.{k}": v for part in ("encoder", "head") for k, v in getattr(base, part).state_dict().items()}
    else:
        delta = load_delta(OLD / name)
        tensors = {f"{part}.{k}": v for part in PARTS for k, v in getattr(delta, part).items()}
    assert content(tensors) == EXPECTED["tensors"][name]


@pytest.mark.parametrize("name", BASES)
def test_a_base_encodes_and_predicts_as_it_did(name):
    base = load_base(OLD / name)
    assert encode([Example(*texts, None, "") for texts in EXPECTED["texts"]], (), base.tokenizer, 64).sequences == EXPECTED["ids"]
    with torch.no_grad():
        close(MaskedLM(base.encoder, base.head).eval()(sequences_batch(EXPECTED["ids"]))[3], EXPECTED["masked_lm"][name])


@pytest.mark.parametrize("name", EXPECTED["logits"])
def test_a_delta_classifies_as_it_did(name):
    close(logits(apply(*opened(name))), EXPECTED["logits"][name])


@pytest.mark.parametrize("name", EXPECTED["halved"])
def test_the_algebra_of_deltas_is_as_it_was(name):
    base, delta = opened(name)
    close(logits(apply(base, delta, scale=0.5)), EXPECTED["halved"][name])
    if name in EXPECTED["doubled"]:
        doubled: Delta = delta + delta
        close(logits(apply(base, doubled)), EXPECTED["doubled"][name])


def test_what_runs_left_is_read_as_it_was():
    rows = summary_rows(OLD / "recycled" / "summary.json")
    assert report(rows, list(dict.fromkeys(row["mode"] for row in rows))) == EXPECTED["report"]
    assert str(best_delta(OLD / "recycled", load_base(OLD / "lineage" / "M1").fingerprint).relative_to(OLD)) == EXPECTED["best"]
    curves = [(row["run"], row["step"]) for row in read_rows(OLD / "recycled" / "metrics.jsonl")]
    assert curves == [(row["run"], step) for row in rows for step, _ in row["curve"]]
    assert forgetting_table(read_json(OLD / "lineage" / "summary.json")["stages"]) == EXPECTED["forgetting"]


def test_no_path_of_a_machine_is_in_it():
    for path in OLD.rglob("*.json*"):
        assert "/tmp" not in path.read_text() and "/home" not in path.read_text(), path
