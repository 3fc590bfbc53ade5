"""Bases on disk: round trip, recorded facts, damaged and foreign folders named in one sentence, folders written atomically."""
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from rt.errors import InputError
from rt.formats import checkpoint
from rt.formats.atomic import atomic_folder
from rt.formats.checkpoint import fingerprint, load_base, save_base
from rt.formats.hub import open_base
from rt.model import MaskedLM


@pytest.fixture
def saved(base, tmp_path):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {"name": "M0", "parent": None})
    return tmp_path / "M0"


def test_round_trip(saved, base):
    again = open_base(str(saved))
    assert again.fingerprint == base.fingerprint == fingerprint(again.encoder) and again.encoder.config == base.encoder.config
    assert all(torch.equal(a, b) for a, b in zip(again.head.state_dict().values(), base.head.state_dict().values()))
    assert again.tokenizer.fingerprint == base.tokenizer.fingerprint
    assert {"fingerprint", "parent", "tokenizer", "versions", "encoder"} <= set(again.meta)


def test_the_fingerprint_is_of_the_content(base, other_base):
    assert base.fingerprint != other_base.fingerprint
    before = fingerprint(base.encoder)
    with torch.no_grad():
        base.encoder.layers[1].qkv.bias[3] += 1e-6
    assert fingerprint(base.encoder) != before


def test_damage_is_named(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
        load_base(saved)
    file.write_bytes(whole)
    meta = json.loads((saved / "meta.json").read_text())
    meta["encoder"]["num_layers"] += 1
    (saved / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="do not fit the model"):
        load_base(saved)
    (saved / "meta.json").write_text("{")
    with pytest.raises(InputError, match="meta.json: not valid JSON"):
        load_base(saved)


def test_what_is_no_base(tmp_path):
    with pytest.raises(InputError, match="no base there"):
        open_base(str(tmp_path))
    with pytest.raises(InputError, match="not a folder here, and not available from the hub"):
        open_base("nobody/no-such-model")       # conftest forbids the network
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    with pytest.raises(InputError, match="model_type 'electra' is not supported"):
        open_base(str(tmp_path))


def test_a_pickle_that_asks_for_code_is_refused(tmp_path, tokenizer):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'exploded')!r}, 'w')",)

    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "roberta", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "max_position_embeddings": 10}))
    with open(tmp_path / "pytorch_model.bin", "wb") as f:
        pickle.dump({"w": Bomb()}, f)
    with pytest.raises(InputError, match="not a weights-only PyTorch file"):
        open_base(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "x") as new:
        (new / "a").write_text("1")
        assert not (tmp_path / "x").exists()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x") as new:
        (new / "a").write_text("2")
        raise RuntimeError
    assert (tmp_path / "x" / "a").read_text() == "1"
    with atomic_folder(tmp_path / "x") as new:
        (new / "b").write_text("3")
    assert [f.name for f in (tmp_path / "x").iterdir()] == ["b"] and not (tmp_path / "x.replaced").exists()


def test_the_fingerprint_is_of_names_and_shapes_too():
    found = {fingerprint(torch.nn.ParameterDict({name: torch.ones(shape)})) for name, shape in (("a", (2, 2)), ("b", (2, 2)), ("a", (4,)))}
    assert len(found) == 3


def test_weights_of_a_checkpoint_without_hashes_are_checked_by_the_fingerprint(tmp_path, base):
    save_base(tmp_path / "M0", MaskedLM(base.encoder, base.head), base.tokenizer, {})
    meta, file = tmp_path / "M0" / "meta.json", tmp_path / "M0" / "model.safetensors"
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if k != "sha256"}))
    assert load_base(tmp_path / "M0").fingerprint == base.fingerprint
    save_file({k: v + 0.5 for k, v in load_file(file).items()}, file)
    with pytest.raises(InputError, match="meta.json was written for other weights"):
        load_base(tmp_path / "M0")


def test_the_room_that_a_checkpoint_needs_is_for_the_optimizers_state_too(tmp_path, base, monkeypatch):
    asked, model = [], MaskedLM(base.encoder, base.head)
    monkeypatch.setattr(checkpoint, "atomic_folder", lambda folder, needs: asked.append(needs) or atomic_folder(folder, needs=needs))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    for state in ((), (optimizer,), (optimizer, {"before": [torch.zeros(1000)]})):
        save_base(tmp_path / "M0", model, base.tokenizer, {}, *state)
    assert asked[1] >= asked[0] + 2 * sum(p.nbytes for p in model.parameters()) and asked[2] == asked[1] + 4000
