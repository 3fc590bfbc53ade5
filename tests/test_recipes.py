"""Recipes of continual pre-training: each switch does what it says, changes nothing at its neutral setting, is recorded, resumes bit for
bit, and gives the same result for ranks and accumulation as for one process."""
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import here, random_base, write_task
from safetensors.torch import load_file
from tokenizers import models

import train as script
from data import docstrings, sources
from data.select import select
from data.sources import task_corpus
from rt.data import Masker, Rows
from rt.errors import InputError
from rt.formats.checkpoint import fingerprint, load_base, save_base
from rt.formats.corpora import build_corpus, split_documents
from rt.formats.files import read_json, read_rows
from rt.formats.tasks import load_task
from rt.formats.tokenizer import Tokenizer, pipeline, train_tokenizer
from rt.model import PRESETS, EncoderConfig, MaskedLM, new_masked_lm
from rt.optim import ScheduleConfig, linear_rate
from rt.pretrain import mlm_loss
from rt.recipes import Mixture, Recipe, counts, mix, mixed_shares
from rt.report.inspect import inspect
from rt.runs import upgrade
from rt.runs.upgrade import RecipeConfig, average_into, contents_of, lengthen

SMALL = ("--preset", "tiny", "--vocab_size", "300", "--seq_len", "16", "--batch_tokens", "256", "--eval_tokens", "256", "--device", "cpu",
         "--precision", "fp32", "--dropout", "0.2", "--snapshots", "0")      # a stage that forgets --dropout has .1
