"""Things that do not belong together cause an error or a note: another tokenizer, base or architecture, other labels, a task, corpus,
tokenizer or base whose content changed under its name, text longer than the model, labels and tables with two readings."""
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import here, random_base, write_task

import train
from rt.data import Task
from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.checkpoint import load_base, save_base
from rt.formats.delta_files import load_delta, save_delta
from rt.formats.files import read_json, write_json
from rt.formats.tasks import load_task
from rt.formats.tokenizer import load_tokenizer, train_tokenizer
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.runs import build
from rt.runs.build import tuned
from rt.runs.resume import check_content

ROWS = [{"text": f"a graph of {i} nodes", "label": "ab"[i % 2]} for i in range(12)]
FAST = ("--device", "cpu", "--precision", "fp32")
TUNE = ("--tune_steps", "2", "--eval_every", "2", "--batch_size", "4", "--seq_len", "16", *FAST)


@pytest.fixture(scope="module")
def home(tokenizer, tmp_path_factory) -> Path:
    """Two bases with one tokenizer, one base with another, a task, and a delta for M0."""
    home = tmp_path_factory.mktemp("mixups")
    for i in (0, 1):
        base = random_base(tokenizer, i)
        save_base(home / f"M{i}", MaskedLM(base.encoder, base.head), tokenizer, {"name": f"M{i}", "parent": None})
    other = random_base(train_tokenizer([row["text"] for row in ROWS] * 9, len(tokenizer.backend.get_vocab())))
    save_base(home / "other", MaskedLM(other.encoder, other.head), other.tokenizer, {"name": "other", "parent": None})
    write_task(home / "nodes", dict.fromkeys(("train", "dev", "test"), ROWS))
    here("train.py", "--mode", "tune", "--base", home / "M0", "--task", home / "nodes", "--delta", "bitfit", "--out", home / "delta", *TUNE)
    return home


def evaluated(home: Path, task: Path, *more, code: int = 0, base: str = "M0") -> str:
    return here("train.py", "--mode", "eval", "--base", home / base, "--task", task, "--delta_dir", home / "delta", *FAST, *more, code=code)


def test_a_delta_on_another_base_tokenizer_or_architecture_is_an_error(home, tmp_path):
    assert "was learned on base" in evaluated(home, home / "nodes", base="M1", code=2)
    error = evaluated(home, home / "nodes", base="other", code=2)
    assert "with another tokenizer" in error or "vocab_size" in error
    folder = shutil.copytree(home / "M0", tmp_path / "M0")
    shutil.copy(home / "other" / "tokenizer.json", folder)
    with pytest.raises(InputError, match="another tokenizer|tokenizer.json"):
        load_base(folder)


def test_a_task_that_has_changed_is_said_aloud_and_other_labels_are_an_error(home, tmp_path, capsys):
    facts = read_json(home / "delta" / "delta.json")["info"]
    assert facts["task_hash"] == load_task(home / "nodes").hash
    evaluated(home, home / "nodes")
    assert capsys.readouterr().err == ""
    same = write_task(tmp_path / "same", dict.fromkeys(("train", "dev", "test"), ROWS))
    evaluated(home, same)
    assert capsys.readouterr().err == ""        # the content counts, not the name
    texts = write_task(tmp_path / "texts", {"train": ROWS, "dev": ROWS, "test": [ROWS[0] | {"text": "another"}, *ROWS[1:]]})
    evaluated(home, texts)
    assert f"learned on task nodes of content {facts['task_hash']}; texts is of content" in capsys.readouterr().err
    labels = write_task(tmp_path / "labels", dict.fromkeys(("train", "dev", "test"), [row | {"label": row["label"] + "x"} for row in ROWS]))
    assert "has the labels a, b, but" in evaluated(home, labels, code=2)


def recycled(home: Path, task: Path, out: Path, *more) -> str:
    return here("recycle.py", "--old_base", home / "M0", "--old_delta", home / "delta", "--base", home / "M1", "--task", task, "--delta",
                "bitfit", "--shots", "2", "--steps", "2", "--eval_every", "2", "--batch_size", "4", *FAST, "--out", out, *more)


