"""The cases of both attention operations: shapes, arrays, and attention by its definition. See `pallas_kernels.operations`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from pallas_kernels.operations import Call, Cost

OUTPUTS = ("out", "lse")
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}


@dataclass(frozen=True)
class Case:
    """One shape. N query heads share K key/value heads of size H; pages hold S tokens; a row has T query tokens.

    `kv_dtype` is the pages' where it is not the queries' `dtype`; `scales` says whether they have none, one for each "head", or
    one for each "token" and head. `lens` are the rows' lengths; left out, the lengths of `edges`.
    """

    N: int
    K: int
    H: int
    S: int = 16
    T: int = 1
    window: int = 0
    dtype: str = "float32"
    kv_dtype: str = ""
    scales: str = ""
    soft_cap: float = 0.0
    has_sinks: bool = False
    spread: float = 1.0  # standard deviation of the queries: large ones make the softmax a maximum
    lens: tuple[int, ...] = ()
    is_prefill: bool = False

    def __str__(self) -> str:
        parts = [f"N{self.N}-K{self.K}-H{self.H}-S{self.S}-T{self.T}", self.dtype]
        parts += [f"kv_{self.kv_dtype}"] * bool(self.kv_dtype) + [f"scales_{self.scales}"] * bool(self.scales)
        parts += [f"window{self.window}"] * bool(self.window) + [f"cap{self.soft_cap:g}"] * bool(self.soft_cap)
        parts += ["sinks"] * self.has_sinks + [f"spread{self.spread:g}"] * (self.spread != 1)
        if self.lens:
            first, last = self.lens[0], self.lens[-1]
            parts.append(f"{len(self.lens)}x{last}" if first == last else f"{first}to{last}")
        return "-".join(parts)


CHECK = (
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
    Case(4, 2, 64, soft_cap=20.0, spread=10.0),
    Case(4, 2, 64, has_sinks=True, T=3, dtype="bfloat16"),
    Case(4, 2, 128, has_sinks=True, soft_cap=30.0, window=40, S=32),
    Case(4, 2, 64, kv_dtype="bfloat16"),  # a float32 model may keep a bfloat16 cache
    Case(4, 2, 128, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="head"),
    Case(4, 2, 64, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="token", S=32),
    Case(4, 2, 64, dtype="bfloat16", kv_dtype="float8_e4m3fn"),  # scales of 1 need not be given
    Case(4, 2, 128, kv_dtype="int8", scales="token"),
    Case(8, 2, 64, dtype="float16", kv_dtype="int8", scales="head", T=2, window=50, has_sinks=True),
)
# Rows of 512 and of 4,096 tokens, a chat and a document, on a CPU; then what published GPU tables quote: 32 heads over 8 of 128.
BENCH = (
    Case(9, 3, 64, lens=(512,) * 16),
    Case(9, 3, 64, lens=(4096,) * 16),
    Case(9, 3, 64, dtype="bfloat16", lens=(512,) * 16),
    Case(9, 3, 64, dtype="bfloat16", lens=(4096,) * 16),
    Case(32, 8, 128, S=64, dtype="bfloat16", lens=(1024,)),
    Case(32, 8, 128, S=64, dtype="bfloat16", lens=(32768,)),
    Case(32, 8, 128, S=64, dtype="bfloat16", lens=(4096,) * 32),
    Case(32, 8, 128, S=16, dtype="bfloat16", lens=(4096,) * 32),
    Case(32, 8, 128, S=64, dtype="bfloat16", lens=(4096,) * 128),
    Case(32, 8, 128, S=64, dtype="bfloat16", lens=(16384,) * 32),
    Case(32, 8, 128, S=64, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="head", lens=(4096,) * 32),
    Case(32, 8, 128, S=64, dtype="bfloat16", kv_dtype="int8", scales="token", lens=(4096,) * 32),
)
# What the interpreter takes a second or two for: fewer rows, which still are empty, of one token, of several chunks and ragged.
# The second alone has chunks of more tiles than there are slots, 97 tiles for 48 items: without it no slot is ever refilled.
INTERPRET = (
    CHECK[5],
    Case(1, 1, 256, S=64, dtype="bfloat16", lens=(20, 3050)),
    *(replace(case, lens=(0, max(1, case.T), max(case.S + 1, case.T), 130, 257)) for case in CHECK),
)
# Every body that the Mosaic kernel has on a GPU: head sizes, pages below and above a tile, quantised pages, many query rows.
COMPILE = (
    *BENCH[-8:],
    Case(32, 8, 128, S=64, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="token", lens=(4096,) * 32),
    Case(32, 8, 128, S=32, dtype="bfloat16", soft_cap=30.0, window=1000, has_sinks=True, lens=(4096,) * 32),
    Case(32, 8, 128, S=128, T=8, dtype="float16", lens=(4096,) * 32),
    Case(32, 8, 128, S=64, T=16, dtype="bfloat16", lens=(4096,) * 32),
    Case(8, 8, 80, dtype="bfloat16", lens=(4096,) * 32),
    Case(8, 8, 80, S=32, dtype="bfloat16", lens=(4096,) * 32),
    Case(16, 8, 96, S=64, dtype="bfloat16", lens=(4096,) * 32),
    Case(16, 8, 256, S=64, dtype="bfloat16", lens=(4096,) * 32),
    Case(32, 8, 64, S=64, lens=(4096,) * 32),
)
INSTRUCTIONS = {
    "sm_80": ("HMMA", "LDGSTS", "LDSM"),
    "sm_89": ("HMMA", "LDGSTS", "LDSM"),
    "sm_90a": ("HMMA", "UTMALDG", "LDSM"),
    "sm_100a": ("HMMA", "UTMALDG", "LDSM"),
}


def edges(case: Case) -> np.ndarray:
    """No token, one, around a page, around the portable path's block of 128 tokens and its double, and padding again."""
    S = case.S
    lens = np.array([0, 1, S - 1, S, S + 1, 127, 128, 129, 255, 257, 300, 0])
    return np.where(lens > 0, np.maximum(lens, case.T), 0)


