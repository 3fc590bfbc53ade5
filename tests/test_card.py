"""The model card of an exported folder, as huggingface_hub reads it. Its code is run, and its numbers match the records."""
import re
from dataclasses import replace

import pytest
from conftest import here, random_base, write_task
from test_hf import LABELS, close, logits_of, our_logits, saved, theirs, trained

from rt.deltas import Base
from rt.formats.card import card
from rt.formats.checkpoint import save_base
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import read_json
from rt.formats.hub import open_base
from rt.kinds import DeltaConfig
from rt.model import MaskedLM

huggingface_hub = pytest.importorskip("huggingface_hub")
HELDOUT = {"math": {"loss": 5.65721, "accuracy": 0.25, "predictions": 160}, "dl": {"loss": None, "accuracy": 1.0, "predictions": 80}}


def read(text: str) -> tuple[huggingface_hub.ModelCardData, list[tuple], str]:
    """The card's metadata, its results as (task, data, split, the hub's name of the metric, ours, value), and its text."""
    found = huggingface_hub.ModelCard(text, ignore_metadata_errors=False)
    results = [(r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_name, r.metric_value)
               for r in found.data.eval_results or []]
    return found.data, results, found.text


def run(text: str, folder, monkeypatch) -> dict:
    """Runs the card's code next to the exported folder and returns its variables."""
    made: dict = {}
    monkeypatch.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], made)
    return made


@pytest.fixture
def lineage(tokenizer, tmp_path) -> tuple[Base, Base]:
    """M0 and M1 on disk."""
    about = {"config": {}, "argv": ["/opt/code/train.py", "--stream=/data/of/me/math.txt,/data/dl/", "--out", "runs/demo"]}
    old, new = random_base(tokenizer, 0), random_base(tokenizer, 1)
    save_base(tmp_path / "M0", MaskedLM(old.encoder, old.head), tokenizer, {"domain": "math", "step": 60, "parent": None, **about})
    save_base(tmp_path / "M1", MaskedLM(new.encoder, new.head), tokenizer, {
        "domain": "dl", "step": 40, "parent": old.fingerprint, "stage": {"heldout": HELDOUT}, **about})
    return open_base(str(tmp_path / "M0")), open_base(str(tmp_path / "M1"))


@pytest.mark.filterwarnings("ignore")
def test_a_recycled_delta_goes_to_both_libraries_with_its_scores_and_its_past(lineage, tmp_path, monkeypatch):
    (old, new), task = lineage, [{"text": f"text number {i}", "label": LABELS[i % 3]} for i in range(18)]
    write_task(tmp_path / "nli", {"train": task, "dev": task[:9], "test": task})
    save_delta(tmp_path / "delta", trained(old, DeltaConfig("lora", r=2)))
    here("recycle.py", "--mode", "init+distill", "--old_base", tmp_path / "M0", "--old_delta", tmp_path / "delta", "--base",
         tmp_path / "M1", "--task", tmp_path / "nli", "--delta", "same", "--shots", 2, "--seeds", 7, "--steps", 2, "--eval_every", 1,
         "--T", 3, "--seq_len", 16, "--out", tmp_path / "out", "--device", "cpu", "--precision", "fp32")
    run_folder, = (tmp_path / "out" / "deltas").iterdir()
    row, delta = read_json(run_folder / "summary.json"), load_delta(run_folder)
    for library, to, what in (("transformers", "hf", "The base `M1` with a delta"), ("peft", "peft", "A LoRA adapter for the base `M1`")):
        pytest.importorskip(library)
        for _ in range(2):      # the second replaces the first
            here("-m", "rt.runs.convert", "export", "--base", tmp_path / "M1", "--delta_dir", tmp_path / "out", "--to", to,
                 "--out", tmp_path / to)
        data, results, text = read((tmp_path / to / "README.md").read_text())
        assert (data.library_name, data.pipeline_tag, data.base_model, data.license) == (library, "text-classification", None, None)
        assert data.tags == ["recyclable-tuning", "lora", "init+distill"] and data.model_name == to
        assert results == [("text-classification", "nli", part, metric, name, round(row[part][name], 4)) for part in ("dev", "test")
                           for metric, name in (("accuracy", "accuracy"), ("f1", "macro_f1"), ("f1", "micro_f1"))]
        assert f"| `nli`, test | {round(row['test']['accuracy'], 4)} |" in text and what in text and "recycled (`init+distill`)" in text
        assert "shots 2, seed 7, learning rate 0.005, steps 2" in text and "alpha 0.7, beta 1.0, T 3.0" in text
        assert "no `base_model`" in text and str(tmp_path) not in text and "--old_base M0" in text
        assert row["origin"][0] == old.fingerprint and row["origin"][1] == new.fingerprint
        assert f"(hash {row['origin'][2]}) of the base `M0` (fingerprint {old.fingerprint})" in text
        assert f"pre-trained on `math`, then `dl` for 40 steps; fingerprint {new.fingerprint}, of its parent {old.fingerprint}" in text
        made = run(text, tmp_path, monkeypatch)
        close(logits_of(made["model"].eval(), new.tokenizer), our_logits(new, delta))
        assert made["tokenizer"]("x", "y")["input_ids"] == new.tokenizer.framed().encode("x", "y").ids


