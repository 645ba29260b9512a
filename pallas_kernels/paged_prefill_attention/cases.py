"""The cases of tiles of prompts; arrays and definition are those of the decode operation. See `pallas_kernels.operations`."""

from __future__ import annotations

import dataclasses

from pallas_kernels.paged_decode_attention.cases import OUTPUTS, PEERS, Case, cost, counts, define, make, plain, poison

__all__ = [
    "BENCH",
    "CHECK",
    "COMPILE",
    "INSTRUCTIONS",
    "INTERPRET",
    "OUTPUTS",
    "PEERS",
    "Case",
    "cost",
    "counts",
    "define",
    "make",
    "plain",
    "poison",
]


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
    Case(8, 1, 96, S=32, T=7, soft_cap=20.0, spread=10.0, dtype="bfloat16"),
    Case(2, 1, 256, S=128, T=70, dtype="bfloat16", lens=(70, 197)),
    Case(8, 2, 64, T=64, dtype="bfloat16", lens=(64, 128, 330)),  # four query heads share one: more rows than a block has
)
# The interpreter takes ten seconds a case. All that differs within the warpgroup kernel: one or two computing warpgroups, one
# block or several, one page or several a tile, one stage's depth or more, window, sinks, cap. The kernel that the rest of CHECK
# runs on is the decode operation's, with cases of its own: here only what is new to it, tiles whose tokens are many.
INTERPRET = tuple(case for case in CHECK if case.dtype != "float32" and not case.kv_dtype) + _tiles(
    Case(4, 2, 64, T=40, window=24, lens=(40, 150)),
    Case(4, 2, 64, T=40, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="token", lens=(40, 150)),
    Case(4, 2, 64, T=40, kv_dtype="int8", scales="head", has_sinks=True, lens=(40, 150)),
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
# The engine's tile over both ends of page sizes, each head size that changes the tiles, and each way to widen pages.
COMPILE = _tiles(
    Case(32, 8, 128, S=64, T=64, dtype="bfloat16", lens=(64, 4096)),
    Case(32, 8, 128, S=16, T=64, dtype="bfloat16", lens=(64, 4096)),
    Case(32, 8, 64, S=64, T=64, dtype="bfloat16", lens=(64, 4096)),
    Case(8, 1, 256, S=64, T=64, dtype="bfloat16", lens=(64, 4096)),
    Case(32, 32, 80, S=64, T=64, dtype="float16", lens=(64, 4096)),
    Case(32, 8, 128, S=64, T=64, window=512, soft_cap=30.0, has_sinks=True, dtype="bfloat16", lens=(64, 4096)),
    Case(32, 8, 128, S=64, T=64, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="head", lens=(64, 4096)),
    Case(32, 8, 128, S=64, T=64, dtype="bfloat16", kv_dtype="int8", scales="token", lens=(64, 4096)),
    Case(9, 3, 64, T=64, lens=(64, 512)),
)
# Pages come by cp.async or by the copy engine; warps multiply, and on Hopper warpgroups where pages have the queries' dtype.
INSTRUCTIONS = {
    "sm_80": ("LDGSTS", "HMMA", "LDSM"),
    "sm_89": ("LDGSTS", "HMMA", "LDSM"),
    "sm_90a": ("UTMALDG", "HGMMA|HMMA"),
    "sm_100a": ("UTMALDG", "HMMA"),
}
