"""The cases of tiles of prompts; arrays and definition are those of the decode operation. See `pallas_kernels.operations`."""

from __future__ import annotations

import dataclasses

from pallas_kernels.paged_decode_attention.cases import OUTPUTS, PEERS, Case, cost, counts, define, make, plain, poison

__all__ = ["BENCH", "CHECK", "OUTPUTS", "PEERS", "Case", "cost", "counts", "define", "make", "plain", "poison"]


def _tiles(*cases: Case) -> tuple[Case, ...]:
    return tuple(dataclasses.replace(case, is_prefill=True) for case in cases)


CHECK = _tiles(
    Case(4, 2, 64, T=16),
    Case(3, 3, 80, S=8, T=16, dtype="float16"),
    Case(8, 1, 96, S=32, T=7),
    Case(4, 2, 128, S=64, T=64, dtype="bfloat16"),
    Case(2, 1, 256, S=128, T=16),
    Case(4, 2, 64, T=16, window=1),
    Case(4, 2, 64, T=16, window=24),
    Case(4, 2, 64, S=8, T=64, window=129, dtype="bfloat16"),
    Case(4, 2, 64, T=16, spread=10.0),
    Case(4, 2, 64, T=16, soft_cap=20.0, spread=10.0),
    Case(4, 2, 128, T=16, has_sinks=True, window=40, S=32, dtype="bfloat16"),
    Case(4, 2, 64, T=16, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="token"),
    Case(4, 2, 64, T=16, kv_dtype="int8", scales="head", has_sinks=True),
)
# Tiles of 16 tokens are the CPU engine's. On a GPU a tile is 64 tokens: whole prompts as many tiles, and a late chunk.
BENCH = _tiles(
    Case(9, 3, 64, T=16, lens=(512,) * 16),
    Case(9, 3, 64, T=16, lens=(4096,) * 16),
    Case(9, 3, 64, T=16, dtype="bfloat16", lens=(4096,) * 16),
    Case(32, 8, 128, S=64, T=64, dtype="bfloat16", lens=tuple(range(64, 4097, 64))),
    Case(32, 8, 128, S=64, T=64, dtype="bfloat16", lens=tuple(range(64, 16385, 64))),
    Case(32, 8, 128, S=16, T=64, dtype="bfloat16", lens=tuple(range(8256, 8705, 64))),
)
