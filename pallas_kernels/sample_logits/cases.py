"""The cases of `sample_logits`: how rows sample, kinds of logits, sampling by its definition. See `pallas_kernels.operations`.

Tokens are integers, so they must be equal, which is made fair and sharp by choosing seeds. Fair: a row's token is the same with
top_p and min_p moved by a thousandth either way, and wins by more than a thousandth, so where float32 rounds nothing is decided.
Sharp: half of the rows sample one of the last tokens that their filters keep, the others would sample one of the first that they
cut, so that a threshold a little off is a wrong token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallas_kernels.operations import Call, Cost

OUTPUTS = ("tokens",)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# temperature, top_k, top_p, min_p
RECIPES = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "k1": (0.7, 1, 1.0, 0.0),
    "k5": (1.3, 5, 1.0, 0.0),
    "k_p": (1.0, 50, 0.8, 0.0),
    "p_min": (1.0, 0, 0.9, 0.05),
    "tiny_p": (0.5, 1 << 20, 0.01, 0.0),
    "all": (2.0, 20, 0.95, 0.1),
    "min": (1.0, -1, 1.0, 0.02),
    "hot_p": (3.0, 0, 0.7, 0.0),
    "hot_k": (5.0, 700, 0.999, 0.0),
    "greedy_anyway": (1e-6, 3, 0.5, 0.2),
    "p0": (1.0, 0, 0.0, 0.0),
    "min1": (1.5, 0, 1.0, 1.0),
    "p": (0.8, 0, 0.95, 0.0),
    "k": (0.8, 50, 1.0, 0.0),
}
EDGES = tuple(RECIPES)


@dataclass(frozen=True)
class Case:
    """One shape: V logits a row, `kind` as in `_logits`; row b samples as recipe b says, over and over until there are B."""

    V: int
    dtype: str = "float32"
    kind: str = "normal"
    recipes: tuple[str, ...] = EDGES
    B: int = 0

    def __str__(self) -> str:
        rows = f"B{self.B or len(self.recipes)}" + ("" if self.recipes == EDGES else "-" + "_".join(self.recipes))
        return f"V{self.V}-{rows}-{self.kind}-{self.dtype}"


CHECK = (
    Case(1),
    Case(7, kind="ties"),
    Case(512, dtype="float16"),
    Case(513),
    Case(1301, dtype="bfloat16"),
    Case(5000, kind="ties"),
    Case(2051, kind="masked"),
    Case(1025, kind="huge"),
    Case(4100, kind="flat"),
    Case(20011),  # from here on the portable path has candidates, and tiles that overlap
    Case(49152, dtype="bfloat16"),
    Case(20011, kind="ties"),
    Case(33000, kind="masked", dtype="bfloat16"),
    Case(20011, kind="flat"),
    Case(17000, kind="peaked"),
    Case(50257, recipes=("k_p",)),
)
# The interpreter takes seconds a row.
INTERPRET = (
    Case(1, recipes=("plain", "k_p")),
    Case(7, kind="ties", recipes=("k5", "p_min", "plain")),
    Case(1301),
    Case(1301, dtype="bfloat16", recipes=("greedy", "k_p", "plain", "p_min")),
    Case(513, dtype="float16", recipes=("all", "hot_k", "p")),
    Case(2051, kind="ties", recipes=("k5", "k_p", "greedy", "p")),
    Case(2051, kind="masked", recipes=("plain", "k_p", "p_min", "greedy", "hot_p", "k5", "all", "k")),
    Case(1025, kind="huge", recipes=("greedy", "plain", "k5", "p_min")),
    Case(1536, kind="flat", recipes=("hot_k", "hot_p", "plain")),
    Case(5000, kind="peaked", recipes=("p", "k", "plain")),  # more than one block a row
)
# A chat's vocabularies of today, rows of one kind and a mixture.
BENCH = tuple(
    Case(V, recipes=recipes, B=B)
    for V in (49152, 151936)
    for B in (1, 16, 64)
    for recipes in (("greedy",), ("plain",), ("k",), ("p",), ("greedy", "plain", "k", "p", "k_p"))
)
COMPILE = (Case(128256, B=64), Case(128256, dtype="bfloat16", B=64), Case(50257, B=8))
# Wide loads where rows are aligned, integer rotations for the noise, reductions across a warp; nothing that needs a newer chip.
INSTRUCTIONS = {gpu: ("LDG", "SHF", "SHFL") for gpu in ("sm_80", "sm_89", "sm_90a", "sm_100a")}


def make(case: Case) -> Call:
    """Random logits, and seeds for which the definition's token is beyond doubt."""
    rng = np.random.default_rng(list(str(case).encode()))
    B = case.B or len(case.recipes)
    logits = np.stack([_logits(rng, case, b) for b in range(B)]).astype(DTYPES[case.dtype])
    temperatures, top_ks, top_ps, min_ps = zip(*(RECIPES[case.recipes[b % len(case.recipes)]] for b in range(B)), strict=True)
    arrays = {
        "logits": logits,
        "seeds": rng.integers(0, 1 << 32, (B, 2), dtype=np.uint32),
        "positions": rng.integers(0, 1 << 17, B, dtype=np.int32),
        "temperatures": np.array(temperatures, np.float32),
        "top_ks": np.array(top_ks, np.int32),
        "top_ps": np.array(top_ps, np.float32),
        "min_ps": np.array(min_ps, np.float32),
    }
    if case not in BENCH:
        for b in range(B):
            arrays["seeds"][b] = _telling_seed(rng, arrays, b)
    return Call(arrays, {})


