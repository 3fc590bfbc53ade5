"""The tile sizes of every kernel, as data in one place.

A row is (tile sizes ..., warps, stages), without stages if the kernel has no pipelined loop; comments in TABLE name the sizes. Rows are
looked up by kernel name, then by architecture, by `size` (the head dimension, or the kernel's row-length class) and by the number of
bits per element.
`python -m bench.compile_check` compiles these rows for every architecture and shows registers, spills and shared memory.

Architectures: 90 is Hopper and 100 is data-centre Blackwell (227 KB of shared memory per block). 80 is Ampere, Ada,
consumer Blackwell and every chip not named here (none before Ampere was tried). Its rows stay under 99 KB, the limit of the consumer
chips of sm_86, 89 and 120 (an A100 has 163).

RT_CONFIGS=FILE replaces rows by the rows of a JSON file {kernel: {"ARCH SIZE BITS": [..]}}. `python -m bench.kernels --tune` writes one.
No call tunes anything by itself.
"""
import functools
import json
import os

import torch

ARCHS = (80, 90, 100)

def _rows(by_size: dict[int, tuple[int, ...]], arch: int = 0, bits: int = 0,
          both: bool = False) -> dict[tuple[int, int, int], tuple[int, ...]]:
    """{(architecture, size, bits): row}; 0 stands for all. `both`: short sequences, the sizes below zero, have the same rows."""
    sizes = by_size | {-size: row for size, row in by_size.items() if both}
    return {(a, size, b): row for size, row in sizes.items() for a in ARCHS if arch in (0, a) for b in (16, 32) if bits in (0, b)}


