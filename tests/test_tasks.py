"""Task folders: formats, column names, labels, one-sentence errors; few-shot samples; encoding."""
import gzip
import json
from dataclasses import replace

import pytest
import torch
from conftest import bounded, write_task

from rt.data import Example, Task, _fit, encode, few_shot, training_indices
from rt.errors import InputError
from rt.formats.tasks import load_task, read_examples

ROWS = [{"text": "good one", "label": "pos"}, {"text": "bad one", "label": "neg"}]


def folder(tmp_path, train=ROWS, dev=ROWS, test=ROWS):
    return write_task(tmp_path / "task_x", {"train": train, "dev": dev, "test": test})


def test_jsonl_csv_and_tsv_agree(tmp_path):
    rows = [{"text": 'say "hi", twice', "label": "pos"}, {"text": "bad one", "label": "neg"}]
    plain = load_task(folder(tmp_path, rows, rows, rows))
    for ending, lines in (("csv", 'text,label\n"say ""hi"", twice",pos\nbad one,neg\n'),
                          ("tsv", 'text\tlabel\nsay "hi", twice\tpos\nbad one\tneg\n')):
        other = tmp_path / ending
        other.mkdir()
        for part in ("train", "dev", "test"):
            (other / f"{part}.{ending}").write_text(lines)
        task = load_task(other)
        assert task.labels == plain.labels == ("neg", "pos")
        assert [(e.text, e.label) for e in task.parts["test"]] == [(e.text, e.label) for e in plain.parts["test"]]


@pytest.mark.parametrize("names", [("sentence", None, "label"), ("sentence1", "sentence2", "gold_label"),
                                   ("premise", "hypothesis", "label"), ("question", "sentence", "label"),
                                   ("question1", "question2", "label")])
def test_columns_of_glue_are_understood(tmp_path, names):
    rows = [{k: v for k, v in zip(names, (f"a{i}", f"b{i}", i)) if k} for i in range(2)]
    task = load_task(folder(tmp_path, rows, rows, rows))
    assert task.labels == ("0", "1")
    assert task.parts["dev"][1].text == "a1" and task.parts["dev"][1].text_pair == ("b1" if names[1] else None)


def test_labels_are_ordered_as_numbers_or_names(tmp_path):
    rows = [{"text": "x", "label": y} for y in (10, 2, -1)]
    assert load_task(folder(tmp_path, rows, rows, rows)).labels == ("-1", "2", "10")


def test_floats_make_a_regression(tmp_path):
    rows = [{"text": "x", "label": y} for y in (0.5, 2.0)]
    task = load_task(folder(tmp_path, rows, rows, rows))
    assert task.is_regression and task.parts["train"][1].label == 2.0
    (tmp_path / "csv").mkdir()
    for part, high in (("train", 2.5), ("dev", 3), ("test", 2)):      # a part may happen to have only whole numbers
        (tmp_path / "csv" / f"{part}.csv").write_text(f"text,label\nx,1\ny,{high}\n")
    task = load_task(tmp_path / "csv")
    assert task.is_regression and [e.label for e in task.parts["dev"]] == [1.0, 3.0]
    mixed = load_task(folder(tmp_path, [{"text": "x", "label": 3}, {"text": "x", "label": 2.5}], rows, rows))
    assert [e.label for e in mixed.parts["train"]] == [3.0, 2.5]
    strings = [{"text": "x", "label": y} for y in ("1.5", "2")]      # strings in a jsonl stay names
    assert load_task(folder(tmp_path, strings, strings, strings)).labels == ("2", "1.5")


def test_an_attribute_beside_the_label_is_not_taken_for_it(tmp_path):
    rows = [{"Tweet": f"tweet {i}", "Target": "ab"[i % 2], "Stance": "FA"[i % 2]} for i in range(4)]       # the names of SemEval-2016
    with pytest.raises(InputError, match="the label may be Target or Stance"):
        load_task(folder(tmp_path, rows, rows, rows))


@pytest.mark.parametrize("twins", [("caf\u00e9", "cafe\u0301"), ("a b", "a\u00a0b")])
def test_labels_that_look_alike_are_one_typed_in_two_ways(tmp_path, twins):
    rows = [{"text": "x", "label": label} for label in twins]
    with pytest.raises(InputError, match="by spaces, Unicode form or .0 alone"):
        load_task(folder(tmp_path, rows, rows, rows))


def test_numbers_as_strings_and_a_label_under_another_name_are_noted(tmp_path, capsys):
    rows = [{"text": "x", "score": y} for y in ("0.14", "2.50")]
    assert load_task(folder(tmp_path, rows, rows, rows)).labels == ("0.14", "2.50")
    assert "are classes; a regression needs .jsonl with numbers, not strings" in capsys.readouterr().err
    load_task(folder(tmp_path / "b", test=[{"text": "x", "labels": "pos"}]))
    assert "test.jsonl: labels is not read, because the files before it have their label in label" in capsys.readouterr().err


