"""The cases of write_kv_pages. See `pallas_kernels.operations`."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallas_kernels.copy_pages.cases import DTYPES, bits
from pallas_kernels.operations import Call, Cost

OUTPUTS = ("pages", "scales")  # scales only where they are computed
DONATE = ("pages",)
# A page's rows of one token: one bulk tensor store, a plain one where a token has one head. Below, 16 bytes a thread at a time.
INSTRUCTIONS = {
    "sm_80": ("LDG", "STG"),
    "sm_89": ("LDG", "STG"),
    "sm_90a": ("UTMASTG|UBLKCP",),
    "sm_100a": ("UTMASTG|UBLKCP",),
}
_LARGEST = {"float8_e4m3fn": 448, "int8": 127}


@dataclass(frozen=True)
class Case:
    """X tokens of K heads of size H, `padding` of them padding, in pages of S tokens.

    `new_dtype` is the new tokens' where it is not the pages' `dtype`; `scales` says whether they have none, one for each "head",
    or one for each "token" and head. `is_prompt`: slots are in order, as a prompt's are, not shuffled.
    """

    X: int
    K: int = 2
    H: int = 64
    S: int = 16
    L: int = 1
    dtype: str = "float32"
    new_dtype: str = ""
    scales: str = ""
    padding: int = 0
    is_prompt: bool = False

    def __str__(self) -> str:
        parts = [f"X{self.X}-K{self.K}-H{self.H}-S{self.S}-L{self.L}", self.dtype]
        parts += [f"new_{self.new_dtype}"] * bool(self.new_dtype) + [f"scales_{self.scales}"] * bool(self.scales)
        return "-".join(parts + [f"padding{self.padding}"] * bool(self.padding) + ["prompt"] * self.is_prompt)


CHECK = (
    *(Case(7, dtype=dtype, padding=2) for dtype in DTYPES),
    *(Case(1, dtype=dtype) for dtype in ("float32", "bfloat16", "float8_e4m3fn")),  # the very last slot
    Case(3, L=2, padding=2),
    Case(2, padding=2),  # nothing but padding
    Case(19, K=1, H=32, S=8, is_prompt=True, padding=5),  # three pages; more tokens than blocks
    Case(5, K=3, H=80, S=8, dtype="bfloat16"),  # rows of 160 bytes
    Case(3, K=8, H=128, S=64, dtype="bfloat16"),
    Case(3, K=1, H=256, S=128, dtype="float16"),
    Case(4, dtype="bfloat16", new_dtype="float32", padding=1),
    *(
        Case(12, H=H, dtype=dtype, new_dtype=new_dtype, scales=scales, padding=2, L=L)
        for dtype, new_dtype, H, L in (("float8_e4m3fn", "float32", 64, 1), ("int8", "bfloat16", 128, 2))
        for scales in ("head", "token")
    ),
    Case(1, dtype="int8", new_dtype="float32", scales="token"),
    Case(1, K=3, H=48, S=8, dtype="float8_e4m3fn", new_dtype="bfloat16", scales="token"),
)
# Decode steps of 32 and 128 rows, a chunk of a prompt, and 64 MiB, which no step writes but a GPU's memory can be timed with.
BENCH = (
    Case(32, K=8, H=128, S=64, dtype="bfloat16"),
    Case(128, K=8, H=128, S=64, dtype="bfloat16"),
    Case(8192, K=8, H=128, S=64, dtype="bfloat16", is_prompt=True),
    Case(32768, K=8, H=128, S=64, dtype="bfloat16"),
    Case(32768, K=8, H=128, S=16, dtype="bfloat16", is_prompt=True),
    Case(128, K=8, H=128, S=64, dtype="float8_e4m3fn", new_dtype="bfloat16", scales="token"),
    Case(32768, K=8, H=128, S=64, dtype="float8_e4m3fn", new_dtype="bfloat16", scales="token"),
    Case(32768, K=8, H=128, S=64, dtype="int8", new_dtype="bfloat16", scales="head"),
    Case(16, K=3, H=64),
)
# Without the large ones that are quantised: XLA does that before the kernel, and what it makes is as large as such a case's pool.
COMPILE = (
    *(case for case in BENCH if case.X < 32768 or not case.scales),
    Case(1, K=1, H=64, dtype="float8_e4m3fn", new_dtype="bfloat16", scales="token"),
    Case(5, K=3, H=80),
)


def make(case: Case) -> Call:
    """Random bits into shuffled slots, the very last among them; new tokens that are cast or quantised are random numbers.

    What padding brings, zeros, the null pages hold already: right answers whether they are written or not.
    """
    rng = np.random.default_rng(list(str(case).encode()))
    num_live = case.X - case.padding
    P = 1 + -(-num_live // case.S) + 2
    pages = bits(rng, (case.L * P, case.K, case.S, case.H), case.dtype)
    pages[::P] = 0
    layer = case.L - 1
    live = np.arange((P - 1) * case.S - num_live, (P - 1) * case.S) + case.S
    if not case.is_prompt:
        # The last slot and any others.
        live = rng.permutation(np.r_[P * case.S - 1, rng.permutation(np.arange(case.S, P * case.S - 1))[: max(num_live - 1, 0)]])
    slots = layer * P * case.S + np.r_[live[:num_live], np.zeros(case.padding, np.int64)]
    if case.is_prompt or not case.new_dtype:
        order = np.arange(case.X)
    else:
        order = rng.permutation(case.X)
    shape = (case.X, case.K, case.H)
    new = _numbers(rng, shape, case) if case.new_dtype else bits(rng, shape, case.dtype)
    new[num_live:] = 0
    arrays = {"pages": pages, "new": new[order], "slots": slots.astype(np.int32)[order]}
    if case.scales == "head":
        arrays["scales"] = (rng.uniform(0.5, 2.0, case.K) * 3 / _LARGEST[case.dtype]).astype(np.float32)
    if case.scales == "token":
        arrays["scales"] = rng.uniform(0.1, 1.0, pages.shape[:3]).astype(np.float32)
        arrays["scales"][::P] = 2.0**-100
    return Call(arrays, {"num_layers": case.L})


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> np.ndarray:
    """Normal numbers; in the first tokens what is hard to quantise, as far as there are tokens and scales."""
    new = rng.standard_normal(shape, np.float32)
    if not case.scales:
        return new.astype(DTYPES[case.new_dtype])
    halves = (np.arange(shape[-1]) - shape[-1] // 2 + 0.5).astype(np.float32)
    halves[0] = _LARGEST[case.dtype]  # a scale next to 1, and every other number between two integers
    hard = [halves, np.zeros(shape[-1]), 5e37 * new[0, 0], 1e-42 * new[0, 0], 1e-30 * new[0, 0]]
    for x, head in enumerate(hard[: shape[0] - 1]):
        new[x, 0] = head
    if shape[0] > 8:
        new[5, -1, 3], new[6, 0, 0], new[7, 0, -1] = np.nan, np.inf, -np.inf
        new[7, 0, 1] = np.inf
    return new.astype(DTYPES[case.new_dtype])


def define(call: Call) -> tuple[np.ndarray, ...]:
    """Token after token; quantised by the contract's steps, each of them rounded to float32 as numpy rounds."""
    a = call.arrays
    pages, scales, new, S = a["pages"].copy(), a.get("scales"), a["new"], a["pages"].shape[2]
    computed = None if scales is None or scales.ndim == 1 else scales.copy()
    for x, slot in enumerate(a["slots"]):
        page, offset = slot // S, slot % S
        for head, numbers in enumerate(new[x]):
            if scales is None:
                with np.errstate(over="ignore"):
                    pages[page, head, offset] = numbers.astype(pages.dtype)
                continue
            scale = scales[head] if computed is None else _scale(numbers, pages.dtype.name)
            if computed is not None:
                computed[page, head, offset] = scale
            pages[page, head, offset] = _quantised(numbers, scale, pages.dtype)
    return (pages,) if computed is None else (pages, computed)


