"""Rows of tasks as others publish them: hidden labels, unlabelled tests, the usual columns, GLUE's files, quoted and unquoted tables. What
cannot be known is reported on stderr or refused in one sentence."""
import csv
import gzip
import io
import json
import lzma
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, bounded, here, random_base, write_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rt.errors import InputError
from rt.formats import tables
from rt.formats.checkpoint import save_base
from rt.formats.files import read_json, read_rows
from rt.formats.tables import STDIN, _is_quoted
from rt.formats.tasks import load_task, read_examples
from rt.model import MaskedLM
from rt.report import inspect, plot
from rt.runs.log import score_text, scores_text, task_text

CASES = ROOT.parent / "shared" / "cases"
FAST = ("--seq_len", "16", "--device", "cpu", "--precision", "fp32")


def rows(labels: list, **more) -> list[dict]:
    return [{"text": f"a graph of {i} nodes", "label": label, **more} for i, label in enumerate(labels)]


def table(rows: list[dict] | list[list], **style) -> str:
    """A table as Python's csv module writes it; pandas uses that module."""
    out = io.StringIO()
    writer = csv.writer(out, **{"lineterminator": "\n"} | style)
    writer.writerows([list(rows[0]), *(row.values() for row in rows)] if isinstance(rows[0], dict) else rows)
    return out.getvalue()


