"""Where a mode starts: gradient-masked deltas, prototype heads, several old deltas, a carried delta; in the core and as commands."""
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import here, random_base, write_task
from test_transport import tuned

from experiments.twin import permuted_twin
from rt.data import Encoded, Example, Task, TaskData, encode, encode_task, few_shot
from rt.deltas import apply, attach, extract
from rt.errors import InputError
from rt.formats.checkpoint import load_base, save_base
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.tasks import load_task
from rt.kinds import DeltaConfig
from rt.losses import DistillConfig, weights_of
from rt.model import ClassificationHead, MaskedLM, prototypes
from rt.recycling import Recycling, check, new_delta, recycle, start
from rt.runs import build
from rt.runs.results import old_names
from rt.runs.starts import ProjectConfig, carry_texts, combine, learn_map, merge_on_dev
from rt.transport import transport
from rt.tune import TuneResult, TuneSettings, evaluate, predict

CPU = dict(device=torch.device("cpu"), precision=torch.float32)
LABELS = ("0", "1", "2")


def recycling(base, new, kind="full", labels=LABELS, **more):
    delta = tuned(base, kind)
    sequences = [[0, 9 + i, 30 + i % 7, 2] for i in range(24)]
    part = Encoded(sequences, torch.arange(24) % max(1, len(labels)), 0)
    return Recycling(base, delta, new, TaskData("t", labels, part, part, part), delta.config, TuneSettings(2, 8, 1e-3, 1, 0),
                     DistillConfig(), **CPU, **more)


def test_gradmask_keeps_the_entries_that_go_down_the_gradient(base, other_base):
    r = recycling(base, other_base)
    r.settings.batch_size = 7       # the last batch is smaller
    plain = apply(other_base, r.old_delta, scale=0.0, stale_ok=True).eval()
    torch.nn.functional.cross_entropy(plain(r.data.train.batch([*range(24)])), r.data.train.batch([*range(24)]).labels).backward()
    model, result = recycle(r, "gradmask")
    assert result.curve[-1][0] == 0 and evaluate(model, r.data.test, **CPU) == result.test
    kept, own = 0, dict(other_base.encoder.named_parameters())
    for name, p in model.encoder.named_parameters():
        D, g = r.old_delta.diffs[name], plain.encoder.get_parameter(name).grad
        clear = g.abs() > 1e-6      # the others may round to either side
        expected = own[name] + D * (D * g < 0)
        torch.testing.assert_close(p[clear], expected[clear])
        kept += (p != own[name]).sum()
    assert 0.2 < kept / sum(p.numel() for p in own.values()) < 0.8
    assert all(torch.equal(v, model.head.state_dict()[name]) for name, v in r.old_delta.head.items())
    half = 0.5 * r.old_delta
    with pytest.raises(ValueError, match="no delta was carried"):
        start(replace(r, carry=True), "gradmask")
    given = dict(old_delta=half), dict(merged=half), dict(carry=True, carried=half)
    first, *others = (weights_of(start(replace(r, **one), "gradmask")) for one in given)
    assert all(torch.equal(v, first[k]) for other in others for k, v in other.items())
    with pytest.raises(InputError, match="gradmask .* needs a full delta, not lora"):
        check(recycling(base, other_base, "lora"), "gradmask")


def test_prototypes_are_the_nearest_mean():
    g = torch.Generator().manual_seed(0)
    f, targets = torch.randn(60, 5, generator=g).double(), torch.arange(60) % 3
    f[:, 0] += 3 * targets
    mu = torch.stack([f[targets == c].mean(0) for c in range(3)])
    within = torch.cat([f[targets == c] - mu[c] for c in range(3)])
    S = within.T @ within / 57

    def centred(W):
        b = -(W * mu).sum(1) / 2
        return W - W.mean(0), b - b.mean()

    W, b = prototypes(f, targets, 3, shrinkage=False)
    torch.testing.assert_close((W, b), centred(S.trace() / S.square().sum() * mu))
    x = 3 * torch.randn(200, 5, generator=g).double()
    assert torch.equal((x @ W.T + b).argmax(1), torch.cdist(x, mu).argmin(1))
    sphere, a, t = torch.eye(5).double() * S.trace() / 5, (S @ S).trace(), S.trace() ** 2
    rho = min(1.0, ((1 - 2 / 5) * a + t) / ((57 + 1 - 2 / 5) * (a - t / 5)))        # OAS; the Mahalanobis distance of that covariance
    torch.testing.assert_close(prototypes(f, targets, 3, shrinkage=True), centred(mu @ torch.linalg.inv((1 - rho) * S + rho * sphere)))
    W, b = prototypes(mu, torch.arange(3), 3, shrinkage=True)        # one example per label: the spread is unknown
    torch.testing.assert_close((W, b), centred(mu))


