"""Files from strangers: no code is run, no memory is allocated for what a file only claims, no path leaves the folder, no network is used
unasked. Every refusal is one sentence, in bounded time and memory."""
import gzip
import json
import lzma
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, bounded, random_base, write_task
from safetensors.torch import load_file, save_file

from rt.deltas import apply, attach, extract
from rt.errors import InputError
from rt.formats.adapters import export_peft
from rt.formats.checkpoint import load_base, read_file, read_tensors, read_torch, save_base
from rt.formats.corpora import build_corpus, read_documents
from rt.formats.delta_files import load_delta, open_delta, save_delta
from rt.formats.files import read_json, read_rows, write_json
from rt.formats.hf import export_hf
from rt.formats.hub import find_dataset, is_hub_id, open_base
from rt.formats.tasks import load_task
from rt.formats.tokenizer import load_tokenizer
from rt.formats.untrusted import JSON_BYTES, LINE_BYTES, header, parse_json
from rt.kinds import DeltaConfig
from rt.model import MaskedLM
from rt.optim import adamw
from rt.runs.config import sentence
from rt.runs.results import best_delta
from rt.speed.dist import load_state


@pytest.fixture(scope="module")
def home(tokenizer, tmp_path_factory) -> Path:
    """M0 (with optimizer state), a delta of each kind that has sizes, and their exports to transformers and PEFT."""
    home, base = tmp_path_factory.mktemp("outside"), random_base(tokenizer)
    model = MaskedLM(base.encoder, base.head)
    optimizer = adamw(model.parameters(), 0.0, 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    save_base(home / "M0", model, tokenizer, {"name": "M0", "number": 0, "step": 1, "parent": None}, optimizer)
    for kind in ("adapter", "lora", "prefix", "full"):
        config = DeltaConfig(kind)
        save_delta(home / kind, extract(attach(base, config, 2, 0), base, config, {"task": "t", "labels": ["no", "yes"]}))
    export_hf(home / "hf", base)
    export_hf(home / "tuned", base, load_delta(home / "full"))
    export_peft(home / "peft", base, "M0", load_delta(home / "lora"))
    return home


def said(call, *arguments) -> str:
    """The sentence that refuses a call, in bounded time and memory."""
    with bounded(), pytest.raises(InputError) as error:
        call(*arguments)
    assert "allocat" not in str(error.value) and "\n" not in sentence(error.value)
    return str(error.value)


def changed(home: Path, what: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / what, tmp_path / "copy"))


def edit(path: Path, change: dict) -> None:
    """Change settings of a JSON file. Its hashes are removed, because a stranger would simply recompute them."""
    write_json(path, {k: v for k, v in read_json(path).items() if k != "sha256"} | change)


# --- code -------------------------------------------------------------------------------------------------------------

class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder, name", [("M0", "optim.pt"), ("hf", "pytorch_model.bin"), ("peft", "adapter_model.bin")])
def test_a_pickle_runs_nothing_wherever_it_lies(home, folder, name, zipped, tmp_path):
    path, bomb = changed(home, folder, tmp_path) / name, {"w": Bomb(tmp_path / "exploded")}
    for weights in path.parent.glob("*model.safetensors"):
        weights.unlink()
    torch.save(bomb, path) if zipped else path.write_bytes(pickle.dumps(bomb))
    base = load_base(home / "M0")
    call = {"M0": lambda: read_torch(path), "hf": lambda: open_base(str(path.parent)), "peft": lambda: open_delta(str(path.parent), base)}
    assert f"{name}: not a weights-only PyTorch file" in said(call[folder])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("value, words", [
    ([1, 2], "something other than named tensors"), ({"a": "b"}, "something other than named tensors"),
    ({1: torch.zeros(2)}, "something other than named tensors"),
    ({"a": torch.zeros(1).expand(10**6, 10**6)}, "larger than what the file holds"),
    ({"a": torch.empty(10**7, 10**7, device="meta")}, "not dense"), ({"a": torch.eye(3).to_sparse()}, "not dense"),
    ({"a": {3}}, "holds a set")], ids=lambda v: type(v).__name__ if not isinstance(v, str) else v)
def test_what_is_no_dict_of_dense_tensors_is_refused(value, words, tmp_path):
    torch.save(value, tmp_path / "x.bin")
    assert words in said(read_file, tmp_path / "x.bin")


def test_a_list_that_names_itself_a_billion_times_is_read_once(tmp_path):
    part = []
    for _ in range(200):
        part = [part, part]
    torch.save({"a": part}, tmp_path / "x.bin")
    assert "something other than named tensors" in said(read_file, tmp_path / "x.bin")