def files(folder: Path, **parts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in parts.items():
        (folder / name.replace("_", ".", 1)).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def sizes(task) -> tuple:
    return tuple(len(task.parts.get(part, ())) for part in ("train", "dev", "test"))


# --- hidden labels ----------------------------------------------------------------------------------------------------

CLASSES = rows(["a", "b", "c"] * 20)
NUMBERS = rows([0, 1, 2] * 20)
BINARY = rows([0, 1] * 30)
FLOATS = rows([i / 4 for i in range(20)])


@pytest.mark.parametrize("good, mark", [
    *((CLASSES, mark) for mark in (None, "", "-", "?", "hidden", "N/A", "nan", "NULL", "<NA>",
                                   "#N/A N/A", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN")),
    *((NUMBERS, mark) for mark in (None, -1, -100, float("nan"))), (BINARY, -100), (FLOATS, None), (FLOATS, float("nan"))])
def test_examples_without_a_gold_label_are_left_out_and_counted(good, mark, tmp_path, capsys):
    task = load_task(write_task(tmp_path / "t", {"train": good + rows([mark] * 3), "dev": good[::-1] + rows([mark] * 2), "test": good}))
    plain = load_task(write_task(tmp_path / "plain", {"train": good, "dev": good[::-1], "test": good}))
    assert (task.labels, task.hash) == (plain.labels, plain.hash)
    name = f" ({mark})" if mark not in (None, "") else ""
    assert capsys.readouterr().err == "".join(
        f"note: {tmp_path / 't'}: {n} of {len(good) + n} {part} examples have no gold label{name} and are left out\n"
        for n, part in ((3, "train"), (2, "dev")))


def test_a_row_without_the_key_has_no_label(tmp_path, capsys):
    bare = [{"text": "x y"}]
    task = load_task(write_task(tmp_path / "t", {"train": bare + CLASSES, "dev": CLASSES + bare, "test": CLASSES}))
    assert sizes(task) == (60, 60, 60) and capsys.readouterr().err.count("1 of 61") == 2
    empty = write_task(tmp_path / "empty", {"train": CLASSES, "dev": CLASSES, "test": [{"text": "x", "text_pair": ""}, {"text": None}]})
    assert sizes(load_task(empty)) == (60, 60, 0)       # no labels, and no real texts either


@pytest.mark.parametrize("mark", [-1, -1.0, -100, None, "", "-", "?", "hidden", "N/A", "NaN", float("nan"), "None", "unknown", "gone"])
@pytest.mark.parametrize("good", [BINARY, CLASSES, FLOATS], ids=["binary", "classes", "floats"])
def test_a_test_part_without_labels_is_none(good, mark, tmp_path, capsys):
    hidden = [{"text": row["text"]} for row in good] if mark == "gone" else rows([mark] * len(good))
    task = load_task(write_task(tmp_path / "t", {"train": good, "dev": good, "test": hidden}))
    assert "test" not in task.parts and sizes(task) == (len(good), len(good), 0)
    assert f"{len(good)} of {len(good)} test examples have no gold label" in capsys.readouterr().err
    (tmp_path / "t" / "test.jsonl").unlink()
    assert load_task(tmp_path / "t").hash == task.hash


def test_a_name_that_train_knows_is_a_class(tmp_path, capsys):
    stance = rows(["none", "pro"] * 9)
    task = load_task(write_task(tmp_path / "t", {"train": stance, "dev": stance, "test": rows(["none"] * 9)}))
    assert sizes(task) == (18, 18, 9) and capsys.readouterr().err == ""


def test_minus_one_is_a_class_where_it_can_be_one(tmp_path, capsys):
    def labels(*values) -> tuple:
        return load_task(write_task(tmp_path / str(values)[:60], dict.fromkeys(("train", "dev", "test"), rows(values)))).labels

    assert labels(*[-1, 1] * 9) == ("-1", "1") and labels(*[-1, 2, 10] * 9) == ("-1", "2", "10") and capsys.readouterr().err == ""
    assert labels(*[-1, 0, 1] * 9) == ("-1", "0", "1")
    assert "-1, the label of 9 of 27 train examples, is taken for a class" in capsys.readouterr().err
    assert labels(*[0, 1] * 50, -1) == ("0", "1") and "1 of 101 train examples have no gold label (-1)" in capsys.readouterr().err
    assert labels(*[0, 1] * 24, -1) == ("-1", "0", "1")       # 2.04 %
    assert labels(*[-9, 0, 1, 2] * 9) == ("-9", "0", "1", "2")
    assert "-9, the label of 9 of 36 train examples, is taken for a class" in capsys.readouterr().err
    assert labels(*["none", "pro"] * 9) == ("none", "pro") and labels(*["v1.0", "v1"] * 9) == ("v1", "v1.0")
    assert labels(*"+-" * 9) == ("+", "-") and labels(*"+-0" * 9) == ("0", "+", "-") and labels(*".,?-" * 9) == (",", "-", ".", "?")
    capsys.readouterr()
    mixed = write_task(tmp_path / "mixed", {"train": BINARY, "dev": BINARY + rows([-1] * 3), "test": BINARY})
    assert sizes(load_task(mixed)) == (60, 60, 60) and "3 of 63 dev" in capsys.readouterr().err


def test_what_may_be_wrong_with_labels_is_said(tmp_path, capsys):
    three = dict.fromkeys(("train", "dev"), FLOATS)
    load_task(write_task(tmp_path / "all0", {"train": BINARY, "dev": BINARY, "test": rows([0] * 10)}))
    assert "all 10 test examples have the label 0: are their true labels hidden?" in capsys.readouterr().err
    task = load_task(write_task(tmp_path / "number", three | {"train": FLOATS + rows([-1.0])}))
    assert task.parts["train"][-1].label == -1.0
    assert "-1, the label of 1 of 21 train examples, is taken for a number" in capsys.readouterr().err
    load_task(write_task(tmp_path / "negative", three | {"train": FLOATS + rows([-1.0, -0.5])}))
    assert capsys.readouterr().err == ""
    load_task(write_task(tmp_path / "whole", dict.fromkeys(("train", "dev"), rows([0.0, 1.0, None] * 9))))      # pandas; some are missing
    assert "all train labels are whole numbers with a decimal point, which makes this a regression" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["dev", "test"])
def test_a_missing_label_in_dev_or_test_makes_no_regression(part, tmp_path, capsys):
    pandas = rows([0.0, 1.0, None] * 9)
    task = load_task(write_task(tmp_path / "t", {"train": BINARY, "dev": BINARY, "test": BINARY} | {part: pandas}))
    assert task.labels == ("0", "1") and {e.label for e in task.parts[part]} == {"0", "1"} and len(task.parts[part]) == 18
    assert "9 of 27" in (said := capsys.readouterr().err) and "regression" not in said
    for name, value, words in (("new", 2.0, "label '2' does not occur"), ("inf", float("inf"), "label inf is not a finite number")):
        with pytest.raises(InputError, match=words):
            load_task(write_task(tmp_path / name, {"train": BINARY, "dev": BINARY} | {part: pandas + rows([value])}))
    half = load_task(write_task(tmp_path / "half", {"train": BINARY, "dev": BINARY} | {part: pandas + rows([0.5])}))
    assert half.is_regression


def test_tables_and_their_types(tmp_path, capsys):
    pandas = table(rows(["0.0", "1.0", ""] * 9))
    task = load_task(files(tmp_path / "ints", train_csv=pandas, dev_csv=pandas))
    assert task.labels == ("0.0", "1.0") and sizes(task) == (18, 18, 0)
    stsb = table(FLOATS)
    task = load_task(files(tmp_path / "stsb", train_csv=stsb, dev_csv=stsb, test_csv=table(rows(["-1.0"] * 9))))
    assert task.is_regression and sizes(task) == (20, 20, 0) and "9 of 9 test examples have no gold label (-1.0)" in capsys.readouterr().err


@pytest.mark.parametrize("parts, words", [
    ({"dev": rows([-1] * 9)}, "dev.jsonl: no example has a gold label"), ({"dev": [{"text": "x"}]}, "take rows of train as dev"),
    ({"train": [{"text": "x", "lbl": 1}]}, "train.jsonl: no example has a gold label (in a column label, gold_label, score"),
    ({"train": [{"text": "x", "lbl": 1}]}, "polarity; found: text, lbl)"),
    ({"train": rows([[0], [1, 2]])}, "label [0] is not a string, an integer or a float, and several labels a text are not supported"),
    ({"train": rows([True, 0])}, "label 'true' is a string, but the label of"),
    (dict.fromkeys(("train", "dev", "test"), rows(["3,5", "4"])), "label '3,5' is neither a number (3.5 would be one) nor"),
    (dict.fromkeys(("train", "dev", "test"), rows(["1", "1.0"])), "label '1.0' differs from the label '1' by spaces, U"),
    (dict.fromkeys(("train", "dev", "test"), rows(["a ", "a"])), "label 'a' differs from the label 'a ' by spaces, U"),
    ({"train": [{"text": "x", "category": 1, "stars": 2}]}, "the label may be category or stars: give the right one the name label"),
    ({"train": [{"sentence_A": "x", "sentence_B": "y", "entailment_label": "NEUTRAL", "relatedness_score": 3.5}]},      # SICK's own columns
     "the label may be relatedness_score or entailment_label: give the right one the name label")])
def test_what_has_no_label_to_learn_or_choose_by_is_refused(parts, words, tmp_path):
    with pytest.raises(InputError) as error:
        load_task(write_task(tmp_path / "t", dict.fromkeys(("train", "dev", "test"), BINARY) | parts))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_printed_of_a_score():
    assert scores_text({"pearson": None, "spearman": 0.25}) == "pearson undefined, spearman 0.250"
    assert [score_text(value) for value in (float("-inf"), float("nan"), 0)] == ["undefined", "undefined", "0.000"]     # -inf: a bar's


def test_the_line_that_says_what_a_task_is(tmp_path):
    three = write_task(tmp_path / "math", {"train": rows(["a"] * 4 + ["b", "c"]), "dev": rows("abc")})
    assert task_text(load_task(three)) == "math: 3 labels: a 4, b 1, c 1 (train 6, dev 3)"
    many = load_task(write_task(tmp_path / "many", dict.fromkeys(("train", "dev", "test"), rows(range(13)))))
    assert task_text(many) == f"many: 13 labels: {', '.join(f'{i} 1' for i in range(10))} and 3 more (train 13, dev 13, test 13)"
    floats = load_task(write_task(tmp_path / "sts", dict.fromkeys(("train", "dev"), rows([0.5, 0.5, 5.0]))))
    assert task_text(floats) == "sts: a regression: 2 different targets from 0.5 to 5 (train 3, dev 3)"


# --- columns ----------------------------------------------------------------------------------------------------------

PAIRS = [("question", "passage"), ("question", "context"), ("question", "answer"), ("question", "sentence"), ("query", "document"),
         ("query", "passage"), ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("sentence", "context"),
         ("claim", "evidence"), ("#1 String", "#2 String"), ("sentence_A", "sentence_B"), ("text_a", "text_b"),
         ("text1", "text2"), ("context", "response"), ("Text", "Text_Pair")]


@pytest.mark.parametrize("first, second", PAIRS)
def test_usual_second_columns_are_read(first, second, tmp_path, capsys):
    for columns in ((first, second, "label"), ("label", second, first)):
        row = dict(zip(columns, columns))
        task = load_task(write_task(tmp_path / columns[0], dict.fromkeys(("train", "dev"), [row | {"label": i} for i in (0, 1)])))
        assert (task.parts["train"][0].text, task.parts["train"][0].text_pair) == (first, second)
        said = capsys.readouterr().err
        is_plain = "2" in second or second in ("hypothesis", "sentence_B", "text_b", "Text_Pair")
        assert said == "" if is_plain else "are read as a pair of texts" in said
    assert next(read_examples(tmp_path / "label" / "dev.jsonl", labelled=False)).text_pair == second


@pytest.mark.parametrize("name", ["labels", "class", "target", "category", "intent", "stars", "is_duplicate", "Quality", "sentiment"])
@pytest.mark.parametrize("text", ["content", "review", "tweet", "utterance"])
def test_other_names_of_text_and_label(text, name, tmp_path):
    found = [{"id": i, text: f"t{i}", name: i} for i in (0, 1)]
    task = load_task(write_task(tmp_path / "t", dict.fromkeys(("train", "dev"), found)))
    assert [(e.text, e.label) for e in task.parts["train"]] == [("t0", "0"), ("t1", "1")]


def test_columns_of_text_that_are_left_unread_are_named_once(tmp_path, capsys):
    prose = "this is said about it"
    more = {"reason": prose, "uid": "a-1", "url": "https://a.b/c", "sentence1_parse": "(ROOT (NP the cat))", "genre": "fiction", "n": 3,
            "label_text": "very positive", "date": "2024-01-01 10:00", "annotator_labels": ["a b"], "rare": "x"}
    nli = [{"premise": "p q", "hypothesis": "h i", "label": i % 3, **more} for i in range(9)]
    nli[0]["rare"] = prose
    load_task(write_task(tmp_path / "anli", dict.fromkeys(("train", "dev", "test"), nli)))
    assert capsys.readouterr().err == f"note: {tmp_path / 'anli'}: columns that hold text but are not read: 'reason'\n"
    multirc = [{"paragraph": prose, "question": prose, "answer": prose, "label": i % 2} for i in range(4)]
    task = load_task(write_task(tmp_path / "multirc", dict.fromkeys(("train", "dev"), multirc)))
    assert task.parts["dev"][0].text_pair == prose and capsys.readouterr().err.endswith("not read: 'answer'\n")


@pytest.mark.parametrize("name, value, is_said", [
    ("aspect", "food", True), ("Target", "Atheism", True), ("term", "soup", True), ("target", "1", False), ("target", 1, False),
    ("idx", {"paragraph": 0, "question": 3}, False), ("word", None, False)])
def test_one_word_that_a_row_asks_about_is_named(name, value, is_said, tmp_path, capsys):
    load_task(write_task(tmp_path / "t", dict.fromkeys(("train", "dev"), rows([0, 1], **{name: value}))))
    said = f"note: {tmp_path / 't'}: columns that hold text but are not read: {name!r}\n"
    assert capsys.readouterr().err == said * is_said


def test_a_second_column_that_holds_no_text_is_none(tmp_path):
    found = [{"text": f"t{i}", "answer": i, "evidence": [["x"]], "label": i} for i in (0, 1)]
    assert load_task(write_task(tmp_path / "t", dict.fromkeys(("train", "dev"), found))).parts["dev"][0].text_pair is None


# --- GLUE and SuperGLUE as published ----------------------------------------------------------------------------------

def tsv(*lines: str) -> str:
    return "".join(line.replace("|", "\t") + "\n" for line in lines)


NLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse|sentence1|sentence2|label1"
MADE = "31193|31193n|fiction|( ( a b ) c )|( d e )|(ROOT (S a))|(ROOT (S d))"
GLUE = {
    "MRPC": (tsv("Quality|#1 ID|#2 ID|#1 String|#2 String", '1|10|20|He said no .|" He said yes .', '0|11|21|" A " b .|C d .'),
             tsv("index|#1 ID|#2 ID|#1 String|#2 String", "0|1|2|A b .|C d ."),
             [("He said no .", '" He said yes .', "1"), ('" A " b .', "C d .", "0")]),
    "QQP": (tsv("id|qid1|qid2|question1|question2|is_duplicate", "1|2|3|What is it ?|What was it ?|0", "4|5|6|Who ?|Who ?|1"),
            tsv("id|question1|question2", "0|A ?|B ?"), [("What is it ?", "What was it ?", "0"), ("Who ?", "Who ?", "1")]),
    "CoLA": (tsv("gj04|1||Our friends won't buy this.", "cj99|0|*|The more \"we\" study.", "bc01|0|?*|Whom did you?"),
             tsv("index|sentence", "0|Bill whistled past."),
             [("Our friends won't buy this.", None, "1"), ('The more "we" study.', None, "0"), ("Whom did you?", None, "0")]),
    "SST-2": (tsv("sentence|label", "hide new secretions |0", "a joy |1"), tsv("index|sentence", "0|uneasy mishmash"),
              [("hide new secretions ", None, "0"), ("a joy ", None, "1")]),
    "STS-B": (tsv("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
                  "0|main-captions|MSRvid|2012test|0001|none|none|A plane.|An air plane.|5.000",
                  "1|main-captions|MSRvid|2012test|0004|none|none|A man.|A flute.|3.800"),
              tsv("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2", "0|c|M|2|1|none|none|A girl.|B girl."),
              [("A plane.", "An air plane.", 5.0), ("A man.", "A flute.", 3.8)]),
    "QNLI": (tsv("index|question|sentence|label", "0|When?|Then it was.|entailment", "1|Who?|It was.|not_entailment"),
             tsv("index|question|sentence", "0|What?|That."),
             [("When?", "Then it was.", "entailment"), ("Who?", "It was.", "not_entailment")]),
    "RTE": (tsv("index|sentence1|sentence2|label", "0|It rains.|It is wet.|entailment", "1|No.|Yes.|not_entailment"),
            tsv("index|sentence1|sentence2", "0|A.|B."), [("It rains.", "It is wet.", "entailment"), ("No.", "Yes.", "not_entailment")]),
    "WNLI": (tsv("index|sentence1|sentence2|label", "0|I stuck a pin.|It stuck.|1", "1|A.|B.|0"),
             tsv("index|sentence1|sentence2", "0|A.|B."), [("I stuck a pin.", "It stuck.", "1"), ("A.", "B.", "0")]),
    "MNLI": (tsv(f"{NLI}|label2|label3|label4|label5|gold_label", f"0|{MADE}|P.|H.|neutral|neutral|neutral|neutral|entailment|neutral",
                 f"1|{MADE}|P2.|H2.|entailment|neutral|contradiction|neutral|entailment|-",
                 f"2|{MADE}|P3.|H3.|{'entailment|' * 5}entailment"),
             tsv(NLI.removesuffix("|label1"), f"0|{MADE}|A.|B."), [("P.", "H.", "neutral"), ("P3.", "H3.", "entailment")])}


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_published(name, tmp_path, capsys):
    train, test, expected = GLUE[name]
    task = load_task(files(tmp_path / name, train_tsv=train, dev_tsv=train, test_tsv=test))
    assert [(e.text, e.text_pair, e.label) for e in task.parts["train"]] == expected and "test" not in task.parts
    said = capsys.readouterr().err
    assert "test examples have no gold label" in said and "not read" not in said
    assert ("no header" in said) == (name == "CoLA") and ("characters of the text" in said) == (name == "MRPC")


def test_superglue_as_published(tmp_path, capsys):
    def labels(name: str, *found: dict) -> tuple:
        task = load_task(write_task(tmp_path / name, {"train": found, "dev": found, "test": [{k: v for k, v in row.items() if k not in (
            "label", "answer")} for row in found]}))
        return task.labels, task.parts["dev"][0].text, task.parts["dev"][0].text_pair

    text = {"question": "is it", "passage": "it is", "title": "t", "idx": 0}
    for name in ("label", "answer"):        # SuperGLUE's files, and the authors' own
        assert labels(name, text | {name: True}, text | {name: False}) == (("false", "true"), "is it", "it is")
    text = {"premise": "it is", "hypothesis": "is it", "idx": 0}
    assert labels("CB", *(text | {"label": x} for x in ("neutral", "entailment"))) == (("entailment", "neutral"), "it is", "is it")
    assert labels("RTE", *(text | {"label": x} for x in ("not_entailment", "entailment")))[0] == ("entailment", "not_entailment")
    assert "not read" not in capsys.readouterr().err
    text = {"word": "place", "sentence1": "a place", "sentence2": "to place", "idx": 0, "start1": 2, "end1": 7, "start2": 3, "end2": 8}
    assert labels("WiC", text | {"label": True}, text | {"label": False}) == (("false", "true"), "a place", "to place")
    assert "not read: 'word'" in capsys.readouterr().err
    text, spans = {"text": "Mark told Pete, and he knew", "idx": 0}, {"span1_text": "Mark", "span2_text": "he"}
    for name, more in (("target", {"target": spans | {"span1_index": 0, "span2_index": 5}}), ("span1_text', 'span2_text", spans)):
        assert labels(name, *(text | more | {"label": x} for x in (True, False))) == (("false", "true"), text["text"], None)
        assert f"not read: '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [("csv", '"3","Wall St. Bears","Short sellers"\n"1","A","B"\n'),
                                           ("csv", "the cat sat,pos\na dog,neg\n"), ("tsv", tsv("1|1|a text", "1|2|b")),
                                           ("tsv", tsv("hide new secretions|0", "a joy|1"))])