def test_recycling_says_what_was_cut_and_what_has_changed(home, tmp_path, capsys):
    recycled(home, home / "nodes", tmp_path / "out", "--mode", "apply", "--seeds", "0")
    assert capsys.readouterr().err == ""
    long = [row | {"text": row["text"] * 9} for row in ROWS[:6]] + ROWS[6:]
    changed = write_task(tmp_path / "task", {"train": long, "dev": ROWS, "test": ROWS})
    out = recycled(home, changed, tmp_path / "out2", "--mode", "apply,init", "--seeds", "0", "--seq_len", "16")
    said = capsys.readouterr().err
    assert "6 of 36 texts are longer than --seq_len 16 and were cut" in said and "note: the delta was learned on task" in said
    assert "were cut" not in out and "note:" not in out     # standard output is only the table
    (folder,) = (tmp_path / "out2" / "deltas").glob("init*")
    assert load_delta(folder).info["task_hash"] == load_task(changed).hash
    capsys.readouterr()
    evaluated(home, changed, "--seq_len", "16")
    assert "6 of 36 texts are longer" in capsys.readouterr().err


def test_a_delta_that_was_tuned_otherwise_is_neither_replaced_nor_compared(home, tmp_path, capsys):
    shutil.copytree(home / "M0", tmp_path / "M0")
    shutil.copytree(home / "M1", tmp_path / "M1")
    tune = ("train.py", "--mode", "tune", "--base", tmp_path / "M0", "--delta", "bitfit", *TUNE)
    here(*tune, "--task", home / "nodes")
    place = tmp_path / "deltas" / "M0-nodes-bitfit-s0"
    error = here(*tune, "--task", home / "nodes", "--lr", "1e-4", code=2)
    assert f"{place}: was tuned with another --lr: 0.005, not 0.0001; give --out, or move it away" in error
    rows = [row | {"label": "ab"[row["label"] == "a"]} for row in ROWS]
    write_task(tmp_path / "t" / "nodes", dict.fromkeys(("train", "dev", "test"), rows))
    assert "tuned with another --task" in here(*tune, "--task", tmp_path / "t" / "nodes", code=2)
    here(*tune, "--task", home / "nodes")       # the same once more
    facts = read_json(place / "delta.json")
    for info, words in ((facts["info"] | {"config": {"tuned": "a"}, "source": "a"}, "another --mode: import, not tune; give --out"),
                        ({"config": [1]}, "does not hold what a tuned delta has"), ([], "does not hold what a tuned delta has")):
        write_json(place / "delta.json", facts | {"info": info})
        assert words in here(*tune, "--task", home / "nodes", code=2)
    write_json(place / "delta.json", facts)
    shutil.copytree(place, tmp_path / "deltas" / "M1-nodes-bitfit-s0")
    base = load_base(tmp_path / "M1")
    save_delta(tmp_path / "deltas" / "M1-nodes-bitfit-s0", extract(attach(base, DeltaConfig("bitfit"), 2, 0), base, DeltaConfig("bitfit"),
                                                                  facts["info"] | {"base": base.fingerprint}))
    capsys.readouterr()
    here("analyze.py", "--study", "distance", "--bases", f"{tmp_path / 'M0'},{tmp_path / 'M1'}", "--tasks", tmp_path / "t" / "nodes",
         "--delta", "bitfit", "--out", tmp_path / "study", "--seq_len", "16", *FAST)
    assert "it has other texts or labels" in capsys.readouterr().err


