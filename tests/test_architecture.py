"""Which package may import which (scripts -> rt -> kernels), however the import is written; and habits that hold in every file."""
import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OURS = {"rt", "kernels", "data", "bench", "experiments", "tests", *SCRIPTS}
BELOW = ("rt/report", "rt/runs", "rt/speed", "rt/formats", "rt")      # rooms: each may import itself and the rooms after it
# Other imports that a room may have besides the standard library. kernels/ can be copied out; the training code needs no framework.
MAY = {"kernels": {"torch", "triton", "tqdm"}, "rt": {"kernels", "torch", "numpy"},
       "rt/formats": {"kernels", "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "filelock", "pyarrow"},
       "rt/speed": {"kernels", "torch", "numpy"}, "rt/runs": {"torch", "numpy", "tqdm", "tensorboard"},
       "rt/report": {"matplotlib", "numpy", "torch"},
       "data": {"rt.errors", "rt.runs.config", "rt.formats.atomic", "rt.formats.corpora", "rt.formats.files", "rt.formats.hub",
                "rt.formats.tasks", "rt.data"},
       "scripts": {"rt", "data", "torch", "numpy", "kernels"}}
NEVER = {"bench": {"tests", *SCRIPTS}, "experiments": {"tests", *SCRIPTS}}      # these may import anything else, because they measure peers
CALLS = {"import_module", "__import__", "run_path", "run_module"}


def room_of(path: Path) -> str:
    """The room of `path`, relative to the checkout: kernels, rt, rt/formats, ..., data, bench, experiments, or scripts."""
    if path.parts[0] == "rt" and len(path.parts) > 2:
        return "/".join(path.parts[:2])
    return path.parts[0] if len(path.parts) > 1 else "scripts"


def imported(source: str, path: Path) -> set[str]:
    """Full names of the modules that `source` imports anywhere, including imports through a function that takes the name. `from a import b`
    gives a and a.b, because b may be a module."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = list(path.parts[:-node.level]) if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)}
        elif isinstance(node, ast.Call) and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in CALLS:
            names |= {str(a.value).removesuffix(".py") for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {name for name in names if name}


def strangers(source: str, path: Path) -> list[str]:
    """The imports of one file that its room does not allow."""
    room, found = room_of(path), []
    for name in sorted(imported(source, path)):
        first = name.split(".")[0]
        if first == "rt" and room in BELOW:
            other = room_of(Path(*name.split("."), "x.py")) if name.count(".") else "rt"
            allowed = BELOW.index(other if other in BELOW else "rt") >= BELOW.index(room)
        else:
            allowed = first == room or room in ("bench", "experiments") or first in MAY[room] or name in MAY[room] \
                or name.rpartition(".")[0] in MAY[room]
        standard = first in sys.stdlib_module_names and first not in OURS
        if first in NEVER.get(room, ()) or not (allowed or standard) or room == "scripts" and first in SCRIPTS:
            found.append(name)
    return found


def product() -> list[Path]:
    """The files of all rooms except tests, relative to the checkout."""
    folders = ("kernels", "rt", "data", "bench", "experiments")
    files = [*ROOT.glob("*.py"), *(file for room in folders for file in (ROOT / room).rglob("*.py"))]
    return [file.relative_to(ROOT) for file in files if file.name != "setup.py"]


@pytest.mark.parametrize("path", product(), ids=str)
def test_imports_keep_their_direction(path):
    assert not strangers((ROOT / path).read_text(encoding="utf-8"), path)


@pytest.mark.parametrize("path, source, found", [
    ("rt/a.py", "import train", ["train"]), ("rt/a.py", "def f():\n    from recycle import main", ["recycle", "recycle.main"]),
    ("rt/a.py", "import tqdm", ["tqdm"]), ("rt/a.py", "import data.sources", ["data.sources"]),
    ("rt/a.py", "from rt.formats import hub\nimport rt.runs.log", ["rt.formats", "rt.formats.hub", "rt.runs.log"]),
    ("rt/formats/a.py", "from rt.runs import config\nfrom rt.model import Batch", ["rt.runs", "rt.runs.config"]),
    ("rt/report/a.py", "from rt.runs import config\nimport rt.formats.hub, matplotlib", []),
    ("rt/speed/a.py", "import tokenizers", ["tokenizers"]),
    ("rt/a.py", "from .. import train", ["train"]), ("rt/formats/a.py", "from ..b import c\nfrom ... import bench", ["bench"]),
    ("rt/a.py", "import importlib\nimportlib.import_module('analyze')", ["analyze"]), ("rt/a.py", "run_path('train.py')", ["train"]),
    ("rt/a.py", "if x:\n    import transformers.models", ["transformers.models"]), ("rt/a.py", "import os, torch\nimport kernels", []),
    ("kernels/a.py", "from rt.model import Batch", ["rt.model", "rt.model.Batch"]), ("kernels/a.py", "import numpy", ["numpy"]),
    ("kernels/a.py", "from . import common\nimport triton.language as tl\nimport argparse", []),
    ("data/a.py", "from rt.model import Batch\nfrom rt.formats.corpora import read_lines", ["rt.model", "rt.model.Batch"]),
    ("data/a.py", "from rt import model", ["rt", "rt.model"]), ("bench/a.py", "from tests import conftest", ["tests", "tests.conftest"]),
    ("experiments/claims/a.py", "import peft\nfrom bench import steps\nfrom ..train import main", []),
    ("bench/a.py", "import train", ["train"]),
    ("new.py", "from train import main\nimport bench", ["bench", "train", "train.main"]), ("new.py", "import peft", ["peft"])])
def test_the_check_finds_what_is_planted(path, source, found):
    assert strangers(source, Path(path)) == found


# --- the core ---------------------------------------------------------------------------------------------------------

CORE = sorted(path.relative_to(ROOT) for path in (ROOT / "rt").glob("*.py"))


def test_the_core_can_be_read_in_one_sitting():
    lengths = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in CORE}
    assert sum(lengths.values()) <= 2500 and max(lengths.values()) <= 350, lengths


def test_the_core_names_no_flag_no_terminal_and_no_signal():
    for path in CORE:
        source = (ROOT / path).read_text(encoding="utf-8")
        words = re.findall(r"(?<![\w-])--[a-z]\w*|\bprint\(|\bsys\.|\bPath\(|\bsignal\b|\btqdm\b", source)
        assert not words, (path, words)


def long_functions(source: str, most: int = 45) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > most]


@pytest.mark.parametrize("path", [path for path in product() if room_of(path) not in ("kernels", "bench", "experiments")], ids=str)
def test_a_function_fits_on_a_screen(path):
    assert not long_functions((ROOT / path).read_text(encoding="utf-8"))


# --- habits -----------------------------------------------------------------------------------------------------------

def unhinted(source: str) -> list[str]:
    """Public functions and methods with a parameter or a return value without a type hint. Triton kernels have no types to give, and the
    types of an autograd Function's static methods are torch's."""
    found = []

    def look(body: list[ast.stmt], inside: str = "", autograd: bool = False) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                look(node.body, node.name + ".", any("Function" in ast.unparse(base) for base in node.bases))
            elif isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                private = node.name.startswith("_") and not node.name.startswith("__")
                if not private and not any("jit" in d for d in decorators) and not (autograd and "staticmethod" in decorators):
                    a = node.args
                    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                    if inside and "staticmethod" not in decorators:
                        parameters = parameters[1:]     # self
                    missing = [p.arg for p in parameters if p.annotation is None]
                    if node.returns is None and gives(node):
                        missing.append("return")
                    found.extend(f"{inside}{node.name}: {name}" for name in missing)

    look(ast.parse(source).body)
    return found


def gives(function: ast.FunctionDef) -> bool:
    """Whether a function returns or yields a value. Functions inside it do not count."""
    nodes, inner = list(function.body), (ast.FunctionDef, ast.Lambda, ast.ClassDef)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Yield, ast.YieldFrom)) or isinstance(node, ast.Return) and node.value is not None:
            return True
        nodes += [] if isinstance(node, inner) else ast.iter_child_nodes(node)
    return False


@pytest.mark.parametrize("path", [path for path in product() if room_of(path) not in ("bench", "experiments")], ids=str)
def test_public_functions_have_type_hints(path):
    assert not unhinted((ROOT / path).read_text(encoding="utf-8"))


def test_a_missing_hint_is_found():
    source = """
class Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x
class A:
    def __init__(self, a, *, b: int = 1): self.a = a
    def f(self) -> int: return 1
    def g(self): return 1
    def h(self): return
    def _h(self, x): return x
@triton.jit
def kernel(x_ptr, N: tl.constexpr): return x_ptr
def rows(n: int, *more):
    def inner(x): return x
    yield n
def main(): print()
"""
    assert unhinted(source) == ["A.__init__: a", "A.g: return", "rows: more", "rows: return"]


def test_ruff_finds_nothing():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed: pip install -e '.[test]'")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
