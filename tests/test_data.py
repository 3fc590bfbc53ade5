"""Corpora: readers and their errors, bins that are built once, rows and batches as functions of (seed, step)."""
import gzip
import json
import lzma
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_base

from rt.data import ROW_SEQUENCES, Masker, Rows
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.corpora import build_corpus, read_documents, split_documents
from rt.formats.tokenizer import load_tokenizer, train_tokenizer
from rt.model import MaskedLM
from rt.pretrain import mlm_loss
from rt.runs.resume import packing
from rt.speed.graphs import static_batch


@pytest.fixture(scope="module")
def corpus(graphs, tokenizer, tmp_path_factory):
    return build_corpus("graphs", graphs / "corpus", tokenizer, tmp_path_factory.mktemp("bins"))


def rows_of(corpus, tokenizer, seed=3, seq_len=32, mask_rate=0.15):
    return Rows(corpus["train"], tokenizer, seq_len=seq_len, mask_rate=mask_rate, seed=seed)


def test_every_format_gives_the_same_documents(tmp_path):
    documents = ["first one", "zweites, mit Umlaut ü", "third"]
    text = "\n".join([documents[0], "", *documents[1:]]) + "\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())    # as Windows writes it
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    for name in ("a.txt", "b.txt", "a.txt.gz", "a.txt.xz", "a.jsonl"):
        assert list(read_documents(tmp_path / name)) == documents


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"fine\n\xff\xfe\n", "a.txt, line 2: not valid UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b'[1]\n', "a.jsonl, line 1: expected a JSON object"),
    ("a.jsonl", b'{"body": "x"}\n', 'a.jsonl, line 1: has no "text" string'),
    ("a.jsonl", b'{"text": "x \\ud83d"}\n', "a.jsonl, line 1: holds half of a surrogate pair"),
    ("a.txt.gz", b"not gzip", "a.txt.gz: cannot be read")])
def test_bad_files_are_named_with_their_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        list(split_documents(tmp_path / name))
    assert words in str(error.value)


def test_empty_and_missing_corpora(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    for path, words in ((tmp_path / "empty.txt", "number of documents .* is 0"), (tmp_path / "folder", "no text there"),
                        (tmp_path / "nowhere", "no such corpus")):
        with pytest.raises(InputError, match=words):
            build_corpus("x", path, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_content_decides_what_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"document {i % 1500}\n" for i in range(3000)))     # each one occurs twice
    parts = {"train": [], "heldout": []}
    for part, text in split_documents(tmp_path / "a.txt"):
        parts[part].append(text)
    assert not set(parts["train"]) & set(parts["heldout"])
    assert 0.01 < len(parts["heldout"]) / 3000 < 0.04


def test_bins_hold_the_tokens_and_are_reused_until_something_changes(tmp_path, tokenizer):
    (tmp_path / "heldout.txt").write_text("held out\n")
    (tmp_path / "train.txt").write_text("Return a graph.\nAdd the nodes of a path.\n")
    built = build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
    tokens, offsets = built["train"].tokens, built["train"].offsets
    assert tokenizer.decode(tokens[offsets[1]:offsets[2]].tolist()) == "Add the nodes of a path."
    meta, = (tmp_path / "cache").glob("*/meta.json")
    facts = json.loads(meta.read_text())
    assert facts["tokenizer"] == tokenizer.fingerprint and facts["train"] == {"documents": 2, "tokens": len(tokens)}
    before = meta.stat().st_mtime_ns
    build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
    assert meta.stat().st_mtime_ns == before
    (tmp_path / "train.txt").write_text("Something else, longer than before.\n")
    again = build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
    assert tokenizer.decode(again["train"].tokens.tolist()) == "Something else, longer than before."