def _telling_seed(rng: np.random.Generator, arrays: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """A seed with which a row's token is beyond doubt and tells of its threshold; see above."""
    x = _numbers(arrays, row)
    if arrays["temperatures"][row] < 1e-5 or x.max() == -np.inf:
        return arrays["seeds"][row]
    variants = [keeps(arrays, row, slack) for slack in (-1e-3, 0.0, 1e-3)]
    surely, maybe = np.logical_and.reduce(variants), np.logical_or.reduce(variants)
    can = x > -np.inf
    values = np.sort(x[can])[::-1]
    num_sure, num_maybe = int(surely.sum()), int(maybe.sum())
    last = surely & (x <= values[max(0, num_sure - 1 - num_sure // 20)])
    next_ = can & ~maybe & (x >= values[min(len(values) - 1, num_maybe + num_maybe // 20)])
    is_cut = num_maybe < can.sum()

    tokens = np.nonzero(maybe | next_)[0]
    scaled = (x[tokens] - x.max()) / float(arrays["temperatures"][row])
    fair = None
    for _ in range(400 if is_cut else 20):
        seed = rng.integers(0, 1 << 32, 2, dtype=np.uint32)
        noisy = scaled + gumbel(seed, arrays["positions"][row], tokens)
        first, second = np.append(np.sort(np.where(maybe[tokens], noisy, -np.inf))[::-1], -np.inf)[:2]
        winner = tokens[np.argmax(np.where(maybe[tokens], noisy, -np.inf))]
        if first - second < 1e-3 or not surely[winner]:
            continue
        fair = seed
        outside = np.where(next_[tokens], noisy, -np.inf).max()
        if last[winner] and not outside > first - 1e-3 if row % 2 else outside > first + 1e-3:
            return seed
    if fair is None:
        raise RuntimeError(f"row {row}: no seed decides it beyond doubt; change the case")
    return fair


def _logits(rng: np.random.Generator, case: Case, row: int) -> np.ndarray:
    V = case.V
    x = rng.standard_normal(V) * 3
    if case.kind == "ties":  # some twenty values in all, and a few dozen of the largest
        return np.minimum(np.round(x), 6)
    if case.kind == "flat":
        return x * 0.02
    if case.kind == "peaked":  # a few tokens hold nearly everything
        x[rng.choice(V, 9, replace=False)] += 14
        return x
    if case.kind == "huge":
        x *= 1e30
        x[rng.integers(V)] = 3e38
        if row % 2:  # two infinities are a tie
            x[rng.choice(V, 2, replace=False)] = np.inf
        return x
    if case.kind == "masked":
        x[rng.random(V) < 0.9] = -np.inf
        x[rng.integers(V, size=5)] = np.nan
        if row % 8 == 3:
            x[:] = [-np.inf, np.nan][row // 8 % 2]  # nothing can be sampled
        elif row % 8 == 5:
            x[:] = -np.inf
            x[V - 1] = -1.0  # one token can
    return x


def define(call: Call) -> tuple[np.ndarray]:
    """The tokens by the definition in float64."""
    return (np.array([_token(call.arrays, row) for row in range(len(call.arrays["logits"]))], np.float64),)


def plain(call: Call) -> tuple[np.ndarray]:
    """The same tokens: there is nothing to round."""
    return (define(call)[0].astype(np.int32),)


def _token(arrays: Mapping[str, np.ndarray], row: int) -> int:
    x, temperature = _numbers(arrays, row), float(arrays["temperatures"][row])
    if temperature >= 1e-5 and x.max() > -np.inf:
        noise = gumbel(arrays["seeds"][row], arrays["positions"][row], np.arange(len(x)))
        x = np.where(keeps(arrays, row), (x - x.max()) / temperature + noise, -np.inf)
    return int(np.argmax(x))  # the first of the largest; 0 if all are -inf


def _numbers(arrays: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """A row's logits in float64, without NaN and +inf."""
    x = arrays["logits"][row].astype(np.float32).astype(np.float64)
    return np.where(np.isnan(x), -np.inf, np.minimum(x, np.finfo(np.float32).max))


def keeps(arrays: Mapping[str, np.ndarray], row: int, slack: float = 0.0) -> np.ndarray:
    """Whether a row that is not greedy keeps each token; `slack`, relative, makes top_p and min_p so much stricter or laxer."""
    temperature, k, p, min_p = (arrays[name][row] for name in ("temperatures", "top_ks", "top_ps", "min_ps"))
    x = _numbers(arrays, row)
    if x.max() == -np.inf:
        return np.zeros(len(x), bool)
    weights = np.exp((x - x.max()) / np.float64(temperature))
    kept = weights >= min(float(min_p) * (1 + slack), 1.0)
    if 0 < k < len(x):
        kept &= x >= np.sort(x)[-k]
    if p < 1:
        order = np.argsort(-x, kind="stable")
        order = order[kept[order]]
        running = np.cumsum(weights[order])
        last = min(int(np.searchsorted(running, float(p) * (1 + slack) * running[-1])), len(order) - 1)  # there it is enough
        kept &= x >= x[order[last]]
    return kept & (x > -np.inf)


def gumbel(seed: np.ndarray, position: np.int32, tokens: np.ndarray) -> np.ndarray:
    """The noise of these tokens in float64, from the formula in `noise.py`."""
    key = (np.zeros(1, np.uint32), np.zeros(1, np.uint32))
    for word in (seed[0], seed[1], np.uint32(position)):
        key = _threefry(key, np.zeros(1, np.uint32), np.array([word], np.uint32))
    a, b = _threefry(key, np.zeros(len(tokens), np.uint32), tokens.astype(np.uint32))
    uniform = np.maximum(((a ^ b) >> np.uint32(9)) * 2.0**-23, np.finfo(np.float32).tiny)
    return -np.log(-np.log(uniform.astype(np.float64)))


def _threefry(key: tuple[np.ndarray, np.ndarray], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 as its paper has it: 20 rounds, a key injected before the first and after each fourth."""
    schedule = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = x + key[0], y + key[1]
    for number in range(20):
        distance = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[number % 8])
        x = x + y
        y = ((y << distance) | (y >> (np.uint32(32) - distance))) ^ x
        if number % 4 == 3:
            group = number // 4 + 1
            x, y = x + schedule[group % 3], y + schedule[(group + 1) % 3] + np.uint32(group)
    return x, y


def cost(case: Case) -> Cost:
    """Every logit once; comparisons are not counted as work."""
    num_logits = (case.B or len(case.recipes)) * case.V
    return Cost(num_bytes=num_logits * DTYPES[case.dtype]().itemsize, num_flops=0)