def _scale(numbers: np.ndarray, dtype: str) -> np.float32:
    peak = np.abs(numbers.astype(np.float32)).max()
    return max(peak * np.float32(1 / _LARGEST[dtype]), np.float32(2.0**-100)) if np.isfinite(peak) else np.float32(np.nan)


def _quantised(numbers: np.ndarray, scale: np.float32, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        ratio = numbers.astype(np.float32) * (np.float32(1) / scale)
    is_finite, largest = np.isfinite(ratio), _LARGEST[dtype.name]
    clipped = np.where(is_finite, np.clip(ratio, -largest, largest), 0)
    if dtype == np.int8:
        return np.where(is_finite, np.rint(clipped), -128).astype(np.int8)
    return np.where(is_finite, clipped.astype(ml_dtypes.float8_e4m3fn), ml_dtypes.float8_e4m3fn(np.nan))


def plain(call: Call) -> None:
    """Bits: quantisation is defined to the last of them."""
    del call


def cost(case: Case) -> Cost:
    """Every new number read once and written once, and the scales that are computed."""
    live, numbers = case.X - case.padding, case.K * case.H
    read = numbers * np.dtype(DTYPES[case.new_dtype or case.dtype]).itemsize
    written = numbers * np.dtype(DTYPES[case.dtype]).itemsize + 4 * case.K * (case.scales == "token")
    return Cost(num_bytes=live * (read + written), num_flops=0)