def test_a_space_after_each_comma_is_no_part_of_a_field(tmp_path):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.csv").write_text('text, label\n"foo, x", "pos"\n"bar", "neg"\n')
    task = load_task(tmp_path)
    assert task.labels == ("neg", "pos") and task.parts["train"][0].text == "foo, x"


def test_a_second_text_that_is_empty_is_none_as_a_csv_cannot_say_null(tmp_path):
    for name, rows in (("csv", "text,text_pair,label\na,,x\nb,c,y\n"), ("jsonl", '{"text": "a", "text_pair": "", "label": "x"}\n'
                                                                              '{"text": "b", "text_pair": "c", "label": "y"}\n')):
        for part in ("train", "dev"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{part}.{name}").write_text(rows)
        assert [e.text_pair for e in load_task(tmp_path / name).parts["train"]] == [None, "c"]
        (tmp_path / name / f"dev.{name}").write_text(rows.replace("c", " "))
        with pytest.raises(InputError, match="text_pair is empty"):     # a blank is a text that got lost
            load_task(tmp_path / name)


def test_columns_without_a_name_as_spreadsheets_add_them_are_left_out(tmp_path):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.csv").write_text("text,label,,\na film,good,,\nanother,bad,,\n,,,\n")
    assert [(e.text, e.label) for e in load_task(tmp_path).parts["train"]] == [("a film", "good"), ("another", "bad")]


def test_a_pointer_of_git_lfs_is_not_a_text(tmp_path):
    (tmp_path / "x.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(InputError, match="x.txt: is a Git LFS pointer, not the file"):
        list(read_examples(tmp_path / "x.txt", labelled=False))


def test_a_label_that_the_task_lacks_is_not_no_label(tokenizer):
    with pytest.raises(InputError, match="place: label 'Pos' is none of the task's: neg, pos"):
        encode([Example("x", None, "Pos", "place")], ("neg", "pos"), tokenizer, 16)
    assert encode([Example("x", None, None, "")], ("neg", "pos"), tokenizer, 16).targets.tolist() == [-100]


@pytest.mark.parametrize("parts, words", [
    (dict(dev=[{"text": "x", "label": "neutral"}]), "dev.jsonl, line 1: label 'neutral' does not occur in the training"),
    (dict(train=[ROWS[0], {"text": "  ", "label": "neg"}]), "train.jsonl, line 2: text is empty"),
    (dict(train=[{"label": "neg"}]), "train.jsonl, line 1: no text column"),
    (dict(train=[{"text": "x"}]), "train.jsonl: no example has a gold label"),
    (dict(train=[{"text": "x", "label": [1]}]), "label [1] is not a string"),
    (dict(train=[{"text": "x", "label": ""}]), "train.jsonl: no example has a gold label"),
    (dict(train=[{"text": "x", "label": 0.5}, {"text": "x", "label": "a"}]), "label 'a' is not a number as other labels"),
    (dict(train=[{"text": "x", "label": float("inf")}]), "not a finite number"),
    (dict(train=[{"text": "x", "label": 1e39}]), "label 1e+39 is not a finite number"),      # infinite in float32
    (dict(train=ROWS[:1], dev=ROWS[:1], test=ROWS[:1]), "have the label 'pos'"),
    (dict(dev=[]), "dev.jsonl: has no examples")])
def test_what_does_not_fit_is_named_with_file_and_line(tmp_path, parts, words):
    with pytest.raises(InputError) as error:
        load_task(folder(tmp_path, **parts))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_wrong_folders_and_broken_tables(tmp_path):
    with pytest.raises(InputError, match="a task is a folder"):
        load_task(tmp_path / "nowhere")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match="has no dev.jsonl, .*found: train.jsonl"):
        load_task(tmp_path)
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,2,3\n")
    with pytest.raises(InputError, match="x.csv, line 3: 3 columns, but the header has 2"):
        list(read_examples(tmp_path / "x.csv", labelled=True))
    (tmp_path / "x.csv").write_text('text,label\n"never closed,1\n')
    with pytest.raises(InputError, match="x.csv, line 2: not a readable table"):
        list(read_examples(tmp_path / "x.csv", labelled=True))
    (tmp_path / "x.csv").write_text('text,label\na,1\n"never closed,1\n' + "b,1\n" * 20)    # the last line is not where the fault is
    with pytest.raises(InputError, match="x.csv, line 23: not a readable table .*is a quote never closed in the row that begins in line 3"):
        list(read_examples(tmp_path / "x.csv", labelled=True))
    for text in (b"text,label\ra,1\rb,2\r", b"text,label\na\rb,1\n"):      # line ends of an old Mac; a text of such lines
        (tmp_path / "x.csv").write_bytes(text)
        with pytest.raises(InputError, match="line [12]: not a readable table .a carriage return .*lines must end with a line feed"):
            list(read_examples(tmp_path / "x.csv", labelled=True))


def test_a_quote_that_is_never_closed_is_refused_without_being_held(tmp_path):
    line = b"x" * 2**20 + b"\n"
    for row in (b'a,"' + line * 200, b'"' + (line * 9 + b'","') * 40):      # one long text, many texts
        (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"text,label\nb,1\n" + row, 1))
        with bounded(10, 150), pytest.raises(InputError, match="x.csv.gz, line 1[0-9]: a row .* is longer than 16 MB; is there a quote"):
            list(read_examples(tmp_path / "x.csv.gz", labelled=True))
    (tmp_path / "x.csv").write_text("text,label\n" + f'"{"y" * 10**6}",1\n' * 20)     # any number of rows
    assert len(list(read_examples(tmp_path / "x.csv", labelled=True))) == 20