@pytest.mark.parametrize("shrinkage", [False, True])
def test_a_prototype_head_answers_in_bf16_as_in_fp32(shrinkage):
    """The features of texts are nearly alike, so logits that are not centred are in the thousands and differ by less than bf16's steps."""
    g, head = torch.Generator().manual_seed(0), ClassificationHead(64, 4).eval()
    targets = torch.arange(400) % 4
    x = 0.5 + 0.05 * torch.randn(400, 64, generator=g) + 0.02 * torch.randn(4, 64, generator=g)[targets]
    head.dense.load_state_dict({"weight": torch.eye(64), "bias": torch.zeros(64)})
    W, b = prototypes(x.tanh().double(), targets, 4, shrinkage)
    head.out.load_state_dict({"weight": W, "bias": b})
    answers = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(x)
    right, agree = ((a.argmax(1) == other).float().mean() for a, other in ((answers, targets), (rounded, answers.argmax(1))))
    assert right > 0.8 and agree > 0.97 and answers.abs().max() < 50


def test_a_prototype_head_is_fitted_to_the_features_of_the_start(base, other_base):
    r = recycling(base, other_base, "adapter", ("x", "y"), head="prototype")
    for mode in ("scratch", "apply", "init"):
        check(r, mode)
        model = start(r, mode)
        plain = start(replace(r, head="fresh"), mode)
        if mode != "scratch":
            plain.head.dense.load_state_dict({k[6:]: v for k, v in r.old_delta.head.items() if k.startswith("dense")})
        plain.head.out = torch.nn.Identity()
        f = predict(plain, r.data.train.sequences, **CPU)
        mu = torch.stack([f[r.data.train.targets == c].mean(0) for c in range(2)])
        nearest = torch.cdist(f.double(), mu.double())
        assert torch.equal(predict(model, r.data.train.sequences, **CPU).argmax(1), nearest.argmin(1)), mode
        shrunk = start(replace(r, shrinkage=True), mode).head.out
        for p, expected in zip((shrunk.weight, shrunk.bias), prototypes(f.double(), r.data.train.targets, 2, shrinkage=True)):
            torch.testing.assert_close(p, expected.float(), atol=1e-4, rtol=1e-4)
        assert model.head.out.weight.requires_grad
    number = extract(attach(base, r.config, 1, seed=0), base, r.config, {"labels": []})       # a delta of a regression
    assert start(replace(r, old_delta=number), "apply")(r.data.train.batch([0, 1])).shape == (2, 2)
    with pytest.raises(InputError, match="for apply and transport `head` prototype"):
        check(replace(r, head="fresh"), "apply")
    with pytest.raises(InputError, match="a regression has none"):
        check(replace(r, data=replace(r.data, labels=())), "scratch")
    assert recycle(r, "apply")[1].dev and new_delta(r, "apply", model).labels == ("x", "y")


def test_a_task_that_gains_a_label_keeps_the_rows_of_the_old_ones(base, other_base):
    """The old head's answers on old labels are unchanged, and the new label's row is on their scale. If the old rows are prototypes up to a
    factor and a shift, the whole head is the nearest mean."""
    r = recycling(base, other_base, "adapter", ("2", "0", "new"), head="prototype")
    old = apply(other_base, r.old_delta, stale_ok=True)
    old.head.out = torch.nn.Identity()
    f = predict(old, r.data.train.sequences, **CPU).double()
    W, b = prototypes(f, r.data.train.targets, 3, False)
    r.old_delta.head["out.weight"][[2, 0]] = (3 * W[:2] + torch.linspace(-2, 2, 64)).float()
    r.old_delta.head["out.bias"][[2, 0]] = (3 * b[:2] - 7).float()
    said = predict(apply(other_base, r.old_delta, stale_ok=True), r.data.train.sequences, **CPU)
    logits = predict(start(r, "apply"), r.data.train.sequences, **CPU)
    torch.testing.assert_close(logits[:, :2], said[:, [2, 0]])
    torch.testing.assert_close(logits.log_softmax(1), (3 * (f @ W.T + b)).log_softmax(1).float(), atol=1e-3, rtol=1e-3)
    r.data = replace(r.data, labels=("1", "0"))         # a task that loses one label
    r.data.train.targets = r.data.train.targets.clamp(max=1)
    torch.testing.assert_close(predict(start(r, "apply"), r.data.train.sequences, **CPU), said[:, [1, 0]])


