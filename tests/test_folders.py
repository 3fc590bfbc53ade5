"""Folders that appear whole: a kill between any two steps loses nothing; content is checked; a full disk keeps the old content; one process
at a time."""
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from rt.deltas import attach, extract
from rt.errors import InputError
from rt.formats.adapters import export_peft
from rt.formats.atomic import atomic_folder, check_seal, differing, found, locked, seal
from rt.formats.checkpoint import load_base, save_base
from rt.formats.delta_files import OF_THE_RUN, load_delta, open_delta, place_of_delta, save_delta
from rt.formats.files import FIGURES, LOCK, check_overwritable, cut_half_row, read_json, read_rows, write_json
from rt.formats.hf import export_hf
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.optim import adamw
from rt.runs.log import Log
from rt.runs.resume import has_work, newest_checkpoints


class Killed(BaseException):
    """Stands for a SIGKILL: raised at the system call that would have been the last."""


def write(folder, text: str) -> None:
    with atomic_folder(folder) as new:
        (new / "a").write_text(text)
        (new / "b").write_text(text)


def content(folder) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b")}


def test_a_kill_between_any_two_steps_loses_nothing(tmp_path, monkeypatch):
    """Each call that changes the disk is once the last one. The folder is then whole, old or new, and the next write succeeds."""
    calls = {"count": 0, "last": 10**9}

    def counted(call):
        def step(*arguments, **named):
            calls["count"] += 1
            if calls["count"] > calls["last"]:
                raise Killed
            return call(*arguments, **named)
        return step

    for owner, name in ((os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "fsync")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    seen = set()
    for last in range(60):
        folder = tmp_path / str(last) / "x"
        calls.update(count=0, last=10**9)
        write(folder, "1")
        write(folder, "2")
        calls.update(count=0, last=last)
        try:
            write(folder, "3")
            break
        except Killed:
            pass
        calls["last"] = 10**9
        now = content(found(folder))
        assert now in ({"2"}, {"3"}), last
        seen |= now
        with pytest.raises(RuntimeError), atomic_folder(folder):     # a failed write changes nothing
            raise RuntimeError
        assert content(found(folder)) == now
        write(folder, "4")
        assert content(folder) == {"4"} and [f.name for f in folder.parent.iterdir()] == ["x"]
    assert last > 10 and seen == {"2", "3"} and content(folder) == {"3"}


def test_what_a_kill_left_is_found_and_said(tmp_path, base, capsys):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {"name": "M0"})
    (tmp_path / "M0").rename(tmp_path / "M0.replaced")
    assert load_base(tmp_path / "M0").fingerprint == base.fingerprint
    assert f"{tmp_path / 'M0.replaced'} is used" in capsys.readouterr().err
    delta = extract(attach(base, DeltaConfig("lora"), 2, seed=0), base, DeltaConfig("lora"), {"labels": ["a", "b"]})
    save_delta(tmp_path / "d", delta)
    (tmp_path / "d").rename(tmp_path / "d.replaced")
    assert load_delta(tmp_path / "d").labels == ("a", "b") and "d.replaced is used" in capsys.readouterr().err
    assert open_delta(str(tmp_path / "d"), base).labels == ("a", "b")


def test_a_backup_beside_a_folder_stays(tmp_path):
    write(tmp_path / "x", "1")
    (tmp_path / "x").rename(tmp_path / "x.old")     # what a user types
    assert found(tmp_path / "x") == tmp_path / "x"
    for version in ("2", "3"):
        write(tmp_path / "x", version)
        assert content(tmp_path / "x") == {version} and content(tmp_path / "x.old") == {"1"}