def test_a_header_that_is_missing_is_said(name, content, tmp_path):
    with pytest.raises(InputError, match="is data, the header .the names of the columns. is missing"):
        load_task(files(tmp_path / "t", **{f"train_{name}": content, f"dev_{name}": content}))


# --- quotes -----------------------------------------------------------------------------------------------------------

def texts(path: Path) -> list[tuple]:
    return [(e.text, e.text_pair) for e in read_examples(path, labelled=False)]


SAID = [('He said "no" to it', "x"), ("two\nlines", 'a "b"'), ("a\ttab", '"all of it"'), ("plain, with comma", "y"), ('"', "z")]


@pytest.mark.parametrize("quoting", ["MINIMAL", "ALL", "NONNUMERIC"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("pack, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_a_quoted_tsv_is_read_as_it_was_written(quoting, ending, pack, opener, tmp_path, capsys, monkeypatch):
    content = table([("text", "text_pair", "n"), *((*pair, i) for i, pair in enumerate(SAID))], delimiter="\t",
                    quoting=getattr(csv, f"QUOTE_{quoting}"), lineterminator=ending)
    with opener(path := tmp_path / f"x.tsv{pack}", "wb") as file:
        file.write(b"\xef\xbb\xbf" + content.encode())
    assert texts(path) == SAID
    assert capsys.readouterr().err == f"note: {path}: quotes around fields are read as quoting, as pandas and spreadsheets write it\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    assert [(e.text, e.text_pair) for e in read_examples(STDIN, labelled=False, format="tsv")] == SAID


@pytest.mark.parametrize("content, note", [
    (tsv("text|label", '" A lone one|0', "b|1"), True), (tsv("text|label", 'a "b" c|0', "d|1"), False),
    (tsv("text|label", '"All of it"|0', "b|1"), True),                      # speech; pandas would not have quoted it
    (tsv("text|label", '"Yes, it is."|0', "no|1"), True),
    (tsv("text|label", '"It begins.|0', 'It ends."|1'), True),              # might be one text with a tab and a newline inside
    (tsv("text|label", '"He said ""no"" ."|0', 'a "b|1'), True),            # a bare quote is evidence against quoting
    (tsv("text|label", '"He said" no|0', "b|1"), True), ("text\n\"one\ntwo\"\n", True)])
def test_quotes_of_glue_stay_characters(content, note, tmp_path, capsys):
    path = files(tmp_path, x_tsv=content) / "x.tsv"
    assert [text for text, _ in texts(path)] == [line.split("\t")[0] for line in content.splitlines()[1:]]
    assert capsys.readouterr().err == f"note: {path}: quotes around fields are read as characters of the text, as in GLUE's files\n" * note


def test_quotes_around_commas_are_excels(tmp_path):
    path = files(tmp_path, x_tsv=tsv("text|label", '"yes, it is"|0', "no|1", '"well, no"|0')) / "x.tsv"
    assert [text for text, _ in texts(path)] == ["yes, it is", "no", "well, no"]
    path.write_text(tsv("text|label", '"yes, it is"|0', "no, no|1", '"well, no"|0'))        # Excel would have quoted the second
    assert [text for text, _ in texts(path)] == ['"yes, it is"', "no, no", '"well, no"']


def test_an_enclosed_header_is_of_a_program(tmp_path, monkeypatch):
    path = files(tmp_path, x_tsv=table([("text", "label"), ("all of it", 0)], delimiter="\t", quoting=csv.QUOTE_ALL)) / "x.tsv"
    assert texts(path) == [("all of it", None)]
    later = tsv("text|label", '"all of it"|0', "b|1", '"and ""more"""|1')      # in a pipe, evidence of quoting may follow the first quote
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(later.encode())))
    assert [e.text for e in read_examples(STDIN, labelled=False, format="tsv")] == ["all of it", "b", 'and "more"']


FIELD = st.text(st.sampled_from('ab "\t\n,\''), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6))
def test_whatever_is_written_is_read(tmp_path, found):
    """Written by a program that quotes where it must, or without quoting, unless such a program would have written the same."""
    written = table([("text", "text_pair"), *found], delimiter="\t")
    path = files(tmp_path, x_tsv=written) / "x.tsv"
    assert texts(path) == found
    plain = [tuple(field.replace("\t", " ").replace("\n", " ") for field in pair) for pair in found]
    if any(not field.strip() for pair in plain for field in pair):
        return
    path.write_text(raw := "text\ttext_pair\n" + "".join(f"{a}\t{b}\n" for a, b in plain))
    as_quoted = [*map(tuple, csv.reader(io.StringIO(raw), delimiter="\t"))][1:]
    assert texts(path) == (as_quoted if _is_quoted(raw.splitlines(), 0) else plain)