def test_what_a_start_draws_is_a_function_of_the_seed(base, other_base):
    def drawn(seed: int) -> list[torch.Tensor]:
        r = replace(recycling(base, other_base, "adapter"), distill=DistillConfig(project_patience=True))
        r.settings.seed = seed
        distill, init = start(r, "distill"), start(replace(r, old_delta=labelled(r.old_delta, "xyz", 1.0)), "init")     # a fresh head
        return [distill.encoder.layers[0].adapter_ffn.down.weight, distill.head.out.weight, distill.patience_map, init.head.out.weight]

    for a, again, other in zip(drawn(0), drawn(0), drawn(1)):
        assert torch.equal(a, again) and not torch.equal(a, other)


def labelled(delta, labels, size):
    """Another delta of the base: `size` times this one, with other labels."""
    return replace(size * delta, info=delta.info | {"labels": list(labels)})


@pytest.mark.parametrize("kind", ["full", "adapter", "lora"])
def test_the_mean_of_several_deltas_takes_bodies_of_all_and_heads_of_the_task(base, batch, kind):
    """Halves of one delta add up to the whole, whatever their labels; modules are concatenated."""
    delta = tuned(base, kind)
    other = labelled(delta, "xy", 1.0)
    other.head = {k: v[:2] if "out" in k else v for k, v in delta.head.items()}
    merged = combine([other, delta], [0.5, 0.5], "mean", LABELS)
    assert merged.labels == LABELS
    with torch.no_grad():
        torch.testing.assert_close(apply(base, merged).eval()(batch), apply(base, delta).eval()(batch), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, delta.head[k]) for k, v in merged.head.items())
    with pytest.raises(InputError, match="deltas of different bases"):
        combine([delta, replace(other, info=other.info | {"base": "z"})], [0.5, 0.5], "mean", LABELS)
    if kind != "full":
        with pytest.raises(InputError, match=f"not modules of {kind}: use mean"):
            combine([delta, other], [0.5, 0.5], "ties", LABELS)