WORDS = {"one": "returns the path of a graph as nodes and edges", "two": "protein binds receptor in cells of mice while genes activate"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two domains, `one` and `two`, as text files."""
    home, rng = tmp_path_factory.mktemp("recipes"), np.random.default_rng(0)
    for name, words in WORDS.items():
        lines = (" ".join(rng.choice(words.split(), rng.integers(5, 30))) for _ in range(300))
        (home / f"{name}.txt").write_text("\n".join(lines))
    return home


def train(home, out, *more, stream="one,two", code=0) -> str:
    domains = ",".join(f"{home}/{name}.txt" for name in stream.split(","))
    return here("train.py", *SMALL, "--stream", domains, "--out", home / out, "--cache", home / "cache", *more, code=code)


def same_weights(a, b) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


# --- schedules --------------------------------------------------------------------------------------------------------

def test_schedules_at_their_corners():
    rates = {kind: [ScheduleConfig(kind, cooldown=0.2, hold=0.25, anneal=0.1).rate(t, 100, 10, 1.0) for t in range(100)]
             for kind in ("linear", "cosine", "wsd", "infinite")}
    assert rates["linear"] == [linear_rate(t, 100, 10, 1.0) for t in range(100)]
    assert all(rate[:10] == rates["linear"][:10] for rate in rates.values())
    assert rates["cosine"][10] == 1 and rates["cosine"][55] == pytest.approx(0.5) and rates["cosine"][99] < 1e-3
    assert rates["wsd"][10:81] == [1.0] * 71 and rates["wsd"][90] == pytest.approx(0.5) and rates["wsd"][99] == pytest.approx(0.05)
    assert rates["infinite"][10] == 1 and rates["infinite"][20] == pytest.approx(0.625)
    assert rates["infinite"][30:91] == [pytest.approx(0.25)] * 61 and rates["infinite"][95] == pytest.approx(0.125)
    held = [ScheduleConfig("infinite", hold=0.25, anneal=0.1).rate(t, 100, 10, 1.0, held=True) for t in range(100)]
    assert held[:91] == [0.25] * 91 and held[95] == pytest.approx(0.125)


def older(base):
    del base.meta["config"]["average"]
    return base


def test_an_infinite_schedule_goes_on_from_before_the_annealing(home, monkeypatch):
    """A stream in one process equals, bit for bit, its stages in two processes, linked only by the trunk and its optimizer state."""
    infinite = ("--schedule", "infinite", "--steps", "10", "--anneal", "0.3")
    train(home, "inf", *infinite)
    train(home, "inf1", *infinite, stream="one")
    train(home, "inf2", *infinite, "--init", home / "inf1" / "M0", stream="two")
    assert same_weights(home / "inf" / "M1", home / "inf2" / "M1")
    trunk, meta = read_json(home / "inf" / "M0-t00007" / "meta.json"), read_json(home / "inf" / "M1" / "meta.json")
    assert meta["parent"] == trunk["fingerprint"] and meta["trunk"] == "M1-t00007"
    assert inspect(home / "inf" / "M1")["lineage"] == "M1 <- M0-t00007 <- a random start"
    rates = [row["lr"] for row in read_rows(home / "inf" / "metrics.jsonl") if row["stage"] == "M1" and "lr" in row]
    assert rates[:8] == [pytest.approx(3e-4)] * 8
    train(home, "inf3", *infinite, "--init", home / "inf1" / "M0", "--rewarm", stream="two")
    assert max(row["lr"] for row in read_rows(home / "inf3" / "metrics.jsonl") if "lr" in row) == 1e-3
    kept = []       # deltas were tuned on M0, not on its state before the annealing: that is what --preserve stays near
    monkeypatch.setattr(upgrade, "Preserve", lambda old, *rest: kept.append(fingerprint(old.encoder)) or mlm_loss)
    train(home, "inf5", *infinite, "--init", home / "inf1" / "M0", "--preserve", "10")
    assert kept == [read_json(home / folder / "meta.json")["fingerprint"] for folder in ("inf1/M0", "inf5/M1")]
    train(home, "inf6", *infinite, "--init", home / "inf1" / "M0", "--preserve", "10", "--max_len", "150", stream="one")
    published = load_base(home / "inf1" / "M0")
    assert kept[2:] == [fingerprint(lengthen(MaskedLM(published.encoder, published.head), 150).encoder)]
    train(home, "inf7", *infinite, "--init", home / "inf1" / "M0", "--max_len", "128", stream="two")        # as long as it is
    assert same_weights(home / "inf2" / "M1", home / "inf7" / "M1")
    train(home, "inf11", *infinite, "--init", home / "inf1" / "M0-t00007", stream="two")        # the state before the annealing itself
    assert same_weights(home / "inf2" / "M1", home / "inf11" / "M1")
    monkeypatch.setattr("train.open_base", lambda place: older(load_base(place)))       # as written by a commit that lacks a setting
    train(home, "inf12", *infinite, "--init", home / "inf1" / "M0", stream="two")
    assert same_weights(home / "inf2" / "M1", home / "inf12" / "M1")
    monkeypatch.undo()
    train(home, "inf9", *infinite, "--lr", "5e-4", stream="one")        # another run, whose trunk has the same name
    for run, name in (("inf1", "M0"), ("inf9", "M0-t00007")):
        shutil.copytree(home / run / name, home / "mixed" / name)
    assert "but of another run" in train(home, "inf10", *infinite, "--init", home / "mixed" / "M0", stream="two", code=2)
    (home / "link").symlink_to(home / "inf1" / "M0")
    state = home / "inf1" / "M0-t00007" / "optim.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert "optim.pt is damaged" in train(home, "inf8", *infinite, "--init", home / "link", stream="two", code=2)
    shutil.rmtree(home / "inf1" / "M0-t00007")
    assert "which is gone" in train(home, "inf4", *infinite, "--init", home / "inf1" / "M0", stream="two", code=2)


# --- replay and mixing ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpora(home, tokenizer):
    return [build_corpus(name, home / f"{name}.txt", tokenizer, home / "bins")["train"] for name in WORDS]


def rows_of(corpora, tokenizer, *shares, every=0):
    """Rows of `one` mixed with rows of `two`, with `shares` of both."""
    one, two = (Rows(corpus, tokenizer, seq_len=16, mask_rate=0.3, seed=i) for i, corpus in enumerate(corpora))
    if shares:
        mix(one, [two], list(shares), every)
    return one, two


def test_shares_are_exact_and_spread_over_an_epoch():
    assert [counts(n, [50_000, 950_000]) for n in (19, 20, 400)] == [[0, 19], [1, 19], [20, 380]]
    for shares in ([0.05, 0.95], [0.3, 0.7], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0], [1.0, 0.0]):
        parts, before = [round(s * 10**6) for s in shares], [0] * len(shares)
        for n in range(1, 1001):
            now = counts(n, parts)
            assert sorted(a - b for a, b in zip(now, before)) == [0] * (len(shares) - 1) + [1]      # one row more of one source
            assert max(abs(c - n * s) for c, s in zip(now, shares)) < len(shares)
            before = now
        assert [c / 1000 for c in before] == pytest.approx(shares, abs=0.002)


def test_each_source_is_read_from_its_first_row_on_and_none_is_left_out(corpora, tokenizer):
    one, two = rows_of(corpora, tokenizer, 0.25, 0.75, every=8)
    one.mixture.append([500_000, 500_000])
    seen = {one: [], two: []}
    for number in range(16):
        source, n = one.mixture.locate(number)
        seen[source].append(n)
    assert seen == {one: [*range(6 + 4)], two: [*range(2 + 4)]}


def test_shares_of_less_than_a_row_per_period_add_up():
    sources = ["replayed", "own", "other"]
    mixture = Mixture(sources, [0.01, 0.005, 0.985], every=50)
    for _ in range(19):
        mixture.append(mixture.history[0])
    seen = {source: [] for source in sources}
    for number in range(1000):
        source, n = mixture.locate(number)
        seen[source].append(n)
    assert seen == {"replayed": [*range(10)], "own": [*range(5)], "other": [*range(985)]}


@pytest.mark.parametrize("world, parts", [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_parts_share_out_a_mixed_batch(world, parts, corpora, tokenizer):
    (one, _), (again, _), (alone, _) = rows_of(corpora, tokenizer, 0.25, 0.75), rows_of(corpora, tokenizer, 0.25, 0.75), \
        rows_of(corpora, tokenizer)
    size = 4 * one.row_tokens
    again.batch(70, size)       # reading elsewhere first must not matter
    whole = again.batch(9, size)
    shares = [one.batch(9, size, part, world * parts) for part in range(world * parts)]
    assert torch.equal(torch.cat([s.ids for s in shares]), whole.ids) and not torch.equal(whole.ids, alone.batch(9, size).ids)
    assert torch.equal(torch.cat([s.labels for s in shares]), whole.labels)
    rows_of_one = whole.ids.view(4, -1)[:3]     # the fourth row is from the other corpus
    assert torch.equal(rows_of_one, torch.cat([alone.masked(range(n, n + 1)).ids for n in (27, 28, 29)]).view(3, -1))


def test_a_stage_records_what_it_ran_with(home):
    train(home, "both", "--steps", "4", "--preserve", "3", "--replay", "0.5", stream="one,two")
    metas = [read_json(home / "both" / name / "meta.json") for name in ("M0", "M1")]
    assert [meta["recipe"] for meta in metas] == [{}, {"preserve": 3.0, "replay": 0.5}]      # nothing came before M0
    assert {meta["precision"] for meta in metas} <= {"fp32", "bf16"}


def test_replay_knows_the_earlier_domains_of_init(home):
    train(home, "old", "--steps", "4", stream="one")
    meta = read_json(home / "old" / "M0" / "meta.json")
    assert meta["domains"] == {"one": str((home / "one.txt").resolve())} and meta["recipe"] == {} and [*meta["contents"]] == ["one"]
    upgrade = ("--steps", "4", "--replay", "0.25", "--init", home / "old" / "M0")
    train(home, "new", *upgrade, stream="two")
    meta = read_json(home / "new" / "M1" / "meta.json")
    assert list(meta["domains"]) == ["one", "two"] and meta["recipe"] == {"replay": 0.25} and "one" in meta["stage"]["heldout"]
    assert meta["stage"]["shares"] == {"one": 0.25, "two": 0.75} and inspect(home / "new" / "M1")["recipe"] == "replay 0.25"
    assert "has no record (in its meta.json) of domains" in train(home, "x", "--steps", "4", "--replay", "0.25", stream="one", code=2)
    said = train(home, "x", *upgrade, stream="one", code=2)
    assert "M0 has no record (in its meta.json) of domains other than those of this stream" in said
    train(home, "back", "--steps", "4", "--replay", "0.5", "--init", home / "new" / "M1", stream="one,two")     # both come back
    shares = [read_json(home / "back" / name / "meta.json")["stage"]["shares"] for name in ("M2", "M3")]
    assert shares == [{"two": 0.5, "one": 0.5}, {"one": 0.5, "two": 0.5}]
    (home / "moved").mkdir()
    shutil.copy(home / "two.txt", home / "moved" / "one.txt")
    for given in (upgrade, ("--steps", "4", *upgrade[-2:])):        # with and without --replay
        assert "has the name of an earlier domain" in train(home, "z", *given, stream="moved/one", code=2)
    train(home, "same", "--steps", "2", *upgrade[-2:], stream="one")
    assert read_json(home / "same" / "M1" / "meta.json")["domains"] == {"one": str((home / "one.txt").resolve())}
    (home / "one.txt").rename(home / "gone.txt")
    try:
        (home / "one.txt").write_text("another text\nabout edges\n" * 99 + "a\nb\n")
        for stream in ("two", "two,one"):       # also if the changed text is learned afterwards
            assert f"one ({home / 'one.txt'}) has changed since the lineage learned it" in train(home, "y", *upgrade, stream=stream, code=2)
        (home / "one.txt").unlink()
        assert "one.txt, which is gone: restore it" in train(home, "y", *upgrade, stream="two", code=2)
    finally:
        (home / "gone.txt").rename(home / "one.txt")


def test_static_shapes_have_room_for_all_sources(corpora, tokenizer):
    one, two = rows_of(corpora, tokenizer)
    two.mean_length, two.length_deviation = 5.0, 9.0
    mix(one, [two], [0.5, 0.5])
    assert (one.mean_length, one.length_deviation) == (5.0, 9.0)


def test_need_moves_shares_towards_the_domain_with_excess_loss():
    assert mixed_shares([0.5, 0.5], [0.0, -3.0], eta=2.0) == [0.5, 0.5]       # neither has an excess
    assert mixed_shares([0.5, 0.5], [np.log(3), 0.0], eta=1.0) == pytest.approx([0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05])
    assert mixed_shares([0.9, 0.1], [0.0, 0.0], eta=1.0) == pytest.approx([0.86, 0.14])       # slowly back to equal shares
    shares = [0.5, 0.5]
    for _ in range(50):
        shares = mixed_shares(shares, [0.0, 1.0], eta=1.0)
    assert 0.9 < shares[1] < 0.951      # no share dies out
    assert mixed_shares([0.5, 0.5], [1.0, 2.0], eta=1e6) == pytest.approx([0.05, 0.95])


def test_need_applies_a_period_later_and_leaves_replay_alone(corpora, tokenizer):
    one, two = rows_of(corpora, tokenizer)
    mixture, measured = Mixture([two, two, one], [0.2, 0.4, 0.4], every=10), []
    recipe = Recipe(None, 0, 1.0, mixture, 5, 1.0, lambda: measured.append(1) or [2.0, 2.0 + np.log(3)], [2.0, 2.0])
    for step in range(1, 6):
        recipe.after_step(step)
    assert measured == [1] and mixture.history[:2] == [[200_000, 400_000, 400_000]] * 2
    assert mixture.history[2] == [200_000, 220_000, 580_000]
    again = Recipe(mixture=Mixture([two, two, one], [0.2, 0.4, 0.4], every=10), reference=[2.0, 2.0])
    again.load_state(recipe.state())
    assert again.mixture.history == mixture.history and again.mixture.before == mixture.before


# --- weights ----------------------------------------------------------------------------------------------------------

def test_reptile_with_eps_1_is_plain_training_and_with_0_stays_where_it_was(home):
    for name, more in (("plain", ()), ("eps1", ("--align", "3", "--align_eps", "1")), ("eps0", ("--align", "3", "--align_eps", "0"))):
        train(home, name, "--steps", "6", "--save_every", "3", *more, stream="one")
    assert same_weights(home / "plain" / "M0", home / "eps1" / "M0")
    train(home, "never", "--steps", "3", "--align", "1", "--align_eps", "0", stream="one")
    assert same_weights(home / "never" / "M0", home / "eps0" / "M0") and not same_weights(home / "plain" / "M0", home / "eps0" / "M0")


def test_reptile_goes_part_of_the_way(tokenizer):
    base = random_base(tokenizer)
    model = MaskedLM(base.encoder, base.head)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = Recipe(model, align=2, eps=0.25)
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(4.0)
        recipe.after_step(step)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k] + 2.0)
    assert all(torch.equal(a, b) for a, b in zip(recipe.before, model.parameters()))


def test_the_mean_of_equal_snapshots_is_the_snapshot(tokenizer):
    models = [MaskedLM(b.encoder, b.head) for b in (random_base(tokenizer, seed) for seed in (0, 0, 1, 2))]
    first, *states = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    average_into(models[0], states[:1] * 4)
    assert all(v.equal(first[k]) for k, v in models[0].state_dict().items())
    average_into(models[0], states[1:])
    for k, v in models[0].state_dict().items():
        torch.testing.assert_close(v, (first[k] + states[1][k] + states[2][k]) / 3)


@pytest.mark.parametrize("steps, snapshots, last", [(12, 3, (6, 9)), (3, 20, (1, 2))])       # 20 snapshots of 3 steps: one is the end
def test_the_published_base_is_the_mean_of_the_last_snapshots(steps, snapshots, last, home):
    for name, average in ((f"end{steps}", "1"), (f"mean{steps}", "3")):
        train(home, name, "--steps", steps, "--snapshots", snapshots, "--average", average, stream="one")
    states = [load_file(home / f"end{steps}" / name / "model.safetensors") for name in (*(f"M0-t{t:05d}" for t in last), "M0")]
    for k, v in load_file(home / f"mean{steps}" / "M0" / "model.safetensors").items():
        torch.testing.assert_close(v, sum(state[k] for state in states) / 3)


# --- objectives and masks ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["rts", "slm"])
def test_every_chosen_token_becomes_another_one_in_100_000(objective, tokenizer):
    masker, rng, seen = Masker(tokenizer, 300, objective), np.random.default_rng(0), np.zeros(tokenizer.vocab_size, int)
    for i in range(100):
        ids = rng.integers(5, tokenizer.vocab_size, 1000)
        ids[::50] = tokenizer.bos_id
        out, chosen, true = masker(ids, np.random.default_rng([7, i]))
        assert len(set(chosen.tolist())) == 300 and (np.flatnonzero(out != ids) == chosen).all() and (true == ids[chosen]).all()
        seen += np.bincount(out[chosen], minlength=tokenizer.vocab_size)
    assert not seen[tokenizer.special_ids].any()
    expected = 30_000 / (tokenizer.vocab_size - 5)
    assert (np.abs(seen[5:] - expected) < 7 * expected ** 0.5).all()     # each token as often as any other


def test_replaced_tokens_are_told_by_every_token_s_own_score(corpora, tokenizer):
    rows = Rows(corpora[0], tokenizer, seq_len=16, mask_rate=0.25, seed=0, objective="rts")
    batch, base = rows.masked(range(4)), random_base(tokenizer)
    original = np.concatenate([rows.row(n)[0] for n in range(4)])
    special = np.isin(original, tokenizer.special_ids)
    assert batch.predict is None and (batch.labels.numpy() == np.where(special, -100, batch.ids.numpy() == original)).all()
    assert (batch.labels == 0).sum() == 4 * 32
    model = MaskedLM(base.encoder, base.head)
    own = model(batch).gather(1, batch.ids[:, None])[:, 0]      # from the logits over the vocabulary
    losses = torch.nn.functional.softplus(torch.where(batch.labels > 0, -own, own))[~torch.from_numpy(special)]
    torch.testing.assert_close(mlm_loss(model, batch), losses.sum() / len(batch.ids))
    halves = [mlm_loss(model, rows.masked(range(n, n + 2))) for n in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, mlm_loss(model, batch))


def test_words_are_masked_whole_and_names_and_numbers_first():
    texts = ["The protein binds. In mice of 1993 Ann Smith saw it (unbelievably) and Bob did not."] * 3
    tokenizer = train_tokenizer([texts[0].replace("Smith", "Smi th").replace("unbeliev", "unbe liev")] * 3, 400)     # most are one token
    ids = np.array([i for text in texts for i in [tokenizer.bos_id, *tokenizer.encode([text])[0], tokenizer.eos_id]])
    pieces = [tokenizer.pieces[i] for i in ids]
    special = [i in tokenizer.special_ids for i in ids]
    word = np.cumsum([i == 0 or not pieces[i][0].isalnum() or special[i] or special[i - 1] or not pieces[i - 1][-1].isalnum()
                      for i in range(len(ids))])
    for seed in range(20):
        out, chosen, _ = Masker(tokenizer, 30, "slm", "word")(ids, np.random.default_rng(seed))
        partly = [w for w in set(word[chosen]) if 0 < (word[chosen] == w).sum() < (word == w).sum()]
        assert len(chosen) == 30 and len(partly) <= 1
    named = re.compile("1993|Ann Smith|Bob")
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    wanted = {i for found in named.finditer(text) for i in range(len(ids)) if found.start() < ends[i] <= found.end()}
    for seed in range(5):
        _, chosen, _ = Masker(tokenizer, len(wanted), "mlm", "entity")(ids, np.random.default_rng(seed))
        assert set(chosen) == wanted
        _, more, _ = Masker(tokenizer, len(wanted) + 5, "mlm", "entity")(ids, np.random.default_rng(seed))
        assert set(more) > wanted
    lower = SimpleNamespace(**{name: getattr(tokenizer, name) for name in ("vocab_size", "mask_id", "special_ids")},
                            pieces=[piece.lower() for piece in tokenizer.pieces])
    with pytest.raises(InputError, match="`mask` entity: the tokenizer has no capital letters"):
        Masker(lower, 3, unit="entity")


def test_a_stop_before_a_closing_quote_ends_a_sentence_and_a_part_of_a_letter_is_in_a_word():
    pieces = ["<s>", "He", " saw", " Ann", '."', " Then", ").", " She", " na", "\ufffd", "\ufffd", "ve", "?"]
    made = SimpleNamespace(vocab_size=13, mask_id=0, special_ids=[0], pieces=pieces)
    keys = Masker(made, 1, unit="entity").order(np.arange(13), np.random.default_rng(0))
    assert [pieces[i] for i in np.flatnonzero(keys < 1)] == [" Ann"]
    keys = Masker(made, 1, unit="word").order(np.arange(13), np.random.default_rng(0))
    assert len({*keys[8:12]}) == 1 and len({*keys}) == 10


def test_pieces_tell_where_a_word_begins(tokenizer):
    """Also for WordPiece and Unigram."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bind", "##ing", "."])}
    wordpiece = Tokenizer(pipeline(models.WordPiece(vocabulary, unk_token="[UNK]")))
    pieces = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u2581bind", "ing")
    unigram = Tokenizer(pipeline(models.Unigram([(piece, -1.0) for piece in pieces], 3)))
    assert wordpiece.pieces[5:] == [" bind", "ing", " ."] and unigram.pieces[5:] == [" bind", "ing"]
    text = "Naive graphs, 100%"
    assert "".join(tokenizer.pieces[i] for i in tokenizer.encode([text])[0]) == text


