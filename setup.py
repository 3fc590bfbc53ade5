"""pip install -e .            (scripts are run from the checkout)
pip install -e '.[test]'    what the tests need; [parquet]: tasks and corpora of it; [plot]: figures; [tensorboard]: its events;
                            [bench]: the peers of measurements

What is allowed stands here, what was tested in requirements.txt and tests/requirements.txt: pip install -r requirements.txt -e .
"""
from setuptools import setup

setup(
    name="recyclable-tuning",
    version="0.1.0",
    description="Recyclable tuning for continual pre-training: a minimal, from-scratch research codebase",
    packages=["rt", "rt.formats", "rt.runs", "rt.speed", "rt.report", "kernels"],
    python_requires=">=3.10",
    # filelock: before 3.30, a process that is refused a lock empties what its holder wrote into the file
    install_requires=["torch>=2.8", "numpy>=1.26", "tokenizers>=0.20", "tqdm", "safetensors>=0.4", "filelock>=3.30"],
    extras_require={
        # triton is what the installed torch names; one built for CPUs names none, and then the tests' interpreter needs some.
        # With triton up to 3.6 and numpy 2.4, that cannot read a loop bound from memory (tests/test_packaging.py): hence the one cap
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.5", "transformers>=4.50", "matplotlib>=3.8",
                 "pyarrow>=14", "tensorboard>=2.16", "triton>=3.4; platform_system == 'Linux'", "numpy<2.4"],
        "parquet": ["pyarrow>=14"],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.16"],
        "bench": ["transformers>=4.50", "peft>=0.14", "liger-kernel>=0.6; platform_system == 'Linux'"],
    },
)
