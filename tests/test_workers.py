"""Runs distributed over processes: results and order as with one process; errors, deaths and signals end all."""
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, here

import recycle
from bench import cell, threads
from rt.errors import InputError
from rt.runs import build, workers
from rt.runs.config import parse
from rt.runs.signals import Interrupted, interruptible
from rt.runs.workers import cores, share_cores, spread

AT_FORK = []        # called in the next fork's hook. What a hook raises is lost.
os.register_at_fork(after_in_parent=lambda: AT_FORK and AT_FORK.pop()())


def squares(n):
    for i in range(n):
        yield os.getpid(), torch.full((2, 2), float(n)).mm(torch.eye(2))[0, 0].item() + i


def test_several_processes_yield_what_one_does():
    meet = multiprocessing.get_context("fork").Barrier(2)

    def meeting(item):
        if item in (3, 4):      # then two processes take part, however busy the machine is
            meet.wait(60)
        yield from squares(item)

    alone = sorted(value for _, value in spread(squares, [3, 1, 4, 1, 5], 1))
    found = list(spread(meeting, [3, 1, 4, 1, 5], 3))
    assert sorted(value for _, value in found) == alone
    assert os.getpid() not in {pid for pid, _ in found} and len({pid for pid, _ in found}) > 1


def test_one_item_or_one_worker_forks_nothing():
    assert {pid for items, count in (([2], 4), ([2, 2], 1)) for pid, _ in spread(squares, items, count)} == {os.getpid()}


def test_an_error_in_a_worker_is_raised_and_ends_the_others():
    def work(item):
        if item:
            raise InputError("seven is too many")
        yield os.getpid()
        time.sleep(60)

    begun, seen = time.monotonic(), []
    with pytest.raises(InputError, match="seven is too many"):
        for pid in spread(work, [0, 7], 2):
            seen.append(pid)
    assert time.monotonic() - begun < 30
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_fork_is_not_lost(number):
    AT_FORK.append(lambda: signal.raise_signal(number))
    with interruptible(), pytest.raises(Interrupted):
        list(spread(squares, [1, 2], 2))
    assert not AT_FORK and not multiprocessing.active_children()


def test_an_error_that_a_signal_caused_is_the_signal():
    with pytest.raises(Interrupted, match="^terminated: all is well$"), interruptible("all is well"):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:       # as compiled code does
            raise InputError("M0/model.safetensors: not a readable safetensors file") from None
    with pytest.raises(InputError, match="^no signal$"), interruptible():
        raise InputError("no signal")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_of_a_weak_reference_comes_again(number, capsys):
    """Python prints and drops an exception raised there. torch.compile has many such callbacks."""
    thing, before = set(), sys.unraisablehook
    _ = weakref.ref(thing, lambda ref: signal.raise_signal(number))
    with pytest.raises(Interrupted) as stopped, interruptible():
        del thing
        time.sleep(30)
    assert stopped.value.code == 128 + number and sys.unraisablehook is before and not capsys.readouterr().err


