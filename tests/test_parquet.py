"""Parquet as tasks, corpora and texts to predict; class names as the datasets library writes them; data sets and models of the hub."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import ROOT, bounded, here, write_task
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from data.sources import corpus_path, open_task
from rt.errors import InputError
from rt.formats import hub
from rt.formats.corpora import build_corpus, read_documents, split_documents
from rt.formats.hub import CONVERTED, find_dataset
from rt.formats.parquet import read_parquet
from rt.formats.tasks import load_task, read_examples

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
WANTED = ("text", "text_pair", "label")


def write(path: Path, columns: dict, names: list[str] | None = None, noted: bytes | None = None, **how) -> Path:
    """Writes a parquet file. `names` are the classes of its label column, stored as datasets.Dataset.to_parquet stores them."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"},
                "tokens": [{"dtype": "string", "_type": "Value"}]}
    noted = json.dumps({"info": {"features": features}}).encode() if names else noted
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({b"huggingface": noted} if noted else None), path, **how)
    return path


def values(path: Path, wanted=WANTED) -> list[dict]:
    return [row for _, row in read_parquet(path, wanted)]


def said(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        result = call(*arguments)
        list(result) if not isinstance(result, (list, dict, tuple)) else None
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is read -------------------------------------------------------------------------------------------------------

def test_a_task_of_parquet_is_that_of_jsonl(tmp_path):
    texts = {part: [f"{part} {i}" for i in range(2500)] for part in ("train", "dev", "test")}     # more than one batch
    names = ["not_entailment", "entailment"]                    # ids are not in the order of the names
    for part, each in texts.items():
        ids = [i % 3 % 2 for i in range(2500)]
        write(tmp_path / "parquet" / f"{part}-00000-of-00001.parquet", {"text": each, "label": ids, "idx": range(2500)}, names)
        write_task(tmp_path / "jsonl", {part: [{"text": text, "label": names[i]} for text, i in zip(each, ids)]})
    one, other = load_task(tmp_path / "parquet"), load_task(tmp_path / "jsonl")
    assert one.hash == other.hash and one.labels == other.labels == ("entailment", "not_entailment")
    assert one.parts["dev"][1234].source == f"{tmp_path / 'parquet' / 'dev-00000-of-00001.parquet'}, row 1235"


def test_shards_are_read_in_order(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / f"train-0000{i}-of-00003.parquet", {"sentence": [f"a{i}", f"b{i}"], "label": [0, 1]})
    write(tmp_path / "validation-00000-of-00001.parquet", {"sentence": ["c"], "label": [1]})
    task = load_task(tmp_path)
    assert [e.text for e in task.parts["train"]] == ["a0", "b0", "a1", "b1", "a2", "b2"] and task.labels == ("0", "1")
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    assert "the train split has 2 of 3 shards" in said(load_task, tmp_path)


@pytest.mark.parametrize("column, expected", [
    (lambda: pa.array(["a", None]), ["a", None]), (lambda: pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
    (lambda: pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]), (lambda: pa.array([1, None], pa.int8()), [1, None]),
    (lambda: pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]), (lambda: pa.array([0.5, None], pa.float32()), [0.5, None]),
    (lambda: pa.array([0.5], pa.float16()), [0.5]), (lambda: pa.array([True, False]), [True, False]), (lambda: pa.nulls(2), [None, None])])
def test_text_and_numbers_of_every_type_are_values(column, expected, tmp_path):
    write(tmp_path / "x.parquet", {"label": column()})
    read = [row["label"] for row in values(tmp_path / "x.parquet")]
    assert read == expected and list(map(type, read)) == list(map(type, expected))


@pytest.mark.parametrize("label, words", [
    (lambda: pa.array([[1], [0]]), "an integer or a float, and several labels a text are not supported"),
    (lambda: pa.array([[1], [0]], pa.large_list(pa.int8())), "and several labels a text are not supported"),
    (lambda: pa.array([1, 2]).cast(pa.decimal128(20, 1)), "row 1: label Decimal128Type(decimal128(20, 1)) is not a string, an integer"),
    (lambda: pa.array([1, 2], pa.timestamp("ns")), "row 1: label TimestampType(timestamp[ns]) is not a string"),
    (lambda: pa.array([b"a", b"b"]), "row 1: label DataType(binary) is not a string"),
    (lambda: pa.array([{"a": 1}] * 2), "row 1: label StructType"),
    (lambda: pa.array([0.5, float("inf")]), "row 2: label inf is not a finite number")])