def test_a_seal_names_what_is_not_as_it_was_written(tmp_path):
    (tmp_path / "w").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "t").write_text("tokens")
    seal(tmp_path, "meta.json", {"step": 5, "scores": (0.1, 1e-9), "by": {1: "one"}}, ["w", "t"])
    facts = read_json(tmp_path / "meta.json")
    assert differing(tmp_path, "meta.json", facts) == [] and set(facts["sha256"]) == {"w", "t", "meta.json"}
    whole = (tmp_path / "w").read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:700] + bytes([whole[700] ^ 1]) + whole[701:]):
        (tmp_path / "w").write_bytes(damaged)
        assert differing(tmp_path, "meta.json", facts) == ["w"] and differing(tmp_path, "meta.json", facts, ["t"]) == []
        with pytest.raises(InputError, match="w is damaged: its content is not what was written"):
            check_seal(tmp_path, "meta.json", facts)
    (tmp_path / "w").unlink()
    with pytest.raises(InputError, match="w is damaged: the file is gone"):
        check_seal(tmp_path, "meta.json", facts)
    (tmp_path / "w").write_bytes(whole)
    assert differing(tmp_path, "meta.json", {**facts, "step": 4}) == ["meta.json"]
    other = {**facts, "sha256": {**facts["sha256"], "t": facts["sha256"]["w"]}}
    assert differing(tmp_path, "meta.json", other) == ["t", "meta.json"]
    for hashes in ("ab", 5, None, {}, {"w": facts["sha256"]["w"]}, {**facts["sha256"], "../w": "0"},
                   {**facts["sha256"], "w" * 300: "0"}):
        with pytest.raises(InputError, match="\"sha256\" does not hold the hashes of the files beside it"):
            differing(tmp_path, "meta.json", {**facts, "sha256": hashes})
    del facts["sha256"]
    assert differing(tmp_path, "meta.json", facts) == []        # written before there were hashes


@pytest.mark.parametrize("place", [0.1, 0.6, 0.999])
def test_a_flipped_bit_of_a_base_or_delta_is_named(tmp_path, base, place):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {"name": "M0", "step": 12})
    delta = extract(attach(base, DeltaConfig("lora"), 2, seed=0), base, DeltaConfig("lora"), {"labels": ["a", "b"]})
    save_delta(tmp_path / "d", delta)
    for file, load in ((tmp_path / "M0" / "model.safetensors", load_base), (tmp_path / "d" / "delta.safetensors", load_delta)):
        load(file.parent)
        whole = bytearray(file.read_bytes())
        whole[int(place * len(whole))] ^= 4
        file.write_bytes(whole)
        with pytest.raises(InputError, match=f"{file.name}"):
            load(file.parent)
    for file, load in ((tmp_path / "M0" / "meta.json", load_base), (tmp_path / "d" / "delta.json", load_delta)):
        save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {"name": "M0", "step": 12})
        save_delta(tmp_path / "d", delta)
        facts = read_json(file)
        write_json(file, facts | {"versions": {}})
        with pytest.raises(InputError, match=f"{file.name} is damaged"):
            load(file.parent)
        facts.pop("sha256")
        write_json(file, facts)
        load(file.parent)       # as written before there were hashes


# --- the checkpoint to resume from ------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, base):
    """A run's folder with checkpoints of steps 10 and 20 to resume from."""
    model = MaskedLM(base.encoder, base.head)
    optimizer = adamw(model.parameters(), 1e-3, 0.0)
    for p in model.parameters():
        p.grad = p.detach() * 0.0
    optimizer.step()
    for step in (10, 20):
        save_base(tmp_path / "run" / "resume" / f"M0-t{step:05d}", model, base.tokenizer, {"name": "M0", "step": step}, optimizer)
    yield tmp_path / "run"
    for p in model.parameters():
        p.grad = None


def resumed(run) -> str | None:
    path = newest_checkpoints(run).get("M0")
    return path and path.name


def test_the_newest_whole_checkpoint_is_resumed_from(run, capsys):
    assert resumed(run) == "M0-t00020" and capsys.readouterr().err == ""
    (run / "resume" / "M0-t00030.part").mkdir()        # left by a killed process; it may contain anything
    assert resumed(run) == "M0-t00020" and capsys.readouterr().err == ""
    for name in ("M0-t00020", "M0-t00010"):
        shutil.rmtree(run / "resume" / name)
    assert resumed(run) is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "half deleted", "no meta", "empty meta", "no hashes", "no step"])
def test_a_damaged_one_is_named_and_kept_and_the_one_before_is_used(run, capsys, damage):
    last, before = run / "resume" / "M0-t00020", run / "resume" / "M0-t00010"
    file = last / ("meta.json" if damage in ("no meta", "empty meta", "no hashes", "no step") else "optim.pt")
    whole = bytearray(file.read_bytes())
    if damage in ("half deleted", "no meta"):
        file.unlink()
    elif file.name == "meta.json":
        gone = {"empty meta": read_json(file).keys(), "no hashes": ["sha256"], "no step": ["step", "sha256"]}[damage]
        write_json(file, {k: v for k, v in read_json(file).items() if k not in gone})
    else:
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole if damage == "flipped" else whole[:-7])
    assert resumed(run) == "M0-t00010"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and f"{before}, is used" in said and (last / "model.safetensors").exists()
    (before / "optim.pt").unlink()
    with pytest.raises(InputError, match="; there is none before it to resume from"):
        resumed(run)
    assert (before / "model.safetensors").exists() and (last / "model.safetensors").exists()


