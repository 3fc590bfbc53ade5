"""`kernels` shares its name with a Hugging Face package; pins have their reasons; imports keep their direction."""
import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


BESIDE = """
import kernels, torch
from transformers import RobertaConfig, RobertaForMaskedLM
model = RobertaForMaskedLM(RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                         intermediate_size=16))
print(kernels.__file__, tuple(model(input_ids=torch.tensor([[0, 7, 2]])).logits.shape))
"""


@pytest.mark.parametrize("theirs", [False, True])
def test_our_kernels_wins_in_the_checkout_and_transformers_works_beside_it(tmp_path, theirs, capsys):
    pytest.importorskip("transformers")
    from transformers.utils import import_utils
    if theirs:  # as installed: a package of that name, in the version that transformers expects
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('theirs was imported')")
        version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.9.0")
        info = tmp_path / f"kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
        out = python(BESIDE, PYTHONPATH=str(tmp_path), HF_HUB_OFFLINE="1")
    else:
        exec(BESIDE, {})        # here, as a process takes seconds to import transformers
        out = capsys.readouterr().out
    assert out.split()[0] == str(ROOT / "kernels" / "__init__.py") and "(1, 3, 50)" in out


@pytest.mark.parametrize("name, command", [("requirements.txt", "pip install -r requirements.txt -e ."),
                                           ("tests/requirements.txt", "pip install -r tests/requirements.txt -e '.[test]'")])
def test_the_tested_set_is_pinned_and_installed_as_the_readme_says(name, command):
    """Every line names one version. Everything that setup.py requires is included."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pins = dict(line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("-r "))
    asked = re.search(r"install_requires=\[(.*?)\]" if "/" not in name else r'"test": \[(.*?)\]', (ROOT / "setup.py").read_text(), re.S)
    names = set(re.findall(r'"([\w-]+)', asked[1])) - (set() if "/" not in name else {"triton", "numpy"})      # of the other file
    assert names <= set(pins), names - set(pins)
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "/" not in name or command.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text()


def test_torch_that_was_just_installed_finds_its_triton():
    """torch.compile's entry point imports, whichever triton came with torch."""
    if sys.platform != "linux":
        pytest.skip("triton is installed on Linux only")
    python("import triton, torch._inductor.runtime.triton_heuristics")


def test_the_interpreter_reads_a_loop_bound_from_memory(tmp_path):
    """The reason for the cap on numpy: with 2.4, Triton 3.6's interpreter fails at exactly this, which every unpadded kernel does."""
    if sys.platform != "linux":
        pytest.skip("triton is installed on Linux only")
    (tmp_path / "loop.py").write_text("""
import torch, triton, triton.language as tl

@triton.jit
def total(x_ptr, count_ptr, out_ptr):
    n = tl.load(count_ptr)
    acc = 0.0
    for i in range(0, n):
        acc += tl.load(x_ptr + i)
    tl.store(out_ptr, acc)

out = torch.zeros(1)
total[(1,)](torch.arange(5.0), torch.tensor([4], dtype=torch.int32), out)
print(out.item())
""")
    done = subprocess.run([sys.executable, tmp_path / "loop.py"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.stdout.strip() == "6.0", done.stderr


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room, may_not", [
    ("kernels", {"rt", "data", "train", "recycle", "analyze", "tests", "bench"}),
    ("rt", {"data", "train", "recycle", "analyze", "argparse", "tests", "bench", "transformers"}),
    ("data", {"train", "recycle", "analyze", "kernels", "tests", "bench"}),
    (".", {"train", "recycle", "analyze", "tests", "bench", "transformers"})])
def test_imports_keep_their_direction(room, may_not):
    files = list((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & may_not, path
        if room == "rt":
            assert not reads_argv(path.read_text()), path


def reads_argv(source: str) -> bool:
    """Whether the command line is read outside a module's `if __name__ == "__main__":` block."""
    main = "__name__ == '__main__'"
    body = [node for node in ast.parse(source).body if not (isinstance(node, ast.If) and ast.unparse(node.test) == main)]
    return any(isinstance(node, ast.Attribute) and node.attr == "argv" or isinstance(node, ast.alias) and node.name == "argv"
               for top in body for node in ast.walk(top))


@pytest.mark.parametrize("source, reads", [
    ("import sys\ndef main(argv): ...\nif __name__ == '__main__':\n    main(sys.argv)", False), ('"""parse(Config, sys.argv)"""', False),
    ("import sys\ndef main():\n    return sys.argv", True), ("from sys import argv", True), ("import sys\nif True:\n    sys.argv", True)])
def test_only_a_main_block_reads_the_command_line(source, reads):
    assert reads_argv(source) is reads


def test_without_triton_the_references_work():
    out = python("""
import sys
sys.modules["triton"] = None        # an import of it fails, as on macOS and Windows
import torch
from kernels import attention, kd_loss
q = torch.randn(3, 1, 32)
print(attention(q, q, q, torch.tensor([0, 3], dtype=torch.int32), 3).shape, kd_loss(q[0], q[0], alpha=1.0, T=2.0).shape)
""")
    assert "[3, 1, 32]" in out and "[1]" in out
