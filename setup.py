"""pip install -e .            (scripts are run from the checkout)
pip install -e '.[test]'    for the tests; [parquet]: tasks and corpora in Parquet; [plot]: figures; [tensorboard]: its event files;
                            [bench]: the libraries that benchmarks compare with

This file has the allowed versions, requirements.txt and tests/requirements.txt the tested ones: pip install -r requirements.txt -e .
"""
from setuptools import setup

setup(
    name="recyclable-tuning",
    version="0.1.0",
    description="Recyclable tuning for continual pre-training: a minimal, from-scratch research codebase",
    packages=["rt", "rt.formats", "rt.runs", "rt.speed", "rt.report", "kernels"],
    python_requires=">=3.10",
    # filelock: before 3.30, a process that is refused a lock erases what the lock's holder wrote into the file
    install_requires=["torch>=2.8", "numpy>=1.26", "tokenizers>=0.20", "tqdm", "safetensors>=0.4", "filelock>=3.30"],
    extras_require={
        # triton: the version comes with the installed torch; a torch built for CPUs brings none, and the tests' interpreter needs one.
        # numpy is capped: with 2.4, the interpreter up to triton 3.6 cannot read a loop bound from memory (tests/test_packaging.py)
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.5", "transformers>=4.50", "matplotlib>=3.8",
                 "pyarrow>=14", "tensorboard>=2.16", "triton>=3.4; platform_system == 'Linux'", "numpy<2.4"],
        "parquet": ["pyarrow>=14"],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.16"],
        "bench": ["transformers>=4.50", "peft>=0.14", "liger-kernel>=0.6; platform_system == 'Linux'"],
    },
)