# --- positions --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_a_longer_position_table_gives_the_old_logits_on_short_texts(model_type, batch, tokenizer):
    config = EncoderConfig(tokenizer.vocab_size, model_type=model_type, **PRESETS["tiny"])
    model = new_masked_lm(config, 0).eval()
    longer = lengthen(model, 300).eval()
    assert torch.equal(model(batch), longer(batch)) and longer.encoder.config.max_len == 300
    old, new = (m.encoder.embeddings.position.weight for m in (model, longer))
    first = config.first_position
    assert torch.equal(new[:first], old[:first]) and torch.equal(new[first:], torch.cat([old[first:]] * 3)[:300])
    with pytest.raises(InputError, match="--max_len 64: the base has positions for 128 tokens"):
        lengthen(model, 64)


def test_a_base_is_made_longer_by_an_upgrade(home):
    train(home, "short", "--steps", "2", stream="one")
    assert "--max_len makes more" in train(home, "long", "--init", home / "short" / "M0", "--seq_len", "160", code=2)
    train(home, "long", "--init", home / "short" / "M0", "--max_len", "200", "--steps", "1")
    assert read_json(home / "long" / "M2" / "meta.json")["encoder"]["max_len"] == 200
    train(home, "fresh", "--steps", "1", "--max_len", "20", stream="one")
    assert read_json(home / "fresh" / "M0" / "meta.json")["encoder"]["max_len"] == 20
    need = ("--init", home / "short" / "M0", "--seq_len", "24", "--batch_tokens", "192", "--mix", "need", "--mix_reference")
    assert "--seq_len 24: the base has positions for 20" in train(home, "no", *need, home / "fresh" / "M0", code=2)