def test_labels_of_other_types_are_refused_with_their_row(label, words, tmp_path):
    for part in ("train", "dev", "test"):
        write(tmp_path / f"{part}.parquet", {"text": ["x", "y"], "label": label()})
    assert (error := said(load_task, tmp_path)).startswith(f"{tmp_path / 'train.parquet'}, row ") and words in error


@pytest.mark.parametrize("column", [lambda: pa.array([["a"], ["b"]]), lambda: pa.array([b"a", b"b"]), lambda: pa.nulls(2)])
def test_texts_of_other_types_are_refused_with_their_row(column, tmp_path):
    path = write(tmp_path / "x.parquet", {"text": column()})
    assert "x.parquet, row 1: text is empty or not a string" in said(read_examples, path, False)
    assert 'x.parquet, row 1: has no "text" string (found: text)' in said(read_documents, path)
    path = write(tmp_path / "y.parquet", {"text": ["x", "y"], "text_pair": column()})
    if column().type == pa.null():
        assert [e.text_pair for e in read_examples(path, False)] == [None, None]
    else:
        assert "y.parquet, row 1: text_pair is empty or not a string" in said(read_examples, path, False)


def test_strings_stay_names_and_floats_make_a_regression(tmp_path):
    for part in ("train", "dev", "test"):
        write(tmp_path / "names" / f"{part}.parquet", {"text": ["x", "y"], "label": ["1.5", "2"]})
        write(tmp_path / "floats" / f"{part}.parquet", {"text": ["x", "y"], "label": [1.5, 2.0]})
    assert load_task(tmp_path / "names").labels == ("2", "1.5")
    assert [e.label for e in load_task(tmp_path / "floats").parts["dev"]] == [1.5, 2.0]


def test_names_in_one_part_and_numbers_in_another_are_refused(tmp_path):
    for part, names in (("train", ["no", "yes"]), ("dev", None)):
        write(tmp_path / f"{part}.parquet", {"text": ["x", "y"], "label": [0, 1]}, names)
    assert "train.parquet, row 1: label 'no' is a string, but the label of" in said(load_task, tmp_path)


def test_columns_that_are_not_wanted_are_not_read_but_named(tmp_path):
    write(tmp_path / "x.parquet", {"body": ["x"], "image": [b"\0" * 100], "label": [1]})
    assert values(tmp_path / "x.parquet") == [{"body": pa.string(), "image": pa.binary(), "label": 1}]
    assert values(tmp_path / "x.parquet", None) == [{"body": "x", "image": pa.binary(), "label": 1}]
    assert "found: body, image, label" in said(read_examples, tmp_path / "x.parquet", False)
    assert "x.parquet: two of its columns have the same name (text, text)" in said(values, _twice(tmp_path / "x.parquet"))


def _twice(path: Path) -> Path:
    pq.write_table(pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["text", "text"]), path)
    return path


def test_no_more_than_a_part_of_a_file_is_held(tmp_path):
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(1000)) for i in range(2000)]
    other = pa.array(["x" * 100_000] * 2000).dictionary_encode()
    write(tmp_path / "x.parquet", {"text": texts * 20, "image": pa.chunked_array([other] * 20)}, row_group_size=4000)
    before, most = pa.total_allocated_bytes(), 0
    for number, _ in enumerate(read_documents(tmp_path / "x.parquet"), 1):
        if number % 500 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert number == 40_000 and most < 12e6       # the texts are 40 MB, the row group of 4,000 is 4 MB, the other column is 4 GB


# --- names of classes ----------------------------------------------------------------------------------------------------