TABLE: dict[str, dict[tuple[int, int, int], tuple[int, ...]]] = {
    # queries, keys, warps, stages; size: the head dimension, negative if the longest sequence has at most 64 tokens
    "attention_forward": {
        **_rows({32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)}, bits=16),
        **_rows(dict.fromkeys((-32, -64, -128), (64, 64, 4, 2)), bits=16),
        **_rows({32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 16, 4, 2)}, bits=32, both=True),
        **_rows({32: (128, 64, 8, 3), 128: (128, 32, 8, 2), -128: (128, 32, 8, 2)}, bits=16, arch=80),
        **_rows({64: (64, 16, 4, 2)}, bits=32, arch=80, both=True),
        **_rows({32: (128, 64, 8, 3), -32: (64, 64, 4, 3)}, bits=16, arch=100),
        **_rows({64: (64, 32, 8, 2)}, bits=32, arch=100, both=True)},
    "attention_backward_keys": {
        **_rows({32: (64, 128, 8, 3), 64: (64, 128, 8, 3), 128: (32, 64, 8, 2)}, bits=16),
        **_rows({-32: (64, 64, 4, 2), -64: (64, 64, 4, 2), -128: (32, 64, 8, 2)}, bits=16),
        **_rows({128: (64, 64, 8, 3), -128: (64, 64, 8, 2)}, bits=16, arch=90),
        **_rows({32: (32, 64, 4, 2), 64: (32, 64, 8, 2), 128: (16, 32, 4, 1)}, bits=32, both=True),
        **_rows({32: (64, 128, 8, 2), 64: (32, 128, 8, 3), -32: (32, 64, 4, 2), -64: (32, 64, 4, 1)}, bits=16, arch=80),
        **_rows({32: (32, 128, 8, 2), -64: (64, 64, 8, 2)}, bits=16, arch=100),
        **_rows({32: (16, 32, 4, 2), 64: (32, 32, 8, 2), 128: (16, 32, 8, 1)}, bits=32, arch=80, both=True)},
    "attention_backward_queries": {
        **_rows({32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (64, 64, 4, 2)}, bits=16),
        **_rows(dict.fromkeys((-32, -64, -128), (64, 64, 4, 2)), bits=16),
        **_rows({32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (64, 16, 8, 2)}, bits=32, both=True),
        **_rows({128: (64, 64, 8, 2)}, bits=16, arch=80, both=True),
        **_rows({32: (64, 16, 4, 2), 64: (32, 32, 8, 2)}, bits=32, arch=80, both=True),
        **_rows({128: (64, 16, 4, 1)}, bits=32, arch=90, both=True),
        **_rows({32: (64, 32, 4, 1), 64: (64, 32, 8, 1), 128: (64, 16, 4, 1)}, bits=32, arch=100, both=True)},
    # queries, keys, warps, stages; size: the larger head dimension of student and teacher, negative as above
    "attention_kd_forward": {
        **_rows({32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)}, bits=16),
        **_rows(dict.fromkeys((-32, -64, -128), (64, 64, 4, 2)), bits=16), **_rows({-128: (64, 32, 4, 2)}, bits=16, arch=80),
        **_rows(dict.fromkeys((32, 64, 128), (64, 32, 4, 1)), bits=32, both=True)},
    # rows that get a gradient (queries for dQ, keys for dK), rows summed over, warps, stages
    "attention_kd_backward": {
        **_rows({32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 64, 8, 2)}, bits=16),
        **_rows(dict.fromkeys((-32, -64, -128), (64, 64, 4, 2)), bits=16), **_rows({128: (64, 64, 4, 1)}, bits=16, arch=100),
        **_rows({128: (128, 32, 8, 2), -64: (64, 64, 4, 1)}, bits=16, arch=80),
        **_rows({32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1)}, bits=32, both=True),
        **_rows({128: (32, 32, 4, 1)}, bits=32, arch=100, both=True)},
    # columns, warps; size: the row-length class (common.row_class)
    "hidden_mse": _rows({32: (32, 1), 256: (256, 1), 1024: (1024, 4), 4096: (4096, 8)}),
    "states_mse": _rows({4096: (1024, 4)}),
    "kd_loss_backward": _rows({32: (32, 1), 256: (256, 1), 1024: (1024, 4), 4096: (2048, 8)}),
    # columns, warps, columns that each part of the row gets at a time; the first divided by the last must fill the warps' vector loads
    "kd_loss_forward": {**_rows({32: (32, 1, 1), 256: (256, 1, 1), 1024: (1024, 4, 1), 4096: (4096, 4, 4)}),
                        **_rows({1024: (1024, 8, 1)}, arch=100)},
    "linear_loss": {**_rows({256: (256, 1, 1), 1024: (1024, 4, 2), 4096: (2048, 4, 4)}),
                    **_rows({4096: (2048, 8, 2)}, arch=90)},
    # rows, columns, warps; size as above
    "dropout": _rows({32: (64, 32, 4), 256: (16, 256, 4), 1024: (16, 256, 4), 4096: (16, 256, 4)}),
    # rows, columns of a tile, of which a row has up to four, warps; size as above
    "add_norm_forward": {**_rows({32: (32, 32, 4), 256: (4, 256, 4), 1024: (4, 256, 4), 4096: (2, 1024, 8)}),
                         **_rows({1024: (8, 256, 8)}, bits=16, arch=80)},
    "add_norm_backward": {**_rows({32: (32, 32, 4), 256: (8, 256, 8), 1024: (4, 256, 4), 4096: (2, 1024, 8)}),
                          **_rows({1024: (8, 256, 8)}, bits=16), **_rows({1024: (1, 256, 1)}, bits=16, arch=90),
                          **_rows({4096: (1, 1024, 4)}, arch=100)},
}
# the dropout words take registers, so with dropout tiles are smaller and more blocks fit on an SM
for _name in ("attention_forward", "attention_backward_queries", "attention_backward_keys"):
    TABLE[_name + "_dropout"] = {**TABLE[_name], **_rows({32: (64, 64, 4, 3), 64: (64, 64, 4, 3)}, bits=16)}
TABLE["attention_backward_queries_dropout"] |= _rows({64: (128, 64, 8, 2)}, bits=16, arch=80)
TABLE["attention_backward_keys_dropout"] |= _rows({64: (32, 128, 8, 3)}, bits=16, arch=80)
_arch: int | None = None        # set by compile_check, which compiles for absent devices


def architecture(device: torch.device) -> int:
    """The table's architecture for `device`; a CPU (in the interpreter) gets the A100's."""
    if _arch is not None:
        return _arch
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: 90, 10: 100}.get(major, 80)


def pick(kernel: str, size: int, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """The row of `kernel` for tensors of `dtype` on `device`."""
    key = (architecture(device), int(size), 8 * dtype.itemsize)      # int: torch.compile may give a symbol
    override = os.environ.get("RT_CONFIGS")
    row = _read(override).get(kernel, {}).get(" ".join(map(str, key))) if override else None
    return tuple(row) if row else TABLE[kernel][key]


@functools.cache
def _read(path: str) -> dict:
    with open(path) as f:
        return json.load(f)