def test_standard_input_streams_until_a_quote_and_a_pipe_is_read_once(tmp_path, monkeypatch):
    read = []

    class Lines(io.BytesIO):
        def readline(self, size=-1):
            read.append(1)
            return super().readline(size)

    content = "text\tlabel\n" + "a\t0\n" * 50 + table([('say "hi"', 1)], delimiter="\t") + "b\t0\n" * 300_000
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Lines(content.encode())))
    examples = read_examples(STDIN, labelled=False, format="tsv")
    assert next(examples).text == "a" and len(read) <= 3
    with bounded(60, 50):
        found = [e.text for e in examples]
    assert found[48:51] == ["a", 'say "hi"', "b"] and len(found) == 300_050
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(content[:2000]))
    writer.start()
    with bounded(30, 50):
        found = [e.text for e in read_examples(tmp_path / "pipe", labelled=False, format="tsv")]
    assert found[49:52] == ["a", 'say "hi"', "b"]
    writer.join()


@pytest.mark.parametrize("name, content", [
    ("csv", table(rows("ab" * 3), delimiter=";")), ("csv", "sep=;\n" + table(rows("ab" * 3), delimiter=";")),
    ("csv", "sep=,\n" + table(rows("ab" * 3))), ("csv", table(rows("ab" * 3), delimiter="\t")), ("tsv", table(rows("ab" * 3))),
    ("csv", b"\xef\xbb\xbf" + table(rows("ab" * 3), lineterminator="\r\n").encode()), ("csv", "\n" + table(rows("ab" * 3))),
    ("csv", table([("Text", " label"), *(row.values() for row in rows("ab" * 3))]))])