def test_ties_is_its_definition(base):
    delta = tuned(base, "bitfit")
    names, n = [*delta.diffs], sum(v.numel() for v in delta.diffs.values())
    flats = [torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    deltas = [replace(delta, diffs=dict(zip(names, (x.view_as(v) for x, v in zip(
        flat.split([v.numel() for v in delta.diffs.values()]), delta.diffs.values()))))) for flat in flats]
    merged = torch.cat([v.flatten() for v in combine(deltas, [1 / 3] * 3, "ties", LABELS).diffs.values()])
    kept = torch.stack([torch.where(flat.abs() >= flat.abs().sort().values[round(0.8 * n)], flat, 0) for flat in flats])
    for i in range(n):
        sign = kept[:, i].sum().sign()
        agree = [x.item() for x in kept[:, i] if x * sign > 0]
        assert merged[i].item() == pytest.approx(sum(agree) / len(agree) if agree else 0.0, abs=1e-6)


def test_the_subset_that_is_best_on_dev_is_merged(base, other_base):
    r = recycling(base, other_base)
    harmful = labelled(r.old_delta, "ab", -3.0)
    r.data.dev = replace(r.data.dev, targets=predict(apply(other_base, r.old_delta, stale_ok=True), r.data.dev.sequences, **CPU).argmax(1))
    merged, about = merge_on_dev(r, [harmful, r.old_delta], "mean")
    assert about["merged"]["weights"] == [0.0, 1.0] and about["merged"]["tried"] == 3
    assert all(torch.equal(v, r.old_delta.diffs[k]) for k, v in merged.diffs.items())
    r.merged = merged
    assert recycle(r, "apply")[1].dev["accuracy"] == 1.0
    r.data = replace(r.data, labels=("x", "y", "z"))        # this would score a fresh head, which says nothing
    assert merge_on_dev(r, [harmful, r.old_delta], "mean")[1]["merged"] == {"how": "mean", "weights": [0.5, 0.5], "tried": 1}


def test_init_and_transport_start_from_the_carried_delta_and_apply_does_not(base, other_base, batch):
    r = recycling(base, other_base, "adapter", carry=True)
    with pytest.raises(ValueError, match="no delta was carried"):
        start(r, "transport")
    r.carried = 0.5 * r.old_delta
    with torch.no_grad():
        for mode, delta in (("apply", r.old_delta), ("transport", r.carried), ("init", r.carried), ("init+distill", r.carried)):
            assert torch.equal(start(r, mode).eval()(batch), apply(other_base, delta, stale_ok=True).eval()(batch)), mode
    r.carry = False
    with torch.no_grad():
        for mode, delta in (("transport", r.carried), ("init", r.old_delta)):
            assert torch.equal(start(r, mode).eval()(batch), apply(other_base, delta, stale_ok=True).eval()(batch)), mode


@pytest.fixture
def home(base, tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i} thing", "label": str(i % 3)} for i in range(24)]
    write_task(tmp_path / "t", {part: rows for part in ("train", "dev", "test")})
    for name, one in (("M0", base), ("M1", permuted_twin(base, 1)), ("IND", random_base(base.tokenizer, 4))):
        save_base(tmp_path / name, MaskedLM(one.encoder, one.head), one.tokenizer, {})
    save_delta(tmp_path / "delta", tuned(base, "bitfit"))
    save_delta(tmp_path / "other", labelled(tuned(base, "bitfit"), "xyz", -1.0))
    return tmp_path


def typed(home, *more, base="M1", **expect):
    return here("recycle.py", "--old_base", home / "M0", "--old_delta", home / "delta", "--base", home / base, "--task", home / "t",
                "--delta", "bitfit", "--steps", "2", "--eval_every", "1", "--seq_len", "16", "--shots", "4", "--seeds", "0",
                "--device", "cpu", "--workers", "1", "--out", home / "out", *more, **expect)


def rows_of(home):
    return {row["mode"]: row for row in json.loads((home / "out" / "summary.json").read_text())["rows"]}


def test_transport_brings_a_twin_to_the_old_score_and_the_settings_are_told_apart(home):
    typed(home, "--mode", "apply", base="M0")
    old = rows_of(home)["apply"]
    typed(home, "--mode", "scratch,apply,transport,init", "--carry")
    rows = rows_of(home)
    assert rows["transport"]["test"] == old["test"] and rows["init"]["curve"][0][1] == rows["transport"]["dev"]["accuracy"]
    assert rows["transport"]["carried"]["cosine"] == 1 and rows["init"]["settings"]["carry"] is True
    assert "carried" not in rows["apply"] and "carry" not in rows["apply"]["settings"] and "carry" not in rows["scratch"]["settings"]
    before = rows["init"]["run"], rows["apply"]["run"]
    typed(home, "--mode", "apply,init", "--resume")
    rows = rows_of(home)
    assert rows["apply"]["run"] == before[1] and rows["init"]["run"] != before[0]
    assert not {"carry", "carry_text", "head", "shrinkage", "merge"} & rows["init"]["settings"].keys()
    (home / "texts.txt").write_text("one good thing\nand a bad one\nor another\n")
    typed(home, "--mode", "transport", "--carry_text", home / "texts.txt", "--resume")
    first = rows_of(home)["transport"]
    assert first["carried"]["texts"] == 3
    (home / "texts.txt").write_text("one good thing\nand a bad one\n")
    typed(home, "--mode", "transport", "--carry_text", home / "texts.txt", "--resume")
    assert rows_of(home)["transport"]["run"] == first["run"] and rows_of(home)["transport"]["origin"] != first["origin"]


def test_a_list_of_deltas_may_be_longer_than_a_file_name_and_a_name_that_is_too_long_is_one_sentence(home):
    assert old_names(", ".join(["delta"] * 60)) == ["delta"] * 60
    assert f"{'x' * 300}: cannot be used (File name too long)" in typed(home, "--mode", "apply", "--task", "x" * 300, code=2)


def test_several_deltas_and_prototypes_typed(home):
    typed(home, "--mode", "scratch,apply,init", "--old_delta", f"{home / 'delta'},{home / 'other'}", "--head", "prototype")
    rows = rows_of(home)
    assert len(rows["apply"]["merged"]["weights"]) == 2 and "merged" not in rows["scratch"]
    assert rows["scratch"]["settings"]["head"] == "prototype"
    said = typed(home, "--mode", "apply,init", "--old_delta", home / "other", "--head", "prototype", "--shrinkage")
    assert "init keeps the delta and starts a prototype head" in said
    said = typed(home, "--mode", "apply,init", "--old_delta", home / "delta", "--head", "prototype", code=2)
    assert "--head prototype has no effect: the old delta has the task's labels" in said
    typed(home, "--mode", "all", "--carry", "--old_delta", home / "other", "--head", "prototype")
    assert {*rows_of(home)} == {"scratch", "apply", "init", "transport"}        # the modes that other labels allow
    said = typed(home, "--mode", "all", "--old_delta", home / "other", "--gamma", "1", code=2)      # they leave no mode with a teacher
    assert "--gamma 1.0: a weight, for modes with a teacher" in said
    typed(home, "--mode", "init", "--old_delta", f"{home / 'delta'},{home / 'other'}", "--sweep", "seed=0,1")
    assert "merged" in rows_of(home)["init"]


@pytest.mark.parametrize("more, sentence", [
    (("--carry_text", "x.txt"), "--carry_text is for --mode transport and --carry"),
    (("--mode", "apply", "--carry"), "--carry is for modes that start from a delta: init, init+distill, transport, gradmask"),
    (("--mode", "init", "--carry", "--chain", "a,b"), "--mode transport or --carry, --chain, and several deltas"),
    (("--mode", "init", "--carry", "--carry_text", "nowhere.txt"), "--carry_text nowhere.txt: is not a file; give a file of texts"),
    (("--mode", "init", "--carry", "--carry_text", "."), "--carry_text .: is not a file; give a file of texts"),
    (("--mode", "transport", "--carry_text", "EMPTY"), "holds no text to compare two bases on"),
    (("--mode", "init", "--side_by_side", "2"), "--side_by_side is for the runs of a --sweep"),
    (("--mode", "init", "--sweep", "seed=1,2"), "--sweep seed=1,2: leaves out --seeds 0"),
    (("--mode", "scratch", "--base", "not/a/base"), "not/a/base: no base there"),
    (("--mode", "gradmask"), "needs a full delta, not bitfit"), (("--mode", "init", "--old_delta", "a,b"), "a: nothing tuned there")])
def test_what_makes_no_sense_is_one_sentence(home, more, sentence):
    (home / "empty.txt").write_text("")
    assert sentence in typed(home, *(home / "empty.txt" if flag == "EMPTY" else flag for flag in more), code=2)


def test_gradmask_reads_the_training_examples_alone(base, other_base):
    r = recycling(base, other_base)
    first, other = weights_of(start(r, "gradmask")), replace(r.data.train, targets=(r.data.train.targets + 1) % 3)
    for part, same in (("train", False), ("dev", True), ("test", True)):
        again = weights_of(start(replace(r, data=replace(r.data, **{part: other})), "gradmask"))
        assert all(torch.equal(v, first[k]) for k, v in again.items()) == same, part


def test_one_kept_label_keeps_its_row_and_prototypes_their_scale(base, other_base):
    r = recycling(base, other_base, "adapter", ("2", "x", "y"), head="prototype")
    said = predict(apply(other_base, r.old_delta, stale_ok=True), r.data.train.sequences, **CPU)
    logits = predict(start(r, "apply"), r.data.train.sequences, **CPU)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 0], said[:, 2])


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_a_merged_delta_is_applied_saved_and_continued_in_its_own_size(base, other_base, kind, tmp_path):
    r = recycling(base, other_base, kind)
    r.merged = combine([r.old_delta, labelled(r.old_delta, LABELS, 0.5)], [0.5, 0.5], "mean", LABELS)
    model, result = recycle(r, "apply")
    save_delta(tmp_path / "d", new_delta(r, "apply", model))
    assert evaluate(apply(other_base, load_delta(tmp_path / "d")), r.data.test, **CPU) == result.test
    with pytest.raises(InputError, match="init continues the old delta"):
        check(r, "init")
    check(replace(r, config=r.merged.config), "init")


