"""Any teacher: with another tokenizer and size, known only by its predictions, on unlabelled texts. Known answers, exact equality."""
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import here, random_base, write_task

import analyze
import recycle as recycle_script
from data.sources import open_texts
from kernels import kd_loss
from rt.data import Encoded, Example, encode, encode_task, endless_indices, few_shot
from rt.deltas import apply, attach, extract
from rt.errors import InputError
from rt.formats.checkpoint import save_base
from rt.formats.delta_files import save_delta
from rt.formats.files import read_json
from rt.formats.predictions import Predictions, text_hash
from rt.formats.tasks import load_task
from rt.formats.tokenizer import Tokenizer, train_tokenizer
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, Loss, TeacherCache, patience, task_loss, trained_weights
from rt.model import PRESETS, Activations, EncoderConfig, MaskedLM, new_masked_lm
from rt.recycling import Recycling, chain, check, distillation_loss, new_delta, recycle, start, teacher_of, training_data
from rt.runs.config import parse
from rt.runs.predict import answers as answers_of
from rt.runs.results import Run
from rt.runs.starts import open_bases
from rt.runs.teaching import Samples, TeacherConfig, open_samples
from rt.speed.multi_run import recycle_together
from rt.tune import TuneSettings, predict, training_batch

CPU = dict(device=torch.device("cpu"), precision=torch.float32)
FAST = ("--device", "cpu", "--precision", "fp32", "--seq_len", "16", "--steps", "4", "--eval_every", "2", "--batch_size", "4")
WORDS = "graph node edge tree path cycle weight directed simple empty dense sparse".split()
ROWS = [{"text": f"the {WORDS[i % 12]} of a {WORDS[i * 5 % 11]} {WORDS[i * 7 % 9]} {i}",
         "label": ("no", "yes", "so")[i * i % 3 if i % 5 else 2]} for i in range(30)]