# --- texts for a task -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def task(tmp_path_factory):
    rows = [{"text": f"The enzyme {name} cleaves collagen", "text_pair": "in tissue", "label": label}
            for name, label in zip(("alpha", "beta", "gamma", "delta"), "xyxy")]
    return write_task(tmp_path_factory.mktemp("tasks") / "enzymes", {part: rows for part in ("train", "dev", "test")})


def test_selection_finds_planted_documents(home, task, tmp_path):
    rng = np.random.default_rng(1)
    plain = [" ".join(rng.choice(WORDS["one"].split(), rng.integers(3, 20))) for _ in range(190)]
    planted = [f"an enzyme that cleaves collagen {i} of tissue" for i in range(10)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").write_text("\n".join(rng.permutation(plain + planted)))
    (tmp_path / "corpus" / "heldout.txt").write_text("nothing of the kind\n")
    folder = select(tmp_path / "corpus", load_task(task), 0.05, tmp_path)
    parts = {part: [text for p, text in split_documents(folder) if p == part] for part in ("train", "heldout")}
    assert sorted(parts["train"]) == sorted(planted) and parts["heldout"] == ["nothing of the kind"]
    stamp = folder.stat().st_mtime_ns
    assert select(tmp_path / "corpus", load_task(task), 0.05, tmp_path) == folder and folder.stat().st_mtime_ns == stamp
    assert select(tmp_path / "corpus", load_task(task), 0.1, tmp_path) != folder


def test_a_task_s_own_texts_are_a_domain_plain_or_in_a_template(home, task, tmp_path):
    plain, prompt = (list(split_documents(task_corpus(load_task(task), template, tmp_path)))
                     for template in ("{text} {text_pair}", "{text}? {label} {}"))
    assert plain[0] == ("train", "The enzyme alpha cleaves collagen in tissue") and plain[-1][0] == "heldout" and len(plain) == 8
    assert prompt[1] == ("train", "The enzyme beta cleaves collagen? y {}")
    for template in ("{txt}", "it is {label}", "{text} is {lable}"):
        with pytest.raises(InputError, match="must say where the {text} goes, and may hold {text_pair} and {label}; nothing else"):
            task_corpus(load_task(task), template, tmp_path)
    short = ("--steps", "2", "--seq_len", "8", "--batch_tokens", "128", "--out", home / "t", "--cache", home / "cache", "--replay", "0.5")
    here("train.py", *SMALL, "--stream", f"{home}/one.txt,task:{task}", *short, "--template", "{text} {text_pair} {text}")
    meta = read_json(home / "t" / "M1" / "meta.json")
    assert "--template has no effect without task:NAME in --stream" in train(home, "u", "--template", "{text}.", code=2)
    selected = here("train.py", *SMALL, "--stream", f"task:{task}", "--select", task, *short, code=2)
    assert "--select has no effect without a corpus in --stream" in selected
    assert meta["domain"] == "task-enzymes" and meta["stage"]["shares"] == {"one": 0.5, "task-enzymes": 0.5}


# --- all of them ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", [
    ("--align", "4", "--replay", "0.25", "--schedule", "infinite", "--average", "2", "--snapshots", "2"),
    ("--mix", "need", "--mix_every", "5", "--mix_reference", "REFERENCE", "--mix_eta", "3", "--align", "3"),
    ("--objective", "rts", "--mask", "word", "--schedule", "cosine", "--preserve", "3"),
    ("--objective", "slm", "--mask", "entity", "--schedule", "wsd", "--preserve", "3", "--preserve_by", "attention"),
    ("--preserve", "1", "--preserve_by", "predictions", "--replay", "0.2")], ids=" ".join)