def test_tables_of_spreadsheets(name, content, tmp_path):
    task = load_task(files(tmp_path / "t", **{f"train_{name}": content, f"dev_{name}": content}))
    assert [(e.text, e.label) for e in task.parts["train"]] == [(row["text"], row["label"]) for row in rows("ab" * 3)]


# --- from the file to what is printed ---------------------------------------------------------------------------------

def strict(path: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{path}: {constant}")

    for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
        json.loads(line, parse_constant=refuse)


def test_without_labels_in_test_dev_is_what_is_reported(tokenizer, tmp_path, capsys):
    for i in range(3):
        base = random_base(tokenizer, i)
        save_base(tmp_path / f"M{i}", MaskedLM(base.encoder, base.head), tokenizer, {"name": f"M{i}", "parent": None})
    task = write_task(tmp_path / "sts", {"train": FLOATS, "dev": FLOATS[::2], "test": rows([-1.0] * 9)})
    tune = ("--task", task, "--delta", "bitfit", "--eval_every", "2", "--batch_size", "4", *FAST)
    said = here("train.py", "--mode", "tune", "--base", tmp_path / "M0", *tune, "--tune_steps", "2", "--out", tmp_path / "d")
    assert "sts: a regression: 20 different targets from 0 to 4.75 (train 20, dev 10)\n" in said
    assert said.count("no labelled test part, so dev is reported") == 1 and "test pearson" not in said
    assert read_json(tmp_path / "d" / "delta.json")["info"]["test"] == read_json(tmp_path / "d" / "summary.json")["test"] == {}
    assert "no labelled test part" in here(
        "train.py", "--mode", "eval", "--base", tmp_path / "M0", *tune[:2], *FAST, "--delta_dir", tmp_path / "d")
    inspect.main([str(tmp_path / "d")])
    assert "test          not scored" in capsys.readouterr().out
    recycle = ("recycle.py", "--old_base", tmp_path / "M0", "--old_delta", tmp_path / "d", *tune, "--steps", "2", "--shots", "4")
    for name, more in {"out": ("--base", tmp_path / "M1", "--mode", "scratch,apply"),
                       "sweep": ("--base", tmp_path / "M1", "--mode", "init", "--sweep", "seed=0,1 lr=1e-3"),
                       "chain": ("--chain", f"{tmp_path / 'M1'},{tmp_path / 'M2'}", "--mode", "init")}.items():
        said = here(*recycle, *more, "--out", tmp_path / name)
        assert "dev pearson" in said and "test" not in said.replace(str(tmp_path), "")
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / name / "deltas").glob("*/summary.json")}
        here(*recycle, *more, "--out", tmp_path / name, "--resume")
        assert made and made == {path: path.stat().st_mtime_ns for path in made}, "a finished run was done again"
        assert all(row["test"] == {} for row in read_json(tmp_path / name / "summary.json")["rows"])
        plot.main([str(tmp_path / name)])
        assert "best dev pearson  test" in capsys.readouterr().out
    for study in ("compatibility", "connectivity", "similarity"):
        said = here("analyze.py", "--study", study, "--bases", f"{tmp_path / 'M0'},{tmp_path / 'M1'}", "--tasks", task, "--delta", "bitfit",
                    "--tune_steps", "2", *(("--points", "2") if study == "connectivity" else ()), "--out", tmp_path / study, *FAST)
        assert study == "similarity" or "dev pearson" in said
    assert {row["scored_on"] for row in read_rows(tmp_path / "compatibility" / "rows.jsonl")} == {"dev"}
    for path in tmp_path.rglob("*.json*"):
        strict(path)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
