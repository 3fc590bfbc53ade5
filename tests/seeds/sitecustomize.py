"""Python imports this before any program that has this folder in PYTHONPATH: the tests and the commands that they start (conftest.py).

With RT_TEST_SEED=1 (or 2, ...) every generator that is seeded draws other numbers: weights, heads, toys, samples, orders, masks. What a
test states should hold for any.
"""
import os


def change_seeds(by: int) -> None:
    import numpy as np
    import torch

    generator, seed_all, default_rng, sequence = torch.Generator, torch.manual_seed, np.random.default_rng, np.random.SeedSequence

    class Generator(generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + by)

    torch.Generator = Generator
    torch.manual_seed = lambda seed: seed_all(seed + by)
    np.random.default_rng = lambda seed: default_rng([*np.atleast_1d(seed).tolist(), by])
    np.random.SeedSequence = lambda keys: sequence([*keys, by])


if os.environ.get("RT_TEST_SEED"):
    change_seeds(int(os.environ["RT_TEST_SEED"]))
