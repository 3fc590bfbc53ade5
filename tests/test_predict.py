"""rt.runs.predict: the same answers from every format, one chunk at a time. If a line is bad, earlier answers stay. Nothing is lost."""
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, here, random_base

from rt.data import Example, Task
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.atomic import locked
from rt.formats.checkpoint import load_base, save_base
from rt.formats.delta_files import save_delta
from rt.formats.tables import STDIN
from rt.formats.tasks import read_examples
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.runs import predict
from rt.runs.config import READER_LEFT
from rt.runs.log import facts_of, note_pairs

TEXTS = [f"Returns the {'complete ' * (i % 5)}graph number {i}, \"é\"." for i in range(23)]
CPU = {"device": torch.device("cpu"), "precision": torch.float32}


@pytest.fixture(scope="module")
def flags(tokenizer, tmp_path_factory) -> tuple:
    """Flags for a base and a delta on disk."""
    home, base = tmp_path_factory.mktemp("predict"), random_base(tokenizer)
    base.fingerprint = save_base(home / "M0", MaskedLM(base.encoder, base.head), tokenizer, {"name": "M0"})
    for name, labels in (("classes", ["no", "yes", "perhaps"]), ("scores", [])):
        model = attach(base, DeltaConfig("lora"), max(1, len(labels)), seed=0)
        save_delta(home / name, extract(model, base, DeltaConfig("lora"), {"task": name, "labels": labels}))
    return ("-m", "rt.runs.predict", "--base", home / "M0", "--delta_dir", home / "classes", "--seq_len", "32", "--device", "cpu",
            "--precision", "fp32")


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def examples(texts: list[str]) -> list[Example]:
    return [Example(text, None, None, "") for text in texts]