def test_a_delta_that_cannot_be_carried_is_refused_before_anything_runs(base, other_base):
    r = recycling(base, other_base, "adapter")
    r.old_delta.modules["layers.0.adapter_ffn.shift"] = torch.zeros(64)
    for mode, carry in (("transport", False), ("init", True)):
        with pytest.raises(InputError, match="shift cannot be carried"):
            check(replace(r, carry=carry), mode)


def test_ties_leaves_a_delta_of_weight_zero_out(base):
    one = tuned(base, "bitfit")
    two, three = (replace(one, diffs={k: torch.randn(v.shape, generator=torch.Generator().manual_seed(s)) for k, v in one.diffs.items()})
                  for s in (1, 2))
    some, all_ = combine([one, two], [0.5, 0.5], "ties", LABELS), combine([one, two, three], [0.5, 0.5, 0.0], "ties", LABELS)
    assert all(torch.equal(v, all_.diffs[k]) for k, v in some.diffs.items())


@pytest.mark.parametrize("how", ["mean", "ties"])
def test_heads_with_the_tasks_labels_are_averaged_by_their_weights(base, how):
    one = tuned(base, "bitfit")
    others = [replace(one, head={k: v * size for k, v in one.head.items()}) for size in (3.0, 100.0)]
    merged = combine([one, *others], [0.25, 0.75, 0.0], how, LABELS)
    for k, v in one.head.items():
        torch.testing.assert_close(merged.head[k], 0.25 * v + 0.75 * 3 * v)