def is_one_prompt(case: Case) -> bool:
    """Whether the rows are the tiles of one prompt and share its pages: when their lengths ascend."""
    return case.is_prefill and len(set(case.lens)) > 1


def make(case: Case) -> Call:
    """Random arrays: pages in random order, rows 6 and 7 of `edges` with shared first pages.

    A prefill row is the last tile of what its sequence has; every other tile is filled to half.
    """
    rng = np.random.default_rng(list(str(case).encode()))
    lens = np.array(case.lens) if case.lens else edges(case)
    B, M = len(lens), -(-int(lens.max()) // case.S) + 1
    needed = -(-lens // case.S)
    if is_one_prompt(case):
        needed = needed[-1:]
    numbers = iter(rng.permutation(np.arange(1, 1 + needed.sum())))
    tables = np.zeros((B, M), np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [next(numbers) for _ in range(count)]
    if is_one_prompt(case):
        tables[:] = tables[0]
    if not case.lens:
        num_shared = 127 // case.S
        tables[7, :num_shared] = tables[6, :num_shared]

    P = 1 + int(needed.sum())
    shape, dtype = (P, case.K, case.S, case.H), DTYPES[case.dtype]
    real = np.minimum(np.where(np.arange(B) % 2, case.T, -(-case.T // 2)) if case.is_prefill else case.T, lens)
    arrays = {
        "q": (rng.standard_normal((B, case.T, case.N, case.H), np.float32) * case.spread).astype(dtype),
        "k_pages": _pages(rng, shape, case),
        "v_pages": _pages(rng, shape, case),
        "block_tables": tables,
        "kv_lens": lens.astype(np.int32),
    }
    if case.is_prefill:
        arrays["first_positions"] = (lens - real).astype(np.int32)
    if case.has_sinks:
        arrays["sinks"] = rng.normal(size=case.N).astype(np.float32) * 2
    if case.scales:
        sizes = (case.K,) if case.scales == "head" else shape[:3]
        low, high = (0.005, 0.03) if case.kv_dtype == "int8" else (0.3, 2.0)
        for name in ("k_scales", "v_scales"):
            arrays[name] = rng.uniform(low, high, sizes).astype(np.float32)
    options = {"scale": case.H**-0.5, "window": case.window, "soft_cap": case.soft_cap, "return_lse": True}
    return Call(arrays, options)


def _pages(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> np.ndarray:
    if case.kv_dtype == "int8":
        return rng.integers(-127, 128, shape, np.int8)
    return rng.standard_normal(shape, np.float32).astype(DTYPES[case.kv_dtype or case.dtype])


def poison(call: Call) -> Call:
    """The same call with NaN wherever no row may look, the null page included, and nowhere else: in pages and in scales."""
    arrays = dict(call.arrays)
    tables, lens = arrays["block_tables"], arrays["kv_lens"]
    P, K, S, _ = arrays["k_pages"].shape
    unused = np.ones((P, S), bool)
    for table, kv_len in zip(tables, lens, strict=True):
        positions = np.arange(kv_len)
        unused[table[positions // S], positions % S] = False
    unused = np.broadcast_to(unused[:, None], (P, K, S))
    for name in ("k_pages", "v_pages", "k_scales", "v_scales"):
        # int8 has no NaN, and scales of a head belong to every page.
        if name in arrays and arrays[name].ndim > 1 and arrays[name].dtype != np.int8:
            arrays[name] = arrays[name].copy()
            arrays[name][unused] = np.nan
    return Call(arrays, call.options)


def define(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, query by query. A padding row is 0 with LSE -inf; a padding query of a real tile is NaN."""
    return _attention(call, np.float64, is_rounded=False)


def plain(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The same in float32, the weights rounded to the dtype of 16-bit queries as every tensor core wants them."""
    out, lse = _attention(call, np.float32, is_rounded=True)
    return out.astype(call.arrays["q"].dtype), lse


def gather(call: Call):
    """The gather of whole padded tables, which a paged kernel has to beat."""
    from pallas_kernels.paged_decode_attention import dispatch, gather

    a, options = dict(call.arrays), call.options
    a.setdefault("first_positions", a["kv_lens"] - a["q"].shape[1])
    fixed = dispatch.Options(scale=options["scale"], window=options.get("window", 0), soft_cap=options.get("soft_cap", 0.0))
    out, lse = gather.attend(dispatch.Arrays(**a), fixed)  # type: ignore[arg-type]
    return (out, lse) if options.get("return_lse") else out


PEERS = {"gather": gather}


def counts(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Which numbers of the outputs mean something: not those of a tile's padding queries."""
    q, lens = call.arrays["q"], call.arrays["kv_lens"]
    first = call.arrays.get("first_positions", lens - q.shape[1])
    is_real = np.arange(q.shape[1]) < np.where(lens > 0, lens - first, q.shape[1])[:, None]
    return np.broadcast_to(is_real[..., None, None], q.shape), np.broadcast_to(is_real[..., None], q.shape[:3])


def _attention(call: Call, dtype: type, *, is_rounded: bool) -> tuple[np.ndarray, np.ndarray]:
    a, options = call.arrays, call.options
    q, tables, lens, sinks = a["q"], a["block_tables"], a["kv_lens"], a.get("sinks")
    (B, T, N, _), (_, K, S, _) = q.shape, a["k_pages"].shape
    first = a.get("first_positions", lens - T)
    window, cap = options.get("window", 0), options.get("soft_cap", 0.0)
    out, lse = np.full(q.shape, np.nan, dtype), np.full((B, T, N), np.nan, dtype)
    for b in range(B):
        if lens[b] == 0:
            out[b], lse[b] = 0.0, -np.inf
            continue
        everything = np.arange(lens[b])
        keys, values = (_numbers(a, name, tables[b, everything // S], everything % S, dtype) for name in ("k", "v"))  # [C, K, H]
        for t in range(min(T, int(lens[b] - first[b]))):
            position = int(first[b]) + t
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            if position < 0:  # more query tokens than tokens: nothing is seen
                out[b, t], lse[b, t] = 0.0, -np.inf if sinks is None else sinks
                continue
            k, v = (np.repeat(x[seen], N // K, axis=1) for x in (keys, values))
            scores = np.einsum("nh,cnh->nc", q[b, t].astype(dtype), k) * dtype(options["scale"])
            scores = cap * np.tanh(scores / dtype(cap)) if cap else scores
            everyone = scores if sinks is None else np.concatenate([scores, sinks[:, None].astype(dtype)], axis=1)
            peak = everyone.max(axis=1, keepdims=True)
            total = np.exp(everyone - peak).sum(axis=1, keepdims=True)
            weights = np.exp(scores - peak)
            if is_rounded and q.dtype.itemsize == 2:
                weights = weights.astype(q.dtype).astype(dtype)
            out[b, t] = np.einsum("nc,cnh->nh", weights, v) / total
            lse[b, t] = (peak + np.log(total))[:, 0]
    return out, lse


def _numbers(a: Mapping[str, np.ndarray], name: str, pages: np.ndarray, offsets: np.ndarray, dtype: type) -> np.ndarray:
    """What the given slots hold, scales applied: [slots, K, H]."""
    values, scales = a[f"{name}_pages"][pages, :, offsets].astype(dtype), a.get(f"{name}_scales")
    if scales is None:
        return values
    return values * (scales[None, :, None] if scales.ndim == 1 else scales[pages, :, offsets][..., None]).astype(dtype)


def cost(case: Case) -> Cost:
    """Every key and value of every row once, queries and results once; two products of every query with what it sees."""
    lens, size = np.array(case.lens), np.dtype(DTYPES[case.dtype]).itemsize
    token_bytes = 2 * case.K * case.H * np.dtype(DTYPES[case.kv_dtype or case.dtype]).itemsize
    token_bytes += 2 * case.K * 4 * (case.scales == "token")
    if case.is_prefill:
        seen = sum(min(position + 1, case.window or position + 1) for n in lens for position in range(n - case.T, n))
    else:
        seen = int(np.minimum(lens, case.window or lens).sum()) * case.T
    read = lens[-1] if is_one_prompt(case) else int(np.minimum(lens, case.window + case.T if case.window else lens).sum())
    queries = 2 * len(lens) * case.T * case.N * case.H * size
    return Cost(num_bytes=int(read) * token_bytes + queries, num_flops=4 * case.N * case.H * seen)
