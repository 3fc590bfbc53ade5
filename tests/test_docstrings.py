"""The embedded data: what is read, how it is split, what is masked, and that a second build does nothing."""
import ast
import json
import re
from pathlib import Path

import pytest

from data import docstrings
from rt.errors import InputError

TEXT = "This sentence number {} is long enough to be kept as one document of its own."


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Path:
    pytest.importorskip("networkx")
    out = tmp_path_factory.mktemp("data")
    docstrings.build("graphs", out)
    return out / "graphs"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def task(folder: Path) -> dict[str, list[dict]]:
    return {part: rows(folder / "task" / f"{part}.jsonl") for part in docstrings.PARTS}


def fake_package(tmp_path: Path, monkeypatch) -> None:
    """Five files in each of `ovens` and `tables`, with ten documents per file. Every sentence names its file."""
    for label in ("ovens", "tables"):
        for file in range(5):
            path = tmp_path / "fake_kitchen" / label / f"file{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            functions = (f'def f{n}():\n    """{TEXT.format(f"{label[0]}{file}x{n}")} An {label[:-1]}.\n"""\n'
                         for n in range(10))
            path.write_text("raise RuntimeError('imported')\n" + "".join(functions))
    (tmp_path / "fake_kitchen" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setitem(docstrings.DOMAINS, "kitchen", "fake_kitchen")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_package_is_read_without_importing_and_split_by_file(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch)
    counts = docstrings.build("kitchen", tmp_path / "out")
    assert counts["corpus"] == {"train": 60, "heldout": 40} and counts["version"] == "unknown"
    files = {part: {re.search(r"number (\w+)x", row["text"])[1] for row in rows_of}
             for part, rows_of in task(tmp_path / "out" / "kitchen").items()}
    assert {part: len(names) for part, names in files.items()} == {"train": 6, "dev": 2, "test": 2}
    assert len(set.union(*files.values())) == 10
    corpus = (tmp_path / "out" / "kitchen" / "corpus" / "train.jsonl").read_text()
    assert set(re.findall(r"number (\w+)x", corpus)) == files["train"]


def test_docstrings_given_to_calls_are_read():
    long = TEXT.format("one")
    torch_s = f'add_docstr(torch.f, r"""{long} {{input}}""" + "end".format(**a))'
    assert docstrings.docstrings(torch_s.encode()) == [f"{long} {{input}}end"]
    assert docstrings.docstrings(f'np.add_newdoc("m", "f", ("g", "{long}"))'.encode()) == [long]
    assert docstrings.docstrings(f'print("{long}")'.encode()) == []
    assert docstrings.docstrings(b'def broken(:\n  """' + long.encode() + b'"""') == []


def test_files_of_very_unequal_size_still_make_three_parts():
    parts = docstrings.split_files({"huge": 900, "large": 500, "small": 300})
    assert parts["huge"] == "train" and sorted(parts.values()) == ["dev", "test", "train"]
    mixed = docstrings.split_files({f"{size} {n}": size for size in (60, 10) for n in range(20)})
    assert {part for path, part in mixed.items() if path.startswith("60")} == {"train"}
    even = docstrings.split_files({f"file{n}": 10 for n in range(100)})
    assert [list(even.values()).count(part) for part in docstrings.PARTS] == [80, 10, 10]


@pytest.mark.parametrize("text, masked", [
    ("A Matrix, matrices and sub_matrix_of", "A ___, ___ and sub_____of"),
    ("ImmutableMatrixBase of matrixes_", "Immutable___Base of matrixes_"),
    ("see sympy.sets.fancy.Range, x.polys.rings.ring", "see ___, ___"),
    ("A polynomial, torch.randn and metapolys", "A polynomial, torch.randn and metapolys"),
    (">>> from sympy import (a,\n... b)\n>>> import sympy\n>>> f(a)", "___\n___\n>>> f(a)"),
    (":func:`~sympy.sets.f` and :func:`f`, :math:`1.5`", "___ and :func:`f`, :math:`1.5`"),
])
def test_what_gives_a_label_away_is_masked(text, masked):
    assert docstrings.masker("sympy", ["polys", "matrices"]).sub("___", text) == masked


def test_texts_that_masking_makes_equal_stay_in_one_part_and_have_one_label():
    same, both, own = (TEXT.format(word) for word in ("same", "both", "own"))
    documents = {"ovens/a.py": [f"oven {same}", f"oven {both}"], "tables/a.py": [f"oven {both}", f"table {own}"],
                 "ovens/b.py": [f"ovens {same}"], "chairs/a.py": [f"Table {own}"]}
    parts = dict.fromkeys(documents, "train") | {"ovens/b.py": "test"}
    found = docstrings.make_task(documents, parts, ["ovens", "tables"], docstrings.masker("p", ["ovens", "tables"]))
    assert found == {"train": [{"text": f"___ {same}", "label": "ovens"}], "dev": [], "test": []}


def test_a_masked_text_may_be_in_a_file_with_a_label_and_in_one_without():
    documents = {"top.py": [TEXT.format("table")], "ovens/a.py": [TEXT.format("oven")]}
    parts, mask = dict.fromkeys(documents, "train"), docstrings.masker("p", ["ovens", "tables"])
    assert docstrings.make_task(documents, parts, ["ovens", "tables"], mask) == {"train": [], "dev": [], "test": []}


def test_no_text_is_in_two_parts_or_under_two_labels(graphs):
    parts = task(graphs)
    labels = {part: {row["label"] for row in found} for part, found in parts.items()}
    assert labels["train"] == labels["dev"] == labels["test"] and len(labels["test"]) >= 3
    texts = [row["text"] for found in parts.values() for row in found]
    assert len(texts) == len(set(texts)) > 500
    train, heldout = ({row["text"] for row in rows(graphs / "corpus" / f"{x}.jsonl")} for x in ("train", "heldout"))
    assert heldout and not train & heldout
    mask = docstrings.masker("networkx", sorted(labels["test"]))
    read = {mask.sub("___", text) for text in train}
    assert not any(row["text"] in read for part in ("dev", "test") for row in parts[part])


def test_no_label_survives_in_a_real_text(graphs):
    found = [row for part in task(graphs).values() for row in part]
    labels = "|".join({row["label"].replace("_", "[ _]") for row in found})
    for row in found:
        assert not re.search(rf"(?<![A-Za-z])({labels})(?![A-Za-z])", row["text"], re.IGNORECASE), row


def test_a_second_build_does_nothing_and_a_new_format_builds_again(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch)
    first = docstrings.build("kitchen", tmp_path / "out")
    train = tmp_path / "out" / "kitchen" / "task" / "train.jsonl"
    before, text = train.stat().st_mtime_ns, train.read_text()
    monkeypatch.setattr(docstrings, "read_package", lambda root: pytest.fail("read again"))
    assert docstrings.build("kitchen", tmp_path / "out") == first and train.stat().st_mtime_ns == before
    monkeypatch.undo()
    fake_package(tmp_path, monkeypatch)
    monkeypatch.setattr(docstrings, "FORMAT", docstrings.FORMAT + 1)
    train.write_text("")
    assert docstrings.build("kitchen", tmp_path / "out")["format"] == docstrings.FORMAT
    for damaged in ("{", "[]", ""):
        (tmp_path / "out" / "kitchen" / "meta.json").write_text(damaged)
        assert docstrings.build("kitchen", tmp_path / "out")["format"] == docstrings.FORMAT
    assert train.read_text() == text and [p.name for p in (tmp_path / "out").iterdir()] == ["kitchen"]


def test_an_unknown_domain_or_missing_package_is_a_usage_error(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'chess'.*graphs"):
        docstrings.build("chess", tmp_path)
    monkeypatch.setitem(docstrings.DOMAINS, "chess", "no_such_package_here")
    with pytest.raises(InputError, match="pip install no_such_package_here"):
        docstrings.build("chess", tmp_path)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="kitchen: cannot be made .a file is in its way"):
        docstrings.build("kitchen", tmp_path / "file" / "cache")
    assert (tmp_path / "file").read_text() == "precious"


def test_tests_are_no_documents(tmp_path):
    for name in ("a/b.py", "a/tests/c.py", "a/test_d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""{TEXT.format(name)}"""\n')
    assert [*docstrings.read_package(tmp_path)] == ["a/b.py"]