def test_a_recipe_resumes_bit_for_bit(recipe, home):
    train(home, "reference", "--steps", "30", "--snapshots", "0", stream="one")
    recipe = [str(home / "reference" / "M0") if word == "REFERENCE" else word for word in recipe]
    tokenizer = () if recipe[0] == "--align" else ("--tokenizer", home / "reference" / "M0")
    arguments = ("--steps", "18" if recipe[0] == "--mix" else "18,11", *recipe, *tokenizer)
    straight, broken = (f"{name}{recipe[1]}" for name in ("straight", "broken"))
    train(home, straight, *arguments)
    train(home, broken, *arguments, "--stop_after", "14")
    train(home, broken, *arguments, "--stop_after", "2" if recipe[0] == "--mix" else "7", "--resume")
    train(home, broken, *arguments, "--resume")
    last = "M0" if recipe[0] == "--mix" else "M1"
    assert same_weights(home / straight / last, home / broken / last)
    assert read_rows(home / straight / "metrics.jsonl") == read_rows(home / broken / "metrics.jsonl")
    if recipe[0] == "--mix":
        facts = read_json(home / straight / "M0" / "meta.json")
        assert facts["domain"] == "one+two" and facts["stage"]["shares"]["one"] > 0.55      # the reference is better there


def test_accumulation_changes_nothing_of_a_mixture(home):
    for parts in "12":
        train(home, f"parts{parts}", "--steps", "5", "--mix", "one:0.25,two:0.75", "--accumulation", parts, "--dropout", "0")
    a, b = ([row["loss"] for row in read_rows(home / f"parts{parts}" / "metrics.jsonl") if "loss" in row] for parts in "12")
    assert a == pytest.approx(b, rel=1e-4)


