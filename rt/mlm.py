"""Masked language modelling: which tokens are predicted and what stands in their place (Devlin et al., 2019: 80/10/10)."""
import numpy as np

from rt.config import UsageError
from rt.tokenizer import Tokenizer


class Masker:
    """Predicts exactly `count` tokens a row, so that shapes never change; special tokens are never chosen."""

    def __init__(self, tokenizer: Tokenizer, count: int):
        self.count, self.mask_id = count, tokenizer.mask_id
        self.is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.is_special[tokenizer.special_ids] = True
        self.regular = np.flatnonzero(~self.is_special)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids (R,) -> masked ids (R,), chosen rows (count,) in order, their true tokens (count,)."""
        candidates = np.flatnonzero(~self.is_special[ids])
        if len(candidates) < self.count:
            raise UsageError(f"a row of {len(ids)} tokens has {len(candidates)} that can be predicted, {self.count} are to "
                             "be: its documents are too short for this --mask_rate")
        rows = np.sort(rng.choice(candidates, self.count, replace=False))
        draw = rng.random(self.count)
        random_tokens = rng.choice(self.regular, self.count)
        masked = ids.copy()
        masked[rows] = np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, random_tokens, ids[rows]))
        return masked, rows, ids[rows]
