"""What a folder is: ours as saved, theirs as transformers and PEFT save them, runs. Nothing is loaded. Damaged or unknown folders."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_base

from rt import deltas, kinds
from rt.errors import InputError
from rt.formats import delta_files
from rt.formats.checkpoint import save_base
from rt.model import PRESETS, Encoder, EncoderConfig, MaskedLM
from rt.report.inspect import SETTINGS, encoder_count, header, inspect, main, settings_of
from rt.runs.config import run

LABELS = [f"label{i}" for i in range(10)]


def kept(folder: Path, tokenizer, seed: int, **meta):
    base = random_base(tokenizer, seed)
    base.fingerprint = save_base(folder, MaskedLM(base.encoder, base.head), tokenizer, meta)
    return base


@pytest.fixture(scope="module")
def run_home(tokenizer, tmp_path_factory) -> Path:
    """M0 -> M1 -> M2 with a snapshot, a delta of M1, and a summary of them all."""
    home, parent = tmp_path_factory.mktemp("inspect") / "run", None
    heldout = {"bio": {"loss": 5.125, "accuracy": 0.25, "predictions": 8}, "rev": {"loss": 6.5, "accuracy": 0.125, "predictions": 8}}
    for i, name in enumerate(("M0", "M1-t00002", "M1", "M2")):
        stage = {} if "-t" in name else {"stage": {"name": name, "steps": 4, "heldout": heldout}}
        base = kept(home / name, tokenizer, i, name=name[:2], domain="rev", step=2 if "-t" in name else 4, parent=parent,
                    argv=["train.py", "--stream", "my texts"], **stage)
        parent = parent if "-t" in name else base.fingerprint
        if name == "M1":
            config = deltas.DeltaConfig("lora", r=4)
            info = {"task": "sick", "labels": LABELS, "seed": 3, "step": 25, "dev": {"accuracy": 0.5, "macro_f1": 0.25},
                    "test": {"accuracy": 0.4375}, "shots": 16, "argv": ["train.py", "--mode", "tune"]}
            delta_files.save_delta(home / "deltas" / "M1-sick", deltas.extract(deltas.attach(base, config, 10, seed=0), base, config, info))
    (home / "metrics.jsonl").write_text('{"stage": "M0", "step": 1, "loss": 6.0}\n' * 3)
    (home / "summary.json").write_text(json.dumps({"stages": [{"name": "M0", "domain": "bio"}], "argv": ["train.py"]}))
    return home


def test_a_base_and_its_lineage(run_home, tokenizer):
    facts, meta = inspect(run_home / "M2"), json.loads((run_home / "M2" / "meta.json").read_text())
    base = random_base(tokenizer)
    encoder, head = (sum(p.numel() for p in module.parameters()) for module in (base.encoder, base.head))
    assert facts["is"] == "a base (rt-base-1)" and f"{encoder + head:,} parameters (encoder {encoder:,})" in facts["size"]
    assert facts["architecture"] == f"roberta, 2 layers x 64, 2 heads, FFN 128, {tokenizer.vocab_size} words, up to 128 tokens"
    assert facts["lineage"] == "M2 <- M1 <- M0 <- a random start" and facts["trained"] == "on rev, 4 steps of 4"
    assert facts["held out"] == "loss (accuracy): bio 5.125 (0.250), rev 6.500 (0.125)"
    assert meta["fingerprint"] in facts["fingerprint"] and tokenizer.fingerprint in facts["fingerprint"]
    assert f"torch {torch.__version__}" in facts["versions"] and facts["made by"] == "train.py --stream 'my texts'"
    assert len(facts) <= 10


def test_a_snapshot_and_a_base_whose_parent_is_elsewhere(run_home, tmp_path):
    snapshot = inspect(run_home / "M1-t00002")
    assert snapshot["lineage"] == "M1-t00002 <- M0 <- a random start" and snapshot["held out"] == "not scored"
    shutil.copytree(run_home / "M2", tmp_path / "alone")
    parent = json.loads((tmp_path / "alone" / "meta.json").read_text())["parent"]
    assert inspect(tmp_path / "alone")["lineage"] == f"alone <- {parent} (not beside it)"
    shutil.copytree(run_home / "M2", run_home / "resume" / "M2-t00004")
    assert inspect(run_home / "resume" / "M2-t00004")["lineage"] == "M2-t00004 <- M1 <- M0 <- a random start"
    shutil.rmtree(run_home / "resume")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "meta.json").write_text("{")     # a broken neighbour is skipped
    assert parent in inspect(tmp_path / "alone")["lineage"]


def test_a_lineage_that_turns_back_on_itself_ends(run_home, tmp_path):
    shutil.copytree(run_home / "M0", tmp_path / "M0")
    meta = json.loads((tmp_path / "M0" / "meta.json").read_text())
    (tmp_path / "M0" / "meta.json").write_text(json.dumps(meta | {"parent": meta["fingerprint"]}))
    assert inspect(tmp_path / "M0")["lineage"].startswith("M0 <- M0")


def test_a_delta_and_the_base_it_was_learned_on(run_home, tokenizer, tmp_path):
    facts = inspect(run_home / "deltas" / "M1-sick")
    encoder = sum(p.numel() for p in random_base(tokenizer).encoder.parameters())
    trained = 2 * 2 * 2 * 4 * 64        # layers, targets, A and B, r, width
    assert facts["is"] == "a delta (rt-delta-1): lora, r 4, lora_alpha 16.0, target_modules query, value"
    assert f"{trained:,} parameters, {trained / encoder:.2%} of the encoder's, and a head of {64 * 64 + 64 + 640 + 10:,}" in facts["size"]
    assert facts["task"] == "sick: 10 labels: " + ", ".join(LABELS[:8]) + " and 2 more"
    assert facts["learned"] == "by tuning, seed 3, 16 examples a label"
    assert facts["dev"] == "accuracy 0.500, macro_f1 0.250, at step 25" and facts["test"] == "accuracy 0.438"
    assert facts["base"].startswith(f"{run_home / 'M1'}; roberta, 2 layers x 64") and facts["made by"] == "train.py --mode tune"
    assert json.loads((run_home / "M1" / "meta.json").read_text())["fingerprint"] in facts["fingerprints"]
    shutil.copytree(run_home / "deltas" / "M1-sick", tmp_path / "a" / "b")
    assert inspect(tmp_path / "a" / "b")["base"].startswith("not found")
    # recycled, and by its config learned on a base in another place
    path = tmp_path / "a" / "b" / "delta.json"
    about = json.loads(path.read_text())
    about["info"] |= {"mode": "init", "labels": [], "shots": None, "config": {"base": str(run_home / "M1")}}
    path.write_text(json.dumps(about))
    facts = inspect(tmp_path / "a" / "b")
    assert facts["learned"] == "by recycling, init, seed 3, all examples" and facts["task"] == "sick: a regression"
    assert facts["base"].startswith(str(run_home / "M1"))
    path.write_text(json.dumps(about | {"info": {**about["info"], "source": "my-finetune"}}))
    assert inspect(tmp_path / "a" / "b")["learned"] == "elsewhere, imported from my-finetune"
    path.write_text(json.dumps(about | {"info": {**about["info"], "config": {"base": "FacebookAI/roberta-base"}}}))
    assert inspect(tmp_path / "a" / "b")["base"].startswith("not found among our bases (learned on FacebookAI/roberta-base); roberta, 2")


def test_an_undefined_score_is_not_called_unscored(run_home, tmp_path):
    folder = shutil.copytree(run_home / "deltas" / "M1-sick", tmp_path / "d")
    facts = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps(facts | {"info": facts["info"] | {"dev": {"pearson": None}, "test": {}}}))
    said = inspect(folder)
    assert said["dev"] == "pearson undefined, at step 25" and said["test"] == "not scored"


def test_the_settings_shown_are_those_that_a_kind_uses(tokenizer):
    assert SETTINGS == {name: kind.settings for name, kind in kinds.KINDS.items() if kind.settings}
    for kind in kinds.KINDS:
        config, more = kinds.DeltaConfig(kind), {"format": "rt-delta-1", "info": {}, "versions": {}, "sha256": {}}
        own = {k: v for k, v in config.used.items() if k != "kind"}
        assert settings_of(asdict(config) | more) == settings_of(config.used | more) == own     # as it is written now, and as before
    of_all = asdict(kinds.DeltaConfig()) | more
    assert settings_of(of_all | {"kind": "a new one", "temperature": 2}) == {"temperature": 2}
    for family in ("roberta", "bert"):
        encoder = Encoder(EncoderConfig(tokenizer.vocab_size, pad_id=tokenizer.pad_id, model_type=family, sep_id=2, **PRESETS["tiny"]))
        assert encoder_count(asdict(encoder.config)) == sum(p.numel() for p in encoder.parameters())


def test_a_run_lists_what_it_holds(run_home, tmp_path):
    facts = inspect(run_home)
    assert facts["is"] == "a run" and facts["deltas"] == "M1-sick" and facts["stages"] == "M0 (bio)" and facts["made by"] == "train.py"
    assert sorted(facts["bases"].split(", ")) == ["M0", "M1", "M1-t00002", "M2"] and facts["rows"] == "3 in metrics.jsonl"
    assert inspect(run_home / "deltas")["is"] == "a run, unfinished or part of one"
    for name in ("M1", "deltas/M1-sick"):       # half written, and about to be replaced
        for suffix in (".part", ".replaced"):
            shutil.copytree(run_home / name, tmp_path / "run" / f"{name}{suffix}")
    shutil.copytree(run_home / "deltas" / "M1-sick", tmp_path / "run" / "deltas" / "b")
    facts = inspect(tmp_path / "run")
    assert facts["deltas"] == "b" and "bases" not in facts
    rows = [{"mode": mode} for mode in ("scratch", "init", "init")]
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows, "argv": ["recycle.py"]}))
    assert inspect(tmp_path)["runs"] == "1 scratch, 2 init"
    for place in (tmp_path / "recipes.png", *(tmp_path / "figures" / name for name in ("convergence.png", "recipes.png"))):    # by plot
        place.parent.mkdir(exist_ok=True)
        place.touch()
    assert inspect(tmp_path)["figures"] == "convergence.png, recipes.png"


def test_checkpoints_of_transformers_and_peft(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = dict(vocab_size=90, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    tuned = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, **names))
    tuned.save_pretrained(tmp_path / "tuned")
    facts = inspect(tmp_path / "tuned")
    assert facts["is"] == "a Hugging Face checkpoint: RobertaForSequenceClassification" and facts["labels"] == "no, maybe, yes"
    assert f"{sum(p.numel() for p in tuned.parameters()):,} parameters" in facts["size"] and "1 weight file" in facts["size"]
    assert facts["architecture"].startswith("roberta, 2 layers x 16, 2 heads, FFN 32, 90 words") and facts["holds"] == "encoder, classifier"
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    masked.save_pretrained(tmp_path / "masked", max_shard_size="10KB")
    facts = inspect(tmp_path / "masked")
    assert f"{sum(p.numel() for p in masked.parameters()):,} parameters" in facts["size"] and facts["holds"] == "encoder, masked-LM head"
    assert len(list((tmp_path / "masked").glob("*.safetensors"))) > 1 and facts["labels"] == "none"
    for path in (tmp_path / "masked").glob("*.safetensors*"):
        path.unlink()
    assert inspect(tmp_path / "masked")["holds"] == "no weights"
    torch.save({}, tmp_path / "masked" / "pytorch_model.bin")
    assert inspect(tmp_path / "masked")["holds"] == "unknown: not in safetensors' format"
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=32, use_rslora=True, target_modules=["query", "value"])
    peft.get_peft_model(tuned, lora).save_pretrained(tmp_path / "peft")
    facts = inspect(tmp_path / "peft")
    assert facts["is"] == "a PEFT adapter: LORA, SEQ_CLS" and facts["settings"].startswith("r 4, lora_alpha 32, rsLoRA True")
    assert facts["target"] == "modules query, value" and "classifier" in facts["saved"]
    assert f"{2 * 2 * 2 * 4 * 16 + 16 * 16 + 16 + 3 * 16 + 3:,} parameters" in facts["size"]


def test_no_tensor_is_read_and_torch_not_imported(run_home, tmp_path):
    shutil.copytree(run_home / "M0", tmp_path / "M0")
    path = tmp_path / "M0" / "model.safetensors"
    size = path.stat().st_size
    start = int.from_bytes(path.read_bytes()[:8], "little") + 8
    with path.open("r+b") as file:
        file.truncate(start)
        file.truncate(size)     # of its original size, with only zeros after the header
    assert inspect(tmp_path / "M0")["size"] == inspect(run_home / "M0")["size"]
    code = f"import sys; from rt.report.inspect import main; main([{str(run_home / 'M0')!r}]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                         env={k: v for k, v in os.environ.items() if k != "RT_TEST_SEED"}).stdout      # this one loads torch
    assert out.splitlines()[0] == f"{run_home / 'M0'}: a base (rt-base-1)" and out.splitlines()[-1] == "False"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: b"\xff" * 100,
                                    lambda data: (2).to_bytes(8, "little") + b"[]", lambda data: (9).to_bytes(8, "little") + b'{"a": {}}'])
def test_a_damaged_file_is_one_sentence(damage, run_home, tokenizer, tmp_path):
    shutil.copytree(run_home / "M0", tmp_path / "M0")
    path = tmp_path / "M0" / "model.safetensors"
    assert header(path)["head.bias"].items() > {"dtype": "F32", "shape": [tokenizer.vocab_size]}.items()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="M0/model.safetensors: not a readable safetensors file"):
        inspect(tmp_path / "M0")


@pytest.mark.parametrize("arguments, words", [
    ([], "what? python -m rt.report.inspect PATH"), (["nowhere"], "nowhere: nothing known here"), (["empty"], "empty: nothing known here"),
    (["corpus"], "nothing known here"), (["hollow"], "model.safetensors: there is no such file"), (["bad"], "not valid JSON"),
    (["odd"], "its JSON does not hold what it should")])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, run_home, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, file, text in (("empty", "notes.txt", ""), ("corpus", "meta.json", '{"source": "x"}'), ("bad", "delta.json", "{"),
                             ("hollow", "meta.json", '{"encoder": {}}'), ("odd", "delta.json", '{"info": []}')):
        Path(name).mkdir()
        (Path(name) / file).write_text(text)
    shutil.copy(run_home / "deltas" / "M1-sick" / "delta.safetensors", "odd")
    with pytest.raises(SystemExit) as end:
        run(lambda: main(arguments))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1


def test_several_paths_are_told_one_after_the_other(run_home, capsys):
    main([str(run_home), str(run_home / "M0")])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{run_home}: a run" and f"{run_home / 'M0'}: a base (rt-base-1)" in said
    assert all(line.startswith("  ") for line in said if not line.startswith(str(run_home)))


def test_verify_hashes_a_run_again_and_names_what_differs(run_home, tmp_path, capsys):
    run_ = shutil.copytree(run_home, tmp_path / "run")
    main(["--verify", str(run_)])
    assert capsys.readouterr().out.count("as it was written") == 5      # four bases, one delta
    for name, change in (("M1", lambda w: w[:-1] + bytes([w[-1] ^ 1])), ("M2", lambda w: b"")):
        path = run_ / name / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    (run_ / "M0" / "meta.json").unlink()
    meta = json.loads((run_ / "M1-t00002" / "meta.json").read_text())
    (run_ / "M1-t00002" / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "sha256"}))
    facts = run_ / "deltas" / "M1-sick" / "delta.json"
    facts.write_text(facts.read_text().replace('"label3"', '"label4"'))
    with pytest.raises(SystemExit) as end:
        main(["--verify", str(run_)])
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert end.value.code == 1 and said == {
        str(run_ / "M0"): f"DIFFERS: {run_ / 'M0' / 'meta.json'}: there is no such file", str(run_ / "M1"): "DIFFERS: model.safetensors",
        str(run_ / "M1-t00002"): "has no hashes: written before there were any", str(run_ / "M2"): "DIFFERS: model.safetensors",
        str(run_ / "deltas" / "M1-sick"): "DIFFERS: delta.json"}
    with pytest.raises(InputError, match="no base or delta of ours there"):
        main(["--verify", str(tmp_path / "nothing")])
    with pytest.raises(InputError, match=f"^{tmp_path / 'typo'}: no base or delta"):
        main(["--verify", str(run_), str(tmp_path / "typo")])
    assert "DIFFERS" in capsys.readouterr().out     # of the other, all the same


@pytest.mark.parametrize("facts", ["{}", '{"format": [1]}', '{"format": "rt-base-2"}'])
def test_verify_reports_facts_that_are_of_no_known_format(run_home, facts, tmp_path, capsys):
    run_ = shutil.copytree(run_home, tmp_path / "run")
    broken = [run_ / "M1" / "meta.json", run_ / "deltas" / "M1-sick" / "delta.json"]
    for path in broken:
        path.write_text(facts)
    for beside in ("theirs", "tokens", "M9.part"):       # a Hugging Face folder, a corpus, a half-written folder
        (run_ / beside).mkdir()
        (run_ / beside / "meta.json").write_text(facts)
        if beside != "tokens":
            (run_ / beside / "model.safetensors").touch()
    (run_ / "theirs" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--verify", str(run_)])
    said = capsys.readouterr().out
    assert said.count("DIFFERS") == 2 and said.count("as it was written") == 3
    assert all(f"{path.parent}: DIFFERS: {path.name} is not of a base or delta (format " in said for path in broken)


def test_bases_are_listed_in_the_order_in_which_they_were_made_and_a_chain_leads_to_one(run_home, tmp_path):
    run_ = shutil.copytree(run_home, tmp_path / "run")
    for time, name in enumerate(("M2", "M0", "M1", "M1-t00002")):
        os.utime(run_ / name, (time, time))
    assert inspect(run_)["bases"] == "M2, M0, M1, M1-t00002"
    folder = shutil.copytree(run_home / "deltas" / "M1-sick", tmp_path / "a" / "b" / "d")
    facts = json.loads((folder / "delta.json").read_text())
    facts["info"]["config"] = {"chain": [str(run_ / "M0"), str(run_ / "M1")]}
    (folder / "delta.json").write_text(json.dumps(facts))
    assert inspect(folder)["base"].startswith(str(run_ / "M1"))


def test_shots_of_a_regression_are_examples_not_examples_a_label(run_home, tmp_path):
    folder = shutil.copytree(run_home / "deltas" / "M1-sick", tmp_path / "d")
    facts = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps(facts | {"info": facts["info"] | {"labels": []}}))
    assert inspect(folder)["learned"] == "by tuning, seed 3, 16 examples"