def test_a_class_is_its_name_and_minus_one_is_none(tmp_path):
    path = write(tmp_path / "x.parquet", {"text": ["a"] * 4, "label": [2, -1, 0, None]}, ["yes", "no", "maybe"])
    assert [row["label"] for row in values(path)] == ["maybe", None, "yes", None]
    path = write(tmp_path / "x.parquet", {"text": ["a", "b"], "label": [2, -1]})      # without names it is -1, whatever that means
    assert [row["label"] for row in values(path)] == [2, -1]


@pytest.mark.parametrize("label, names, words", [
    ([0, 3], ["a", "b", "c"], "x.parquet, row 2: label is 3, but the file names 3 classes, from 0 on"),
    ([0, -2], ["a", "b", "c"], "x.parquet, row 2: label is -2, but"), ([0, 1], ["a", "a"], "no names of classes: ['a', 'a']"),
    ([0, 1], [1, 2], "no names of classes: [1, 2]")])
def test_classes_without_a_name_of_their_own_are_refused(label, names, words, tmp_path):
    assert words in said(values, write(tmp_path / "x.parquet", {"text": ["a", "b"], "label": label}, names))


@pytest.mark.parametrize("noted", [b"{", b"[]", b'{"info": 5}', b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}',
                                   b'{"info": {"features": [1]}}', b'{"info": {}, "info": {}}', b"\xff"])
def test_damaged_notes_are_one_sentence(noted, tmp_path):
    assert "x.parquet: " in said(values, write(tmp_path / "x.parquet", {"text": ["a"], "label": [0]}, noted=noted))


@pytest.mark.parametrize("noted", [b"{}", b'{"info": null}', b'{"info": {"features": null}}', b'{"info": {"features": {"label": null}}}',
                                   b'{"info": {"features": {"label": {"_type": "ClassLabel", "num_classes": 2}}}}'])
def test_notes_that_name_no_class_change_nothing(noted, tmp_path):
    path = write(tmp_path / "x.parquet", {"text": ["a"], "label": [0]}, noted=noted)
    assert values(path) == [{"text": "a", "label": 0}]


# --- damage --------------------------------------------------------------------------------------------------------------

def test_damaged_files_are_one_sentence(tmp_path):
    good = write(tmp_path / "x.parquet", {"text": [f"text {i}" for i in range(5000)], "label": [0] * 5000}, compression="zstd").read_bytes()
    for content in (b"", b"PAR1", good[:len(good) // 2], good[:-3], b"PAR1" + good[4:-4] + b"PARE", b"x" * 100,
                    good[:30] + b"\0" * 5000 + good[5030:], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        (tmp_path / "x.parquet").write_bytes(content)
        assert f"{tmp_path / 'x.parquet'}: not a readable parquet file (" in said(values, tmp_path / "x.parquet")
    assert "git lfs pull fetches" in said(values, tmp_path / "x.parquet")


def test_a_file_that_claims_more_rows_than_it_holds_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"text": ["a", "b"], "label": [0, 1]})

    class Claims(pq.ParquetFile):
        def iter_batches(self, *a, **k):
            yield next(super().iter_batches(*a, **k)).slice(0, 1)

    monkeypatch.setattr(pq, "ParquetFile", Claims)
    assert "x.parquet: holds 1 rows, but says that it has 2" in said(values, path)


def test_text_that_is_not_utf8_or_too_long_is_named_with_its_row(tmp_path):
    bad = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    assert "x.parquet, rows 1 to 3: not valid UTF-8" in said(values, write(tmp_path / "x.parquet", {"text": bad}))
    path = write(tmp_path / "x.parquet", {"text": ["short", "x" * (16 * 2**20 + 1)]})
    assert "x.parquet, row 2: text is longer than 16 MB" in said(values, path)
    path = write(tmp_path / "x.parquet", {"text": ["x" * (16 * 2**20)]})
    assert len(values(path)) == 1


