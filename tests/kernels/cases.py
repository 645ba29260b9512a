"""One list of shapes for the attention kernels' tests and benchmarks, and the arrays of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Case:
    """One shape. N query heads share K key/value heads of size H; pages hold S tokens; a row has T query tokens."""

    N: int
    K: int
    H: int
    S: int = 16
    T: int = 1
    window: int = 0
    dtype: str = "float32"
    spread: float = 1.0  # standard deviation of the queries: large ones make the softmax a maximum

    def __str__(self) -> str:
        window = f"-window{self.window}" if self.window else ""
        spread = f"-spread{self.spread:g}" if self.spread != 1 else ""
        return f"N{self.N}-K{self.K}-H{self.H}-S{self.S}-T{self.T}{window}-{self.dtype}{spread}"

    @property
    def scale(self) -> float:
        return self.H**-0.5


DECODE = [
    Case(4, 2, 64),
    Case(3, 3, 80, S=8),  # one query head per key/value head
    Case(8, 1, 96, S=32),  # all share one
    Case(4, 2, 128, S=64, dtype="bfloat16"),
    Case(2, 1, 256, S=128, dtype="float16"),
    Case(4, 2, 64, dtype="bfloat16"),
    Case(4, 2, 64, spread=10.0),
    Case(4, 2, 64, window=1),
    Case(4, 2, 64, window=24),
    Case(4, 2, 64, S=8, window=129, dtype="bfloat16"),
    Case(4, 2, 64, T=4),
    Case(6, 2, 32, T=5, window=24),
    Case(2, 2, 32, T=17),  # more than one turn of the portable loop takes at once
]
PREFILL = [
    Case(4, 2, 64, T=16),
    Case(3, 3, 80, S=8, T=16, dtype="float16"),
    Case(8, 1, 96, S=32, T=7),
    Case(4, 2, 128, S=64, T=64, dtype="bfloat16"),
    Case(2, 1, 256, S=128, T=16),
    Case(4, 2, 64, T=16, window=1),
    Case(4, 2, 64, T=16, window=24),
    Case(4, 2, 64, S=8, T=64, window=129, dtype="bfloat16"),
    Case(4, 2, 64, T=16, spread=10.0),
]


@dataclass(frozen=True)
class Arrays:
    """Arguments of one call. `used` [P, S] are the slots of tokens that some row may see; everything else may hold anything."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    block_tables: np.ndarray
    kv_lens: np.ndarray
    first_positions: np.ndarray
    used: np.ndarray

    def poisoned(self) -> Arrays:
        """The same call with NaN in every slot that no row may use, the null page's included, and in no other."""
        k, v = self.k_pages.copy(), self.v_pages.copy()
        for pages in (k, v):
            pages[np.broadcast_to(~self.used[:, None], pages.shape[:3])] = np.nan
        return dataclasses.replace(self, k_pages=k, v_pages=v)


def lengths(case: Case) -> np.ndarray:
    """No token, one, around a page, around the portable path's block of 128 tokens and its double, and padding again."""
    S = case.S
    lens = np.array([0, 1, S - 1, S, S + 1, 127, 128, 129, 255, 257, 300, 0])
    return np.where(lens > 0, np.maximum(lens, case.T), 0)


def arrays(case: Case, *, is_prefill: bool) -> Arrays:
    """Random arrays: pages in random order, rows 6 and 7 with shared first pages.

    A prefill row is the last tile of what its sequence has; every other tile is filled to half.
    """
    rng = np.random.default_rng(list(str(case).encode()))
    dtype, lens = DTYPES[case.dtype], lengths(case)
    B, M = len(lens), -(-int(lens.max()) // case.S) + 1
    needed = -(-lens // case.S)
    numbers = iter(rng.permutation(np.arange(1, 1 + needed.sum())))
    tables = np.zeros((B, M), np.int32)
    for row in range(B):
        tables[row, : needed[row]] = [next(numbers) for _ in range(needed[row])]
    num_shared = 127 // case.S
    tables[7, :num_shared] = tables[6, :num_shared]

    P = 1 + int(needed.sum())
    shape = (P, case.K, case.S, case.H)
    used = np.zeros((P, case.S), bool)
    for row in range(B):
        for position in range(lens[row]):
            used[tables[row, position // case.S], position % case.S] = True

    real = np.minimum(np.where(np.arange(B) % 2, case.T, -(-case.T // 2)) if is_prefill else case.T, lens)
    return Arrays(
        q=(rng.normal(size=(B, case.T, case.N, case.H)) * case.spread).astype(dtype),
        k_pages=rng.normal(size=shape).astype(dtype),
        v_pages=rng.normal(size=shape).astype(dtype),
        block_tables=tables,
        kv_lens=lens.astype(np.int32),
        first_positions=(lens - real).astype(np.int32),
        used=used,
    )