@pytest.mark.parametrize("name, labels, expected, first", [
    ("stsb-hidden-test/stsb-minus1", 0, (20, 6, 0), None), ("nli-without-gold/snli-dash", 3, (17, 5, 5), None),
    ("boolq-passage/boolq", 2, (20, 6, 6), None), ("tsv-quoted/tsv-pandas-newline", 2, (20, 6, 6), "\nsecond line"),
    ("tsv-quoted/tsv-pandas-quotes", 2, (20, 6, 6), 'A "The frozen saddle repairs a sturdy pebble near the pebble." b'),
    ("glue-original/CoLA", 2, (24, 8, 0), "The polite harbour holds a ragged parcel near the glacier."),
    ("glue-original/QQP", 2, (24, 8, 0), None), ("glue-original/SST-2", 2, (24, 8, 0), None), ("glue-original/MRPC", 2, (24, 8, 0), None)])
def test_the_cases_that_were_read_wrongly(name, labels, expected, first, capsys):
    task = load_task(CASES / name)
    assert (len(task.labels), sizes(task)) == (labels, expected) and (first is None or task.parts["train"][0].text.endswith(first))
    assert ("-passage" in name) <= (task.parts["train"][0].text_pair is not None)


def test_a_hidden_label_is_not_made_up_for_by_another_column(tmp_path, capsys):
    for part, text in (("train", "text,label,rating\na b,0,5\nc d,1,4\n"), ("dev", "text,label,rating\na b,0,5\nc d,1,4\n"),
                       ("test", "text,rating\ne f,1\n")):
        (tmp_path / f"{part}.csv").write_text(text)
    assert "test" not in load_task(tmp_path).parts
    assert "1 of 1 test examples have no gold label" in capsys.readouterr().err