def test_a_split_without_rows_and_a_file_without_columns(tmp_path):
    for part, rows in (("train", 2), ("dev", 0), ("test", 2)):
        write(tmp_path / f"{part}.parquet", {"text": pa.array(["a"] * rows, pa.string()), "label": pa.array([*range(rows)], pa.int64())})
    assert said(load_task, tmp_path) == f"{tmp_path / 'dev.parquet'}: has no examples"
    write(tmp_path / "x.parquet", {})
    assert "x.parquet: has no examples" in said(read_examples, tmp_path / "x.parquet", True)
    write(tmp_path / "x.parquet", {"text": pa.array([], pa.string())})
    assert "number of documents (lines or rows) is 0" in said(split_documents, tmp_path / "x.parquet")


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path):
    write(tmp_path / "train.parquet", {"text": ["a"], "label": [0]})
    code = ("import sys; sys.modules['pyarrow'] = None; from pathlib import Path; from rt.runs.config import run; "
            f"from rt.formats.corpora import read_documents; run(lambda: list(read_documents(Path({str(tmp_path / 'train.parquet')!r}))))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr == (f"error: {tmp_path / 'train.parquet'}: parquet is read by pyarrow, which is not "
                                                    "installed: pip install -e '.[parquet]'\n")


# --- the commands ---------------------------------------------------------------------------------------------------------

def test_parquet_from_the_corpus_to_the_answers(graphs, tmp_path):
    documents = list(read_documents(graphs / "corpus" / "heldout.jsonl"))
    for split, some in (("train", documents[20:]), ("validation", documents[:20]), ("test", ["left unread"])):
        write(tmp_path / "corpus" / f"{split}-00000-of-00001.parquet", {"text": some, "id": range(len(some))})
        write(tmp_path / "task" / "sst2" / f"{split}-00000-of-00001.parquet", {"sentence": some[:40] * 2, "label": [0, 1] * len(some[:40])},
              ["negative", "positive"])
    small = ("--preset", "tiny", "--seq_len", "32", "--device", "cpu", "--cache", tmp_path / "cache")
    here("train.py", "--stream", tmp_path / "corpus", "--vocab_size", "500", "--steps", "2", "--batch_tokens", "256", "--eval_tokens",
         "256", "--snapshots", "0", "--out", tmp_path / "run", *small)
    base, delta = ("--base", tmp_path / "run" / "M0"), ("--delta_dir", tmp_path / "delta")
    here("train.py", "--mode", "tune", *base, "--task", tmp_path / "task" / "sst2", "--delta", "bitfit", "--tune_steps", "2", "--out",
         tmp_path / "delta", "--device", "cpu", "--seq_len", "32")
    assert json.loads((tmp_path / "delta" / "summary.json").read_text())["labels"] == ["negative", "positive"]
    lines = [here("-m", "rt.runs.predict", *base, *delta, "--input", file, "--device", "cpu").splitlines()
             for file in (write(tmp_path / "x.parquet", {"text": documents[:30]}), _jsonl(tmp_path / "x.jsonl", documents[:30]))]
    assert lines[0] == lines[1] and len(lines[0]) == 30
    error = here("-m", "rt.runs.predict", *base, *delta, "--input", "-", "--input_format", "parquet", "--device", "cpu", code=2)
    assert error == "error: standard input: parquet cannot be read from there; name a file\n"


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# --- the hub --------------------------------------------------------------------------------------------------------------