def tuned(base, labels=("no", "yes", "so"), seed=4):
    """A delta of `base` with logits far from each other."""
    model = attach(base, DeltaConfig("adapter"), len(labels), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return extract(model, base, DeltaConfig("adapter"), {"task": "t", "labels": list(labels)})


def other_base():
    """Another tokenizer, three layers instead of two, width 48 instead of 64."""
    tokenizer = train_tokenizer([row["text"] for row in ROWS] * 3, 300)
    sizes = PRESETS["tiny"] | dict(hidden_size=48, num_layers=3, max_len=40)
    base = random_base(tokenizer)
    encoder = new_masked_lm(EncoderConfig(tokenizer.vocab_size, pad_id=tokenizer.pad_id, **sizes), 3)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return replace(base, encoder=encoder.encoder, head=encoder.head)


def written(folder: Path, base) -> str:
    return save_base(folder, MaskedLM(base.encoder, base.head), base.tokenizer, {"name": folder.name, "parent": None})


@pytest.fixture(scope="module")
def home(tokenizer, tmp_path_factory) -> Path:
    """M1; an old base with M1's tokenizer and size, and its delta; another base and tokenizer with their delta; a task; and texts."""
    home = tmp_path_factory.mktemp("teachers")
    for name, base in (("M0", random_base(tokenizer, 0)), ("other", other_base()), ("M1", random_base(tokenizer, 1))):
        base.fingerprint = written(home / name, base)
        if name != "M1":
            save_delta(home / f"{name}-delta", tuned(base))
    write_task(home / "task", {"train": ROWS, "dev": ROWS[:12], "test": ROWS[12:]})
    return home


def teaching(task, shots=None, **config) -> Samples:
    return Samples(SimpleNamespace(teaching=TeacherConfig(**config), seq_len=16, shots=shots), task, True)


@pytest.fixture
def taught(tokenizer, home) -> Recycling:
    """M1 taught by the other base, on the whole task."""
    old, new, task = other_base(), random_base(tokenizer, 1), load_task(home / "task")
    r = Recycling(old, tuned(old).ordered(task.labels), new, encode_task(task, tokenizer, 16), DeltaConfig("adapter"),
                  TuneSettings(6, 8, 1e-2, 3, 0), DistillConfig(beta=0.0), **CPU)
    return teaching(task).of(r, 0)


def recycled(home: Path, out: Path, *more, old: str = "other", code: int = 0) -> str:
    given = ("--old_base", home / old, "--old_delta", home / f"{old}-delta") if old else ()
    return here("recycle.py", *given, "--base", home / "M1", "--task", home / "task", "--delta", "adapter", "--out", out, *FAST, *more,
                code=code)


def rows_of(out: Path) -> list[dict]:
    """The rows of a call, without its clock, paths and kind of teacher."""
    kept = ("mode", "seed", "lr", "dev", "test", "curve", "best_step")
    return sorted(({k: row[k] for k in kept} for row in read_json(out / "summary.json")["rows"]), key=json.dumps)


# --- another tokenizer, size, family ----------------------------------------------------------------------------------

def test_a_teacher_reads_each_text_with_its_own_tokenizer(taught, home):
    examples = load_task(home / "task").parts["train"]
    own = encode(examples, taught.data.labels, taught.old_base.tokenizer, 16).sequences
    assert own != taught.data.train.sequences
    cache = teacher_of(taught)
    torch.testing.assert_close(cache.logits, predict(apply(taught.old_base, taught.old_delta), own, **CPU), atol=1e-5, rtol=1e-5)
    assert cache.states.shape == (30, 3, 48)
    longer = teaching(load_task(home / "task"), old_seq_len=9).of(taught, 0)
    assert max(map(len, longer.old_train.sequences)) == 9 and longer.old_train.truncated == 30
    _, result = recycle(taught, "distill")
    assert [step for step, _ in result.curve] == [0, 3, 6]


def test_one_vocabulary_and_length_are_encoded_once(taught, home):
    task = load_task(home / "task")
    same = replace(taught, old_base=taught.base, old_train=None)
    assert teaching(task).of(same, 0) is same and teaching(task, old_seq_len=12).of(same, 0).old_train


def test_a_teacher_of_the_same_vocabulary_that_changes_texts_reads_its_own_ids(taught, home):
    """A chain of two such bases would read the task's texts as the first does, and so would a study."""
    task, old = load_task(home / "task"), taught.base.tokenizer
    backend = tokenizers.Tokenizer.from_str(old.backend.to_str())
    backend.normalizer = tokenizers.normalizers.Replace("the", "The")
    other = replace(taught.base, tokenizer=Tokenizer(backend))
    assert other.tokenizer.vocabulary == old.vocabulary
    r = teaching(task).of(replace(taught, old_base=other, old_train=None), 0)
    own = encode(task.parts["train"], task.labels, other.tokenizer, 16).sequences
    assert r.old_train.sequences == own != r.data.train.sequences
    written(home / "changes", other)
    c = SimpleNamespace(chain=(str(home / "M1"), str(home / "changes")))
    with pytest.raises(InputError, match=r"--chain: the tokenizer of \S+changes gives other ids for the texts of teachers"):
        open_bases(c, task, CPU["device"])
    with pytest.raises(InputError, match="changes: other sizes or another tokenizer"):
        analyze.open_study(analyze.Config(bases=c.chain, tasks=(str(home / "task"),), device="cpu", seq_len=16))
    c.chain = (str(home / "M0"), str(home / "M1"))
    assert [*open_bases(c, task, CPU["device"])] == [*c.chain]


def test_what_another_teacher_cannot_give_is_refused_with_what_it_can(taught):
    for distill, message in ((DistillConfig(beta=0.0, gamma=1.0), "leave both 0"), (DistillConfig(beta=0.0, itp=1), "leave both 0"),
                             (DistillConfig(), "use `beta` 0, or `project_patience`"),
                             (DistillConfig(project_patience=True, itp=1), "two vocabularies")):
        with pytest.raises(InputError, match=message):
            check(replace(taught, distill=distill), "distill")
    with pytest.raises(InputError, match="one vocabulary, or the texts as the teacher's tokenizer reads them"):
        check(replace(taught, old_train=None), "distill")
    for mode in ("init", "apply", "init+distill"):
        with pytest.raises(InputError, match="puts the old delta on the new base, and .* `mode` distill needs equal labels"):
            check(taught, mode)
    check(replace(taught, distill=DistillConfig(project_patience=True)), "distill")


def test_patience_across_widths_is_the_formula_and_its_map_is_thrown_away(taught):
    taught.distill = DistillConfig(alpha=0.5, beta=2.0, project_patience=True)
    model, batch, cache = start(taught, "distill").eval(), taught.data.train.batch([3, 9, 4]), teacher_of(taught)
    model(batch, activations := Activations())
    maps, plain = model.patience_map, start(replace(taught, distill=DistillConfig(beta=0.0)), "distill").eval()
    plain(batch, own := Activations())
    assert maps.shape == (2, 48, 64) and plain.patience_map is None
    expected = sum((h @ W.T - cache.states[batch.index, j]).square().mean(-1) for h, W, j in zip(own.rows, maps, (0, 1))) / 2
    torch.testing.assert_close(patience(Loss(False, cache, taught.distill), None, activations, batch), expected)
    Loss(False, cache, taught.distill)(model, batch).backward()
    assert all(part.abs().max() > 0 for part in maps.grad) and "patience_map" in trained_weights(model)
    assert start(taught, "scratch").patience_map is None
    model, _ = recycle(taught, "distill")
    delta = new_delta(taught, "distill", model)
    assert {*delta.tensors()} == {*new_delta(taught, "scratch", start(taught, "scratch")).tensors()}
    with torch.no_grad():
        torch.testing.assert_close(apply(taught.base, delta).eval()(batch), model.eval()(batch))


def test_depths_are_matched_in_proportion(tokenizer, taught):
    states, cache = torch.randn(2, 4, 8), TeacherCache(torch.zeros(5, 3), torch.randn(5, 6, 8))
    batch = taught.data.train.batch([1, 2])
    activations = Activations(rows=[*states.unbind(1)])
    expected = (states - cache.states[batch.index][:, [0, 1, 3, 4]]).square().mean((1, 2))
    torch.testing.assert_close(patience(Loss(False, cache, DistillConfig()), None, activations, batch), expected)


def test_side_by_side_with_maps_is_alone(taught):
    taught.distill = DistillConfig(project_patience=True, beta=3.0)
    runs = [replace(taught, settings=replace(taught.settings, seed=seed), distill=replace(taught.distill, T=T), on_eval=[].append)
            for seed, T in ((0, 1.0), (0, 5.0), (1, 5.0))]
    curves = [[], [], []]
    for r, curve in zip(runs, curves):
        r.on_eval = curve.append
    for k, (_, model, _) in enumerate(recycle_together(runs, "distill")):
        alone: list[dict] = []
        single, _ = recycle(replace(runs[k], on_eval=alone.append), "distill")
        for ours, theirs in zip(curves[k][1:], alone[1:], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert model.patience_map.shape == (2, 48, 64)


def test_a_teacher_of_other_sizes_in_a_sweep_side_by_side(home, tmp_path):
    out = recycled(home, tmp_path / "out", "--mode", "scratch,distill", "--beta", "0", "--shots", "4", "--sweep", "seed=0,1 T=1,5")
    assert "distill" in out and len(rows_of(tmp_path / "out")) == 6


def test_recycle_py_says_what_the_teacher_cut_and_what_it_has_no_positions_for(home, tmp_path, capsys):
    more = ("--mode", "distill", "--seeds", "0", "--shots", "none", "--lr", "1e-2")
    recycled(home, tmp_path / "out", *more, "--project_patience", "--old_seq_len", "9")
    assert "30 of 30 texts are longer than --old_seq_len 9" in capsys.readouterr().err
    error = recycled(home, tmp_path / "out", *more, "--old_seq_len", "41", code=2)
    assert "--old_seq_len 41: the old base, which teaches, has positions for 40 tokens" in error
    assert "use --beta 0, or --project_patience" in recycled(home, tmp_path / "out", *more, code=2)


def test_a_chain_begins_with_any_old_base(taught, tokenizer):
    bases = {"M1": taught.base, "M2": random_base(tokenizer, 2)}
    links = {(link.base, link.route): link for link in chain(taught, "distill", bases)}
    direct, _ = recycle(replace(taught, base=bases["M2"], teacher=None), "distill")
    first = links["M1", "chain"].delta
    again, _ = recycle(replace(taught, old_base=bases["M1"], old_delta=first, old_train=None, base=bases["M2"], teacher=None), "distill")
    for route, model in (("direct", direct), ("chain", again)):
        delta = new_delta(replace(taught, base=bases["M2"]), "distill", model)
        assert all(torch.equal(v, links["M2", route].delta.tensors()[k]) for k, v in delta.tensors().items())


# --- black box --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def answers(home) -> Path:
    """The file that predict writes for the other base's delta on the training texts."""
    here("-m", "rt.runs.predict", "--base", home / "other", "--delta_dir", home / "other-delta", "--input", home / "task" / "train.jsonl",
         "--out", home / "answers.jsonl", "--seq_len", "16", *FAST[:4])
    return home / "answers.jsonl"


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_black_box_is_the_white_box(taught, answers):
    """Equal in KD to 1e-6, computed in double precision."""
    train, task = taught.data.train, load_task(answers.parent / "task")
    white, black = teacher_of(taught), Predictions(answers, task.labels).logits(task.parts["train"])
    student = torch.randn(len(train), 3, generator=torch.Generator().manual_seed(0)).double()
    for T in (1.0, 5.0, 20.0):
        kd = [kd_loss(student, t.double(), alpha=1.0, T=T).mean().item() for t in (white.logits, black)]
        assert kd[0] == pytest.approx(kd[1], abs=1e-6) and kd[0] > 0.001


def test_what_predict_writes_of_a_sure_teacher_gives_its_logits_back(taught, tmp_path):
    class Sure(torch.nn.Module):
        def forward(self, batch):
            return torch.tensor([[21.0, 0.0, -3.5], [-1.0, 30.0, 2.5]])[:len(batch.first)]

    examples = [Example(text, None, None, "") for text in "ab"]
    rows, _ = next(answers_of(Sure(), examples, ("x", "y", "z"), taught.base.tokenizer, 16, **CPU))
    logits = Predictions(lines(tmp_path / "p.jsonl", rows), ("x", "y", "z")).logits(examples)
    expected = torch.tensor([[21.0, 0.0, -3.5], [-1.0, 30.0, 2.5]])
    torch.testing.assert_close(logits - logits.max(-1, True).values, expected - expected.max(-1, True).values, atol=1e-5, rtol=0)


def test_recycle_py_with_the_black_box_is_recycle_py_with_the_white_one(home, answers, tmp_path):
    same = ("--mode", "scratch,distill", "--beta", "0", "--shots", "4", "--seeds", "0,1", "--lr", "1e-2")
    recycled(home, tmp_path / "white", *same)
    said = recycled(home, tmp_path / "black", *same, "--teacher", answers, old="")
    assert f"{answers} -> " in said and rows_of(tmp_path / "white") == rows_of(tmp_path / "black")
    row = read_json(tmp_path / "black" / "summary.json")["rows"][0]
    assert row["settings"]["old_base"] is None and row["origin"][0] == ""
    recycled(home, tmp_path / "both", *same[2:], "--mode", "init+distill,distill", "--teacher", answers, old="M0")      # another's delta
    assert [row for row in rows_of(tmp_path / "both") if row["mode"] == "distill"] == [
        row for row in rows_of(tmp_path / "black") if row["mode"] == "distill"]
    recycled(home, tmp_path / "sweep", *same[:-2], "--lr", "1e-2", "--sweep", "T=5", "--teacher", answers, old="")
    side, alone = (rows_of(tmp_path / name) for name in ("sweep", "black"))
    assert [row["curve"] for row in side] == [row["curve"] for row in alone]
    assert "scratch" in recycled(home, tmp_path / "all", "--mode", "all", *same[2:], "--teacher", answers, old="")
    assert {row["mode"] for row in rows_of(tmp_path / "all")} == {"scratch", "distill"}


def test_forms_of_answers(tmp_path):
    examples = [Example("a b", None, None, "t, line 1"), Example("c", "d", None, "t, line 2"), Example("e", None, None, "t, line 3")]
    path = lines(tmp_path / "p.jsonl", [{"text": "e", "label": True}, {"hash": text_hash("c", "d"), "true": 0.25, "false": 0.75, "id": 7},
                                        {"text": "a b", "text_pair": "", "label": "true", "probabilities": {"true": 1, "false": 0}}])
    logits = Predictions(path, ("false", "true"), smoothing=0.2).logits(examples)
    expected = torch.tensor([[1e-38, 1.0], [0.75, 0.25], [0.1, 0.9]], dtype=torch.float64).log().float()
    assert torch.equal(logits, expected)
    with pytest.raises(InputError, match="--label_smoothing is for hard labels, and .*sure.jsonl has none"):
        Predictions(lines(tmp_path / "sure.jsonl", [{"text": "e", "false": 0, "true": 1}]), ("false", "true"), smoothing=0.2)
    path = lines(tmp_path / "v.jsonl", [{"text": "e", "value": -2.5}])
    assert Predictions(path, ()).logits(examples[2:]).tolist() == [[-2.5]]
    for value in (None, "2", True, 10**400, 1e39):      # the last is infinite in float32
        with pytest.raises(InputError, match='line 1: its "value" is not a number, and the task is a regression'):
            Predictions(lines(path, [{"text": "e", "value": value}]), ())
    assert text_hash("c", "d") == hashlib.sha256(b"c\nd").hexdigest()[:16]


@pytest.mark.parametrize("row, message", [
    ({"text": "x", "probabilities": {"no": 0.5, "maybe": 0.5}}, "line 2: has probabilities of no, maybe, and the task's labels are no, y"),
    ({"text": "x", "probabilities": [0.5, 0.5]}, r"line 2: has probabilities of \[0.5, 0.5\], and"),
    ({"text": "x", "probabilities": None}, "line 2: has neither probabilities"),
    ({"text": "x", "probabilities": {"no": 0.5, "yes": 0.7}}, "line 2: .* are not probabilities of no, yes"),
    ({"text": "x", "no": 0.5, "yes": 0.4}, "line 2: .* are not probabilities of no, yes"),
    ({"text": "x", "no": "0.5", "yes": 0.5}, "line 2: .* are not probabilities"), ({"text": "x", "no": -0.5, "yes": 1.5}, "not probabil"),
    ({"text": "x", "label": "maybe"}, "line 2: has neither probabilities of no, yes nor one of them as its label"),
    ({"no": 0.5, "yes": 0.5}, "line 2: has neither a text nor a hash"), ({"text": 3, "no": 0.5, "yes": 0.5}, "line 2: has neither a text"),
    ({"text": "first", "no": 0.4, "yes": 0.6}, "line 2: answers the text of .*line 1 differently"),
    ({"text": "x", "no": 0.5, "yes": 0.5}, r"has no answer for 2 of 3 texts that are taught; the first is t, line 8: 'second', t, line 9")])
def test_answers_that_do_not_fit_are_named(row, message, tmp_path):
    path = lines(tmp_path / "p.jsonl", [{"text": "first", "no": 0.2, "yes": 0.8}, row])
    with pytest.raises(InputError, match=message):
        Predictions(path, ("no", "yes")).logits([Example(text, None, None, f"t, line {i}") for i, text in
                                                 ((7, "first"), (8, "second"), (9, "third"))])


@pytest.mark.parametrize("flags, message", [
    (("--mode", "scratch", "--teacher", "p.jsonl"), "--teacher has no effect with --mode scratch"),
    (("--mode", "distill,init", "--teacher", "p.jsonl"), "modes other than scratch and distill need --old_delta"),
    (("--mode", "distill", "--teacher", "p.jsonl", "--chain", "M1,M2"), "--teacher has no --chain"),
    (("--mode", "distill", "--teacher", "p.jsonl", "--old_seq_len", "32"), "with --teacher none does"),
    (("--mode", "distill", "--label_smoothing", ".1"), "--label_smoothing is for the hard labels of a --teacher"),
    (("--mode", "scratch", "--unlabelled", "rest"), "--unlabelled has no effect with --mode scratch"),
    (("--mode", "distill", "--unlabelled", "rest", "--shots", "none"), "rest needs --shots: rest is what --shots leaves over"),
    (("--mode", "init", "--old_base", "M0", "--old_seq_len", "32"), "--old_seq_len has no effect with --mode init"),
    (("--mode", "distill", "--old_seq_len", "32", "--gamma", "1"), "give the teacher the student's token ids"),
    (("--mode", "init", "--project_patience"), "--project_patience: is for modes with a teacher"),
    (("--mode", "scratch,init", "--old_base", "M0", "--alpha", "0.5"), "--alpha has no effect with --mode scratch,init"),
    (("--mode", "scratch,init", "--old_base", "M0", "--rank", "4"), "--rank has no effect with --mode scratch,init"),
    (("--old_base", "none", "--mode", "distill"), "--old_base is missing"),
    (("--old_base", "none", "--mode", "scratch", "--old_delta", "x"), "--old_base is missing"),
    (("--old_delta", "x,"), "--old_delta x,: one of the names is empty"),
    (("--mode", "init", "--shrinkage"), "--shrinkage is for --head prototype"),
    (("--mode", "init", "--merge", "ties"), "--merge ties is for several deltas"),
    (("--mode", "project", "--source_task", "t", "--old_delta", "a,b"), "several deltas in --old_delta: one of them at a time"),
    (("--mode", "distill", "--pseudo_labels", "hard"), "are for the texts of --unlabelled: name some"),
    (("--mode", "distill", "--unlabelled", "x.txt", "--pseudo_labels", "hard", "--T", "2"), "hard uses the task loss alone"),
    (("--mode", "distill", "--project_patience", "--beta", "0"), "--beta 0 leaves that out"),
    (("--mode", "distill", "--teacher", "p.jsonl", "--old_base", "M0"), "--old_base has no effect with a --teacher"),
    (("--mode", "init", "--itp", "2"), "--itp 2: a number of points, for modes with a teacher"),
    (("--mode", "distill", "--att_layers", "all"), "--att_layers is for --gamma")])
def test_flags_that_make_no_sense_together(flags, message, home, tmp_path):
    assert message in here("recycle.py", "--base", home / "M1", "--task", home / "task", "--out", tmp_path / "out", *flags, code=2)


def test_the_samples_of_all_seeds_are_looked_at_before_a_run(home, tmp_path):
    rows = [{"text": f"text {i}", "label": 0.0 if i < 5 else 1.5} for i in range(6)]
    write_task(tmp_path / "task", {part: rows for part in ("train", "dev", "test")})
    alike = [len({e.label for e in few_shot(load_task(tmp_path / "task"), 2, seed).parts["dev"]}) == 1 for seed in range(20)]
    error = recycled(home, tmp_path / "out", "--mode", "scratch", "--shots", "2", "--seeds", f"{alike.index(False)},{alike.index(True)}",
                     "--task", tmp_path / "task", code=2)
    assert "dev's targets are all equal" in error and not (tmp_path / "out").exists()


def test_a_black_box_has_no_hidden_states_and_must_answer_for_all_texts(home, answers, tmp_path):
    call = ("--mode", "distill", "--delta", "adapter", "--seeds", "0", "--shots", "none", "--teacher")
    assert "use --beta 0, and none of --gamma" in recycled(home, tmp_path / "out", *call, answers, old="", code=2)
    some = lines(tmp_path / "some.jsonl", [json.loads(line) for line in answers.read_text().splitlines()[:9]])
    error = recycled(home, tmp_path / "out", *call, some, "--beta", "0", old="", code=2)
    assert "has no answer for 21 of 30 texts that are taught; the first is" in error and "train.jsonl, line 10" in error
    two = [row for row in load_task(home / "task").parts["train"] if row in few_shot(load_task(home / "task"), 2, 0).parts["train"]]
    path = lines(tmp_path / "two.jsonl", [{"text": e.text, "label": e.label} for e in two])
    assert "texts that are taught" in recycled(home, tmp_path / "out", "--mode", "distill", "--beta", "0", "--shots", "2", "--seeds", "0,1",
                                               "--teacher", path, old="", code=2)       # seed 1 draws other examples, and no run starts
    assert "is not a .jsonl file" in recycled(home, tmp_path / "out", *call, home / "M1", "--beta", "0", old="", code=2)
    assert not (tmp_path / "out").exists()


# --- texts without labels ---------------------------------------------------------------------------------------------

@pytest.fixture
def mixed(taught, home) -> Recycling:
    """Two labelled examples per label, and the rest of the task as texts. The teacher is the other base."""
    task = load_task(home / "task")
    return teaching(task, 2, unlabelled="rest").of(replace(taught, share=0.25), 5)


def test_what_few_shot_leaves_over_are_the_texts(home, taught):
    task = load_task(home / "task")
    few = teaching(task, 2, unlabelled="rest")
    drawn, rest = few.labelled(5).parts["train"], few.unlabelled(5)
    assert len(drawn) == 6 and len(rest) == 24 and {e.label for e in rest} == {None}
    assert sorted(e.text for e in drawn + rest) == sorted(row["text"] for row in ROWS)
    some = teaching(task, 2, unlabelled="rest", unlabelled_texts=7)
    assert len({e.text for e in some.unlabelled(5)} & {e.text for e in rest}) == 7 and some.unlabelled(5) != some.unlabelled(6)
    assert teaching(task, 2, unlabelled="rest", pseudo_labels="hard").of(taught, 5).hard and not few.of(taught, 5).hard
    with pytest.raises(InputError, match="--unlabelled rest: has no text; --shots 99 may have taken all"):
        teaching(task, 99, unlabelled="rest").unlabelled(0)


def test_student_and_teacher_read_the_same_texts_in_the_same_order(mixed, home):
    examples, labels = load_task(home / "task").parts["train"], mixed.data.labels
    own, old = ([*map(tuple, encode(examples, labels, base.tokenizer, 16).sequences)] for base in (mixed.base, mixed.old_base))
    data = training_data(mixed, "distill").train
    assert {*zip(map(tuple, data.sequences), map(tuple, mixed.old_train.sequences))} == {*zip(own, old)}


def test_every_batch_has_its_share_and_every_text_its_turn(mixed):
    data, indices = training_data(mixed, "distill").train, []
    assert len(data) == 30 and data.unlabelled == 24 and (data.targets[6:] == -100).all() and (data.targets[:6] >= 0).all()
    for step in range(48):
        batch = training_batch(data, mixed.settings, step)
        assert len(batch.index) == 8 and (batch.labels == -100).sum() == 2
        indices.append(data.indices(8, step, 0))
    own, others = ([i for batch in indices for i in batch if (i < 6) == labelled] for labelled in (True, False))
    assert all(sorted(own[k:k + 6]) == [*range(6)] for k in range(0, 48 * 6, 6))
    assert all(sorted(others[k:k + 24]) == [*range(6, 30)] for k in range(0, 96, 24)) and others[:24] != others[24:48]
    assert endless_indices(3, 8, 1, [0, 2]) == (endless_indices(3, 24, 0, [0, 2]))[8:16]


@pytest.mark.parametrize("public_code", [False, True])
def test_a_row_without_a_label_has_no_task_term(mixed, public_code):
    mixed.distill = DistillConfig(alpha=0.6, beta=0.0, T=3.0, public_code=public_code)
    model, batch = start(mixed, "distill").eval(), training_batch(training_data(mixed, "distill").train, mixed.settings, 0)
    s, t, labelled = model(batch), teacher_of(mixed).logits[batch.index], batch.labels >= 0
    kd = 9 * (t / 3).softmax(-1).mul((t / 3).log_softmax(-1) - (s / 3).log_softmax(-1)).sum(-1) / (3 if public_code else 1)
    task = torch.zeros(8).masked_scatter(labelled, -s.log_softmax(-1)[labelled].gather(1, batch.labels[labelled, None]).detach())
    torch.testing.assert_close(distillation_loss(mixed)(model, batch), (0.4 * task + 0.6 * kd).mean())


def test_of_a_regression_too(mixed):
    logits = torch.tensor([[1.0], [2.0]], requires_grad=True)
    rows = task_loss(logits, torch.tensor([3.0, float("nan")]), True)
    rows.sum().backward()
    assert rows.tolist() == [4.0, 0.0] and logits.grad.tolist() == [[-4.0], [0.0]]
    data = replace(mixed.data, labels=(), train=replace(mixed.data.train, targets=torch.full((6,), 0.5)))
    texts, answers = replace(mixed.unlabelled, targets=torch.full((24,), float("nan"))), torch.linspace(-1, 1, 30)
    hard = replace(mixed, hard=True, data=data, unlabelled=texts, teacher=TeacherCache(answers[:, None], None))
    assert torch.equal(training_data(hard, "distill").train.targets, torch.cat([data.train.targets, answers[6:]]))


def test_hard_pseudo_labels_are_training_on_the_teachers_likeliest_labels(mixed):
    answers = predict(apply(mixed.old_base, mixed.old_delta), mixed.old_train.sequences, **CPU).argmax(-1)
    train = mixed.data.train.beside(mixed.unlabelled, 0.25)
    train.targets[6:] = answers[6:]
    expected, found = [], []
    plain = replace(mixed, unlabelled=None, data=replace(mixed.data, train=train), on_eval=expected.append)
    model, _ = recycle(plain, "scratch")
    other, _ = recycle(replace(mixed, hard=True, distill=DistillConfig(gamma=1.0), on_eval=found.append), "distill")
    assert found == expected and all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    soft: list[dict] = []
    recycle(replace(mixed, on_eval=soft.append), "distill")
    assert soft[1:] != found[1:]


def test_modes_without_a_teacher_do_not_read_the_texts(mixed):
    curves = [[], []]
    for curve, r in zip(curves, (mixed, replace(mixed, unlabelled=None))):
        recycle(replace(r, on_eval=curve.append), "scratch")
    assert curves[0] == curves[1] and mixed.teacher is None


@pytest.mark.parametrize("hard", [False, True])
def test_side_by_side_with_texts_is_alone(mixed, hard):
    curves = [[], [], []]
    runs = [replace(mixed, hard=hard, settings=replace(mixed.settings, seed=seed), distill=DistillConfig(beta=0.0, T=T, alpha=0.5),
                    on_eval=curve.append) for curve, seed, T in zip(curves, (0, 0, 1), (1.0, 5.0, 5.0))]
    assert len([*recycle_together(runs, "distill")]) == 3
    for r, curve in zip(runs, curves):
        alone: list[dict] = []
        recycle(replace(r, on_eval=alone.append), "distill")
        assert [row["loss"] for row in curve[1:]] == pytest.approx([row["loss"] for row in alone[1:]], rel=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_of_no_row_or_all_is_refused(mixed, share):
    with pytest.raises(InputError, match="a batch needs labelled and unlabelled ones"):
        check(replace(mixed, share=share), "distill")
    check(replace(mixed, share=share), "scratch")


def test_places_of_texts(home, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name, text in (("a.txt", "one\n\ntwo\n"), ("heldout.txt", "three\n"), ("b.csv", "text\nfour\n")):
        (tmp_path / "texts" / name).write_text(text)
    assert [e.text for e in open_texts(str(tmp_path / "texts"), "cache")] == ["one", "two"]
    assert capsys.readouterr().err == f"note: {tmp_path / 'texts'}: left unread: heldout.txt, b.csv\n"
    assert [e.text for e in open_texts(str(tmp_path / "texts" / "a.txt"), "cache")] == ["one", "two"]
    (tmp_path / "a.csv").write_text("sentence,id\none,1\ntwo,2\n")
    assert [e.text for e in open_texts(str(tmp_path / "a.csv"), "cache")] == ["one", "two"]
    (tmp_path / "a.md").write_text("one\n")
    with pytest.raises(InputError, match="a.md: no text there"):
        open_texts(str(tmp_path / "a.md"), "cache")
    found = open_texts(str(home / "task"), "cache")     # train, but not dev or test
    assert [e.text for e in found] == [row["text"] for row in ROWS] and {e.label for e in found} == {None}
    with pytest.raises(InputError, match="no such task; give a file of texts, a folder"):
        open_texts(str(tmp_path / "none"), "cache")


def test_recycle_py_on_texts_without_labels(home, answers, tmp_path):
    same = ("--mode", "distill", "--beta", "0", "--shots", "2", "--lr", "1e-2", "--seeds", "0,1", "--unlabelled")
    recycled(home, tmp_path / "white", *same, "rest")
    recycled(home, tmp_path / "black", *same, "rest", "--teacher", answers, old="")
    recycled(home, tmp_path / "sweep", *same, "rest", "--sweep", "unlabelled_share=.5,.75")
    rows = rows_of(tmp_path / "white")
    assert rows == rows_of(tmp_path / "black") and len(rows) == 2 and len(rows_of(tmp_path / "sweep")) == 4
    assert all(row["curve"] in [other["curve"] for other in rows_of(tmp_path / "sweep")] for row in rows)
    recycled(home, tmp_path / "hard", *same, home / "task" / "train.jsonl", "--pseudo_labels", "hard", "--unlabelled_texts", "9", old="M0")
    (tmp_path / "more.txt").write_text("a text that nobody has answered\n")
    error = recycled(home, tmp_path / "out", *same, tmp_path / "more.txt", "--teacher", answers, old="", code=2)
    assert "has no answer for 1 of 7 texts that are taught; the first is" in error and "more.txt, line 1" in error
    assert "is 0 rows" in recycled(home, tmp_path / "out", *same, "rest", "--unlabelled_share", ".05", code=2)
    content = [read_json(tmp_path / name / "summary.json")["rows"][0]["origin"] for name in ("white", "hard")]
    (tmp_path / "more.txt").write_text("two texts\nof another content\n")
    recycled(home, tmp_path / "hard", *same, tmp_path / "more.txt", "--pseudo_labels", "hard", old="M0")
    assert len({*map(tuple, content), *(tuple(row["origin"]) for row in read_json(tmp_path / "hard" / "summary.json")["rows"])}) == 3


def test_a_chain_with_texts(home, tokenizer, tmp_path):
    written(tmp_path / "M2", random_base(tokenizer, 2))
    here("recycle.py", "--old_base", home / "M0", "--old_delta", home / "M0-delta", "--chain", f"{home / 'M1'},{tmp_path / 'M2'}", "--task",
         home / "task", "--delta", "adapter", "--mode", "distill", "--shots", "2", "--seeds", "0", "--unlabelled", "rest", *FAST, "--out",
         tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 4


def test_runs_that_use_none_of_this_keep_their_names():
    def name(mode: str, *flags: str) -> str:
        return Run(parse(recycle_script.Config, list(flags)), mode, 0, 1e-3).name

    used = (("--teacher", "p.jsonl"), ("--old_seq_len", "9"), ("--unlabelled", "x"), ("--unlabelled_texts", "3"), ("--project_patience",),
            ("--label_smoothing", ".1"), ("--pseudo_labels", "hard"), ("--unlabelled_share", ".2"))
    assert len({name("distill", *flags) for flags in ((), *used)}) == 9
    assert {name("scratch", *flags) for flags in used} == {name("scratch")}
    settings = Run(recycle_script.Config(), "distill", 0, 1e-3).settings
    assert not {flag[0].lstrip("-") for flag in used} & settings.keys()


def test_a_sample_keeps_the_test_part_that_it_was_given(taught, home):
    blind = replace(taught, data=replace(taught.data, test=None))
    assert teaching(load_task(home / "task"), 2).of(blind, 0).data.test is None


def test_hard_labels_are_smoothed_as_the_flag_says(home, tmp_path):
    task = load_task(home / "task")
    path = lines(tmp_path / "hard.jsonl", [{"text": e.text, "label": e.label} for e in task.parts["train"]])
    c = SimpleNamespace(teaching=TeacherConfig(teacher=str(path), label_smoothing=0.3), seq_len=16, shots=None)
    logits = open_samples(c, ["distill"], task, None, None, [0]).predictions.logits(task.parts["train"])
    torch.testing.assert_close(logits.exp().min(-1).values, torch.full((30,), 0.1))


def test_a_samples_content_is_that_of_answers_texts_and_pairs(home, tmp_path):
    task, found = load_task(home / "task"), []
    for label, pair in (("no", None), ("yes", None), ("yes", "b"), ("yes", "c")):
        path = lines(tmp_path / "hard.jsonl", [{"text": "a", "label": label}])
        found.append(Samples(None, task, True, Predictions(path, task.labels), [Example("a", pair, None, "")]).content)
    assert len({*found}) == 4


def test_a_teacher_is_run_again_for_its_texts_cut_elsewhere(taught, home):
    shorter = teaching(load_task(home / "task"), old_seq_len=9).of(taught, 0)
    assert not torch.equal(teacher_of(taught).logits, teacher_of(replace(shorter, teacher=taught.teacher)).logits)


def test_a_map_of_patience_begins_at_the_scale_of_the_states(taught):
    maps = start(replace(taught, distill=DistillConfig(project_patience=True)), "distill").patience_map
    assert maps.std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_the_unlabelled_share_of_a_batch_is_rounded():
    own, others = (Encoded([[0, 2]] * 4, torch.full((4,), target), 0) for target in (1, -100))
    assert sum(i >= 4 for i in own.beside(others, 0.7).indices(4, 0, seed=0)) == 3      # 2.8


def test_an_answer_that_has_one_label_more_is_of_another_task(tmp_path):
    path = lines(tmp_path / "p.jsonl", [{"text": "x", "probabilities": {"no": 0.5, "yes": 0.495, "maybe": 0.005}}])
    with pytest.raises(InputError, match="line 1: has probabilities of no, yes, maybe, and the task's labels are no, yes"):
        Predictions(path, ("no", "yes"))


def test_warmup_and_weight_decay_reach_the_runs():
    c = parse(recycle_script.Config, ["--warmup", ".5", "--weight_decay", ".2", "--early_stop", "3"])
    s = recycle_script.settings_of(Run(c, "scratch", 0, 1e-3))["settings"]
    assert (s.warmup, s.weight_decay, s.early_stop) == (0.5, 0.2, 3)