def test_a_delta_without_an_old_one_says_what_taught_it(lineage, tmp_path):
    rows = [{"text": f"text number {i}", "label": LABELS[i % 3]} for i in range(9)]
    write_task(tmp_path / "nli", {"train": rows, "dev": rows, "test": rows})
    save_delta(tmp_path / "old", trained(lineage[0], DeltaConfig("bitfit")))
    for mode, flags in (("distill", ("--teacher", tmp_path / "nli" / "train.jsonl", "--beta", 0)),      # hard labels
                        ("scratch", ("--old_base", tmp_path / "M0", "--old_delta", tmp_path / "old"))):
        here("recycle.py", "--mode", mode, *flags, "--base", tmp_path / "M1", "--task", tmp_path / "nli", "--delta", "bitfit", "--shots",
             "none", "--seeds", 7, "--steps", 2, "--seq_len", 16, "--out", tmp_path / mode, "--device", "cpu", "--precision", "fp32")
        delta, = (tmp_path / mode / "deltas").iterdir()
        text = card("exported", str(tmp_path / "M1"), lineage[1], load_delta(delta))
        assert "The delta was learned on this base" in text and "Recycled from" not in text and str(tmp_path) not in text
        assert ("teacher train.jsonl, alpha 0.7" in text) == (mode == "distill")


def test_a_base_alone_says_what_it_was_trained_on(lineage, tmp_path, monkeypatch):
    here("-m", "rt.runs.convert", "export", "--base", tmp_path / "M1", "--out", tmp_path / "exported")
    data, results, text = read((tmp_path / "exported" / "README.md").read_text())
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "fill-mask", ["recyclable-tuning"])
    assert results == [("fill-mask", domain, "heldout", metric, metric, value) for domain, metric, value in (
        ("math", "loss", 5.6572), ("math", "accuracy", 0.25), ("dl", "accuracy", 1.0))]
    assert "The base `M1`, pre-trained on `math`, then `dl` for 40 steps." in text and "| `dl`, heldout |  | 1.0 |" in text
    assert "Command: `train.py --stream=math.txt,dl/ --out runs/demo`" in text
    assert type(run(text, tmp_path, monkeypatch)["model"]).__name__ == "RobertaForMaskedLM"


def test_the_domains_of_a_mixture_are_named_together(lineage):
    base = replace(lineage[1], meta=lineage[1].meta | {"domain": "math+dl"})
    assert "pre-trained on `math+dl` for 40 steps" in card("exported", "M1", base, None)
    replayed = replace(lineage[1], meta=lineage[1].meta | {"recipe": {"replay": 0.1}, "config": {"init": "M0"}})
    assert "continued from `M0`, pre-trained on `dl` for 40 steps" in card("exported", "M1", replayed, None)