def test_a_second_command_waits_for_the_bins_that_a_first_one_makes(tmp_path, tokenizer, capsys):
    (tmp_path / "heldout.txt").write_text("held out\n")
    (tmp_path / "train.txt").write_text("Return a graph.\n")
    build_corpus("x", tmp_path, tokenizer, tmp_path / "c")
    meta, = tmp_path.glob("c/*/meta.json")
    bins = meta.parent.rename(tmp_path / "made")
    with ThreadPoolExecutor(1) as pool:
        with locked(meta.parent):
            second, said = pool.submit(build_corpus, "x", tmp_path, tokenizer, tmp_path / "c"), ""
            while "waiting" not in said:
                assert not second.done()
                time.sleep(0.01)
                said += capsys.readouterr().err
            bins.rename(meta.parent)        # the first one has ended
        assert second.result()["train"].offsets[-1] > 0 and not [*tmp_path.glob("c/*.lock")]


def test_an_epoch_has_every_token_once_but_for_the_cut_ones(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer)
    seen = np.concatenate([rows.row(r)[0] for r in range(rows.per_epoch)])
    assert len(seen) == rows.per_epoch * ROW_SEQUENCES * 32
    count = np.bincount(seen, minlength=tokenizer.vocab_size)[5:]
    there = np.bincount(corpus["train"].tokens, minlength=tokenizer.vocab_size)[5:]
    assert (count <= there).all() and count.sum() > 0.97 * there.sum()


def test_sequences_are_framed_and_fit(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer)
    for r in range(20):
        ids, lengths = rows.row(r)
        assert sum(lengths) == len(ids) == rows.row_tokens and max(lengths) <= 32
        starts = np.cumsum([0, *lengths[:-1]])
        assert (ids[starts] == tokenizer.bos_id).all() and (ids == tokenizer.bos_id).sum() == len(lengths)
        # a row cuts a sequence at its end; at its start only the </s> of one may be left, which becomes <s>
        assert len(lengths) - 2 <= (ids == tokenizer.eos_id).sum() <= len(lengths)


def test_a_batch_is_a_function_of_seed_and_step(corpus, tokenizer):
    rows, again, other = (rows_of(corpus, tokenizer, seed) for seed in (3, 3, 4))
    size = 4 * rows.row_tokens
    again.batch(70, size)   # reading elsewhere first must not matter
    a, b, c = rows.batch(5, size), again.batch(5, size), other.batch(5, size)
    assert all(torch.equal(x, y) for x, y in zip((a.ids, a.labels, a.predict, a.cu_seqlens),
                                                 (b.ids, b.labels, b.predict, b.cu_seqlens)))
    assert not torch.equal(a.ids, c.ids) and not torch.equal(a.ids, rows.batch(6, size).ids)


def test_every_epoch_has_another_order_and_every_row_of_the_stream_its_own_mask(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer)
    n, same = rows.per_epoch, rows.row(0)
    assert not np.array_equal(same[0], rows.row(n)[0])
    rows.row = lambda number: same      # one text everywhere: only the masks differ
    assert len({tuple(rows.masked(range(r, r + 1)).predict.tolist()) for r in (0, 1, n, n + 1)}) == 4