def test_texts_to_compare_bases_on_are_the_training_texts(base, tmp_path):
    part = {name: [Example(f"{name} {i}", None, None, "") for i in range(600)] for name in ("train", "dev", "test")}
    expected = encode([replace(e, text=f"{e.text} ") for e in part["train"][:512]], (), base.tokenizer, 16).sequences
    assert carry_texts(None, Task("t", (), part), base, 16) == expected
    (tmp_path / "texts.md").write_text("a text\n")
    with pytest.raises(InputError, match="texts.md: does not end in .txt, .jsonl or .parquet"):
        carry_texts(str(tmp_path / "texts.md"), Task("t", (), part), base, 16)


def test_subsets_are_scored_on_dev_and_not_on_the_training_examples(base, other_base):
    r = recycling(base, other_base)
    harmful, sequences = labelled(r.old_delta, LABELS, -3.0), r.data.dev.sequences
    said = [predict(apply(other_base, d, stale_ok=True), sequences, **CPU).argmax(1) for d in (r.old_delta, harmful)]
    r.data = replace(r.data, dev=replace(r.data.dev, targets=said[0]), train=replace(r.data.train, targets=said[1]))
    assert merge_on_dev(r, [harmful, r.old_delta], "mean")[1]["merged"]["weights"] == [0.0, 1.0]


def test_transport_too_may_have_a_prototype_head(base, other_base):
    r = recycling(base, other_base, "adapter", ("x", "y"), head="prototype")
    check(r, "transport")
    r.carried = r.old_delta
    assert start(r, "transport")(r.data.train.batch([0, 1])).shape == (2, 2)


def test_a_map_is_learned_as_the_flags_say(base, other_base):
    r = recycling(base, other_base, "bitfit")
    p = ProjectConfig(rank=2, granularity="tensor", residual=True, project_steps=1)
    about = learn_map(r, p, [(r.old_delta, r.data)], lambda _: None)["projection"]
    assert (about["r"], about["granularity"], about["residual"], about["with_head"]) == (2, "tensor", True, True)


def test_both_texts_of_a_pair_are_compared(base):
    pairs = [Example("a graph", "of nodes", None, "")]
    expected = encode([Example("a graph of nodes", None, None, "")], (), base.tokenizer, 16).sequences
    assert carry_texts(None, Task("t", (), {"train": pairs}), base, 16) == expected


def test_a_mode_that_is_named_beside_all_is_done_or_refused(home):
    typed(home, "--mode", "all,transport")
    assert {*rows_of(home)} == {"scratch", "apply", "init", "distill", "init+distill", "transport"}
    assert "needs a full delta, not bitfit" in typed(home, "--mode", "all,gradmask", code=2)
    assert "apply needs an old delta with the task's labels" in typed(home, "--mode", "all,apply", "--old_delta", home / "other", code=2)