class Hub:
    """Stands for the hub: `revisions` are {branch: folder of files}. A download leaves the same files in the cache as huggingface_hub."""
    def __init__(self, cache: Path, **revisions: Path):
        self.cache, self.revisions, self.asked = cache, {name.replace("convert", CONVERTED): place for name, place in revisions.items()}, []

    def HfApi(self) -> SimpleNamespace:
        return SimpleNamespace(dataset_info=self.dataset_info)

    def dataset_info(self, repo: str, revision: str | None = None, timeout: float | None = None) -> SimpleNamespace:
        assert timeout == hub.SECONDS
        if (revision or "main") not in self.revisions:
            raise ValueError(f"404: no {revision} of {repo}")
        files = [f for f in self.revisions[revision or "main"].rglob("*") if f.is_file()]
        names = [f.relative_to(self.revisions[revision or "main"]).as_posix() for f in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, repo: str, repo_type: str, revision: str | None, local_files_only: bool, **patterns: list[str]) -> str:
        assert repo_type == "dataset" and not local_files_only
        source, home = self.revisions[revision or "main"], self.cache / f"datasets--{repo.replace('/', '--')}"
        commit = {"main": "1" * 40, CONVERTED: "2" * 40}[revision or "main"]
        ref = home / "refs" / (revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        (home / "blobs").mkdir(exist_ok=True)
        names = [s.rfilename for s in self.dataset_info(repo, revision, hub.SECONDS).siblings]
        for name in filter_repo_objects(names, **patterns):
            blob, link = home / "blobs" / f"{commit[0]}{len(self.asked)}", home / "snapshots" / commit / name
            if not link.exists():
                self.asked.append(name)
                link.parent.mkdir(parents=True, exist_ok=True)
                blob.write_bytes((source / name).read_bytes())
                link.symlink_to(blob)
        return str(home / "snapshots" / commit)


@pytest.fixture
def online(tmp_path, monkeypatch):
    """Makes the hub hold folders, by branch. With none, the hub is offline, as in conftest.py, and the cache is unchanged."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def hold(**revisions: Path) -> Hub:
        fake = Hub(tmp_path / "hub", **revisions)
        monkeypatch.setattr(huggingface_hub, "HfApi", fake.HfApi)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return hold


def repository(folder: Path, *names: str) -> Path:
    """For each name, a file with the texts of a task. The texts say which file they are from."""
    for name in names:
        path = folder / name
        if path.suffix == ".parquet":
            write(path, {"text": [f"{name} a", f"{name} b"], "label": [0, 1]}, ["no", "yes"])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f'{{"text": "{name} {x}", "label": "{x}"}}\n' for x in "ab"))
    return folder


def shards(config: str) -> tuple[str, ...]:
    return tuple(f"{config}/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test"))


def test_a_config_of_the_hub_is_a_task_of_its_name_online_and_then_from_the_cache(online, tmp_path, monkeypatch, capsys):
    real = huggingface_hub.HfApi, huggingface_hub.snapshot_download
    fake = online(main=repository(tmp_path / "repo", "README.md", *shards("sst2"), *shards("cola"), "ax/test-00000-of-00001.parquet"))
    task = open_task("hub:nyu-mll/glue/sst2", tmp_path)
    assert task.name == "sst2" and task.labels == ("no", "yes") and sorted(fake.asked) == sorted(shards("sst2"))
    assert task.parts["dev"][0].text == "sst2/validation-00000-of-00001.parquet a"
    assert capsys.readouterr().out == f"hub:nyu-mll/glue/sst2: folder sst2 of commit {'1' * 40} is read\n"
    assert said(find_dataset, "hub:nyu-mll/glue") == "hub:nyu-mll/glue: has 2 configs; give hub:nyu-mll/glue/CONFIG with one of cola, sst2"
    assert "hub:nyu-mll/glue/mrpc: has no train split and is not a folder" in said(find_dataset, "hub:nyu-mll/glue/mrpc")
    monkeypatch.setattr(huggingface_hub, "HfApi", real[0])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", real[1])
    with bounded(20, 4096):     # the real library, offline, with the cache
        again = open_task("hub:nyu-mll/glue/sst2", tmp_path)
        assert (again.name, again.hash) == (task.name, task.hash)
        assert "hub:nyu-mll/cola: not a folder here, and not available from the hub (" in said(find_dataset, "hub:nyu-mll/cola")
    assert load_task(tmp_path / "hub" / "datasets--nyu-mll--glue" / "snapshots" / ("1" * 40)).hash == task.hash


def test_a_repository_of_one_config_has_its_own_name(online, tmp_path):
    online(main=repository(tmp_path / "repo", *shards("data")))
    assert open_task("hub:stanfordnlp/imdb", tmp_path).name == "imdb"
    online(main=repository(tmp_path / "other", *shards("plain_text")))
    assert open_task("hub:stanfordnlp/snli", tmp_path).name == "snli"
    with pytest.raises(InputError, match="hub:OWNER/NAME"):
        open_task("hub:imdb", tmp_path)


def test_what_the_hub_has_made_of_a_repository_comes_before_its_other_tables(online, tmp_path, monkeypatch):
    plain = repository(tmp_path / "repo", "train.jsonl", "dev.jsonl", "script.py")
    made = repository(tmp_path / "made", *(f"default/{split}/000{i}.parquet" for split in ("train", "validation") for i in (0, 1)))
    fake = online(main=plain, convert=made)
    task = open_task("hub:a/b", tmp_path)
    assert [e.text for e in task.parts["train"]] == [f"default/train/000{i}.parquet {x}" for i in (0, 1) for x in "ab"]
    assert task.name == "b" and len(fake.asked) == 4 and find_dataset("hub:a/b/default")[1] == f"default of commit {'2' * 40}"
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_task("hub:a/b", tmp_path).hash == task.hash             # offline; the cache has nothing of main
    online(main=plain, convert=repository(tmp_path / "partial", "default/partial-train/0000.parquet"))
    assert open_task("hub:a/c", tmp_path).parts["train"][0].text == "train.jsonl a"
    online(main=plain)
    assert open_task("hub:a/d", tmp_path).parts["dev"][0].text == "dev.jsonl a"


def test_corpora_of_the_hub(online, tmp_path, tokenizer):
    online(main=repository(tmp_path / "repo", *shards("wikitext-2-raw-v1"), *shards("wikitext-103-raw-v1")))
    path = corpus_path("hub:Salesforce/wikitext/wikitext-2-raw-v1", tmp_path)
    texts = {part: {text.split("-0")[0] for p, text in split_documents(path) if p == part} for part in ("train", "heldout")}
    assert texts == {"train": {"wikitext-2-raw-v1/train"}, "heldout": {"wikitext-2-raw-v1/validation"}}
    assert build_corpus("x", path, tokenizer, tmp_path / "bins")["train"].content
    names = [f"sample/10BT/{i:03}_00000.parquet" for i in range(3)]
    fake = online(main=repository(tmp_path / "fine", *names, "data/CC/000_00000.parquet"))
    assert len(list(split_documents(corpus_path("hub:f/web/sample/10BT", tmp_path)))) == 6 and sorted(fake.asked) == names
    assert "folders of tables: data/CC, sample/10BT" in said(find_dataset, "hub:f/web")
    fake = online(main=repository(tmp_path / "lines", "train.jsonl", "validation.jsonl", "test.jsonl"))
    assert {part: text.split(".")[0] for part, text in split_documents(corpus_path("hub:f/lines", tmp_path))} == {
        "train": "train", "heldout": "validation"}


def test_a_whole_repository_is_not_fetched_for_the_tables_at_its_top(online, tmp_path):
    fake = online(main=repository(tmp_path / "repo", "train.parquet", "dev.parquet", "old[1]/train.parquet", "data/en/train.parquet"))
    find_dataset("hub:a/b")
    assert sorted(fake.asked) == ["dev.parquet", "train.parquet"]
    assert find_dataset("hub:a/b/old[1]")[0].name == "old[1]" and find_dataset("hub:a/b/en")[0].name == "en"
    assert fake.asked[2:] == ["old[1]/train.parquet", "data/en/train.parquet"]


@pytest.mark.parametrize("name", ["hub:", "hub:a", "hub:a/", "hub:a/b/", "hub:../b", "hub:a/b/../c", "hub:a//b", "hub:a/b/.git"])
def test_names_that_are_none_of_a_data_set(name, online, tmp_path):
    online(main=repository(tmp_path / "repo", "train.parquet", "dev.parquet", ".git/train.parquet"))
    assert said(find_dataset, name).startswith(f"{name}: ")


def test_bin_files_of_a_model_are_fetched_only_if_it_has_no_safetensors(tmp_path, monkeypatch):
    def model_info(name, timeout):
        if not online:
            raise OSError("no network")

    def snapshot_download(name, allow_patterns, local_files_only):
        assert local_files_only is not online
        for file in filter_repo_objects(there, allow_patterns=allow_patterns):
            (tmp_path / "cache" / file).touch()
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for online in (True, False):
        for there, fetched in ((["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
                               (["pytorch_model.bin", "tf_model.h5"], ["pytorch_model.bin"])):
            (tmp_path / "cache").mkdir()
            assert hub.find("owner/name") == tmp_path / "cache" and [file.name for file in (tmp_path / "cache").iterdir()] == fetched
            shutil.rmtree(tmp_path / "cache")
