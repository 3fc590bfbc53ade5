"""The embedded default data: technical English from the docstrings of packages that every machine with PyTorch has.

    python -m data.docstrings --out DIR [domain ...]

For each domain it writes DIR/<domain>/corpus/{train,heldout}.jsonl for pre-training, one `text` per line, and
DIR/<domain>/task/{train,dev,test}.jsonl, one `text` and `label` per line. The task is to guess the sub-package that a docstring comes from.
Sources are parsed with `ast` and never imported. All documents of a file go to the same part, and `heldout` is exactly the dev and test
files, so pre-training never sees a test text.

Caveats: the texts are those of the installed version (meta.json says which), so compare numbers only between equal versions. Documents of
different files can still be near-duplicates (a function and its sibling). Docstrings of compiled parts (numpy.random) cannot be read.
"""
import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter, defaultdict, deque
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Iterator

from rt.errors import InputError
from rt.formats.atomic import atomic_folder, locked
from rt.formats.files import read_json, write_json
from rt.runs.config import run

DOMAINS = {"python": "stdlib", "arrays": "numpy", "math": "sympy", "graphs": "networkx", "dl": "torch"}
FORMAT = 1  # increase it whenever the code below would write something else
PARTS = ("train", "dev", "test")
CAPS = {"train": 300, "dev": 40, "test": 40}  # documents per label; equal caps make chance about 1 / labels
MAX_LABELS, MIN_FILES, MIN_DOCUMENTS = 10, 3, 40
MIN_CHARACTERS, MIN_LETTERS = 60, 40
MASK = "___"
SKIPPED = {"test", "tests", "testing", "benchmarks", "site-packages", "dist-packages", "idlelib", "lib2to3", "_vendor"}
# The label is the first folder of a path (python: email, math: polys, arrays: _core, dl: _dynamo). networkx keeps most of its code in
# algorithms/; its label is the folder below that (isomorphism, tree).
TRANSPARENT = "algorithms"


def package_root(domain: str) -> tuple[Path, str]:
    """The folder and the version of the domain's package, found without importing it."""
    if domain not in DOMAINS:
        raise InputError(f"unknown domain {domain!r}; the known ones are {', '.join(DOMAINS)}")
    package = DOMAINS[domain]
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"]), platform.python_version()
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"domain {domain!r} needs the package {package}, which is missing: pip install {package}")
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return Path(spec.submodule_search_locations[0]), version


def docstrings(source: bytes) -> list[str]:
    """The docstrings in one file, including those passed to add_docstr or add_newdoc; none if the file does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree) if re.search(b"add_(docstr|newdoc)", source) else statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node, clean=False) or "")
        elif isinstance(node, ast.Call) and re.search("add_(docstr|newdoc)", getattr(node.func, "attr", getattr(node.func, "id", ""))):
            for argument in node.args:  # numpy also writes (name, text) pairs
                found += map(_literal, argument.elts if isinstance(argument, ast.Tuple) else [argument])
    found = [inspect.cleandoc(text.encode("utf-8", "ignore").decode()) for text in found]  # no lone surrogates
    return [text for text in found if len(text) >= MIN_CHARACTERS and _letters(text)]


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What ast.walk yields, in its order, but no expressions: they are nine tenths of the nodes, and hold no docstrings."""
    waiting = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for part in ("body", "handlers", "cases", "orelse", "finalbody"):
            waiting.extend(getattr(node, part, ()))


def _literal(node: ast.AST) -> str:
    """The literal part of a string expression; for a `.format(...)` call, the template."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _literal(node.func.value)
    return ""


def _letters(text: str) -> bool:
    return sum(map(str.isalpha, text)) >= MIN_LETTERS


def read_package(root: Path) -> dict[str, list[str]]:
    """Relative path -> its documents, in path order. A document that an earlier file also has is left out."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("test_")]
    seen, documents = set(), {}
    for path in sorted(paths):
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue  # parsing is the slow part
        fresh = [text for text in dict.fromkeys(docstrings(source)) if text not in seen]
        seen.update(fresh)
        if fresh:
            documents[path.relative_to(root).as_posix()] = fresh
    return documents


