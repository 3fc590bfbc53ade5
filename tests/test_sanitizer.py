"""Every kernel once, small and ragged, in a process of its own: under compute-sanitizer's memcheck where there is a GPU."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EVERY_KERNEL = """
import sys, torch
from kernels import attention, attention_kd, hidden_mse, kd_loss, linear_cross_entropy, linear_kd, top_k
device, dtype = sys.argv[1], torch.float16
cu = torch.tensor([0, 5, 5, 75, 76], dtype=torch.int32, device=device)
def randn(*shape):
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)
qkv, prefix, labels = randn(76, 3, 2, 32), (randn(7, 2, 32), randn(7, 2, 32), randn(2)), torch.randint(37, (13,), device=device)
for deterministic in (False, True):
    torch.use_deterministic_algorithms(deterministic)
    attention(*qkv.unbind(1), cu, 70, dropout_p=0.1, prefix_kv=prefix).sum().backward()
torch.use_deterministic_algorithms(False)
attention_kd(*qkv.unbind(1)[:2], *randn(76, 2, 2, 64).unbind(1), cu, 70).sum().backward()
student, teacher = randn(13, 37), randn(13, 37)
for t in (teacher, top_k(teacher.detach(), 5, 2.0), None):
    kd_loss(student, t, labels, alpha=0.5, T=2.0).sum().backward()
hidden_mse(randn(3, 2, 40), randn(9, 2, 40), torch.tensor([8, 0, 3], device=device)).sum().backward()
x, w, b = randn(13, 24), randn(37, 24), randn(37)
(linear_cross_entropy(x, w, b, labels) + linear_kd(x, w, b, x, w, b, labels, alpha=0.5, T=2.0)).backward()
assert all(torch.isfinite(p.grad).all() for p in (qkv, *prefix, student, x, w, b))
print("done")
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, **env})


def test_the_small_run_itself():
    done = run(sys.executable, "-c", EVERY_KERNEL, "cpu", RT_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.stdout == "done\n", done.stderr


@pytest.mark.gpu
def test_memcheck_finds_nothing():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("no compute-sanitizer")
    done = run(tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", EVERY_KERNEL, "cuda",
               PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