def test_each_unfinished_stage_has_its_own_checkpoint(run):
    """M0 was moved away after M1 began, and is trained again: it resumes from its own checkpoint, though M1's are later."""
    shutil.copytree(run / "resume" / "M0-t00010", run / "resume" / "M1-t00004")
    shutil.copytree(run / "resume" / "M0-t00010", run / "resume" / "M1-t00006")
    assert {name: path.name for name, path in newest_checkpoints(run).items()} == {"M0": "M0-t00020", "M1": "M1-t00006"}
    shutil.copytree(run / "resume" / "M0-t00020", run / "M0")       # finished
    (run / "resume" / "M0-t00020" / "optim.pt").unlink()
    assert [*newest_checkpoints(run)] == ["M1"]


# --- a full disk ------------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_much_is_needed(tmp_path, base):
    """A limit on file sizes replaces a full disk, because no small disk can be mounted everywhere."""
    model, run = MaskedLM(base.encoder, base.head), tmp_path / "run"
    size = sum(x.nbytes for x in model.state_dict().values())
    save_base(run / "last", model, base.tokenizer, {"name": "M0", "step": 20})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 2, 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match=f"last: no room to write it: it needs {size:,} bytes in {run}, where [0-9,]+ are free"):
                save_base(run / "last", model, base.tokenizer, {"name": "M0", "step": 30})
            with pytest.raises(InputError, match="config.json: no room"):
                write_json(run / "config.json", {"x": "y" * size})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert load_base(run / "last").meta["step"] == 20 and not (run / "last.part").exists()


def test_a_row_after_half_a_row_is_not_lost(tmp_path):
    for before, kept in ((b'{"a": 1}\n{"a"', [{"a": 1}]), (b'{"a"', []), (b"", []), (b'{"a": 1}\n', [{"a": 1}])):
        (tmp_path / "rows.jsonl").write_bytes(before)
        cut_half_row(tmp_path / "rows.jsonl")
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"a": 2}\n')
        assert read_rows(tmp_path / "rows.jsonl") == [*kept, {"a": 2}]