def label_of(path: str) -> str | None:
    """The sub-package of a file, without the leading underscore of a private sub-package; None at the top level."""
    folders = path.removeprefix(f"{TRANSPARENT}/").split("/")[:-1]
    return folders[0].lstrip("_") if folders else None


def choose_labels(documents: dict[str, list[str]]) -> list[str]:
    """The labels with the most documents, among labels with enough documents and files for three parts."""
    sizes = defaultdict(list)       # of the files of each label
    for path, texts in documents.items():
        sizes[label_of(path)].append(len(texts))
    enough = [x for x in sizes if x and len(sizes[x]) >= MIN_FILES and sum(sizes[x]) >= MIN_DOCUMENTS]
    return sorted(enough, key=lambda label: (-sum(sizes[label]), label))[:MAX_LABELS]


def split_files(sizes: dict[str, int]) -> dict[str, str]:
    """Path -> part for the files of one label, given their document counts.

    Files go, in the order of their hash, to the emptier of dev and test until both are full. Files that would overfill a part by half or
    fill the whole test are skipped. The rest is train. Full means a tenth of the documents, or more if that makes a poor test, but never
    more than a fifth. If nothing fits (a few huge files), the part gets the smallest file."""
    total = sum(sizes.values())
    room = min(max(total / 10, 1.25 * CAPS["test"]), total / 5)
    parts, held = dict.fromkeys(sizes, "train"), {"dev": 0, "test": 0}
    for path in sorted(sizes, key=_hash):
        part = min(held, key=held.get)
        if held[part] < room and sizes[path] <= min(1.5 * room - held[part], CAPS["test"]):
            parts[path] = part
            held[part] += sizes[path]
    for part in held:
        if not held[part] and len(sizes) >= MIN_FILES:
            parts[min((x for x in sizes if parts[x] == "train"), key=sizes.get)] = part
    return parts


def split_package(documents: dict[str, list[str]], labels: list[str]) -> dict[str, str]:
    """Path -> part. The files of each label are split separately; files without a label are split together."""
    groups = defaultdict(dict)
    for path, texts in documents.items():
        label = label_of(path)
        groups[label if label in labels else None][path] = len(texts)
    return {path: part for sizes in groups.values() for path, part in split_files(sizes).items()}


def _hash(text: str) -> str:
    return hashlib.sha256(f"docstrings {text}".encode()).hexdigest()


def masker(package: str, labels: list[str]) -> re.Pattern:
    """A pattern for what gives a label away. Every label is masked in every text: masking only the text's own label would reveal it."""
    variants = sorted({form for label in labels for form in _forms(label)}, key=len, reverse=True)
    words = "|".join(form.replace("_", r"[\s_-]?") for form in variants)
    titles = "|".join(form.title().replace("_", "") for form in variants)
    capitals = "|".join(variants).upper()
    own = "|".join(map(re.escape, labels))
    return re.compile("|".join([
        r"^[ \t]*(?:>>>|\.\.\.)?[ \t]*(?:from[ \t]+[\w.]+[ \t]+import\b|import[ \t]+\w)(?:[^\n(]*\([^)]*\))?.*",
        r":(?:\w+:)?(?:mod|class|func|meth|attr|obj|exc|data|ref|doc):`[^`]*\w[./]\w[^`]*`",
        rf"(?<![\w.]){package}(?:\.\w+){{2,}}",  # sympy.core.add.Add, but not torch.randn
        rf"(?<![\w.])(?:\w+\.)*_?(?:{own})(?:\.\w+)+",
        rf"(?<![A-Za-z])(?i:{words})(?![a-z])",  # a whole word or part of snake_case; the next line: of CamelCase
        rf"(?:{titles}|(?<![A-Z])(?:{capitals}))(?![a-z])",
    ]), re.MULTILINE)


