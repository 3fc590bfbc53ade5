"""Every kernel, forward and backward, in one go: under memcheck, in a CUDA graph, without host synchronisation."""
import os
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import ROOT
from every_kernel import inputs, step

from kernels.common import HAS_TRITON, triton

ALL = str(ROOT / "tests" / "every_kernel.py")


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, **env})


@pytest.mark.skipif(HAS_TRITON and triton.__version__.startswith("3.6.") and int(numpy.__version__.split(".")[1]) > 3,
                    reason="this interpreter cannot loop up to a number that it loads")
def test_the_small_run_itself():
    done = run(sys.executable, ALL, "cpu", RT_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_and_references_agree_on_it(device, dtype, monkeypatch):
    ours = step(inputs(device.type, dtype))
    monkeypatch.setenv("RT_KERNELS", "ref")
    for a, b in zip(ours, step(inputs(device.type, dtype))):
        assert (a - b).norm() <= 5 * torch.finfo(dtype).eps * b.norm()      # both sides round


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_all_of_it_in_a_cuda_graph(device):
    i = inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(i)
    graph.replay()
    for a, b in zip(captured, expected):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    i["seed"].add_(1)       # the mask depends on the seed at replay
    before = captured[0].clone()
    graph.replay()
    assert not torch.equal(before, captured[0])


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_nothing_waits_for_the_device(device):
    i = inputs("cuda")
    step(i)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memcheck_finds_nothing():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("no compute-sanitizer")
    check = tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable
    if run(*check, "-c", "import torch; torch.ones(1, device='cuda').item()").returncode:
        pytest.skip("the sanitizer does not take this device")      # for example a virtual device
    done = run(*check, ALL, "cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