def test_settings_that_make_no_sense_together_are_refused_in_a_sentence(home):
    for change, words in ((dict(align_eps=0.5), "`align_eps` has no effect without `align`"),
                          (dict(mix=("need",)), "there is one domain, a"),
                          (dict(rates=ScheduleConfig(hold=0.1)), "`hold` has no effect without `schedule` infinite"),
                          (dict(rates=ScheduleConfig("cosine", cooldown=0.1)), "`cooldown` has no effect without `schedule` wsd or inf"),
                          (dict(rates=ScheduleConfig("infinite", cooldown=0.9)), "`cooldown` 0.9 and `anneal` 0.1 add up to more than the"),
                          (dict(rates=ScheduleConfig("wsd", cooldown=0.96)), "`warmup` 0.05, `cooldown` 0.96 add up to more"),
                          (dict(rates=ScheduleConfig("infinite", cooldown=0.0, anneal=0.9)), "nothing is left of 4 steps to go on from"),
                          (dict(align=5), "`align` 5: has its first effect after 5 steps, and a stage has 4"),
                          (dict(average=4), "`average` 4 takes 3 snapshots and the end of a stage: raise `snapshots` (2)"),
                          (dict(mix_eta=2.0), "`mix_eta` has no effect without `mix` need")):
        with pytest.raises(InputError) as error:
            RecipeConfig(**change).check(["a"], 0.05, 4, 2)
        assert words in str(error.value)
    RecipeConfig(rates=ScheduleConfig("infinite", cooldown=0.34, anneal=0.1)).check(["a"], 0.56, 100, 2)      # as floats, above 1
    for shares in (("a:0.5", "c:0.5"), ("a:0.5", "b:0.6"), ("a:x", "b:0.5"), ("a", "b"), ("need", "a:1"), ("a:0", "b:1"), ("a:-1", "b:2"),
                   ("a:²", "b:1")):
        with pytest.raises(InputError, match="must be need, or shares of a, b that add up to 1, as in a:0.5,b:0.5"):
            replace(RecipeConfig(), mix=shares).check(["a", "b"], 0.1, 4, 2)
    with pytest.raises(InputError, match="`mix_every` 5: shares change first after 10 steps, and a stage has 10"):
        RecipeConfig(mix=("need",), mix_every=5).check(["a", "b"], 0.1, 10, 2)
    RecipeConfig(mix=("need",), mix_every=5, align=11).check(["a", "b"], 0.1, 11, 2)
    RecipeConfig(mix=("a:0.3", "b:0.7"), replay=0.1).check(["a", "b"], 0.1, 4, 2)
    assert RecipeConfig(mix=("a:0.3", "b:0.7"), replay=0.1).start_shares(["b", "a"], 2) == pytest.approx([0.05, 0.05, 0.63, 0.27])
    (thirds := RecipeConfig(mix=("a:0.333", "b:0.333", "c:0.333"))).check(["a", "b", "c"], 0.1, 4, 2)      # what the refusal suggests
    assert thirds.start_shares(["a", "b", "c"], 0) == pytest.approx([1 / 3] * 3)
    assert "--align_eps has no effect without --align" in train(home, "z", "--align_eps", "0.1", code=2)
    assert "--mask_rate 0.001: predicts none of the 128 tokens of a row" in train(home, "z", "--mask_rate", "0.001", code=2)
    assert "--compile would recompile for each" in train(home, "z", "--mix", "need", "--mix_reference", "M0", "--compile", code=2)
    assert "--mix need: no loss of a new base rises above that of its random start" in train(home, "z", "--mix", "need", code=2)
    assert "no earlier one to stay near" in train(home, "z", "--preserve", "3", stream="one", code=2)
    said = train(home, "z", "--schedule", "infinite", "--rewarm", stream="one", code=2)
    assert "--rewarm has no effect without --init: the rate of a new base rises anyway" in said
    for stream, steps in (("one", 600), ("one,two", 500)):      # the default steps of the stages that there are
        said = train(home, "z", "--align", "601", stream=stream, code=2)
        assert f"--align 601: has its first effect after 601 steps, and a stage has {steps}" in said
    assert "the model did not fit into memory: lower --preset or --max_len" in train(home, "z", "--max_len", str(10**12), code=2)


def test_the_reference_of_need_is_part_of_a_run_and_need_goes_with_preserve(home):
    train(home, "own", "--steps", "2")
    need = ("--init", home / "own" / "M0", "--mix", "need", "--mix_every", "5", "--preserve", "3", "--steps", "12", "--save_every", "6",
            "--mix_reference", home / "target")
    shutil.copytree(home / "own" / "M1", home / "target")
    train(home, "by need", *need, "--stop_after", "6")
    shutil.rmtree(home / "target")
    shutil.copytree(home / "own" / "M0", home / "target")
    assert "--mix_reference" in train(home, "by need", *need, "--resume", code=2)
    assert "recipes of an upgrade (docs/recipes.md):\n  --schedule" in here("train.py", "--help")


def test_a_number_may_begin_a_sentence_and_neighbours_are_one_entity():
    pieces = ["<s>", "7", " mice", " saw", " Ann", " Smith", ".", " 1993", " went", " by", ".", " Then", " Bob"]
    made = SimpleNamespace(vocab_size=13, mask_id=0, special_ids=[0], pieces=pieces)
    keys = Masker(made, 1, unit="entity").order(np.arange(13), np.random.default_rng(0))
    named = np.flatnonzero(keys < 1)
    assert [pieces[i] for i in named] == ["7", " Ann", " Smith", " 1993", " Bob"]
    assert keys[4] == keys[5] and len({*keys[named]}) == 4