def packed_again(path: Path, out: Path, **change: bytes) -> Path:
    """A torch file with compressed parts, some of them replaced."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if not change else zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change.get(name.partition("/")[2].replace("/", "_").replace(".", "_"), old.read(name)))
    return out


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    torch.save({"w": torch.zeros(5_000_000)}, tmp_path / "plain.bin")
    bomb = packed_again(tmp_path / "plain.bin", tmp_path / "bomb.bin")
    assert bomb.stat().st_size < 10**5 and "its parts are packed" in said(read_file, bomb)


def test_a_torch_file_that_claims_more_than_it_holds(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.bin")
    short = packed_again(tmp_path / "plain.bin", tmp_path / "short.bin", data_0=b"\0" * 8)
    assert "short.bin: not a weights-only PyTorch file" in said(read_file, short)
    whole = (tmp_path / "plain.bin").read_bytes()
    for cut in (1, 10, 100, len(whole) // 2, len(whole) - 1):
        short.write_bytes(whole[:cut])
        assert "short.bin: not a weights-only PyTorch file" in said(read_file, short)


def test_legacy_files_are_read_and_bounded(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_file(tmp_path / "old.bin")["w"].tolist() == [0, 1, 2, 3]
    whole = (tmp_path / "old.bin").read_bytes()
    (tmp_path / "old.bin").write_bytes(whole[:-8])
    assert "old.bin: not a weights-only PyTorch file" in said(read_file, tmp_path / "old.bin")


def test_an_optimizers_state_of_other_parameters_is_refused():
    def optimizer(*shapes):
        found = adamw([torch.nn.Parameter(torch.ones(s)) for s in shapes], 1e-3, 0.0)
        for group in found.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        found.step()
        return found

    mine = optimizer((2, 3), (4,))
    load_state(mine, optimizer((2, 3), (4,)).state_dict())
    states = [optimizer((2, 3)).state_dict(), optimizer((3, 2), (4,)).state_dict(), {"state": {0: 1, 1: {}}}, {}, [1]]
    for state in states:
        assert "not that of this model" in said(load_state, mine, state)
    strange = optimizer((2, 3), (4,)).state_dict()
    strange["param_groups"][0]["lr"] = "high"
    load_state(mine, strange)
    assert mine.param_groups[0]["lr"] == 1e-3       # a file changes no setting


# --- safetensors ------------------------------------------------------------------------------------------------------

def lying(path: Path, head: dict | str | bytes, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = head if isinstance(head, bytes) else (head if isinstance(head, str) else json.dumps(head)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(4,), offsets=(0, 16), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = [        # safetensors finds these itself; the words are its own
    ({"a": entry()}, "header too large", 2**50), ({"a": entry()}, "header too large", 2**63), ({"a": entry()}, "invalid JSON", 0),
    ({"a": entry((4, 2**40))}, "invalid shape", None), ({"a": entry((2**62, 2**62))}, "overflow", None),
    ({"a": entry(offsets=(0, 32))}, "invalid shape", None), ({"a": entry((8,), (0, 32))}, "file not fully covered", None),
    ({"a": entry(), "b": entry()}, "invalid offset", None), ({"a": entry((2,), (8, 16))}, "invalid offset", None),
    ({"a": entry((2,), (0, 8))}, "file not fully covered", None), ({"a": entry((-4,), (0, 16))}, "invalid value: integer `-4`", None),
    ({"a": entry((4.0,))}, "floating point `4.0`", None), ({"a": entry((True,), (0, 4))}, "boolean `true`", None),
    ({"a": entry(offsets=(16, 0))}, "invalid offset", None), ({"a": entry([1] * 10**5)}, "invalid shape", None),
    ({"a": entry(dtype="F99")}, "unknown variant `F99`", None), ({"a": entry(dtype=["F32"])}, "invalid type: sequence", None),
    ('{"a": 1}', "invalid type: integer `1`", None), ("[]", "invalid type: sequence", None), ("[" * 10**5, "invalid type: sequence", None),
    ("{{", "invalid JSON", None), (b"\xff\xfe", "invalid UTF-8", None),
    (f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', "'a' is there twice", None)]     # safetensors would read this


@pytest.mark.parametrize("head, words, length", LIES, ids=range(len(LIES)))
def test_a_header_that_lies_is_refused_before_a_tensor_is_read(head, words, length, tmp_path):
    path = lying(tmp_path / "model.safetensors", head, length=length)
    for read in (header, read_tensors):
        assert f"{path}: not a readable safetensors file" in said(read, path) and words in said(read, path)


def test_the_header_agrees_with_safetensors_own(home):
    for name in ("M0/model.safetensors", "adapter/delta.safetensors", "hf/model.safetensors"):
        assert {k: tuple(v["shape"]) for k, v in header(home / name).items()} == {k: v.shape for k, v in load_file(home / name).items()}


# --- sizes ------------------------------------------------------------------------------------------------------------

ABSURD = [10**9, 2**62, 10**40, 0, -1, 1.5, "4", None, True, [4], {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_len", "pad_id"])
@pytest.mark.parametrize("value", ABSURD, ids=str)
def test_absurd_sizes_of_a_base_are_refused_before_they_are_allocated(home, name, value, tmp_path):
    if (name, value) == ("pad_id", 0):
        value = 599         # this is a token, but the file's positions do not match it
    folder = changed(home, "M0", tmp_path)
    edit(folder / "meta.json", {"encoder": read_json(folder / "meta.json")["encoder"] | {name: value}})
    assert str(folder) in said(load_base, folder)


@pytest.mark.parametrize("name, value", [("dropout", 7), ("dropout", -0.1), ("attention_dropout", "0.1"), ("layer_norm_eps", 0),
                                         ("layer_norm_eps", float("nan")), ("layer_norm_eps", -1e-5), ("layer_norm_eps", 1e30),
                                         ("model_type", 3), ("sep_id", -2), ("sep_id", 10**9), ("sep_id", "2")])
def test_absurd_settings_of_an_encoder_are_named(home, name, value, tmp_path):
    folder = changed(home, "M0", tmp_path)
    edit(folder / "meta.json", {"encoder": read_json(folder / "meta.json")["encoder"] | {name: value}})
    assert f"meta.json: {name} {value!r} is not possible for an encoder" in said(load_base, folder)


@pytest.mark.parametrize("name, value", [("number", "../.."), ("number", 2.5), ("step", -1), ("step", "9"), ("name", ["M0"]), ("stage", 5),
                                         ("domains", ["a"]), ("contents", {"a": 1}), ("trunk", 3), ("recipe", 5)])
def test_absurd_facts_of_a_base_are_named(home, name, value, tmp_path):
    folder = changed(home, "M0", tmp_path)
    edit(folder / "meta.json", {name: value})
    assert f"its {name} is" in said(load_base, folder)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                  "max_position_embeddings", "pad_token_id", "hidden_dropout_prob", "layer_norm_eps", "model_type"])
@pytest.mark.parametrize("value", [7, 10**9, 10**40, -1, "4", None, [4], float("nan")], ids=str)
def test_absurd_settings_of_a_hugging_face_folder(home, name, value, tmp_path):
    if name in ("pad_token_id", "hidden_dropout_prob", "layer_norm_eps") and value in (7, None):
        value = 599     # 7 would only leave fewer positions, and null is the default
    folder = changed(home, "hf", tmp_path)
    write_json(folder / "config.json", read_json(folder / "config.json") | {name: value})
    assert str(folder) in said(open_base, str(folder))


@pytest.mark.parametrize("folder, name", [("adapter", "bottleneck"), ("lora", "r"), ("prefix", "prefix_len")])
@pytest.mark.parametrize("value", ABSURD, ids=str)
def test_absurd_sizes_of_a_delta_are_refused_before_they_are_allocated(home, folder, name, value, tmp_path):
    copy, base = changed(home, folder, tmp_path), load_base(home / "M0")
    edit(copy / "delta.json", {name: value})
    assert said(lambda: apply(base, load_delta(copy)))


@pytest.mark.parametrize("change", [
    {"lora_alpha": "16"}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"target_modules": "query"}, {"target_modules": [["query"]]},
    {"kind": ["lora"]}, {"target_modules": []}, {"kind": "full"}, {"info": {"labels": {"a": 1}}}, {"info": {"labels": ["a"]}},
    {"info": {"labels": ["a", "a"]}},
    {"info": {"labels": ["a", 1]}}, {"info": {"labels": ["a", "b\nc"]}}, {"info": {"labels": []}}, {"info": {"encoder": 5}},
    {"info": {"encoder": {}}}, {"info": {"base": 5}}, {"info": {"tokenizer": None, "vocabulary": []}}, {"info": None}], ids=str)
def test_absurd_facts_of_a_delta(home, change, tmp_path):
    copy, base = changed(home, "lora", tmp_path), load_base(home / "M0")
    info = read_json(copy / "delta.json")["info"]
    edit(copy / "delta.json", change | ({"info": info | change["info"]} if change.get("info") else {}))
    assert said(lambda: apply(base, load_delta(copy)))


@pytest.mark.parametrize("name, tensor", [("head.out.bias", torch.zeros(10**6)), ("head.out.bias", torch.zeros(())),
                                          ("head.x", torch.zeros(2)),
                                          ("head.out.weight", torch.zeros(2, 9)), ("modules.layers.0.qkv.bias", torch.zeros(192)),
                                          ("diffs.layers.0.qkv.bias", torch.zeros(192)), ("modules.layers.9.x", torch.zeros(1)),
                                          ("head.dense.bias", torch.zeros(64, dtype=torch.int64))])
def test_tensors_that_are_not_a_deltas_are_named(home, name, tensor, tmp_path):
    copy, base = changed(home, "lora", tmp_path), load_base(home / "M0")
    save_file(load_file(copy / "delta.safetensors") | {name: tensor}, copy / "delta.safetensors")
    edit(copy / "delta.json", {})
    assert said(lambda: apply(base, load_delta(copy)))


@pytest.mark.parametrize("change", [{"r": 10**9}, {"r": -1}, {"r": 8.5}, {"r": "8"}, {"r": [8]}, {"lora_alpha": float("nan")},
                                    {"lora_alpha": 1e300}, {"lora_alpha": None}, {"peft_type": ["LORA"]}, {"r": True}], ids=str)
def test_absurd_settings_of_an_adapter(home, change, tmp_path):
    copy, base = changed(home, "peft", tmp_path), load_base(home / "M0")
    write_json(copy / "adapter_config.json", read_json(copy / "adapter_config.json") | change)
    assert said(open_delta, str(copy), base)


def test_factors_whose_product_is_larger_than_the_file_are_not_multiplied(home, tmp_path):
    copy, base = changed(home, "peft", tmp_path), load_base(home / "M0")
    factors = {"lora_A.weight": torch.zeros(8, 10**5), "lora_B.weight": torch.zeros(10**5, 8)}
    path = copy / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.classifier.dense.{k}": v for k, v in factors.items()}, path)
    assert "lora_B times lora_A does not have the shape of" in said(open_delta, str(copy), base)


# --- text and JSON ----------------------------------------------------------------------------------------------------

def test_json_is_bounded(tmp_path):
    for text, words in (("[" * 10**5, "nested too deeply"), ('{"a": ' * 10**5, "nested too deeply"), ("9" * 5000, "not valid JSON"),
                        ('{"a": {"b": 1, "b": 2}}', "'b' is there twice"), ('["\\ud800"]', "surrogate"), ("", "not valid JSON"),
                        ("[]", "expected a JSON object")):
        (tmp_path / "x.json").write_text(text)
        assert f"{tmp_path / 'x.json'}: " in said(read_json, tmp_path / "x.json") and words in said(read_json, tmp_path / "x.json")
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(10**9)        # zeros that take no disk space
    assert f"is longer than {JSON_BYTES >> 20} MB" in said(read_json, tmp_path / "x.json")
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in said(read_json, tmp_path / "folder") and "cannot be read" in said(read_json, Path("a\0b"))
    (tmp_path / "rows.jsonl").write_text('{"a": "\u2028"}\n{"b": 1}\n' + "[" * 10**5)
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": "\u2028"}, {"b": 1}]      # the last line may be incomplete
    for line in ("[" * 10**5, "", "5", '{"c": '):
        (tmp_path / "rows.jsonl").write_text(f'{{"a": 1}}\n{line}\n{{"b": 1}}\n')
        assert f"{tmp_path / 'rows.jsonl'}, line 2: is not a row" in said(read_rows, tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.txt.gz", lambda text: gzip.compress(text, 1)),
                                        ("a.txt.xz", lambda text: lzma.compress(text, preset=0))])
def test_a_line_of_100_mb_is_refused_without_being_held(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(b"x" * 10**8))
    with bounded(10, 80), pytest.raises(InputError, match=f"{name}, line 1: is longer than {LINE_BYTES >> 20} MB"):
        list(read_documents(tmp_path / name))


def test_a_tokenizer_is_bounded(home, tmp_path):
    folder = changed(home, "M0", tmp_path)
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["model"]["vocab"]["far"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    assert "its ids go up to 4294967295" in said(load_tokenizer, folder)
    (folder / "tokenizer.json").write_text("[" * 10**5)
    assert "not a tokenizer file" in said(load_tokenizer, folder)
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(10**9)
    assert "too long for a tokenizer" in said(load_tokenizer, folder)


def test_a_million_labels_are_refused(tmp_path):
    rows = [{"text": "x", "label": f"l{i}"} for i in range(6000)]
    task = write_task(tmp_path / "task", {part: rows for part in ("train", "dev", "test")})
    assert "6000 labels, and up to 5000 are supported" in said(load_task, task)


def test_damaged_tokens_in_the_cache_are_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"document {i}\n" for i in range(300)))
    build_corpus("a", tmp_path / "a.txt", tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    for damage in (lambda: (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-4]),
                   lambda: (folder / "train.offsets.npy").write_bytes(b"x"), lambda: (folder / "meta.json").write_text('{"dtype": "O"}')):
        damage()
        assert "are damaged; remove the folder" in said(build_corpus, "a", tmp_path / "a.txt", tokenizer, tmp_path / "cache")


def test_a_name_that_is_not_utf_8_is_refused_before_it_is_recorded(tmp_path, tokenizer):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff.txt"))
    path.write_text("a document\n" * 3)
    assert "c\\udcff.txt: its name is not UTF-8" in sentence(said(build_corpus, "c", path, tokenizer, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


# --- places -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("run", ["../../elsewhere", "/etc", "..", "a/b", 5, None])
def test_a_summary_leads_to_no_delta_outside_its_folder(home, run, tmp_path):
    (tmp_path / "out" / "deltas").mkdir(parents=True)
    shutil.copytree(home / "lora", tmp_path / "elsewhere")
    write_json(tmp_path / "out" / "summary.json", {"rows": [{"run": run, "dev": {"accuracy": 1.0}}]})
    assert str(tmp_path / "out" / "summary.json") in said(best_delta, tmp_path / "out", "")


def test_an_index_that_leads_out_of_the_folder_is_refused(home, tmp_path):
    folder = changed(home, "hf", tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    for places in ({"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": 5}, ["a"], {"a": ".."}):
        write_json(folder / "model.safetensors.index.json", {"weight_map": places})
        assert said(open_base, str(folder))


@pytest.mark.parametrize("name, asks", [
    ("FacebookAI/roberta-base", True), ("runs/M9", False), ("here/M9", False), ("./a/b", False), ("../a", False), ("/a/b", False),
    ("a", False), ("a/b/c", False), ("a/..", False), ("../..", False), ("a/b\n", False), (".a/b", False), ("", False), ("a//b", False)])
def test_what_a_hub_id_is(name, asks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(name) is asks


def test_no_socket_is_opened_for_a_path(home, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    base = open_base(str(home / "M0"))
    open_base(str(home / "hf"))
    open_delta(str(home / "peft"), base)
    for name in ("runs/M9", str(tmp_path / "nothing"), "nowhere", "a/b/c"):
        assert f"{name}: no base there" in said(open_base, name) and "nothing tuned there" in said(open_delta, name, base)


OFFLINE = """
import socket, time
def refuse(*_, **__):
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from rt.runs.config import run
from rt.formats.hub import find_dataset, open_base
started = time.monotonic()
try:
    run(lambda: CALL)
