"""Every kernel, compiled without a GPU in bf16 in one configuration per architecture (`-m marathon`: in all of them); and a test that the
check finds what it looks for."""
import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import common

triton = pytest.importorskip("triton")
# These limits hold for triton 3.6 and 3.7 (torch 2.11 and 2.13). One of the earlier kernels spilt 16 bytes with 3.8 on sm_100.
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}    # bytes per block
COMPILER = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}     # with the interpreter, nothing is compiled


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=1500, env={**COMPILER, **env})


@pytest.mark.xfail(TRITON not in ((3, 6), (3, 7)), reason="a compiler that was not looked at", strict=False)
@pytest.mark.long
@pytest.mark.parametrize("which", [("--dtype", "bf16", "--every", "1000"), pytest.param((), marks=pytest.mark.marathon)])
def test_all_compiles_without_spills_and_with_matrix_instructions(which, tmp_path):
    done = python("-m", "bench.compile_check", *which, "--json", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = {row["kernel"] for row in rows}
    assert {"dropout_words", "_backward_keys", "_backward_queries", "_kd_forward", "_kd_backward", "_mse_forward",
            "_mse_backward", "_row", "_dropout_rows", "_norm_forward", "_norm_backward"} < names
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] <= SHARED_MEMORY[row["arch"]] and 0 < row["registers"] <= 255, row
        assert row["matrix"] > 0 or not row["has_dot"], row


COUNTS = """
import json
from bench.compile_check import compile_one, launches
if __name__ == "__main__":
    attention, norm, kd = (launches(90, [name], ["bf16"]) for name in ("attention", "norm", "kd_loss"))
    chosen = [next(s for s in attention if s.kernel == kernel and s.constants["D"] == 64 and s.constants["num_stages"] == 3
                   and s.constants["DROPOUT"] == dropped) for kernel in ("_forward", "_backward_keys") for dropped in (False, True)]
    chosen += [next(s for s in norm if s.kernel == kernel and s.constants["BLOCKS"] == 3 and "*i64" in s.types)
               for kernel in ("_norm_forward", "_norm_backward")]
    print(json.dumps({"counts": [compile_one(90, s)["instructions_per_element"] for s in chosen], "launches": len(attention + kd),
                      "floats": [v for s in attention + kd for v in s.constants.values() if isinstance(v, float)]}))
"""


@pytest.fixture(scope="module")
def counts() -> dict:
    """Instructions per element of six programs, and what the launches hold, from one process."""
    return json.loads(python("-c", COUNTS).stdout)


def test_the_counts_of_attention_and_of_its_dropout(counts):
    """Per element in the loop, as docs/kernels.md says; the next compiler may differ. The two products of the forward cost 9.6."""
    forward, keys = counts["counts"][:2], counts["counts"][2:4]
    assert forward[0] < 10 and keys[0] < 10.5 and all(0 < dropped - plain < 6 for plain, dropped in (forward, keys)), (forward, keys)


def test_the_counts_of_add_norm_with_dropout_at_768_columns(counts):
    """One tile of 1,024 columns, a quarter of its lanes idle, took 52 and 48 or more."""
    forward, backward = counts["counts"][4:]
    assert forward < 48 and backward < 34, (forward, backward)


FAULT = """
from bench import compile_check
if __name__ == "__main__":
    spec = next(s for s in compile_check.launches(90, ["attention"], ["fp32"]) if s.kernel == "_forward" and s.constants["D"] == 128)
    row = compile_check.compile_one(90, spec)
    print(compile_check.fault(row))
"""


@pytest.mark.parametrize("tile, words", [([128, 64, 4, 2], "spills "), ([64, 16, 8, 2], "a TF32 product of 8 columns")])
def test_a_spill_is_found_and_what_sm_90_gets_wrong(tile, words, tmp_path):
    (tmp_path / "tiles.json").write_text(json.dumps({"attention_forward": {"90 128 32": tile, "90 -128 32": tile}}))
    done = python("-c", FAULT, RT_CONFIGS=str(tmp_path / "tiles.json"))
    assert done.stdout.startswith(words), done.stdout + done.stderr


def test_what_counts_as_a_fault():
    fault = importlib.import_module("bench.compile_check").fault
    good = {"arch": 90, "spilled": 0, "shared": 227 * 1024, "has_dot": True, "matrix": 4, "narrow": False}
    rows = (good, good | {"shared": 227 * 1024 + 1}, good | {"matrix": 0}, good | {"spilled": 8}, {"error": "no"},
            good | {"arch": 80, "shared": 100 * 1024}, good | {"narrow": True})
    assert [*map(fault, rows)] == ["", "needs more than 232448 bytes of shared memory", "a matrix product without matrix instructions",
                                   "spills 8 bytes", "no", "needs more than 101376 bytes of shared memory",
                                   "a TF32 product of 8 columns, which sm_90 gets wrong"]


def test_no_float_becomes_a_constant(counts):
    """Triton turns only integers into constants. A check of code that differs from the launched code would prove nothing."""
    assert counts["launches"] > 50 and not counts["floats"]


def test_an_error_ends_the_recording():
    """Otherwise no kernel would run from then on."""
    with pytest.raises(ZeroDivisionError), common.recording():
        assert common._launched == []
        1 / 0
    assert common._launched is None


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("sys.argv", ["compile_check"])
    assert importlib.import_module("bench.compile_check").main() == 2 and "unset it" in capsys.readouterr().err