def test_beside_text_a_column_of_documents_is_no_second_text_and_pairs_by_other_names_are_said(tmp_path, capsys):
    for name, header, rows in (("ids", "text,document,label", "a b,17,0\nc d,18,1"), ("qa", "question,passage,label", "a b,e f,0\nc d,,1")):
        (tmp_path / name).mkdir()
        for part in ("train", "dev", "test"):
            (tmp_path / name / f"{part}.csv").write_text(f"{header}\n{rows}\n")
    assert {e.text_pair for e in load_task(tmp_path / "ids").parts["train"]} == {None}
    assert "read as a pair" not in capsys.readouterr().err
    assert [e.text_pair for e in load_task(tmp_path / "qa").parts["train"]] == ["e f", None]
    assert capsys.readouterr().err.count("question and passage are read as a pair of texts") == 1


def test_parts_of_which_only_some_have_pairs_are_said(tmp_path, capsys):
    for part, text in (("train", "sentence1,sentence2,label\na,b,0\nc,d,1\n"), ("dev", "sentence1,label\na,0\nc,1\n")):
        (tmp_path / f"{part}.csv").write_text(text)
    load_task(tmp_path)
    assert "only some of train, dev have pairs of texts" in capsys.readouterr().err


def test_a_blank_line_above_the_header_and_files_called_by_years(tmp_path):
    for part in ("train", "dev"):
        (tmp_path / part).mkdir()
        for year in (2023, 2024):
            (tmp_path / part / f"{year}.csv").write_text("\ntext;label\na, b;0\nc;1\n")
    assert [len(examples) for examples in load_task(tmp_path).parts.values()] == [4, 4]


