"""Shared fixtures: a tokenizer, random tiny bases, a task folder and a corpus, all made from real docstrings."""
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # tests must not reach a network
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # deterministic tests need it; it is read once, at the first matrix product
os.environ.setdefault("OMP_NUM_THREADS", "1")    # read with torch, also by commands that tests start: two test processes share two cores

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")   # read when kernels/ is imported: makes the kernels run, slowly, on the CPU

from data import docstrings
from kernels.common import HAS_TRITON
from rt.data import sequences_batch
from rt.deltas import Base
from rt.formats.checkpoint import fingerprint
from rt.formats.corpora import read_documents
from rt.formats.files import read_rows
from rt.formats.tokenizer import train_tokenizer
from rt.model import PRESETS, EncoderConfig, new_masked_lm
from rt.runs.config import run
from rt.runs.resume import PretrainRun
from rt.speed.dist import Ranks
from train import Config, train_stage

if os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON:
    interpreter = importlib.import_module("interpreter")
    interpreter.compute_in_bf16()
    interpreter.save_time()
torch.set_num_threads(int(os.environ.get("RT_TEST_THREADS", 1)))     # the models are tiny: more threads would only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)    # in a shell's background it is ignored, also by the commands that tests start
ROOT = Path(__file__).resolve().parent.parent
SEEDS = ROOT / "tests" / "seeds"
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, SEEDS)))     # for the commands that tests start
if not hasattr(sys.modules.get("sitecustomize"), "change_seeds"):       # xdist's processes already have it
    runpy.run_path(str(SEEDS / "sitecustomize.py"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in two processes. Files named on the command line run in pytest's own process, where a debugger works."""
    return 0 if any(".py" in argument for argument in config.args) else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slowest tests first. Otherwise one process would wait for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    """The devices a kernel is tested on: the CPU in Triton's interpreter, and a GPU, compiled, if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here; TRITON_INTERPRET=1 interprets them")
    monkeypatch.setenv("RT_KERNELS", "triton")
    return torch.device(request.param)


@pytest.fixture
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def far_apart(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x with `stride` elements from x[i] to x[i + 1]. On a CPU only the pages with numbers in them take memory, not those between."""
    try:
        memory = torch.empty(stride * (len(x) - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    except RuntimeError as error:       # the system does not give out more address space than it has memory
        pytest.skip(str(error).splitlines()[0])
    return memory.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(x.detach())


@pytest.fixture(scope="session")
def graphs(tmp_path_factory) -> Path:
    """The embedded `graphs` domain: corpus/ and task/."""
    out = tmp_path_factory.mktemp("docstrings")
    docstrings.build("graphs", out)
    return out / "graphs"


@pytest.fixture(scope="session")
def tokenizer(graphs):
    return train_tokenizer(read_documents(graphs / "corpus" / "heldout.jsonl"), 600)


def random_base(tokenizer, seed: int = 0, std: float = 0.1) -> Base:
    """A tiny base with weights large enough that every part affects the output."""
    config = EncoderConfig(tokenizer.vocab_size, pad_id=tokenizer.pad_id, **PRESETS["tiny"])
    model = new_masked_lm(config, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return Base(model.encoder.eval(), model.head.eval(), tokenizer, {"name": "random"}, fingerprint(model.encoder))


@pytest.fixture
def base(tokenizer):
    return random_base(tokenizer)


@pytest.fixture
def other_base(tokenizer):
    return random_base(tokenizer, seed=1)


@pytest.fixture
def batch(tokenizer):
    """Five ragged sequences. One of them has two tokens."""
    g = torch.Generator().manual_seed(0)
    sequences = [[tokenizer.bos_id, *torch.randint(5, 500, (n,), generator=g).tolist(), tokenizer.eos_id]
                 for n in (7, 0, 30, 1, 16)]
    return sequences_batch(sequences, labels=torch.tensor([0, 1, 2, 1, 0]), index=torch.arange(5))


def pretrained(folder: Path, model, rows, optimizer, settings, tokenizer, *, device=torch.device("cpu"), precision=torch.float32,
               first: int | None = None, stop_after: int | None = None, log_every: int = 1, compile=False, graphs=False) -> list[dict]:
    """Runs train.py's loop for one stage in `folder`, from step `first` or from the newest checkpoint there. Returns the rows of
    metrics.jsonl."""
    ranks = Ranks(device)
    c = Config(resume=(folder / "config.json").exists(), snapshots=0, save_every=10**9, log_every=log_every, stop_after=stop_after)
    with PretrainRun(c, folder, ranks, {}) as run:
        run.begin({}, tokenizer)
        about = {"name": "M0", "domain": "d", "number": 0, "parent": None}
        start = run.start_stage(about, settings, rows, model, optimizer, precision)
        train_stage(model, rows, optimizer, settings, run, ranks, precision, start if first is None else first, compile, graphs)
    return [{k: v for k, v in row.items() if k != "stage"} for row in read_rows(folder / "metrics.jsonl")]


def write_task(folder: Path, rows: dict[str, list[dict]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, items in rows.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in items))
    return folder


@contextlib.contextmanager
def bounded(seconds: int = 10, megabytes: int = 1024):
    """Limits the time of the code inside, and its memory beyond what is already mapped (Linux). Raises an error above either limit."""
    def late(*_):
        raise TimeoutError(f"not done in {seconds} s")

    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else None
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        if mapped:
            resource.setrlimit(resource.RLIMIT_AS, (mapped + megabytes * 2**20, limits[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: str, code: int = 0, cwd: Path | None = None) -> str:
    """Run a script of the checkout as a user would. Returns stdout, or stderr if an error was expected."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd or ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def main_of(script: str) -> Callable[[], None]:
    return importlib.import_module(Path(script).stem).main


class Fork:
    """A command in a fork of this process: like subprocess.Popen, without the seconds that a new process takes to import torch."""
    def __init__(self, argv: list[str], env: dict[str, str], main: Callable[[], None] | None = None, printed: str | None = None):
        def command() -> None:
            os.environ.clear()
            os.environ.update(env)
            for name, number in (("stdout", 1), ("stderr", 2)):
                setattr(sys, name, open(f"{printed}.{name}" if printed else os.dup(number), "w"))
            sys.argv, code = argv, 1
            try:
                run(main or main_of(argv[0]))
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        self.process = multiprocessing.get_context("fork").Process(target=command)
        self.process.start()
        self.kill = self.process.kill

    def wait(self, seconds: float | None = None) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


def forked(*arguments: str, code: int = 0, change: Callable[[int], None] = lambda rank: None,
           main: Callable[[], None] | None = None) -> str:
    """Run a script (or `main`) as the two ranks of a group, in forks of this process. Each rank may `change` itself first. Returns what
    both print: on stdout, or on stderr if one is to end with `code`."""
    def rank() -> None:
        change(int(os.environ["RANK"]))
        (main or main_of(arguments[0]))()

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)      # as torchrun's agent has one
    group = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
             "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [Fork([*map(str, arguments)], {**group, "RANK": n, "LOCAL_RANK": n}, rank, f"{folder}/{n}") for n in "01"]
        ended = [one.wait(120) for one in ranks]
        for one in ranks:
            one.kill()
        out, error = ("".join(Path(folder, f"{n}.{name}").read_text() for n in "01") for name in ("stdout", "stderr"))
    assert None not in ended and (code in ended if code else not any(ended)), f"exit codes {ended}\n{out}\n{error}"
    return error if code else out


@pytest.fixture
def forked_builds(monkeypatch) -> None:
    """Commands that make what is missing run in forks. A test that runs recycle.py as a real command has real ones."""
    monkeypatch.setattr("rt.runs.build.subprocess", SimpleNamespace(Popen=lambda command, env: Fork(command[1:], env)))


def here(*arguments: str, code: int = 0) -> str:
    """Like `command`, but without the seconds that a new process takes. For commands that other tests run as real commands."""
    name, *arguments = [arguments[0].removesuffix(".py"), *arguments[1:]] if arguments[0] != "-m" else arguments[1:]
    script = importlib.import_module(name)
    if not hasattr(script, "main"):
        script = importlib.import_module(name + ".__main__")
    ended, out, error = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            run(script.main)
        except SystemExit as end:
            ended = end.code
    assert ended == code, f"exit code {ended}\n{out.getvalue()}\n{error.getvalue()}"
    print(error.getvalue(), end="", file=sys.stderr)     # for capsys
    return (out if code == 0 else error).getvalue()
