"""pip install -e .            (scripts are run from the checkout)
pip install -e '.[test]'    what the tests need; [plot]: figures; [bench]: the peers that are measured against
"""
from setuptools import setup

setup(
    name="recyclable-tuning",
    version="0.1.0",
    description="Recyclable tuning for continual pre-training: a minimal, from-scratch research codebase",
    packages=["rt", "rt.formats", "rt.runs", "rt.speed", "rt.report", "kernels"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8,<2.14",
        # each torch is built against one triton (2.8: 3.4 ... 2.13: 3.7); a later one breaks torch.compile
        "triton>=3.4,<3.8; platform_system == 'Linux'",
        # with numpy 2.4, Triton's interpreter cannot read a loop bound from memory (tests/test_packaging.py)
        "numpy>=1.26,<2.4",
        "tokenizers>=0.20",
        "tqdm",
        "safetensors>=0.4",
        # a process that is refused leaves what the lock says of its holder
        "filelock>=3.30",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.5,<1", "transformers>=4.50", "matplotlib>=3.8"],
        "plot": ["matplotlib>=3.8"],
        "bench": ["transformers>=4.50", "peft>=0.14", "liger-kernel>=0.6; platform_system == 'Linux'"],
    },
)