def test_preserve_takes_its_variances_from_many_rows_of_the_new_text(home, monkeypatch):
    seen = []
    monkeypatch.setattr(upgrade, "Preserve", lambda old, weight, by, sample: seen.append(len(sample.ids)) or mlm_loss)
    train(home, "sampled", "--steps", "2", "--preserve", "3")
    rows = read_json(home / "sampled" / "M1" / "meta.json")["stage"]["packing"]["rows"]
    assert seen == [min(upgrade.SAMPLE_TOKENS // 128, rows) * 128] and rows > 1


def test_a_chain_can_stay_near_its_first_base(home, monkeypatch):
    train(home, "first", "--steps", "2", stream="one")
    first, olds = home / "first" / "M0", []
    base = load_base(first)
    chain = ("--init", first, "--steps", "2", "--preserve", "3", "--preserve_to")
    for name, size in (("ffn_size", 256), ("max_len", 256)):        # what has begun would refuse the corrected command
        save_base(home / name, new_masked_lm(replace(base.encoder.config, **{name: size}), seed=0), base.tokenizer, {})
        said = train(home, "near another", *chain, home / name, code=2)
        assert f"--preserve_to {home / name}: the new base has an encoder of other sizes: {name}" in said
        assert not (home / "near another" / "config.json").exists()
    train(home, "near itself", *chain, first, stream="two")
    train(home, "near the last", *chain[:-1], stream="two")
    train(home, "near a shorter one", *chain, first, "--max_len", "150", "--seq_len", "130", "--batch_tokens", "1040", stream="two")
    assert same_weights(home / "near itself" / "M1", home / "near the last" / "M1")
    assert read_json(home / "near itself" / "M1" / "meta.json")["recipe"] == {"preserve": 3.0, "preserve_to": str(first)}
    monkeypatch.setattr(upgrade, "Preserve", lambda old, weight, by, sample: olds.append(fingerprint(old.encoder)) or mlm_loss)
    train(home, "near the first", *chain, first)
    train(home, "near each", *chain[:-1])
    M0, M1 = (load_base(folder).fingerprint for folder in (first, home / "near each" / "M1"))
    assert olds == [M0, M0, M0, M1]


def test_bases_are_scored_on_15_percent_of_the_tokens_of_the_same_rows(corpora, tokenizer):
    one, two = (upgrade.scored_rows(corpora[0], tokenizer, 40).masked(range(4)) for _ in range(2))
    assert one.predict.equal(two.predict) and one.ids.equal(two.ids) and len(one.ids) == 4 * 40
    assert len(one.predict) == 4 * 6        # whatever --mask_rate is


def test_no_more_snapshots_are_averaged_than_a_stage_has_steps():
    RecipeConfig(average=3).check(["a"], 0.1, 3, 5)
    with pytest.raises(InputError, match=r"`average` 4 takes 3 snapshots .*: raise `snapshots` \(5\) and `steps` \(3\)"):
        RecipeConfig(average=4).check(["a"], 0.1, 3, 5)


def test_a_domain_that_is_learned_again_is_noted_as_it_is_now():
    corpora = {"a": {"train": SimpleNamespace(content="new")}}
    assert contents_of(corpora, {"a": "old", "b": "kept"}, {}, [("a",)]) == [{"a": "new", "b": "kept"}]
    with pytest.raises(InputError, match=r"--replay: a \(a.txt\) has changed since the lineage learned it"):
        contents_of(corpora, {"a": "old", "b": "kept"}, {"a": "a.txt"}, [("b",)])


def test_shares_by_need_go_on_from_the_last_ones(corpora, tokenizer):
    one, two = rows_of(corpora, tokenizer)
    mixture = Mixture([two, one], [0.5, 0.5], every=10)
    recipe = Recipe(None, 0, 1.0, mixture, 5, 1.0, lambda: [2.0, 2.0 + np.log(3)], [2.0, 2.0])
    for step in range(1, 11):
        recipe.after_step(step)
    assert mixture.history[2:] == [[275_000, 725_000], [151_020, 848_980]]     # 0.9 * 0.275 / (0.275 + 3 * 0.725) + 0.05


def test_a_complete_run_has_no_resumable_checkpoints(home):
    train(home, "whole", "--steps", "3", "--save_every", "1", "--stop_after", "2", stream="one")
    assert len([*(home / "whole" / "resume").iterdir()]) == 2
    train(home, "whole", "--steps", "3", "--save_every", "1", "--resume", stream="one")
    assert (home / "whole" / "M0").exists() and not (home / "whole" / "resume").exists()


@pytest.mark.parametrize("word", ["ENZYME", "collagen"])
def test_one_document_is_selected_at_least_by_words_of_either_text_in_any_case(word, tmp_path):
    rows = [{"text": "The Enzyme", "text_pair": "of collagen", "label": label} for label in "xy"]
    task = load_task(write_task(tmp_path / "task", dict.fromkeys(("train", "dev"), rows)))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").write_text("".join(f"x{i}\n" for i in range(9)) + f"{word}\n")
    (tmp_path / "corpus" / "heldout.txt").write_text("nothing of the kind\n")
    folder = select(tmp_path / "corpus", task, 1e-3, tmp_path / "cache")
    assert [*split_documents(folder)] == [("train", word), ("heldout", "nothing of the kind")]


def test_a_dot_has_a_name_and_an_embedded_domain_comes_before_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "math.v2").mkdir()
    monkeypatch.chdir(tmp_path / "math.v2")
    assert sources.domain_names("stream", (".", "task:../x.jsonl")) == ["math", "task-x"]
    Path("graphs").mkdir()
    counts = {"corpus": {"train": 9, "heldout": 1}, "task": dict.fromkeys(docstrings.PARTS, {"a": 2, "b": 1})}
    monkeypatch.setattr(docstrings, "build", lambda domain, out: {"package": "networkx", "version": "3", **counts})
    sources.corpus_path("graphs", tmp_path)
    said = capsys.readouterr()
    assert said.err == "note: graphs: the embedded domain is read; give ./graphs to read what is here under this name\n"
    assert said.out == "embedded domain graphs: docstrings of networkx 3, 9 documents and 1 held out; task of 2 labels, 3/3/3\n"


def test_need_goes_with_preserve_and_align(home, monkeypatch):
    train(home, "z own", "--steps", "2", stream="one")
    need = ("--init", home / "z own" / "M0", "--mix", "need", "--mix_every", "5", "--steps", "11")
    calls = []
    monkeypatch.setattr(upgrade, "Preserve", lambda *_: lambda model, batch: calls.append(1) or mlm_loss(model, batch))
    train(home, "z plain", *need, "--preserve", "3")
    assert len(calls) == 11
    train(home, "z align", *need, "--align", "11", "--align_eps", "0")
    assert not same_weights(home / "z plain" / "M1", home / "z align" / "M1")


def test_warmup_and_weight_decay_are_those_of_the_flags(home):
    for name, decay in (("warm", "0"), ("decay", "1")):
        train(home, name, "--steps", "8", "--warmup", ".5", "--weight_decay", decay, stream="one")
    rates = [row["lr"] for row in read_rows(home / "warm" / "metrics.jsonl") if "lr" in row]
    assert rates == pytest.approx([linear_rate(t, 8, 4, 1e-3) for t in range(8)])
    assert not same_weights(home / "warm" / "M0", home / "decay" / "M0")


def test_bases_that_cannot_serve_as_reference_or_be_preserved_are_refused(home, monkeypatch):
    train(home, "words", "--steps", "1", "--vocab_size", "280", stream="one")
    train(home, "start", "--steps", "1", stream="one")
    said = train(home, "no reference", "--init", home / "start" / "M0", "--mix", "need", "--mix_every", "5", "--steps", "11",
                 "--mix_reference", home / "words" / "M0", code=2)
    assert "words/M0: has another tokenizer than the new base, or no masked-LM head" in said
    assert not (home / "no reference" / "config.json").exists()     # the command with another reference can begin there
    monkeypatch.setattr("train.open_base", lambda place: replace(load_base(place), head=None))
    said = train(home, "no head", "--init", home / "start" / "M0", "--steps", "1", "--preserve", "3", "--preserve_by", "predictions",
                 stream="two", code=2)
    assert "predicts nothing without its masked-LM head; use hidden" in said


def test_a_domain_of_the_hub_is_not_looked_for_on_the_disk_and_idle_settings_are_not_recorded():
    c = SimpleNamespace(recipe=RecipeConfig(replay=0.1), init="M0")
    assert upgrade.earlier_domains(c, {"a": "hub:owner/a"}, {"b": "b.txt"}) == {"a": "hub:owner/a"}
    mixed = SimpleNamespace(recipe=RecipeConfig(replay=0.1, mix=("a:0.5", "b:0.5")), init=None)
    with pytest.raises(InputError, match="has no record"):
        upgrade.earlier_domains(mixed, {}, {"a": "a.txt", "b": "b.txt"})
    with pytest.raises(InputError, match="--stream: b .* is not UTF-8, and could not be read again"):
        upgrade.earlier_domains(c, {}, {"b": "/here/\udcff/b.txt"})
    assert upgrade.used(RecipeConfig(preserve=3.0, preserve_by="last", replay=0.1), SimpleNamespace(mixture=None), None) == {}


def test_a_cache_that_predates_hashes_changes_none_and_contradicts_none():
    corpora = {"a": {"train": SimpleNamespace(content="")}, "b": {"train": SimpleNamespace(content="new")}}
    assert contents_of(corpora, {"a": "old", "b": ""}, {"a": "a.txt", "b": "b.txt"}, [("c",)]) == [{"a": "old", "b": "new"}]


@pytest.mark.parametrize("change, words", [
    (dict(keep=0.5), "`keep` has no effect without `select`"), (dict(rates=ScheduleConfig(anneal=0.2)), "`anneal` has no effect without"),
    (dict(mix_every=9), "`mix_every` has no effect without `mix` need"), (dict(mix_reference="M0"), "`mix_reference` has no effect")])
def test_more_settings_without_effect(change, words):
    with pytest.raises(InputError, match=words):
        RecipeConfig(**change).check(["a"], 0.05, 4, 2)


def test_a_domain_of_a_later_stage_is_noted_as_the_lineage_learned_it_until_then(home):
    train(home, "before", "--steps", "2", stream="one")
    was, text = read_json(home / "before" / "M0" / "meta.json")["contents"]["one"], (home / "one.txt").read_text()
    (home / "one.txt").write_text("another text\nabout edges\n" * 99 + "a\nb\n")
    try:
        train(home, "changed", "--steps", "2", "--init", home / "before" / "M0", stream="two,one")
    finally:
        (home / "one.txt").write_text(text)
    noted = [read_json(home / "changed" / name / "meta.json")["contents"]["one"] for name in ("M1", "M2")]
    assert noted[0] == was != noted[1]


def test_a_file_whose_name_begins_like_a_tasks_is_a_corpus():
    RecipeConfig(select="t").check(["task-notes"], 0.1, 4, 2)
    with pytest.raises(InputError, match="`template` has no effect without task:NAME"):
        RecipeConfig(template="{text}!").check(["task-notes"], 0.1, 4, 2)


def test_weights_and_rows_are_functions_of_the_seed_and_scores_of_eval_tokens(home):
    still = ("--steps", "1", "--lr", "1e-30")
    train(home, "s0", *still, "--eval_tokens", "32", stream="one")
    train(home, "s1", *still, "--seed", "1", "--tokenizer", home / "s0" / "M0", stream="one")
    assert not same_weights(home / "s0" / "M0", home / "s1" / "M0")
    for seed in "01":
        train(home, f"d{seed}", "--steps", "1", "--dropout", "0", "--seed", seed, "--init", home / "s0" / "M0", stream="one")
    assert not same_weights(home / "d0" / "M1", home / "d1" / "M1")
    assert read_json(home / "s0" / "M0" / "meta.json")["stage"]["heldout"]["one"]["predictions"] == 2 * 2      # rows of 16 tokens


def test_a_tokenizer_has_not_seen_the_held_out_text(tmp_path):
    (tmp_path / "train.txt").write_text("nodes and edges\n" * 30)
    (tmp_path / "heldout.txt").write_text("zqzqzq\n" * 30)
    c = SimpleNamespace(tokenizer=None, resume=False, vocab_size=300)
    assert not any("zq" in piece for piece in script.start_tokenizer(c, tmp_path / "out", tmp_path).pieces)


def test_a_base_without_a_head_gets_one_by_the_seed(base):
    c = SimpleNamespace(seed=3, dropout=0.0, recipe=RecipeConfig())
    model, *_ = upgrade.go_on_from(c, Path("M0"), replace(base, head=None))
    drawn = new_masked_lm(base.encoder.config, 3).head.state_dict()
    assert all(torch.equal(v, drawn[name]) for name, v in model.head.state_dict().items())