def test_an_error_that_cannot_be_pickled_is_told_all_the_same(capfd):
    class Two(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def work(item):
        raise Two("a fault", 2)
        yield

    with pytest.raises(RuntimeError, match=r"in a worker process: Two\('a fault'\)"):
        list(spread(work, [1, 2], 2))
    assert "Traceback" in capfd.readouterr().err


def test_a_worker_that_is_killed_is_one_sentence():
    def work(item):
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    with pytest.raises(InputError, match=r"exit code -9.*lower `workers`"):
        list(spread(work, [1, 2], 2))


def test_workers_end_with_the_process_that_they_serve():
    code = """
import os, time
from rt.runs.workers import spread
def work(item):
    yield os.getpid()
    time.sleep(60)
for pid in spread(work, [1, 2], 2):
    print(pid, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        process.wait()
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}/stat") and open(f"/proc/{pid}/stat").read().split()[2] != "Z" for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_quota_of_the_cgroup_and_omp_num_threads_bound_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "THREADS", 8)
    monkeypatch.setattr(workers, "CGROUP", tmp_path / "none")
    assert cores() == 8
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    monkeypatch.setattr(workers, "CGROUP", tmp_path / "cpu.max")
    assert cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores() == 8
    for quota, count in (("50000 100000", 1), ("1600000 100000", 8)):       # half a core is one; no more than torch would take
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert cores() == count
    affinity = "import os; os.sched_setaffinity(0, [*os.sched_getaffinity(0)][:1])"
    count = "from rt.runs.workers import cores; print(cores())"
    for code, omp, said in ((f"{affinity}; {count}", {}, "1\n"), (count, {"OMP_NUM_THREADS": "1"}, "1\n")):
        env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RT_TEST_SEED")} | omp
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env).stdout == said


def test_threads_and_workers_follow_from_cores_and_runs(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 4)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert [(share_cores(runs, 0, 0), counts.pop()) for runs in (1, 2, 3, 9)] == [(1, 4), (2, 2), (3, 1), (4, 1)]
    assert (share_cores(9, 2, 0), share_cores(9, 2, 5), counts) == (2, 5, [2, 2])
    workers.use_threads(0)
    workers.use_threads(3)
    assert counts[2:] == [4, 3]
    monkeypatch.setattr(workers, "sys", SimpleNamespace(platform="darwin"))
    assert share_cores(9, 0, 0) == 1        # only Linux forks safely


@pytest.mark.parametrize("command", ["analyze.py", "-m rt.runs.predict --base B --delta_dir D --input /none"])
def test_commands_without_runs_to_share_use_the_cores_of_the_quota_too(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "cores", lambda: 3)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: counts.append(count) or stop())

    def stop() -> None:
        raise InputError("far enough")

    assert "far enough" in here(*command.split(), code=2) and counts == [3]


@pytest.mark.parametrize("way, threads, processes", [("one at a time", 4, 1), ("side by side", 4, 1), ("workers", 1, 4)])
def test_a_way_of_sweeping_has_the_processes_that_it_says(way, threads, processes, tmp_path, monkeypatch):
    counts, commands = [], []
    monkeypatch.setattr(workers, "cores", lambda: 4)
    monkeypatch.setattr(cell, "cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(cell, "command", lambda *words: commands.append(words))
    cell.sweep(way, cell.Config(), ["--task", "math"], tmp_path)
    (script, *flags), = commands
    c = parse(recycle.Config, flags)
    assert (share_cores(108, c.threads, c.workers), counts) == (processes, [threads]) and script == cell.RECYCLE
    assert c.side_by_side == (way == "one at a time")


@pytest.mark.parametrize("script", ["train", "recycle", "analyze", "rt.runs.predict"])
def test_how_threads_wait_is_said_before_torch_is_loaded(script):
    code = f"""
import os, sys
class AsksForTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            os._exit(print(os.environ["GOMP_SPINCOUNT"], flush=True) or 0)
sys.meta_path.insert(0, AsksForTorch())
import {script}
"""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "RT_TEST_SEED")}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env).stdout
    assert said == "2000\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what gives memory back")
@pytest.mark.parametrize("environment, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_on_a_cpu_freed_memory_is_used_again(environment, kept):
    """The number of new pages of the last of many large tensors, unless the user has configured malloc."""
    code = """
import resource, torch
from rt.speed.device import pick_device
pick_device("cpu")
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | environment
    pages = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True).stdout)
    assert (pages < 20) == kept     # otherwise 24,414 small pages, or 48 huge ones


def test_missing_deltas_are_made_as_many_at_once_as_there_are_cores(tmp_path, monkeypatch):
    """Each of two waits for the other's file. A third that fails ends the runs beside it and is named."""
    script = tmp_path / "train.py"
    script.write_text("""
import os, pathlib, sys, time
flags = dict(argument[2:].split("=") for argument in sys.argv[1:])
me, other = (pathlib.Path(flags[name]) for name in ("out", "waits_for"))
me.write_text(os.environ["OMP_NUM_THREADS"])
while not other.exists():
    time.sleep(0.01)
sys.exit(flags["fails"] == "True")
""")
    monkeypatch.setattr(build, "TRAIN", script)
    monkeypatch.setattr(build, "cores", lambda: 2)
    c = SimpleNamespace(device="cpu", precision="fp32", cache="x", deterministic=False)

    def job(name, other, fails=False):
        return f"the delta {name}", dict(out=tmp_path / name, waits_for=tmp_path / other, fails=fails)

    build.build(c)
    build.build(c, job("a", "b"), job("b", "a"))
    build.build(c, job("e", "e"), of=2)     # the other is not missing
    assert (tmp_path / "a").read_text() == (tmp_path / "e").read_text() == "1"
    begun = time.monotonic()
    with pytest.raises(InputError, match="could not build the delta c"):
        build.build(c, job("c", "c", fails=True), job("d", "never"))
    assert time.monotonic() - begun < 30


def test_the_benchmark_of_threads_measures_each_command_and_ends_one_that_takes_too_long():
    found = threads.measure(threads.Config(steps=1), "one thread", 1)
    assert len(found) == 1 and found[0] > 0
    assert threads.measure(threads.Config(steps=1, seconds=0.1), "passive", 2) == [None, None]