def give(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


WRITTEN = {
    "txt": "\n".join(TEXTS[:5]) + "\n\n" + "\n".join(TEXTS[5:]),
    "jsonl": "".join(json.dumps({"sentence": text, "label": 7}) + "\n" for text in TEXTS),
    "csv": "id,text\n" + "".join(f"{i},{quoted(text)}\n" for i, text in enumerate(TEXTS)),
    "tsv": "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS))}


def test_every_format_from_every_place_gets_the_same_answers_in_order(flags, tmp_path, monkeypatch):
    expected = None
    for format, text in WRITTEN.items():
        for ending, opener in (("", open), (".gz", gzip.open), (".xz", lzma.open)):
            path = tmp_path / f"texts.{format}{ending}"
            with opener(path, "wt", encoding="utf-8") as file:
                file.write(text)
            assert [e.text for e in read_examples(path, labelled=False)] == TEXTS
        out = here(*flags, "--input", path)
        expected = expected or out
        assert out == expected and [row["text"] for row in rows(out)] == TEXTS
        give(monkeypatch, text)
        assert here(*flags, "--input", "-", *(() if format == "txt" else ("--input_format", format))) == expected
        (tmp_path / "unnamed").write_text(text, encoding="utf-8")
        assert here(*flags, "--input", tmp_path / "unnamed", "--input_format", format) == expected
    for row in rows(expected):
        assert set(row["probabilities"]) == {"no", "yes", "perhaps"} and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert len({json.dumps(row["probabilities"]) for row in rows(expected)}) > 20


def test_chunks_and_batches_change_no_answer_and_no_more_than_a_chunk_is_read_ahead(tokenizer, monkeypatch):
    base = random_base(tokenizer)
    model = attach(base, DeltaConfig("bitfit"), 3, seed=0)
    read = []

    def source():
        for example in examples(TEXTS):
            read.append(example)
            yield example

    arguments = ("a", "b", "c"), tokenizer, 16, *CPU.values()
    whole = [row for said, _ in predict.answers(model, source(), *arguments) for row in said]
    monkeypatch.setattr(predict, "CHUNK", 5)
    read.clear()
    pieces = []
    for n, (said, _) in enumerate(predict.answers(model, source(), *arguments), 1):
        assert len(read) == min(5 * n, len(TEXTS)) and len(said) == (5 if n < 5 else 3)
        pieces += said
    alone = [next(predict.answers(model, [e], *arguments))[0][0] for e in examples(TEXTS)]
    for rows in (pieces, alone):
        assert [row["text"] for row in rows] == TEXTS
        for row, same in zip(rows, whole):
            assert row["probabilities"] == pytest.approx(same["probabilities"], abs=2e-6)


def test_pairs_and_regressions(flags, tmp_path):
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2\na graph,another one\na graph,a tree\n")
    at = flags.index("--delta_dir") + 1
    said = rows(here(*flags[:at], flags[at].with_name("scores"), *flags[at + 1:], "--input", tmp_path / "pairs.csv"))
    assert [(row["text"], row["text_pair"]) for row in said] == [("a graph", "another one"), ("a graph", "a tree")]
    assert all(set(row) == {"text", "text_pair", "value"} for row in said) and said[0]["value"] != said[1]["value"]


def test_single_texts_for_a_delta_of_pairs_are_said_and_the_reverse(capsys):
    one, two = Example("a", None, None, "x, line 1"), Example("a", "b", None, "x, line 2")
    for pairs, given, said in ((True, [two, one, one], "the task has pairs of texts, and x, line 1 is a single text"),
                               (False, [one, two], "the task has single texts, and x, line 2 is a pair of texts"),
                               (True, [two], ""), (None, [one, two], "")):
        assert [*note_pairs({"pairs": pairs}, given)] == given
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == bool(said)
    for train, pairs in (([one], False), ([two], True), ([one, two], None)):
        assert facts_of(Task("t", (), {"train": train}))["pairs"] is pairs


def test_a_pair_that_is_null_is_none_and_a_text_may_be_long(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"text": "a", "text_pair": "b"}\n{"text": "a", "text_pair": null}\n{"text": "a"}\n')
    assert [e.text_pair for e in read_examples(tmp_path / "pairs.jsonl", labelled=False)] == ["b", None, None]
    for format in ("csv", "tsv"):
        (tmp_path / f"long.{format}").write_text("text\n" + "word " * 40_000 + "\nshort\n")
        assert [len(e.text) for e in read_examples(tmp_path / f"long.{format}", labelled=False)] == [200_000, 5]


def test_what_comes_before_a_bad_line_is_written(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 2)
    give(monkeypatch, '{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n{"text": \n{"text": "five"}\n')
    error = here(*flags, "--input", "-", "--input_format", "jsonl", "--out", tmp_path / "out.jsonl", code=2)
    assert error == "error: standard input, line 4: not valid JSON (Expecting value)\n"
    assert [row["text"] for row in rows((tmp_path / "out.jsonl").read_text())] == ["one", "two", "three"]
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\xff\n")
    assert "bad.txt, line 2: not valid UTF-8" in here(*flags, "--input", tmp_path / "bad.txt", code=2)
    give(monkeypatch, "text,id\none,1\ntwo\n")
    assert "standard input, line 3: 1 columns, but" in here(*flags, "--input", "-", "--input_format", "csv", code=2)


def test_texts_that_are_cut_are_counted(flags, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("short\n" + "long " * 100 + "\nshort again\n")
    assert len(rows(here(*flags, "--input", tmp_path / "texts.txt"))) == 3
    assert capsys.readouterr().err == "1 of 3 texts are longer than --seq_len 32 and were cut\n"


@pytest.mark.parametrize("text, arguments, words", [
    ("", (), "standard input: has no examples"), ("\n \n", (), "standard input: has no examples"),
    ("text\n", ("--input_format", "csv"), "standard input: has no examples"),
    ("x", ("--input_format", "xml"), "--input_format xml: not one of txt, jsonl, csv, tsv"),
    ("x", ("--input", "FOLDER/nothing.txt"), "nothing.txt: there is no such file"),
    ("x", ("--input", "FOLDER"), "is a folder, not a file"),
    ("x", ("--input", "FOLDER/mine.md"), "mine.md: ends in none of .txt, .jsonl, .csv, .tsv"),
    ("x", ("--out", "FOLDER/out.csv"), "answers are written as JSONL; give a name such as out.jsonl"),
    ("x", ("--out", "FOLDER/out.jsonl.gz"), "answers are written as JSONL"),
    ("x", ("--out", "FOLDER/no/out"), "there is no folder"), ("x", ("--out", "FOLDER"), "cannot be written"),
    ("x", ("--out", "FOLDER/mine.md"), "holds something other than answers"),
    ("x", ("--out", "FOLDER/task.jsonl"), "holds something other than answers"),
    ("x", ("--out", "FOLDER/sales.jsonl"), "holds something other than answers"),
    ("x", ("--out", "FOLDER/more.jsonl"), "holds something other than answers"),
    ("x", ("--input", "FOLDER/said.jsonl", "--out", "FOLDER/said.jsonl"), "is the --input")])
def test_bad_input_is_one_sentence_and_leaves_files_alone(flags, text, arguments, words, tmp_path, monkeypatch):
    files = {"mine.md": "# My notes\n", "task.jsonl": '{"text": "x", "label": "y"}\n', "said.jsonl": '{"text": "x", "value": 1.0}\n',
             "sales.jsonl": '{"item": "x", "value": 1.0}\n', "more.jsonl": '{"text": "x", "value": 1.0, "author": "y"}\n'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    give(monkeypatch, text)
    filled = [str(a).replace("FOLDER", str(tmp_path)) for a in arguments]
    error = here(*flags, "--input", "-", *filled, code=2)
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_earlier_answers_are_replaced_once_all_others_are_there(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 1)
    out = tmp_path / "out.jsonl"
    out.touch()
    for text in ("one\ntwo\n", "three\n"):
        give(monkeypatch, text)
        assert here(*flags, "--input", "-", "--out", out) == ""
        assert [row["text"] for row in rows(out.read_text())] == text.split()
        assert not (tmp_path / "out.jsonl.part").exists()
    give(monkeypatch, "")
    here(*flags, "--input", "-", "--out", out, code=2)
    (tmp_path / "link").symlink_to(out)
    give(monkeypatch, '{"text": "four"}\n{')
    here(*flags, "--input", "-", "--input_format", "jsonl", "--out", tmp_path / "link", code=2)
    assert [row["text"] for row in rows(out.read_text())] == ["three"]
    assert [row["text"] for row in rows((tmp_path / "out.jsonl.part").read_text())] == ["four"]


def test_two_commands_do_not_write_one_file(flags, tmp_path, monkeypatch):
    give(monkeypatch, "one\n")
    with locked(tmp_path / "out.jsonl.answers"):
        assert "is being written to by process" in here(*flags, "--input", "-", "--out", tmp_path / "out.jsonl", code=2)
    assert not (tmp_path / "out.jsonl").exists()


def test_on_a_terminal_there_is_a_bar_and_how_much_is_left(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("texts.txt", "texts.parquet"):     # of which the ends of lines say nothing
        (tmp_path / name).write_text("a\n" * 40)
    for source, of in ((tmp_path / "texts.txt", "/40 ["), (STDIN, "0text ["), (tmp_path / "texts.parquet", "0text [")):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert predict.write_answers([([{"value": 0.0}] * 10, 3), ([{"value": 1.0}] * 10, 1)], None, source) == (20, 4)
        said = sys.stderr.getvalue()
        assert "predict" in said and "text/s" in said and of in said and len(rows(sys.stdout.getvalue())) == 20


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_full_disk_is_one_sentence(length):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    full = SimpleNamespace(open=lambda *a, **k: open("/dev/full", *a, **k))
    with pytest.raises(InputError, match="cannot be written after 0 texts .No space left"):
        predict.write_answers([([{"text": "x" * length}], 0)], full, STDIN)


def test_a_reader_that_leaves_ends_it_quietly(flags, tmp_path):
    (tmp_path / "texts.txt").write_text("a graph\n" * 30_000)
    process = subprocess.Popen([sys.executable, *map(str, flags), "--input", tmp_path / "texts.txt"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads(process.stdout.readline())["text"] == "a graph"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == READER_LEFT


def test_standard_input_that_is_closed_is_one_sentence(flags, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert here(*flags, "--input", "-", code=2) == "error: standard input: is closed; pipe the texts in, or name a file\n"


def test_a_link_to_earlier_answers_stays_a_link(flags, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "out.jsonl").touch()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "disk" / "out.jsonl")
    give(monkeypatch, "one\n")
    here(*flags, "--input", "-", "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").is_symlink() and [row["text"] for row in rows((tmp_path / "disk" / "out.jsonl").read_text())] == ["one"]


def test_the_longest_text_is_the_flags_or_the_deltas_or_what_the_base_can_read(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "SEQ_LEN", 1000)
    base = load_base(flags[3])
    config = DeltaConfig("bitfit")
    save_delta(tmp_path / "d", extract(attach(base, config, 2, seed=0), base, config, {"labels": ["a", "b"], "config": {"seq_len": 24}}))
    longest = base.encoder.config.max_len

    def length(delta, seq_len):
        c = SimpleNamespace(base=str(flags[3]), delta_dir=str(delta), seq_len=seq_len, device="cpu", precision="fp32")
        return predict.open_tuned(c)[3]
    assert (length(tmp_path / "d", 16), length(tmp_path / "d", None)) == (16, 24)
    assert length(flags[5], None) == longest == 128
    with pytest.raises(InputError, match=str(longest)):
        length(flags[5], longest + 1)


def test_a_standard_output_that_has_no_umlauts_gets_them_escaped(monkeypatch):
    for encoding, said in (("ascii", b'{"text": "\\u00fc"}\n'), ("utf-8", '{"text": "ü"}\n'.encode())):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert predict.write_answers([([{"text": "ü"}], 0)], None, STDIN) == (1, 0)
        assert sys.stdout.buffer.getvalue() == said


def test_outputs_follow_the_order_of_the_labels_that_are_asked_for(flags):
    c = SimpleNamespace(base=str(flags[3]), delta_dir=str(flags[5]), seq_len=16, device="cpu", precision="fp32")
    own, asked = (predict.open_tuned(c, labels)[1] for labels in ((), ("yes", "no", "perhaps")))
    assert own.labels == ("no", "yes", "perhaps") and asked.labels == ("yes", "no", "perhaps")
    assert torch.equal(asked.head["out.weight"], own.head["out.weight"][[1, 0, 2]])