def test_a_row_that_does_not_fit_is_an_error_and_not_half_a_row(tmp_path):
    log = Log(tmp_path)
    log.row(step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(InputError, match="metrics.jsonl: no room to write it: it needs [0-9]+ bytes"):
            log.row(step=2, text="x" * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


SMALL_DISK = """
import sys, torch
from pathlib import Path
from rt.formats.checkpoint import load_base, save_base
from rt.errors import InputError
from rt.model import EncoderConfig, PRESETS, new_masked_lm
from rt.optim import adamw
from rt.formats.tokenizer import load_tokenizer
tokenizer, out = load_tokenizer(Path(sys.argv[1])), Path(sys.argv[2])
model = new_masked_lm(EncoderConfig(tokenizer.vocab_size, **PRESETS["tiny"]), 0)
optimizer = adamw(model.parameters(), 1e-3, 0.0)
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
for step in range(9):
    try:
        save_base(out / "last", model, tokenizer, {"name": "M0", "step": step}, optimizer)
    except InputError as error:
        print(step, error)
        break
    (out / f"ballast{step}").write_bytes(bytes(1_000_000))
print(load_base(out / "last").meta["step"])
"""


def test_a_small_disk_that_fills_up(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("no mounting here")
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"', tmp_path / "disk"]
    done = subprocess.run([*mounted, sys.executable, "-c", SMALL_DISK, tmp_path, tmp_path / "disk"], cwd=ROOT, capture_output=True,
                          text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    said, last = done.stdout.splitlines()
    failed = int(said.split()[0])
    assert "last: no room to write it: it needs" in said and failed >= 1 and int(last) == failed - 1


# --- what is somebody else's, and where nothing can be made ----------------------------------------------------------

def lora(base):
    return extract(attach(base, DeltaConfig("lora"), 2, seed=0), base, DeltaConfig("lora"), {"labels": ["a", "b"]})


@pytest.mark.parametrize("ending", ["replaced", "part"])
def test_what_lies_beside_and_is_not_ours_stays(tmp_path, base, ending):
    delta = lora(base)
    beside = tmp_path / f"g.{ending}"
    beside.mkdir()
    for name in ("delta.json.tmp", ".tmpA1b2C3"):
        (beside / name).write_text("what a killed process of ours left, or of ours in safetensors")
    save_delta(tmp_path / "g", delta)
    assert [f.name for f in tmp_path.iterdir()] == ["g"]
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    (beside / "thesis.txt").write_text("precious")
    for write_it in (lambda: save_delta(tmp_path / "g", delta), lambda: export_hf(tmp_path / "g", base),
                     lambda: export_peft(tmp_path / "g", base, "M0", delta)):
        shutil.rmtree(tmp_path / "g", ignore_errors=True)
        with pytest.raises(InputError, match=f"g.{ending} holds other things .thesis.txt. and would be lost"):
            write_it()
    assert (beside / "thesis.txt").read_text() == "precious" and not (tmp_path / "g").exists()


def test_what_a_killed_export_left_is_replaced(tmp_path, base):
    (tmp_path / "g.part" / "base.part").mkdir(parents=True)
    export_peft(tmp_path / "g", base, "M0", lora(base))
    assert [f.name for f in tmp_path.iterdir()] == ["g"]


@pytest.mark.parametrize("out", ["file", "file/x", "file/x/y"])
def test_a_file_in_the_place_of_a_folder_is_left_alone(tmp_path, base, out):
    (tmp_path / "file").write_text("precious")
    delta = lora(base)
    for write_it in (lambda path: save_delta(path, delta), lambda path: export_hf(path, base),
                     lambda path: check_overwritable(path, set()), lambda path: has_work(path, {}, False, {}),
                     lambda path: locked(path).__enter__()):
        with pytest.raises(InputError, match="file.* cannot be (used as a folder|made)"):
            write_it(tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious" and [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_lock_or_folder_that_cannot_be_made_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, code):
    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    words = f"run.*: cannot be made .{os.strerror(code)}|run.*: no room to write it"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fails)       # the file exists, but its text does not fit
        with pytest.raises(InputError, match=words), locked(tmp_path / "run"):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", fails)
        with pytest.raises(InputError, match=words), atomic_folder(tmp_path / "run"):
            pass
        with pytest.raises(InputError, match=words), locked(tmp_path / "not" / "there" / "run"):
            pass
    assert not list(tmp_path.iterdir())


READ_ONLY = """
from pathlib import Path
import sys
from rt.errors import InputError
from rt.formats.atomic import atomic_folder, locked
out = Path(sys.argv[1])
for context in (locked(out / "run"), locked(out / "there"), locked(out / "a" / "b"), atomic_folder(out / "run"),
                atomic_folder(out / "there")):
    try:
        with context:
            print("made")
    except InputError as error:
        print(error)
"""


def test_a_disk_that_is_read_only(tmp_path):
    mount = 'mount -t tmpfs none "$0" && mkdir "$0/there" && mount -o remount,ro "$0" && exec "$@"'
    mounted = ["unshare", "-rm", "sh", "-c", mount, tmp_path]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("no mounting here")
    done = subprocess.run([*mounted, sys.executable, "-c", READ_ONLY, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("cannot be made (Read-only file system") == 5, done.stdout + done.stderr


# --- one process at a time --------------------------------------------------------------------------------------------

def test_the_second_process_is_refused_with_pid_and_host(tmp_path):
    with locked(tmp_path / "run"):
        held = read_json(tmp_path / "run.lock")
        assert held["pid"] == os.getpid() and held["host"] == socket.gethostname()
        with pytest.raises(InputError, match=f"being written to by process {os.getpid()} on {socket.gethostname()} since"), \
                locked(tmp_path / "run"):
            pass
        with pytest.raises(InputError), locked(tmp_path / "there" / ".." / "run"):      # by another name
            pass
    assert not list(tmp_path.glob("run*"))
    with pytest.raises(RuntimeError), locked(tmp_path / "run"):
        raise RuntimeError
    assert not list(tmp_path.glob("run*"))


HOLDER = """
import sys
from pathlib import Path
from rt.formats.atomic import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_a_killed_process_left_is_taken_over(tmp_path):
    """The operating system frees the lock. Its file stays and says who held it."""
    lock, host = tmp_path / "run.lock", socket.gethostname()
    child = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"locked\n"
    for _ in range(2):      # a second look does not change what the lock says
        with pytest.raises(InputError, match=f"process {child.pid} on {host} since .*: end it first, or give another --out"), \
                locked(tmp_path / "run"):
            pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert read_json(lock)["pid"] == child.pid
    with locked(tmp_path / "run"):
        assert read_json(lock)["pid"] == os.getpid()
    assert not lock.exists()


def test_what_a_lock_file_says_does_not_hold_it(tmp_path):
    lock, host = tmp_path / "run.lock", socket.gethostname()
    write_json(lock, {"pid": os.getppid(), "host": host, "started": 5, "since": "now"})     # its process id now belongs to another process
    with locked(tmp_path / "run"):
        pass
    lock.touch()        # killed before it wrote anything
    with locked(tmp_path / "run"):
        pass
    write_json(lock, {"pid": 1, "host": "elsewhere", "started": 1, "since": "yesterday"})      # but for other hosts
    with pytest.raises(InputError, match=f"1 on elsewhere since yesterday.*if it has gone, remove {lock}"), locked(tmp_path / "run"):
        pass
    assert json.loads(lock.read_text())["host"] == "elsewhere" and [f.name for f in tmp_path.iterdir()] == ["run.lock"]


def test_of_many_processes_at_once_one_writes(tmp_path):
    """Each process holds the lock for a moment and appends two lines. No other process's lines come between them."""
    code = f"""
import sys, time
from pathlib import Path
from rt.errors import InputError
from rt.formats.atomic import locked
done = 0
while done < 40:
    try:
        with locked(Path({str(tmp_path / 'run')!r})):
            for _ in range(2):
                with open({str(tmp_path / 'lines')!r}, "a") as file:
                    file.write(sys.argv[1] + chr(10))
            done += 1
    except InputError as error:
        assert "is being written to by" in str(error), error
"""
    others = [subprocess.Popen([sys.executable, "-c", code, str(i)], cwd=ROOT, stderr=subprocess.PIPE) for i in range(3)]
    for other in others:
        assert other.wait(100) == 0, other.stderr.read()
    lines = (tmp_path / "lines").read_text().split()
    assert len(lines) == 240 and lines[::2] == lines[1::2]


@pytest.mark.parametrize("content", [b"precious", b"[]", b'{"pid": -1, "host": "a", "since": 1}', b'{"pid": "x", "host": "a", "since": 1}',
                                     b"\xff", None])
def test_a_file_that_is_no_lock_is_left_alone(tmp_path, content):
    lock = tmp_path / "run.lock"
    if content is None:
        lock.mkdir()
    else:
        lock.write_bytes(content)
    with pytest.raises(InputError, match="run.lock is in the way: it is not a lock, and the lock of"), locked(tmp_path / "run"):
        pass
    assert lock.exists()


def test_a_linked_folder_is_replaced_where_it_is_and_the_link_stays(tmp_path):
    write(tmp_path / "disk" / "x", "1")
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    write(tmp_path / "x", "2")
    assert (tmp_path / "x").is_symlink() and content(tmp_path / "disk" / "x") == {"2"}
    assert [f.name for f in tmp_path.iterdir() if f.name != "disk"] == ["x"]


def test_a_delta_that_is_saved_again_keeps_its_figures_and_the_records_of_its_run(tmp_path, base):
    save_delta(tmp_path / "d", lora(base))
    for name in (*OF_THE_RUN, f"{FIGURES}/convergence.png"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    save_delta(tmp_path / "d", lora(base))
    assert all((tmp_path / "d" / name).read_text() == name for name in (*OF_THE_RUN, f"{FIGURES}/convergence.png"))


def test_a_delta_is_put_beside_its_base_or_under_runs_if_that_is_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "M0" / "resume").mkdir(parents=True)
    for place, name in (("M0", "."), ("M0/resume", "..")):
        monkeypatch.chdir(tmp_path / place)
        assert place_of_delta(name, "sick", "full") == tmp_path / "deltas" / "M0-sick-full-s0"
    assert place_of_delta(str(tmp_path / "M0"), "sick", "lora", "-r4", 2) == tmp_path / "deltas" / "M0-sick-lora-r4-s2"
    assert place_of_delta("an/id", "sick", "full") == Path("runs/deltas/id-sick-full-s0")


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, name=name, call=getattr(os, name): (done.append(name), call(*a))[1])
    write_json(tmp_path / "x.json", {})
    assert done == ["fsync", "replace"]


def test_a_lock_is_inside_a_folder_beside_which_nothing_can_be_made(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with locked(run):
        assert (run / LOCK).exists() and not (tmp_path / "run.lock").exists()
        check_overwritable(run, set())      # it is not somebody else's
    assert not [*run.iterdir()]
