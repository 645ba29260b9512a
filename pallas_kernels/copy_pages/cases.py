"""The cases of copy_pages, and the pools that gather_pages and scatter_pages share. See `pallas_kernels.operations`."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallas_kernels.operations import Call, Cost

OUTPUTS = ("pages",)
DONATE = ("pages",)
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}
# Bulk copies where there is an engine for them; below, 16 bytes a thread at a time.
INSTRUCTIONS = {"sm_80": ("LDG", "STG"), "sm_89": ("LDG", "STG"), "sm_90a": ("UBLKCP",), "sm_100a": ("UBLKCP",)}


@dataclass(frozen=True)
class Case:
    """X pages of S tokens of K heads of size H move, `padding` of them the null page, in a pool of L layers."""

    X: int
    K: int = 2
    S: int = 16
    H: int = 64
    L: int = 1
    dtype: str = "float32"
    padding: int = 0

    def __str__(self) -> str:
        parts = [f"X{self.X}-K{self.K}-S{self.S}-H{self.H}-L{self.L}", self.dtype]
        return "-".join(parts + [f"padding{self.padding}"] * bool(self.padding))

    @property
    def page_bytes(self) -> int:
        """Of one logical page: all of its layers."""
        return self.L * self.K * self.S * self.H * np.dtype(DTYPES[self.dtype]).itemsize


CHECK = (
    *(Case(5, dtype=dtype, padding=2) for dtype in DTYPES),
    *(Case(4, L=3, dtype=dtype) for dtype in ("float32", "bfloat16", "float8_e4m3fn")),
    Case(1),
    Case(1, L=2, dtype="bfloat16"),
    Case(3, padding=3),  # nothing but padding
    Case(3, K=1, S=8, H=32, dtype="int8"),  # 256 bytes a page
    Case(2, K=3, S=8, H=80, L=2, dtype="bfloat16", padding=1),
    Case(2, K=8, S=64, H=128),  # 256 KiB a page: several pieces
    Case(2, K=3, S=64, H=96, L=2),  # pieces that are no power of two
)
# 64 MiB and more, as 8 heads of 128 make them; then what one copy-on-write and one swapped sequence of 1,024 tokens cost.
BENCH = (
    Case(512, K=8, S=64, H=128, dtype="bfloat16"),
    Case(2048, K=8, S=16, H=128, dtype="bfloat16"),
    Case(1024, K=8, S=64, H=128, dtype="float8_e4m3fn"),
    Case(1, K=8, S=64, H=128, L=32, dtype="bfloat16"),
    Case(16, K=8, S=64, H=128, L=32, dtype="bfloat16"),
    Case(64, K=3, S=16, H=64, L=30),
)
COMPILE = (*BENCH, Case(2, K=3, S=64, H=96, L=2), Case(4, K=1, S=16, H=64, dtype="int8"))


def bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Every bit at random: NaN of all payloads, negative zeros and infinities among them."""
    size = np.dtype(DTYPES[dtype]).itemsize
    return rng.integers(0, 1 << (8 * size), shape, f"u{size}").view(DTYPES[dtype])


def pool(case: Case) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """The case's numbers, a pool of 2 X + 2 pages a layer, and those pages but the null page in random order.

    The very last page comes first in that order, so that whoever uses any page uses it.
    """
    rng = np.random.default_rng(list(str(case).encode()))
    P = 2 * case.X + 2
    return rng, bits(rng, (case.L * P, case.K, case.S, case.H), case.dtype), np.r_[P - 1, rng.permutation(np.arange(1, P - 1))]


def pad(case: Case, numbers: np.ndarray) -> np.ndarray:
    """int32 [X], page numbers of which the last `padding` become the null page."""
    return np.where(np.arange(case.X) < case.X - case.padding, numbers[: case.X], 0).astype(np.int32)


def make(case: Case) -> Call:
    """Random pages onto other random pages; the last two pairs have one source."""
    _, pages, order = pool(case)
    targets, sources = order[: case.X], order[case.X : 2 * case.X].copy()
    sources[max(0, case.X - case.padding - 1) :] = sources[max(0, case.X - case.padding - 2)]
    arrays = {"pages": pages, "sources": pad(case, sources), "targets": pad(case, targets)}
    return Call(arrays, {"num_layers": case.L})


def define(call: Call) -> tuple[np.ndarray]:
    """Page after page and layer after layer."""
    before, num_layers = call.arrays["pages"], call.options["num_layers"]
    after, P = before.copy(), before.shape[0] // num_layers
    for source, target in zip(call.arrays["sources"], call.arrays["targets"], strict=True):
        for layer in range(num_layers):
            after[layer * P + target] = before[layer * P + source]
    return (after,)


def plain(call: Call) -> None:
    """Bits, not numbers."""
    del call


def cost(case: Case) -> Cost:
    """Every page read and written."""
    return Cost(num_bytes=2 * (case.X - case.padding) * case.page_bytes, num_flops=0)