def _forms(label: str) -> set[str]:
    """A label with its singular and plural: matrices, matrix; classes, class; core, cores; centrality, centralities."""
    endings = (("ices", "ix"), ("ies", "y"), ("sses", "ss"), ("ss", "ss"), ("s", ""))
    one = next((label.removesuffix(ending) + singular for ending, singular in endings if label.endswith(ending)), label)
    many = one[:-1] + "ies" if one.endswith("y") else one + ("es" if one.endswith("s") else "s")
    return {label, one, many}


def make_task(documents: dict[str, list[str]], parts: dict[str, str], labels: list[str], mask: re.Pattern) -> dict:
    """Part -> its rows, labels mixed. No masked text is in two parts, has two labels or is in the train corpus. Files take turns, one
    document each, so under the cap of a label no large file crowds out the others."""
    queues = {part: [] for part in PARTS}
    known = defaultdict(set)
    for path, texts in documents.items():
        masked = sorted((mask.sub(MASK, text) for text in texts), key=_hash)
        for turn, text in enumerate(masked):
            known[text].add(label_of(path))
            queues[parts[path]].append((turn, _hash(text), text, label_of(path)))
    seen, task = set(), {part: [] for part in PARTS}
    for part in PARTS:
        counts = Counter()
        for _, _, text, label in sorted(queues[part], key=itemgetter(0, 1)):      # not by label, which may be None
            usable = label in labels and len(known[text]) == 1 and text not in seen and _letters(text)
            if usable and counts[label] < CAPS[part]:
                counts[label] += 1
                task[part].append({"text": text, "label": label})
            seen.add(text)
    return task


def build(domain: str, out: Path) -> dict:
    """Write the domain's corpus and task under `out` unless they are there already. Returns the content of meta.json."""
    root, version = package_root(domain)
    stamp = {"domain": domain, "package": DOMAINS[domain], "version": version, "format": FORMAT}
    final = Path(out) / domain
    if meta := _ready(final, stamp):
        return meta
    documents = read_package(root)
    labels = choose_labels(documents)
    parts = split_package(documents, labels)
    task = make_task(documents, parts, labels, masker(DOMAINS[domain], labels))
    rows = {f"task/{part}": task[part] for part in PARTS} | {"corpus/train": [], "corpus/heldout": []}
    for path, texts in documents.items():
        rows["corpus/train" if parts[path] == "train" else "corpus/heldout"] += [{"text": text} for text in texts]
    meta = stamp | {
        "files": len(documents),
        "corpus": {part: len(rows[f"corpus/{part}"]) for part in ("train", "heldout")},
        "characters": sum(len(text) for texts in documents.values() for text in texts),
        "task": {part: dict(Counter(row["label"] for row in task[part]).most_common()) for part in PARTS},
    }
    with locked(final, wait=True):
        if not _ready(final, stamp):  # another process may have been faster
            with atomic_folder(final) as new:
                for name, items in rows.items():
                    (new / name).parent.mkdir(exist_ok=True)
                    (new / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
                write_json(new / "meta.json", meta)
    return meta


def _ready(final: Path, stamp: dict) -> dict | None:
    """The meta.json in `final`, or None if it is missing, damaged or of other data than `stamp` says."""
    with suppress(InputError):
        meta = read_json(final / "meta.json")
        return meta if stamp.items() <= meta.items() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the docstring data.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("domains", nargs="*", metavar="domain", help=f"of {', '.join(DOMAINS)}; all unless given")
    arguments = parser.parse_args()
    print("domain   version      files   train heldout    MB  labels  task train/dev/test  majority")
    for domain in arguments.domains or DOMAINS:
        meta = build(domain, arguments.out)
        task = {part: sum(counts.values()) for part, counts in meta["task"].items()}
        majority = max(meta["task"]["test"].values(), default=0) / max(task["test"], 1)
        print(f"{domain:8} {meta['version']:12} {meta['files']:5} {meta['corpus']['train']:7} "
              f"{meta['corpus']['heldout']:7} {meta['characters'] / 1e6:5.2f} {len(meta['task']['train']):7} "
              f"{task['train']:11}/{task['dev']}/{task['test']} {majority:9.2f}")


if __name__ == "__main__":
    run(main)
