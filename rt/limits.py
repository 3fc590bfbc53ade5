"""Types with limits for annotating settings, as in `lr: Positive = 1e-3`. rt/runs/config.py checks flags against them."""
from typing import Annotated, Any, Callable, NamedTuple


class Limit(NamedTuple):
    """Used as Annotated[type, Limit(...)]. If `holds` is false for a value, the value is refused with the message `sentence`."""
    holds: Callable[[Any], bool]
    sentence: str


ABOVE_ZERO = Limit(lambda v: v > 0, "`{name}` {value}: must be above zero")
NOT_NEGATIVE = Limit(lambda v: v >= 0, "`{name}` {value}: must not be negative")
SEEDS = "seeds {value}: must be whole numbers from 0 on, at least one"      # NumPy's generators take no negative seeds

Positive = Annotated[float, ABOVE_ZERO]
PositiveInt = Annotated[int, ABOVE_ZERO]
NonNegative = Annotated[float, NOT_NEGATIVE]
NonNegativeInt = Annotated[int, NOT_NEGATIVE]
Share = Annotated[float, Limit(lambda v: 0 <= v <= 1, "`{name}` {value}: must lie between 0 and 1")]
PositiveShare = Annotated[Share, ABOVE_ZERO]
ShareBelowOne = Annotated[float, Limit(lambda v: 0 <= v < 1, "`{name}` {value}: must be at least 0 and below 1")]
Seed = Annotated[int, Limit(lambda v: v >= 0, SEEDS.replace("{value}", "[{value}]"))]
Seeds = Annotated[tuple[int, ...], Limit(lambda v: bool(v) and min(v) >= 0, SEEDS)]
SeqLen = Annotated[int, Limit(lambda v: v >= 8, "`{name}` {value}: must be 8 or more")]     # 8: a pair's special tokens and some text