def test_of_two_delimiters_in_a_header_a_csvs_semicolon_counts_before_its_tab(tmp_path):
    path = files(tmp_path, x_csv='text;"on\ttopic"\na b, c;yes\n') / "x.csv"
    assert texts(path) == [("a b, c", None)]


def test_a_pipe_is_read_ahead_until_the_quote_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "AHEAD", 5)
    content = table([("text", "label"), ("one\nof many\nlines", 0), ("b", 1)], delimiter="\t")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    assert [e.text for e in read_examples(STDIN, labelled=False, format="tsv")] == ["one\nof many\nlines", "b"]


def test_a_name_as_it_is_written_comes_before_one_in_capitals_and_the_first_before_the_second(tmp_path):
    path = files(tmp_path, x_csv="Text,text,Label\nno,yes,a\n", y_csv="TEXT,Text,Label\nyes,no,a\n")
    assert texts(path / "x.csv") == texts(path / "y.csv") == [("yes", None)]


def test_minus_one_alone_in_train_is_no_hidden_label(tmp_path):
    task = write_task(tmp_path / "t", {"train": rows([-1] * 9), "dev": rows([-1] * 9)})
    with pytest.raises(InputError, match="all training examples have the label '-1'"):
        load_task(task)


def test_a_link_to_a_task_keeps_its_own_name(tmp_path):
    write_task(tmp_path / "sick", dict.fromkeys(("train", "dev"), BINARY))
    (tmp_path / "mine").symlink_to(tmp_path / "sick")
    assert load_task(tmp_path / "mine").name == "mine"


def test_in_a_table_a_class_may_be_a_number_with_a_point_among_names_and_numbers_may_have_a_capital_e(tmp_path):
    few = table(rows(["low", "1.5", "high"] * 4))
    assert load_task(files(tmp_path / "classes", train_csv=few, dev_csv=few)).labels == ("1.5", "high", "low")
    numbers = table(rows(["1E-3", "2e-3", "4"] * 4))
    assert load_task(files(tmp_path / "numbers", train_csv=numbers, dev_csv=numbers)).is_regression


def test_a_dev_part_of_one_label_is_said(tmp_path, capsys):
    load_task(write_task(tmp_path / "t", {"train": BINARY, "dev": rows([1] * 10)}))
    assert "all 10 dev examples have the label 1: are their true labels hidden?" in capsys.readouterr().err


def test_unread_text_is_named_in_a_large_file_too(tmp_path, capsys):
    load_task(write_task(tmp_path / "t", dict.fromkeys(("train", "dev"), rows([0, 1] * 1100, reason="this is said about it"))))
    assert capsys.readouterr().err == f"note: {tmp_path / 't'}: columns that hold text but are not read: 'reason'\n"


def test_a_number_in_a_table_may_begin_with_its_point(tmp_path):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.csv").write_text("text,label\na,.5\nb,1\nc,-.25\n")
    assert [e.label for e in load_task(tmp_path).parts["dev"]] == [0.5, 1.0, -0.25]
