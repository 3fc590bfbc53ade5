"""The cases of bench.kernels, most important first."""


def attention(tokens: int, S: int, ragged: bool = False, dropout: float = 0.0, D: int = 64, kernel: str = "attention") -> dict:
    return {"kernel": kernel, "tokens": tokens, "S": S, "H": 768 // D, "D": D, "ragged": ragged, "dropout": dropout}


def kd(R: int, C: int) -> dict:
    return {"kernel": "kd_loss", "R": R, "C": C}


def linear(kernel: str, N: int, V: int = 50265, d: int = 768) -> dict:
    return {"kernel": kernel, "N": N, "V": V, "d": d}


def norm(kernel: str, N: int, dropout: float, d: int = 768) -> dict:
    return {"kernel": kernel, "dropout": dropout, "N": N, "d": d}


GPU_CASES = [
    *(attention(n, 512, ragged, p) for p in (0.0, 0.1) for ragged in (False, True) for n in (16384, 32768)),
    linear("linear_kd", 4096), linear("linear_kd", 16384), kd(4096, 50265), kd(64, 20), kd(4096, 1000), kd(16384, 50304), kd(16, 3),
    attention(16384, 512, kernel="attention_kd"), attention(16384, 512, True, kernel="attention_kd"),
    linear("linear_cross_entropy", 2458),
    {"kernel": "hidden_mse", "B": 64, "L": 13, "d": 768},
    norm("add_norm", 16384, 0.1), norm("add_norm", 16384, 0.0), norm("dropout", 16384, 0.1),
    attention(16384, 512, D=128), linear("linear_kd", 2458), linear("linear_cross_entropy", 16384), linear("linear_cross_entropy", 4096),
    *(attention(n, S, ragged, p) for p in (0.0, 0.1) for n in (16384, 32768) for S in (1024, 256, 128, 4096) for ragged in (False, True)),
    attention(16384, 2048, D=128),
]
CPU_CASES = [
    *(attention(256, 64, ragged, p) | {"H": 2} for p in (0.0, 0.1) for ragged in (False, True)),
    linear("linear_kd", 96, 211, 32), linear("linear_cross_entropy", 96, 211, 32), kd(64, 1001), kd(16, 3),
    *(attention(256, 64, ragged, kernel="attention_kd") | {"H": 2} for ragged in (False, True)),
    {"kernel": "hidden_mse", "B": 8, "L": 3, "d": 48},
    norm("add_norm", 96, 0.1, 48), norm("add_norm", 96, 0.0, 48), norm("dropout", 96, 0.1, 48),
]


def cases(cuda: bool, only: tuple[str, ...], quick: bool) -> list[dict]:
    """The cases of the kernels in `only` (empty: of all kernels), in order; on a GPU, `quick` takes two per kernel."""
    chosen = [case for case in (GPU_CASES if cuda else CPU_CASES) if not only or case["kernel"] in only]
    if cuda and quick:
        chosen = [case for i, case in enumerate(chosen) if sum(c["kernel"] == case["kernel"] for c in chosen[:i]) < 2]
    return chosen


def small(case: dict) -> dict:
    """The smaller case that is checked against float64 in place of `case`."""
    if "tokens" in case:
        return case | ({"tokens": 1024, "S": 256, "H": 2} if case["tokens"] > 1024 else {})
    return case | {k: min(case[k], most) for k, most in (("R", 64), ("N", 256)) if k in case}