def test_few_shot_takes_k_a_label_by_seed_and_leaves_test(tmp_path):
    rows = {part: [{"text": f"{part} {i}", "label": "abc"[i % 3]} for i in range(60)] for part in ("train", "dev", "test")}
    task = load_task(folder(tmp_path, **rows))
    small, again, other = few_shot(task, 4, 1), few_shot(task, 4, 1), few_shot(task, 4, 2)
    for part in ("train", "dev"):
        assert sorted(e.label for e in small.parts[part]) == list("aaaabbbbcccc")
        assert all(e.text.startswith(part) for e in small.parts[part])
    assert small.parts == again.parts and small.parts["train"] != other.parts["train"]
    assert small.parts["test"] == task.parts["test"]


def test_the_hash_is_of_all_that_a_task_holds():
    one = Example("x", "y", "a", "")
    others = ({"dev": [replace(one, **change)]} for change in ({}, {"text": "z"}, {"text_pair": None}, {"label": "b"}))
    assert len({Task("t", ("a", "b"), {"train": [one]} | more).hash for more in (*others, {"test": [one]})}) == 5


def test_encoding_frames_truncates_and_counts(tokenizer):
    words = "graph " * 50
    examples = [Example("graph", None, "a", ""), Example(words, "node", "b", ""), Example(words, words, "b", "")]
    encoded = encode(examples, ("a", "b"), tokenizer, 20)
    s, bos, eos = encoded.sequences, tokenizer.bos_id, tokenizer.eos_id
    assert s[0] == [bos, *tokenizer.encode(["graph"])[0], eos]
    assert len(s[1]) == len(s[2]) == 20 and encoded.truncated == 2
    assert s[2][9:11] == [eos, eos] and s[2].count(eos) == 3       # <s> 8 tokens </s></s> 8 tokens </s>
    node = tokenizer.encode(["node"])[0]
    assert s[1][-len(node) - 1:] == [*node, eos]                     # the short text of a pair stays whole
    assert encoded.targets.tolist() == [0, 1, 1]


@pytest.mark.parametrize("a, b, room", [(5, 5, 20), (30, 3, 16), (3, 30, 16), (30, 30, 16), (30, 30, 17), (9, 8, 16)])
def test_fit_fills_the_room(a, b, room):
    keep_a, keep_b = _fit(a, b, room)
    assert keep_a <= a and keep_b <= b and keep_a + keep_b == min(a + b, room)
    if a + b > room:
        assert min(keep_a, keep_b) == min(a, b, room // 2)


def test_a_batch_says_which_examples_it_holds(tokenizer):
    examples = [Example("graph " * n, None, "ab"[n % 2], "") for n in (9, 2, 5, 1)]
    encoded = encode(examples, ("a", "b"), tokenizer, 64)
    batch = encoded.batch([0, 3, 2])
    bounds = batch.cu_seqlens.tolist()
    assert sorted(batch.index.tolist()) == [0, 2, 3]
    for i, (a, b) in zip(batch.index.tolist(), zip(bounds, bounds[1:])):
        assert batch.ids[a:b].tolist() == encoded.sequences[i]
    assert torch.equal(batch.labels, encoded.targets[batch.index])


def test_training_order_visits_everything_once_an_epoch():
    steps = [training_indices(10, 4, t, seed=5) for t in range(6)]
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(10))
    assert steps[0] != steps[3] and steps == [training_indices(10, 4, t, seed=5) for t in range(6)]
    assert steps[0] != training_indices(10, 4, 0, seed=6)


def test_a_text_that_just_fits_does_not_count_as_cut(tokenizer):
    for pair in (None, "node"):
        example = Example("graph node edge", pair, "a", "")
        whole = len(encode([example], ("a",), tokenizer, 64).sequences[0])
        assert [encode([example], ("a",), tokenizer, most).truncated for most in (whole, whole - 1)] == [0, 1]


def test_a_text_about_git_lfs_is_a_text(tmp_path):
    (tmp_path / "x.txt").write_text("What a pointer holds:\nversion https://git-lfs.github.com/spec/v1\n")
    assert len(list(read_examples(tmp_path / "x.txt", labelled=False))) == 2