@pytest.mark.parametrize("world, parts", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_parts_share_out_the_same_batch(corpus, tokenizer, world, parts):
    rows = rows_of(corpus, tokenizer)
    size = 4 * rows.row_tokens
    whole = rows.batch(9, size)
    shares = [rows.batch(9, size, part, world * parts) for part in range(world * parts)]
    assert torch.equal(torch.cat([s.ids for s in shares]), whole.ids)
    assert torch.equal(torch.cat([s.labels for s in shares]), whole.labels)
    assert torch.equal(torch.cat([s.predict + i * len(s.ids) for i, s in enumerate(shares)]), whole.predict)


def test_static_shapes_change_nothing_but_shapes(corpus, tokenizer):
    rows, base = rows_of(corpus, tokenizer), random_base(tokenizer)
    batch = rows.batch(5, 4 * rows.row_tokens)
    static = static_batch(rows, batch)
    assert len(static.cu_seqlens) > len(batch.cu_seqlens) and (static.cu_seqlens[len(batch.cu_seqlens):] == len(batch.ids)).all()
    with torch.no_grad():
        assert torch.equal(*(base.encoder.embeddings(b.ids, b.cu_seqlens) for b in (batch, static)))     # the same positions
    model = MaskedLM(base.encoder, base.head)
    results = [torch.autograd.grad(loss, model.parameters()) + (loss,) for loss in (mlm_loss(model, b) for b in (batch, static))]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seq_len", [8, 32])
def test_static_shapes_are_the_same_for_every_batch_and_give_way_to_one_that_does_not_fit(corpus, tokenizer, seq_len):
    rows = rows_of(corpus, tokenizer, seq_len=seq_len)
    statics = [static_batch(rows, rows.batch(t, 4 * rows.row_tokens)) for t in range(60)]
    assert len({(len(b.ids), len(b.cu_seqlens), len(b.predict), b.max_seqlen) for b in statics}) == 1
    crowded = rows.batch(0, 4 * rows.row_tokens)
    crowded.cu_seqlens = torch.arange(len(crowded.ids) + 1, dtype=torch.int32)      # every token is a sequence
    wide = static_batch(rows, crowded).cu_seqlens
    assert len(wide) > len(statics[0].cu_seqlens) and torch.equal(wide[:len(crowded.cu_seqlens)], crowded.cu_seqlens)


def test_rows_are_full_and_the_share_of_cut_sequences_is_counted(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer)
    found, ids = packing(rows), np.concatenate([rows.row(r)[0] for r in range(rows.per_epoch)])
    assert found["rows"] == rows.per_epoch and (ids != tokenizer.pad_id).mean() > 0.98
    # a sequence cut by the end of a row counts as two, each in its own row
    parts = sum(len(rows.row(r)[1]) for r in range(rows.per_epoch))
    unread = int((rows.ends > rows.per_epoch * rows.row_tokens).sum())      # sequences after the last row of the epoch
    assert found["cut"] == round((parts - len(rows.lengths) + unread) / len(rows.lengths), 4)


def test_sizes_that_do_not_divide_are_said(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer)
    with pytest.raises(InputError, match=f"must be a multiple of {2 * rows.row_tokens}"):
        rows.check_batch(3 * rows.row_tokens, 2)
    with pytest.raises(InputError, match="do not fill one row"):
        rows_of(corpus, tokenizer, seq_len=100_000)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_mask_statistics_on_100_000_tokens(tokenizer, rate):
    rng = np.random.default_rng(0)
    row = 1000
    masker = Masker(tokenizer, round(rate * row))
    masked_count = kept = replaced = special = 0
    for i in range(100):
        ids = rng.integers(5, tokenizer.vocab_size, row)
        ids[::50] = tokenizer.bos_id
        out, chosen, true = masker(ids, np.random.default_rng([7, i]))
        assert len(chosen) == len(set(chosen.tolist())) == round(rate * row) and (true == ids[chosen]).all()
        untouched = np.setdiff1d(np.arange(row), chosen)
        assert (out[untouched] == ids[untouched]).all()
        special += (chosen % 50 == 0).sum() + np.isin(out[chosen], [tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id]).sum()
        masked_count += (out[chosen] == tokenizer.mask_id).sum()
        kept += (out[chosen] == true).sum()
        replaced += ((out[chosen] != true) & (out[chosen] != tokenizer.mask_id)).sum()
    n = 100 * round(rate * row)
    sigma = (0.8 * 0.2 / n) ** 0.5
    assert special == 0
    assert abs(masked_count / n - 0.8) < 4 * sigma
    assert abs(kept / n - 0.1) < 4 * sigma and abs(replaced / n - 0.1) < 4 * sigma


def test_too_few_tokens_to_mask_is_said(tokenizer):
    with pytest.raises(InputError, match="mask_rate"):
        Masker(tokenizer, 3)(np.array([tokenizer.bos_id, 9, tokenizer.eos_id, 10]), np.random.default_rng(0))


def test_tokenizer_files_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint     # with its added tokens
    text = "Naïve graphs — 100% of them;\n  indented"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    (tmp_path / "pair").mkdir()
    tokenizer.backend.model.save(str(tmp_path / "pair"))      # vocab.json and merges.txt, as RoBERTa ships them
    assert load_tokenizer(tmp_path / "pair").encode([text]) == tokenizer.encode([text])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_rows_of_an_epoch_come_in_another_order_than_they_were_cut(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer)
    drawn = [rows.row(r)[0].tolist() for r in range(rows.per_epoch)]
    rows.row_order = np.arange(rows.per_epoch)
    cut = [rows.row(r)[0].tolist() for r in range(rows.per_epoch)]
    assert drawn != cut and sorted(drawn) == sorted(cut)


def test_bins_are_of_one_tokenizer_and_of_the_text_as_it_was_last_changed(tmp_path, tokenizer):
    (tmp_path / "heldout.txt").write_text("held out\n")
    (tmp_path / "train.txt").write_text("a graph\n")
    build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
    other = train_tokenizer(["a graph held out"] * 9, 300)
    assert other.decode(build_corpus("x", tmp_path, other, tmp_path / "cache")["train"].tokens.tolist()) == "a graph"
    (tmp_path / "train.txt").write_text("a paths\n")        # as many bytes
    os.utime(tmp_path / "train.txt", ns=(1, 1))
    assert tokenizer.decode(build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")["train"].tokens.tolist()) == "a paths"


def test_the_content_of_a_corpus_says_which_documents_are_held_out(tmp_path, tokenizer):
    documents, found = ["one graph\n", "two paths\n", "three nodes\n"], []
    for held in (1, 2, 1):
        (tmp_path / "train.txt").write_text("".join(documents[:-held]))
        (tmp_path / "heldout.txt").write_text("".join(documents[-held:]))
        found.append(build_corpus("x", tmp_path, tokenizer, tmp_path / f"bins{len(found)}")["train"].content)
    assert found[0] == found[2] != found[1]


def test_ids_that_16_bits_cannot_hold_are_kept(tmp_path):
    (tmp_path / "heldout.txt").write_text("b\n")
    (tmp_path / "train.txt").write_text("a\n")
    for size, dtype in ((65536, "uint16"), (65537, "uint32")):
        large = SimpleNamespace(vocab_size=size, fingerprint=dtype, encode=lambda texts: [[size - 1] for _ in texts])
        tokens = build_corpus("x", tmp_path, large, tmp_path / "cache")["train"].tokens
        assert tokens.tolist() == [size - 1] and tokens.dtype == dtype


def test_a_packed_file_that_is_cut_short_says_where(tmp_path):
    packed = gzip.compress(b"".join(b"%d some text\n" % i for i in range(50_000)))
    (tmp_path / "x.txt.gz").write_bytes(packed[:-len(packed) // 4])
    with pytest.raises(InputError, match=r"x.txt.gz: cannot be read after line [1-9]\d* \(Compressed file ended"):
        list(read_documents(tmp_path / "x.txt.gz"))


def test_a_document_of_no_tokens_is_left_out(tmp_path):
    (tmp_path / "heldout.txt").write_text("b\n")
    (tmp_path / "train.txt").write_text("a\n\u200b.\na\n")
    cleaning = SimpleNamespace(vocab_size=9, fingerprint="x", encode=lambda texts: [[8] * (text in "ab") for text in texts])
    assert build_corpus("x", tmp_path, cleaning, tmp_path / "cache")["train"].offsets.tolist() == [0, 1, 2]


def test_a_part_without_documents_is_named(tmp_path, tokenizer):
    (tmp_path / "heldout.txt").write_text("\n\n")
    (tmp_path / "train.txt").write_text("a graph\n")
    with pytest.raises(InputError, match="no heldout documents in this corpus; it is empty or far too small"):
        build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