def test_a_prototype_head_without_effect_is_refused_for_merged_and_projected_deltas_too(home):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i} other thing", "label": str(i % 3)} for i in range(24)]
    write_task(home / "s", {part: rows for part in ("train", "dev", "test")})
    for more in (("--mode", "apply", "--old_delta", f"{home / 'delta'},{home / 'other'}"),
                 ("--mode", "apply,project", "--source_task", home / "s", "--source_delta", home / "delta", "--lr", "1e-3")):
        assert "--head prototype has no effect" in typed(home, *more, "--head", "prototype", code=2)


@pytest.mark.parametrize("more", [(), ("--carry",)])
def test_modes_without_a_teacher_are_not_done_again_for_other_texts(home, more):
    written = {}
    for text in ("a b c\nd e f\n", "a b c\nd e f\ng h\n"):
        (home / "u.txt").write_text(text)
        typed(home, "--mode", "scratch,init,transport,distill,init+distill", "--unlabelled", home / "u.txt", "--resume", *more)
        for mode, row in rows_of(home).items():
            written.setdefault(mode, set()).add((home / "out" / "deltas" / row["run"] / "summary.json").stat().st_mtime_ns)
    assert {mode for mode, found in written.items() if len(found) > 1} == {"distill", "init+distill"}


def test_no_order_is_sought_in_a_process_that_is_forked_afterwards(home, monkeypatch):
    """A fork has none of its parent's threads, and would wait for them for ever."""
    def noted(*given):
        (home / "pids").open("a").write(f"{os.getpid()}\n")
        return transport(*given)

    monkeypatch.setattr("recycle.transport", noted)
    typed(home, "--mode", "transport,init", "--carry", "--workers", "2", "--threads", "2")
    pids, rows = (home / "pids").read_text().split(), rows_of(home)
    assert pids and str(os.getpid()) not in pids and {*rows} == {"transport", "init"}
    assert [row["threads"] for row in rows.values()] == [2, 2]


def test_the_flags_of_train_py_reach_the_tuning(home, monkeypatch):
    seen = []
    monkeypatch.setattr("train.tune", lambda *given, **_: seen.append(given) or TuneResult(dev={"accuracy": 0.0}))
    here("train.py", "--mode", "tune", "--base", home / "M0", "--task", home / "t", "--delta", "adapter", "--shots", "2", "--seed", "3",
         "--tune_steps", "7", "--batch_size", "5", "--lr", ".02", "--eval_every", "2", "--weight_decay", ".2", "--warmup", ".5",
         "--seq_len", "16", "--device", "cpu", "--out", home / "d")
    (model, data, _, settings), base = seen[0], load_base(home / "M0")
    assert settings == TuneSettings(7, 5, 0.02, 2, 3, 0.2, 0.5)
    assert data.train.sequences == encode_task(few_shot(load_task(home / "t"), 2, 3), base.tokenizer, 16).train.sequences
    drawn = dict(attach(base, DeltaConfig("adapter"), 3, 3).named_parameters())
    assert all(torch.equal(p, drawn[name]) for name, p in model.named_parameters())


def test_a_map_that_diverges_is_its_start_and_the_row_says_so(base, other_base):
    r = recycling(base, other_base, "bitfit")
    r.settings = replace(r.settings, lr=1e30, keep_diverged=True)
    row = learn_map(r, ProjectConfig(rank=2, project_steps=40), [(r.old_delta, r.data)], lambda _: None)
    assert row["diverged"] > 10 and row["projection"]["best_step"] < row["diverged"]
    assert all(p.isfinite().all() for p in r.projection.parameters())


def test_what_is_built_is_built_as_the_command_runs(monkeypatch):
    given = []
    process = SimpleNamespace(wait=lambda: 0, kill=lambda: None)
    monkeypatch.setattr(build, "subprocess", SimpleNamespace(Popen=lambda command, env: given.append(command[2:]) or process))
    build.build(SimpleNamespace(device="cpu", precision="fp32", cache="there", deterministic=True), ("a delta", {"mode": "tune"}))
    assert given == [["--mode=tune", "--device=cpu", "--precision=fp32", "--cache=there", "--deterministic=True"]]