def test_short_texts_are_no_documents_and_async_functions_have_some():
    assert docstrings.docstrings(b'"""' + b"x" * 59 + b'"""') == docstrings.docstrings(b'"""' + b"- 0 " * 30 + b'"""') == []
    assert docstrings.docstrings(f'async def f():\n    """{TEXT}"""'.encode()) == [TEXT]


def test_labels_are_sub_packages():
    files = ("x.py", "_core/x.py", "algorithms/tree/sub/x.py", "algorithms/x.py")
    assert [docstrings.label_of(file) for file in files] == [None, "core", "tree", None]


def test_a_label_has_a_cap():
    documents = {"ovens/a.py": [TEXT.format(i) for i in range(50)]}
    task = docstrings.make_task(documents, {"ovens/a.py": "test"}, ["ovens"], docstrings.masker("p", ["ovens"]))
    assert len(task["test"]) == docstrings.CAPS["test"] == 40


def test_the_largest_ten_labels_are_taken():
    many = {f"l{i:02}/{file}.py": ["x"] * (20 + i) for i in range(12) for file in range(3)}
    others = {f"few/{file}.py": ["x"] * 50 for file in range(2)} | {f"short/{file}.py": ["x"] * 13 for file in range(3)}
    assert docstrings.choose_labels(many | others | {"top.py": ["x"] * 999}) == [f"l{i:02}" for i in range(11, 1, -1)]


def test_what_is_walked_without_expressions_is_in_the_order_of_all_nodes():
    tree = ast.parse(Path(ast.__file__).read_text() + """
class A:
    for x in []:
        def loop(): pass
    else:
        def loop_else(): pass
    try:
        def tried(): pass
    except ValueError:
        def handler(): pass
    else:
        async def try_else(): pass
    finally:
        class Final: pass
    with open("") as f:
        match f:
            case 1:
                def case(): pass
""")
    found, kinds = [*docstrings.statements(tree)], (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert [x for x in found if isinstance(x, kinds)] == [x for x in ast.walk(tree) if isinstance(x, kinds)]
    assert not any(isinstance(x, ast.expr) for x in found)