finally:
    assert time.monotonic() - started < 30
"""


@pytest.mark.parametrize("call, name", [(open_base, "nobody/no-such-model"), (find_dataset, "hub:nobody/no-such-data")])
def test_without_a_connection_a_hub_id_is_one_sentence_at_once(call, name, tmp_path):
    assert "offline mode is enabled" in said(call, name)     # set by conftest.py
    code = OFFLINE.replace("CALL", f"{call.__name__}({name!r})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {name}: not a folder here, and not available from the hub (")


def test_a_sentence_is_one_line_whatever_it_quotes():
    assert sentence(InputError("a\nb\x1b[31m\ud800\u2028ü")) == "a\\nb\\x1b[31m\\ud800\\u2028ü"
    assert len(sentence(InputError("x" * 10**6))) < 1100
    assert parse_json("[1, NaN]", "x")[0] == 1


def test_offsets_in_the_cache_that_do_not_rise_are_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"document {i}\n" for i in range(300)))
    build_corpus("a", tmp_path / "a.txt", tokenizer, tmp_path / "cache")
    (file,) = tmp_path.glob("cache/*/train.offsets.npy")
    offsets = np.load(file)
    offsets[1] = offsets[-1]        # the last one, the number of tokens, stays right
    np.save(file, offsets)
    assert "are damaged; remove the folder" in said(build_corpus, "a", tmp_path / "a.txt", tokenizer, tmp_path / "cache")


def test_a_tensor_of_no_part_of_a_delta_is_named(home, tmp_path):
    file = changed(home, "lora", tmp_path) / "delta.safetensors"
    save_file(load_file(file) | {"strange.x": torch.zeros(2)}, file)
    assert "delta.safetensors: unexpected tensor strange.x" in said(load_delta, file.parent)
