"""Which files make up a task or a corpus: names of splits, shards and configs; what a small corpus holds out; packed and JSON files."""
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from conftest import ROOT, bounded

from rt.errors import InputError
from rt.formats import tables
from rt.formats.corpora import build_corpus, corpus_files, read_documents, split_documents
from rt.formats.splits import listed, read_name, split_files
from rt.formats.tasks import load_task, read_examples

CASES = ROOT.parent / "shared" / "cases"
ROWS = [{"text": "good one", "label": "pos"}, {"text": "bad one", "label": "neg"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def touch(folder: Path, *names: str, content: str = LINES) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def found(folder: Path) -> dict[str, list[str]]:
    return {part: [file.relative_to(folder).as_posix() for file in files] for part, files in split_files(folder).items()}


@pytest.mark.parametrize("names, train, dev, test", [
    ("train.jsonl dev.jsonl test.jsonl", "train.jsonl", "dev.jsonl", "test.jsonl"),
    ("train.jsonl val.jsonl test.jsonl", "train.jsonl", "val.jsonl", "test.jsonl"),                             # SuperGLUE
    ("Train.csv Validation.CSV TEST.csv", "Train.csv", "Validation.CSV", "TEST.csv"),
    ("train.tsv.gz valid.tsv.xz", "train.tsv.gz", "valid.tsv.xz", ""),
    ("train.tsv dev_matched.tsv dev_mismatched.tsv test_matched.tsv test_mismatched.tsv",
     "train.tsv", "dev_matched.tsv", "test_matched.tsv"),
    ("data/train-00000-of-00001.parquet data/validation-00000-of-00001-b42a775f407cee45.parquet README.md .gitattributes",
     "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001-b42a775f407cee45.parquet", ""),
    ("sst2/train/0001.parquet sst2/train/0000.parquet sst2/validation/0000.parquet sst2/test/0000.parquet ax/test/0000.parquet",
     "sst2/train/0000.parquet sst2/train/0001.parquet", "sst2/validation/0000.parquet", "sst2/test/0000.parquet"),
    ("mnli/train-00000-of-00001.parquet mnli/validation_matched-00000-of-00001.parquet mnli/validation_mismatched-00000-of-00001.parquet",
     "mnli/train-00000-of-00001.parquet", "mnli/validation_matched-00000-of-00001.parquet", ""),
    ("c/train/0000.parquet c/validation_matched/0000.parquet c/validation_mismatched/0000.parquet", "c/train/0000.parquet",
     "c/validation_matched/0000.parquet", ""),
    ("train-2-of-3.csv train-1-of-3.csv train-3-of-3.csv dev.csv", "train-1-of-3.csv train-2-of-3.csv train-3-of-3.csv", "dev.csv", ""),
    ("train/part-00001-ab.snappy.parquet train/part-00000-ab.snappy.parquet train/_SUCCESS train/.part-0.crc dev/x.parquet",
     "train/part-00000-ab.snappy.parquet train/part-00001-ab.snappy.parquet", "dev/x.parquet", ""),                # Spark
    ("train.parquet/part-00000-ab.snappy.parquet train.parquet/_SUCCESS dev.parquet/part-00000-ab.snappy.parquet",
     "train.parquet/part-00000-ab.snappy.parquet", "dev.parquet/part-00000-ab.snappy.parquet", ""),
    ("train.jsonl dev.jsonl ._train.jsonl __MACOSX/._train.jsonl .DS_Store old/train.jsonl old/dev.jsonl README.txt train.txt",
     "train.jsonl", "dev.jsonl", ""),
    ("train/train-00000-of-00001.parquet validation/validation-00000-of-00001.parquet", "train/train-00000-of-00001.parquet",
     "validation/validation-00000-of-00001.parquet", "")])
def test_names_of_splits_are_understood(names, train, dev, test, tmp_path, capsys):
    assert found(touch(tmp_path, *names.split())) == {"train": train.split(), "dev": dev.split(), "test": test.split()}
    others = [name for name in names.split() if "mismatched" in name]
    said = f"note: {tmp_path}: left unread: {', '.join(others)} (dev and test are the matched ones)\n" if others else ""
    assert capsys.readouterr().err == said


def test_ten_shards_come_in_the_order_of_their_numbers(tmp_path):
    touch(tmp_path, "dev.csv", *(f"train-{i}-of-11.csv" for i in range(11)))
    assert found(tmp_path)["train"] == [f"train-{i}-of-11.csv" for i in range(11)]


@pytest.mark.parametrize("names, words", [
    ("train.csv train.jsonl dev.csv", ": train.csv and train.jsonl could all be the train split; leave one of them there"),
    ("train.csv validation.csv dev.csv", ": dev.csv and validation.csv could all be the dev split"),
    ("train.tsv train.tsv.gz dev.tsv", ": train.tsv and train.tsv.gz could all be"),
    ("train.tsv Train.tsv dev.tsv", "could all be the train split"),
    ("train.tsv dev.tsv dev_matched.tsv", ": dev.tsv and dev_matched.tsv could all be"),
    ("train.parquet train-00000-of-00001.parquet dev.parquet", "could all be the train split"),
    ("train.jsonl dev.jsonl test.jsonl test/0000.jsonl", ": test.jsonl and test/0000.jsonl could all be the test split"),
    ("train-00000-of-00003.parquet train-00002-of-00003.parquet dev.csv",
     ": the train split has 2 of 3 shards (train-00000-of-00003.parquet, train-00002-of-00003.parquet): some are missing, or there twice"),
    ("train-00000-of-00001-aaaaaaaaaaaaaaaa.parquet train-00000-of-00001-bbbbbbbbbbbbbbbb.parquet dev.csv", "has 2 of 1 shards"),
    ("train-00000-of-00002-aaaaaaaaaaaaaaaa.parquet train-00000-of-00002-bbbbbbbbbbbbbbbb.parquet dev.csv", "has 2 of 2 shards"),
    ("c/train/0001.parquet c/validation/0000.parquet", "the train split has 1 of 2 shards (c/train/0001.parquet)"),
    ("train.jsonl test.jsonl notes.txt",
     ": has no dev.jsonl, .json, .csv, .tsv or .parquet (or val, valid, validation), nor shards of one; found: notes.txt, test.jsonl"),
    ("train.tsv dev_mismatched.tsv", "has no dev.jsonl"), ("train.txt dev.txt", "has no train.jsonl"), (".DS_Store", "found: nothing"),
    ("train/data-00000-of-00001.arrow train/state.json train/dataset_info.json dataset_dict.json",
     "has no train.jsonl, .*/data-00000.*; .arrow files (save_to_disk) are not read: write each split with to_parquet$"),
    ("cola/train-00000-of-00001.parquet sst2/train-00000-of-00001.parquet ax/test-00000-of-00001.parquet",
     ": has 2 configs; give .*/CONFIG with one of cola, sst2")])
def test_what_is_not_clear_is_refused_in_a_sentence(names, words, tmp_path):
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")) as error:
        found(touch(tmp_path, *names.split()))
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_links_are_followed_and_one_that_leads_nowhere_is_no_missing_split(tmp_path):
    touch(tmp_path / "elsewhere", "train.jsonl", "blob")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "dev.jsonl").symlink_to("blob")
    assert len(load_task(tmp_path / "task").parts["dev"]) == 2
    (tmp_path / "elsewhere" / "test.jsonl").symlink_to("gone")
    with pytest.raises(InputError, match="data/test.jsonl: there is no such file"):
        load_task(tmp_path / "task")


def test_a_folder_and_a_pipe_are_no_tables(tmp_path):
    touch(tmp_path, "train.jsonl", "test.jsonl/readme")
    os.mkfifo(tmp_path / "dev.jsonl")
    with bounded(), pytest.raises(InputError, match="has no dev.jsonl, .*found: test.jsonl/readme, train.jsonl"):
        load_task(tmp_path)


@pytest.mark.parametrize("name", ["CoLA", "SST-2", "MRPC", "QQP", "MNLI"])
def test_glue_as_downloaded(name):
    if not CASES.is_dir():
        pytest.skip("no shared data beside the checkout")
    files = split_files(CASES / "glue-original" / name)
    assert [[f.name for f in files[part]] for part in files] == (
        [["train.tsv"], ["dev_matched.tsv"], ["test_matched.tsv"]] if name == "MNLI" else [["train.tsv"], ["dev.tsv"], ["test.tsv"]])


# --- packed and JSON files ----------------------------------------------------------------------------------------------

def packed(name: str, text: str) -> bytes:
    return {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)(text.encode())


@pytest.mark.parametrize("ending, text", [
    *((ending, LINES) for ending in ("jsonl", "jsonl.gz", "jsonl.xz", "json", "json.gz", "json.xz")),
    ("json", json.dumps(ROWS)), ("json.gz", json.dumps(ROWS)), ("json", "\n" + json.dumps(ROWS, indent=1))])
def test_jsonl_and_json_packed_or_not_as_a_task_and_as_a_corpus(ending, text, tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.{ending}").write_bytes(packed(ending, text))
    task = load_task(tmp_path)
    assert [(e.text, e.label) for e in task.parts["test"]] == [("good one", "pos"), ("bad one", "neg")]
    assert list(read_documents(tmp_path / f"train.{ending}")) == ["good one", "bad one"]
    assert {f.name for f in corpus_files(tmp_path)["train"]} == {f"{name}.{ending}" for name in ("train", "dev", "test")}
    assert [e.text for e in read_examples(tmp_path / f"dev.{ending}", labelled=False)] == ["good one", "bad one"]


def test_labels_of_packed_and_listed_files_have_types(tmp_path):
    rows = [{"text": "x", "label": y} for y in ("1.5", "2")]       # strings, not numbers
    for ending in ("jsonl.gz", "json"):
        (tmp_path / ending).mkdir()
        for name in ("train", "dev", "test"):
            text = json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / ending / f"{name}.{ending}").write_bytes(packed(ending, text))
        assert load_task(tmp_path / ending).labels == ("2", "1.5")


def test_endings_in_capitals_say_the_same(tmp_path):
    for name, text in (("Train.TSV.GZ", "text\tlabel\na\tb\nc\td\n"), ("DEV.Json", json.dumps(ROWS))):
        (tmp_path / name).write_bytes(packed(name.lower(), text.replace("pos", "b").replace("neg", "d")))
    assert [e.label for part in ("train", "dev") for e in load_task(tmp_path).parts[part]] == ["b", "d", "b", "d"]


def test_a_list_may_be_longer_than_a_line_but_not_than_a_json_file(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps([{"text": "x" * 1000}] * 20_000))
    assert len(list(read_documents(tmp_path / "x.json"))) == 20_000
    (tmp_path / "x.json").write_text(json.dumps(ROWS, indent=1))
    monkeypatch.setattr(tables, "JSON_BYTES", 60)
    with pytest.raises(InputError, match="x.json: is a list longer than 0 MB; write it as JSONL"):
        list(read_documents(tmp_path / "x.json"))


@pytest.mark.parametrize("text, words", [
    ('[{"text": "x", "label": 1}, 5]', "x.json, row 2: expected a JSON object, found int"), ('[{"text": "x"}', "x.json: not valid JSON"),
    ('["{}"]', "x.json, row 1: expected a JSON object, found str"), ("[]", "x.json: has no examples"),
    ("", "x.json: has no examples"), ('{\n "data": []\n}', "x.json, line 1: not valid JSON"),
    ('{"text": "x"}\n[{"text": "y"}]\n', "x.json, line 2: expected a JSON object")])
def test_a_json_file_that_is_no_list_of_objects_is_named(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError) as error:
        list(read_examples(tmp_path / "x.json", labelled=False))
    assert words in str(error.value)


# --- corpora ------------------------------------------------------------------------------------------------------------

def kinds(folder: Path) -> dict[str, str]:
    return {part: " ".join(f.relative_to(folder).as_posix() for f in files) for part, files in corpus_files(folder).items()}


@pytest.mark.parametrize("names, train, heldout, unread", [
    ("test.txt train.txt validation.jsonl test.jsonl", "test.jsonl test.txt train.txt validation.jsonl", "", ""),      # as before
    ("train.parquet validation.parquet test.parquet", "train.parquet", "validation.parquet", "test.parquet"),
    ("train.parquet heldout.jsonl validation.parquet", "train.parquet", "heldout.jsonl", "validation.parquet"),
    ("train-00000-of-00002.jsonl.gz validation-00000-of-00001.jsonl.gz extra.txt", "extra.txt train-00000-of-00002.jsonl.gz",
     "validation-00000-of-00001.jsonl.gz", ""),
    ("000_00000.parquet 000_00001.parquet", "000_00000.parquet 000_00001.parquet", "", ""),
    ("data/train-00000-of-00001.parquet data/test-00000-of-00001.parquet data/unsupervised-00000-of-00001.parquet README.md",
     "data/train-00000-of-00001.parquet data/unsupervised-00000-of-00001.parquet", "", "data/test-00000-of-00001.parquet"),
    ("c/train/0000.parquet c/validation/0000.parquet c/test/0000.parquet c/more/x.parquet",
     "c/train/0000.parquet", "c/validation/0000.parquet", "c/test/0000.parquet"),
    ("train.parquet/part-0.snappy.parquet test.parquet/part-0.snappy.parquet", "train.parquet/part-0.snappy.parquet", "",
     "test.parquet/part-0.snappy.parquet"),     # Spark's folders
    ("c/train/a.jsonl c/test/a.jsonl", "c/train/a.jsonl", "", "c/test/a.jsonl"), ("train.json a.json", "a.json train.json", "", ""),
    ("a.jsonl meta.json ._a.jsonl", "a.jsonl", "", "meta.json"), ("a.txt b.csv c.json d.md", "a.txt", "", "b.csv c.json"),
    ("A.TXT", "A.TXT", "", ""), ("a.txt B.TXT HELDOUT.Jsonl.GZ", "B.TXT a.txt", "HELDOUT.Jsonl.GZ", ""), ("A.JSON", "A.JSON", "", ""),
    ("Train.PARQUET TEST.PARQUET", "Train.PARQUET", "", "TEST.PARQUET"), ("train.csv b.csv", "train.csv", "", "b.csv"),
    ("data/train.jsonl labels.tsv", "data/train.jsonl", "", "labels.tsv")])
def test_splits_of_a_corpus_are_named_as_on_the_hub(names, train, heldout, unread, tmp_path):
    assert kinds(touch(tmp_path, *names.split())) == {"train": train, "heldout": heldout, "unread": unread}


@pytest.mark.parametrize("name", ["test.parquet", "heldout.txt"])
def test_a_file_that_is_named_is_read_whatever_its_name(name, tmp_path):
    touch(tmp_path, name)
    assert corpus_files(tmp_path / name)["train"] == [tmp_path / name]


def test_in_the_hubs_cache_plain_names_are_splits_too(tmp_path):
    place = touch(tmp_path / "datasets--a--b" / "snapshots" / "0123", "train.jsonl", "test.jsonl", "dev.jsonl")
    assert kinds(place) == {"train": "train.jsonl", "heldout": "dev.jsonl", "unread": "test.jsonl"}


def test_what_is_left_unread_is_said_when_the_bins_are_made(tmp_path, tokenizer, capsys):
    names = [f"{split}-00000-of-00001.jsonl" for split in ("train", "validation", "test")]
    touch(tmp_path, *names, content='{"text": "graph"}\n')
    corpora = build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
    assert len(corpora["train"].offsets) == len(corpora["heldout"].offsets) == 2
    assert capsys.readouterr().err == "note: corpus x: left unread: test-00000-of-00001.jsonl\n"


def test_a_file_that_is_renamed_to_heldout_is_held_out_and_a_valid_txt_is_said(tokenizer, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    for name in ("train", "valid", "ptb.test"):
        (tmp_path / f"{name}.text").write_text("".join(f"{name} {i} of a graph\n" for i in range(99)))
        (tmp_path / "c" / f"{name}.txt").symlink_to(tmp_path / f"{name}.text")
    build_corpus("c", tmp_path / "c", tokenizer, tmp_path)
    assert capsys.readouterr().err == "note: corpus c: ptb.test.txt, valid.txt are trained on, too: only heldout.* would be held out\n"
    (tmp_path / "c" / "valid.txt").rename(tmp_path / "c" / "heldout.txt")
    parts = build_corpus("c", tmp_path / "c", tokenizer, tmp_path)
    assert [len(parts[part].offsets) - 1 for part in ("train", "heldout")] == [198, 99]


def test_shards_of_heldout_are_held_out_and_what_cannot_be_unpacked_is_said(tmp_path, tokenizer, capsys):
    touch(tmp_path, "train-00000-of-00001.jsonl", "heldout-00000-of-00001.jsonl", content='{"text": "graph"}\n' * 30)
    (tmp_path / "more.jsonl.zst").write_bytes(b"zst")
    corpora = build_corpus("x", tmp_path, tokenizer, tmp_path / "cache")
    assert len(corpora["train"].offsets) == len(corpora["heldout"].offsets) == 31
    assert capsys.readouterr().err == "note: corpus x: left unread: more.jsonl.zst\n"


def parts_of(path: Path) -> dict[str, list[str]]:
    parts = {"train": [], "heldout": []}
    for part, text in split_documents(path):
        parts[part].append(text)
    return parts


@pytest.mark.parametrize("count", [2, 3, 20, 60])
def test_a_small_corpus_has_a_part_that_is_held_out(count, tmp_path):
    for salt in range(30):
        documents = [f"{salt}: document {i % count}" for i in range(2 * count)]     # each one occurs twice
        (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in documents))
        (tmp_path / "b.txt").write_text("".join(f"{text}\n" for text in documents[::-1]))
        parts = parts_of(tmp_path / "a.txt")
        assert parts["train"] and parts["heldout"] and not {*parts["train"]} & {*parts["heldout"]}
        assert {*parts["heldout"]} == {*parts_of(tmp_path / "b.txt")["heldout"]}


@pytest.mark.parametrize("text, words", [
    ("", "is 0: none"), ("one\n\n", "is 1: none"), ("one\none\none\n", "is 3, all of them equal: none")])
def test_what_cannot_be_parted_is_refused_with_its_number_of_documents(text, words, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=words + " can be held out; give more, or a folder with a heldout"):
        list(split_documents(tmp_path / "a.txt"))


def test_the_corpus_of_which_chance_held_out_nothing(tokenizer, tmp_path):
    if not CASES.is_dir():
        pytest.skip("no shared data beside the checkout")
    corpora = build_corpus("few0", CASES / "few-documents" / "few0.jsonl", tokenizer, tmp_path)
    assert [len(c.offsets) - 1 for c in corpora.values()] == [19, 1]


def test_what_lies_in_a_hidden_folder_is_no_data(tmp_path):
    touch(tmp_path, "train.jsonl", "dev.jsonl", ".cache/c/train.jsonl", "_old/dev.jsonl", "__pycache__/train/0000.parquet")
    assert [str(f) for f in listed(tmp_path)] == ["dev.jsonl", "train.jsonl"]


def test_a_folder_that_is_named_like_a_shard_is_no_folder_of_a_split():
    assert read_name(Path("train/0000.parquet")) and read_name(Path("train-00000-of-00002/0000.parquet")) is None