def test_a_conversion_replaces_only_what_it_wrote(home, tmp_path):
    export = ("-m", "rt.runs.convert", "export", "--base", home / "M0", "--out")
    here(*export, tmp_path / "hf")
    here(*export, tmp_path / "hf")
    assert "is what is to be converted" in here(*export, home / "M0", code=2)
    (tmp_path / "hf" / "README.md").write_text("# my own modèle", encoding="latin-1")
    assert "was not written by this command" in here(*export, tmp_path / "hf", code=2)
    shutil.copytree(home / "delta", tmp_path / "delta")
    error = here("-m", "rt.runs.convert", "import", "--base", home / "M0", "--tuned", tmp_path / "hf", "--out", tmp_path / "delta", code=2)
    assert "was not written by this command" in error and read_json(tmp_path / "delta" / "delta.json")["kind"] == "bitfit"


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(home, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        here("train.py", "--mode", "tune", "--base", home / "M0", "--task", home / "nodes", "--delta", "bitfit", *TUNE, "--out",
             tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "delta.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_task_called_by_dots_has_its_own_name(home, tmp_path, monkeypatch):
    write_task(tmp_path / "mine" / "task", dict.fromkeys(("train", "dev", "test"), ROWS))
    monkeypatch.chdir(home)
    monkeypatch.chdir(tmp_path / "mine" / "task")
    assert load_task(Path("../task")).name == "mine"


def test_a_base_of_ones_own_needs_its_old_base(home, tmp_path):
    flags = ("recycle.py", "--base", home / "M1", "--task", home / "nodes", "--delta", "bitfit", "--shots", "4", "--seeds", "0",
             "--steps", "1", "--seq_len", "16", "--out", tmp_path / "out", *FAST)
    for more in (("--mode", "init"), ("--mode", "scratch", "--old_delta", home / "delta"), ("--mode", "all")):
        assert "--old_base is missing" in here(*flags, *more, code=2)
    said = here(*flags, "--mode", "scratch")
    assert "building" not in said and "nodes (2 labels, 4 examples a label), bitfit: " in said
    assert "up to 7 examples a label" in here(*flags, "--mode", "scratch", "--shots", "7")
    assert "--r has no effect with --delta bitfit" in here(*flags, "--mode", "scratch", "--r", "4", code=2)
    assert "--r has no effect with --delta adapter" in here("train.py", "--mode", "tune", "--base", "M0", "--task", "t", "--r", "4", code=2)


def test_a_sweep_does_not_take_runs_on_another_task_for_its_own(home, tmp_path):
    task = write_task(tmp_path / "task", dict.fromkeys(("train", "dev", "test"), ROWS))
    sweep = ("--mode", "init", "--sweep", "seed=0,1 lr=1e-3")
    recycled(home, task, tmp_path / "out", *sweep)
    places = sorted((tmp_path / "out" / "deltas").glob("*/delta.safetensors"))
    before = [path.stat().st_mtime_ns for path in places]
    recycled(home, task, tmp_path / "out", *sweep)
    assert [path.stat().st_mtime_ns for path in places] == before
    write_task(task, {"train": ROWS[::-1]})
    recycled(home, task, tmp_path / "out", *sweep)
    assert all(path.stat().st_mtime_ns > time for path, time in zip(places, before))


def test_scratch_of_another_task_is_not_what_init_is_held_to(home, tmp_path):
    task = write_task(tmp_path / "task", dict.fromkeys(("train", "dev", "test"), ROWS))
    recycled(home, task, tmp_path / "out", "--mode", "scratch", "--seeds", "0")
    write_task(task, {"train": ROWS[::-1]})
    recycled(home, task, tmp_path / "out", "--mode", "init", "--seeds", "0")
    rows = {row["mode"]: row for row in read_json(tmp_path / "out" / "summary.json")["rows"]}
    assert rows["init"]["steps_to_scratch_best"] is None and rows["init"]["origin"][:3] == rows["scratch"]["origin"][:3]


def test_a_head_with_other_labels_than_its_delta_says_is_an_error(home, tmp_path, base):
    config = DeltaConfig("bitfit")
    save_delta(tmp_path / "d", extract(attach(base, config, 3, 0), base, config, {"task": "t", "labels": list("abc")}))
    for labels in (["a", "b"], ["a", "b", "c", "d"], ["a", "b", "b"], []):
        facts = {k: v for k, v in read_json(tmp_path / "d" / "delta.json").items() if k != "sha256"}
        write_json(tmp_path / "d" / "delta.json", facts | {"info": facts["info"] | {"labels": labels}})
        with pytest.raises(InputError, match="are not those of a head of 3 outputs"):
            load_delta(tmp_path / "d")


def begun(tmp_path: Path, *more) -> list:
    """The command that continues a stopped pre-training run."""
    (tmp_path / "a.txt").write_text("".join(f"the graph number {i} has {i * 7 % 31} nodes and {i * 3 % 17} edges\n" for i in range(400)))
    arguments = ["train.py", "--stream", tmp_path / "a.txt", "--steps", "4", "--seq_len", "16", "--batch_tokens", "128",
                 "--eval_tokens", "128", "--snapshots", "0", "--cache", tmp_path / "cache", "--out", tmp_path / "out", *FAST, *more]
    here(*arguments, "--stop_after", "2")
    return arguments + ["--resume"]


def test_a_resumed_run_with_other_flags_corpus_or_base_is_an_error(home, tmp_path):
    shutil.copytree(home / "M0", tmp_path / "M0")
    again = begun(tmp_path, "--init", tmp_path / "M0")
    assert "was begun with --lr None, not 0.5" in here(*again, "--lr", "0.5", code=2)
    text = (tmp_path / "a.txt").read_text()
    (tmp_path / "a.txt").write_text(text.replace("number 7 ", "number seven "))
    assert "corpus a has changed since the run was begun" in here(*again, code=2)
    (tmp_path / "a.txt").write_text(text)       # another modification time, the same content
    shutil.rmtree(tmp_path / "M0")
    shutil.copytree(home / "M1", tmp_path / "M0")
    assert "--init has changed since the run was begun" in here(*again, code=2)
    shutil.rmtree(tmp_path / "M0")
    shutil.copytree(home / "M0", tmp_path / "M0")
    assert "M1 (a)" in here(*again) and "is complete" in here(*again)
    shutil.rmtree(tmp_path / "M0")
    shutil.copytree(home / "M1", tmp_path / "M0")
    assert "--init has changed since the run was begun" in here(*again, code=2)     # also if it is complete


def test_a_runs_tokenizer_that_was_replaced_is_an_error(home, tmp_path):
    again = begun(tmp_path, "--preset", "tiny", "--vocab_size", "400")
    shutil.copy(home / "other" / "tokenizer.json", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").fingerprint
    assert "tokenizer has changed since the run was begun" in here(*again, code=2)


def test_an_old_delta_of_other_sizes_is_not_taken_for_the_one_that_is_asked_for(tmp_path):
    config = {"r": 4, "lora_alpha": 16.0, "target_modules": ["query", "value"], "seq_len": 64}
    write_json(tmp_path / "deltas" / "M0-t-lora-s0" / "delta.json", {"info": {"config": config}})
    (tmp_path / "M0").mkdir()
    lora, teaching = DeltaConfig("lora", r=4), SimpleNamespace(old_seq_len=None)
    c = SimpleNamespace(old_base=str(tmp_path / "M0"), delta=lora, seq_len=64, teaching=teaching)
    assert tuned(c, "t", Task("t", (), {})).endswith("M0-t-lora-s0") and len([*(tmp_path / "deltas").iterdir()]) == 1      # and no lock
    for name, value, words in (("delta", DeltaConfig("lora", r=8), "r: 4, not 8"), ("seq_len", 128, "seq_len: 64, not 128")):
        with pytest.raises(InputError, match=f"was tuned with another --{words}; to use it as it is, name it with --old_delta"):
            tuned(SimpleNamespace(**vars(c) | {name: value}), "t", Task("t", (), {}))


def test_of_two_commands_that_need_one_delta_one_makes_it(tmp_path, monkeypatch):
    (tmp_path / "M0").mkdir()
    c, made = SimpleNamespace(old_base=str(tmp_path / "M0"), delta=DeltaConfig("lora"), seq_len=64,
                              teaching=SimpleNamespace(old_seq_len=None)), []

    def slowly(c, job):
        made.append(job)
        time.sleep(0.5)
        write_json(job[1]["out"] / "delta.json", {"info": {}})

    monkeypatch.setattr(build, "build", slowly)
    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(lambda _: tuned(c, "t", Task("t", (), {})), range(2))}) == 1
    assert len(made) == 1


def test_two_tasks_of_one_name_do_not_share_a_delta_and_one_task_is_not_its_own_source(home, tmp_path):
    rows = [row | {"label": "ba"[row["label"] == "b"]} for row in ROWS]
    write_task(tmp_path / "nodes", dict.fromkeys(("train", "dev", "test"), rows))
    shutil.copytree(home / "M0", tmp_path / "M0")
    flags = ("recycle.py", "--mode", "project", "--old_base", tmp_path / "M0", "--base", home / "M1", "--delta", "bitfit", "--shots", "4",
             "--seeds", "0", "--steps", "2", "--seq_len", "16", *FAST, "--task", home / "nodes", "--out", tmp_path / "out")
    assert "is the --task itself" in here(*flags, "--source_task", f"{home}/./nodes", code=2)
    (tmp_path / "deltas").mkdir()
    shutil.copytree(home / "delta", tmp_path / "deltas" / "M0-nodes-bitfit-s0")
    info = read_json(home / "delta" / "delta.json")["info"]
    assert f"was tuned with another --task: {info['task_hash']}, not" in here(*flags, "--source_task", tmp_path / "nodes", code=2)


def test_the_delta_of_a_base_of_another_owner_is_not_replaced(home, tmp_path, monkeypatch):
    """A delta of OWNER/NAME has its place under runs/deltas, without the owner's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_base", lambda name: load_base(home / "M0"))
    tune = ("train.py", "--mode", "tune", "--task", home / "nodes", "--delta", "bitfit", *TUNE, "--base")
    for _ in range(2):
        here(*tune, "Anna/enc")
    assert "was tuned with another --base: Anna/enc, not Bert/enc" in here(*tune, "Bert/enc", code=2)


def test_a_tokenizer_that_is_given_has_the_vocabulary_it_has_and_a_first_run_may_say_resume(home, tmp_path, capsys):
    text = tmp_path / "new.txt"
    text.write_text("".join(f"a graph of {i} nodes\n" for i in range(300)))
    short = ("train.py", "--stream", text, "--preset", "tiny", "--steps", "1", "--seq_len", "16", "--batch_tokens", "128",
             "--snapshots", "0", "--eval_tokens", "128", "--cache", tmp_path, *FAST)
    for flag in ("--init", "--tokenizer"):
        for size, said in ((7, True), (load_tokenizer(home / "M0").vocab_size, False)):
            out = here(*short, flag, home / "M0", "--vocab_size", size, "--out", tmp_path / f"{flag}{size}")
            assert capsys.readouterr().err == ""
            assert (f"--vocab_size {size} has no effect: the tokenizer of {home / 'M0'} has" in out) == said
    here(*short, "--init", home / "M0", "--resume", "--out", tmp_path / "new")
    assert capsys.readouterr().err == f"note: --resume: {tmp_path / 'new'} holds no run yet; one begins there\n"


def test_steps_for_stages_that_there_are_not_are_refused():
    for more, stages in ((("--stream", "python"), 1), (("--stream", "python,math", "--mix", "need"), 1)):
        said = here("train.py", *more, "--steps", "4,5", code=2)
        assert said == f"error: --steps 4,5: are for 2 stages, and --stream makes {stages}\n"


def test_content_that_was_not_noted_is_not_compared(tmp_path):
    check_content(tmp_path, {"tokenizer": "1"})
    write_json(tmp_path / "config.json", {"lr": 1, "content": {"tokenizer": "1", "corpus a": ""}})
    check_content(tmp_path, {"tokenizer": "1", "corpus a": "2", "corpus b": "3", "--init": None})
    with pytest.raises(InputError, match="tokenizer has changed"):
        check_content(tmp_path, {"tokenizer": "2"})


@pytest.mark.parametrize("rows, words", [
    ([{"text": "x", "label": "1"}, {"text": "y", "label": 1}], "label '1' is a string, but the label of"),
    ([{"text": "x", "label": "a\nb"}, {"text": "y", "label": "c"}], "holds control characters"),
    ([{"text": "x", "label": "a\u2028b"}, {"text": "y", "label": "c"}], "holds control characters"),
    ([{"text": "x", "label": "\x1b[31m"}, {"text": "y", "label": "c"}], "holds control characters"),
    ([{"text": "x", "label": "  "}, {"text": "y", "label": "c"}], "is blank")])
def test_labels_that_say_two_things_are_an_error(rows, words, tmp_path):
    with pytest.raises(InputError) as error:
        load_task(write_task(tmp_path / "task", dict.fromkeys(("train", "dev", "test"), rows)))
    assert words in str(error.value) and "train.jsonl, line" in str(error.value)


@pytest.mark.parametrize("name, content, words", [
    ("csv", b"\ntext,label,text\na,b,c\n", "line 2: two columns are called 'text'"),
    ("csv", b"text,label\na\0b,c\n", "line 2: holds a NUL byte"),
    ("tsv", b"text\tlabel\n\xffa\tb\n", "line 2: not valid UTF-8"), ("csv", b"text,label\n,b\n", "line 2: text is empty"),
    ("csv", b"text,label\na,\n", "train.csv: no example has a gold label"),
    ("jsonl", b'{"text": "a", "text": "b", "label": 1}\n', "'text' is there twice"),
    ("jsonl", b'{"text": "a", "label": "\\ud800"}\n', "half of a surrogate pair"), ("csv", b"", "has no examples")])
def test_tables_that_say_two_things_or_nothing_are_an_error(name, content, words, tmp_path):
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.{name}").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_task(tmp_path)
    assert words in str(error.value) and f"train.{name}" in str(error.value)


def test_a_typo_among_numbers_and_whole_floats_in_a_csv_are_said(tmp_path, capsys):
    for name, labels in (("typo", ["0.5", "1.0", "3.5*", "2.5"]), ("whole", ["0.0", "1.0", "2.0", "1.0"]),
                         ("kinds", ["a.1", "b", "1.5", "1"])):
        (tmp_path / name).mkdir()
        for part in ("train", "dev"):
            (tmp_path / name / f"{part}.csv").write_text("text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels)))
    with pytest.raises(InputError, match=r"train.csv, line 4: label '3.5\*' is not a number as most labels of this task are"):
        load_task(tmp_path / "typo")
    assert load_task(tmp_path / "whole").labels == ("0.0", "1.0", "2.0")
    assert "0.0 and the other labels are classes; a regression needs .jsonl" in capsys.readouterr().err
    assert load_task(tmp_path / "kinds").labels == ("1", "1.5", "a.1", "b")


def test_what_windows_writes_and_line_separators_inside_a_text_change_nothing(tmp_path):
    plain = b"text,label\nfirst \xe2\x80\xa8 one,a\nsecond,b\n"
    tasks = []
    for name, content in (("unix", plain), ("windows", b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))):
        for part in ("train", "dev", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{part}.csv").write_bytes(content)
        tasks.append(load_task(tmp_path / name))
    assert tasks[0].hash == tasks[1].hash and tasks[0].parts["dev"][0].text == "first \u2028 one"
    rows = [{"text": "a \u2028 b", "label": "x"}, {"text": "c", "label": "y"}]
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_task(tmp_path).parts["train"][0].text == "a \u2028 b"


def test_a_missing_old_delta_is_tuned_at_the_teachers_length(tmp_path):
    (tmp_path / "M0").mkdir()
    (tmp_path / "deltas" / "M0-t-lora-s0").mkdir(parents=True)
    write_json(tmp_path / "deltas" / "M0-t-lora-s0" / "delta.json", {"info": {"config": {"seq_len": 64}}})
    c = SimpleNamespace(old_base=str(tmp_path / "M0"), delta=DeltaConfig("lora"), seq_len=64, teaching=SimpleNamespace(old_seq_len=32))
    with pytest.raises(InputError, match="another --seq_len: 64, not 32"):
        tuned(c, "t", Task("t", (), {}))