def test_a_hub_id_is_the_base_model(base, tokenizer, tmp_path, monkeypatch):
    """A folder with a name like a hub id is not a hub id. A PEFT adapter is put on the base."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    assert read(card("out", "FacebookAI/roberta-base", base))[0].base_model == "FacebookAI/roberta-base"
    assert "`base_model`" not in card("out", "FacebookAI/roberta-base", base)
    model = saved(theirs("roberta", "MaskedLM", tokenizer), tokenizer, tmp_path / "FacebookAI" / "roberta-base")
    base = open_base("FacebookAI/roberta-base")
    save_delta(tmp_path / "delta", delta := trained(base, DeltaConfig("lora")))
    here("-m", "rt.runs.convert", "export", "--base", "FacebookAI/roberta-base", "--delta_dir", "delta", "--to", "peft", "--out", "lora")
    data, results, text = read((tmp_path / "lora" / "README.md").read_text())
    assert data.base_model is None and not results and "Scores" not in text and "the base `roberta-base`" in text and model.exists()
    made = run(text, tmp_path, monkeypatch)
    close(logits_of(made["model"].eval(), tokenizer), our_logits(base, delta))
    assert made["tokenizer"].vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("odd", ['quo"te: \'y\'', "a\n---\n# b", "`|{x}%s", "\x85\u2028\x7f\U0001f600 é", "1e-3", "yes", "- a"])
def test_odd_names_are_read_back_as_they_are(odd, base):
    delta = trained(base, DeltaConfig("full"), labels=("a: b", odd.replace("\n", " ")))
    delta.info |= {"task": odd, "mode": odd, "dev": {"accuracy": 0.00001, "pearson": None, "macro_f1": float("nan")}, "test": None}
    data, results, text = read(card("out", "M1", base, delta))
    assert data.tags == ["recyclable-tuning", "full", odd]
    assert results == [("text-classification", odd, "dev", "accuracy", "accuracy", 0.0)]
    assert text.count("\n# ") + text.startswith("# ") == 1 and "{x}" in text or "{x}" not in odd


def test_a_record_of_another_shape_is_one_sentence_and_nothing_is_written(base, tmp_path):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    delta = trained(base, DeltaConfig("full"))
    for info in ({"config": "lost"}, {"dev": [0.5]}, {"argv": 7}, {"origin": ["a"], "config": {"old_base": "M0"}}):
        save_delta(tmp_path / "delta", type(delta)(delta.config, delta.diffs, delta.modules, delta.head, delta.info | info))
        said = here("-m", "rt.runs.convert", "export", "--base", tmp_path / "M0", "--delta_dir", tmp_path / "delta", "--out",
                    tmp_path / "out", code=2)
        assert "delta: its records lack what a model card needs" in said and not (tmp_path / "out").exists()


def test_cards_of_a_regression_tuned_elsewhere_of_many_labels_and_of_a_continued_base(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    delta = trained(base, DeltaConfig("full"), labels=())
    delta.info |= {"test": {"pearson": 0.5, "spearman": 0.25}, "source": "/a/my-model"}
    _, results, text = read(card("out", "M1", base, delta))
    assert [result[3:5] for result in results] == [("pearsonr", "pearson"), ("spearmanr", "spearman")]
    assert "(a regression). The delta was tuned elsewhere, as `my-model`" in text
    many = trained(base, DeltaConfig("full"), labels=tuple("abcdefghijk"))
    assert "11 labels: `a`, `b`, `c`, `d`, `e`, `f`, `g`, `h`, `i`, ...)" in card("out", "M1", base, many)
    data, _, text = read(card("out", "M1", replace(base, meta=base.meta | {"config": {"init": "FacebookAI/roberta-base"}})))
    assert data.base_model == "FacebookAI/roberta-base" and "continued from `FacebookAI/roberta-base`" in text
