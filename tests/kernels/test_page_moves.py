"""What the operations that move pages promise beyond their cases: in place, nothing else touched, and back again bit by bit."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import copy_pages, gather_pages, operations, scatter_pages
from pallas_kernels.backends import MOSAIC_JAX
from pallas_kernels.copy_pages.cases import DTYPES, Case, bits
from pallas_kernels.target import Target

MOVES = {"copy_pages": copy_pages, "gather_pages": gather_pages, "scatter_pages": scatter_pages}
KERNELS = ("write_kv_pages", *MOVES)
AMPERE = Target((8, 0), num_sms=8, is_interpreted=True)
needs_mosaic = pytest.mark.skipif(jax.__version_info__[:3] < MOSAIC_JAX, reason="jax is older than the Mosaic kernels need")


def arguments(
    name: str, num_pages: int, num_layers: int, dtype: str, pool_pages: int = 1024, num_heads: int = 2
) -> list[jax.ShapeDtypeStruct]:
    shape = (num_heads, 16, 64)
    pages, numbers = jax.ShapeDtypeStruct((pool_pages, *shape), dtype), jax.ShapeDtypeStruct((num_pages,), "int32")
    staged = jax.ShapeDtypeStruct((num_pages, num_layers, *shape), dtype)
    return {"copy_pages": [pages, numbers, numbers], "gather_pages": [pages, numbers], "scatter_pages": [pages, staged, numbers]}[
        name
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_swapped_out_and_in_elsewhere_every_bit_is_back(dtype: str, backend: Any) -> None:
    pages = bits(np.random.default_rng(0), (2 * 7, 2, 8, 32), dtype)
    staged = jax.jit(partial(gather_pages, num_layers=2, backend=backend))(pages, np.array([3, 6, 1], np.int32))
    back = jax.jit(partial(scatter_pages, num_layers=2, backend=backend))(pages, staged, np.array([5, 2, 4], np.int32))
    layers = np.asarray(back).reshape(2, 7, 2, 8, 32)
    before = pages.reshape(layers.shape)
    assert layers[:, [5, 2, 4]].tobytes() == before[:, [3, 6, 1]].tobytes()
    assert layers[:, [0, 1, 3, 6]].tobytes() == before[:, [0, 1, 3, 6]].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("num_pages", [1, 7])
@pytest.mark.parametrize("name", MOVES)
def test_a_donated_pool_is_worked_on_in_place(name: str, num_pages: int, num_heads: int, num_layers: int, dtype: str) -> None:
    """Nothing beside the pool but one page of all layers; gathered pages of one head may be laid out twice."""
    donated = () if name == "gather_pages" else (0,)
    given = arguments(name, num_pages, num_layers, dtype, num_heads=num_heads)
    function = jax.jit(partial(MOVES[name], num_layers=num_layers, backend="xla"), donate_argnums=donated)
    analysis: Any = function.lower(*given).compile().memory_analysis()
    page = num_heads * 16 * 64 * np.dtype(dtype).itemsize
    num_held = num_pages if name == "gather_pages" and num_heads == 1 else 2
    assert analysis.alias_size_in_bytes == (1024 * page if donated else 0)
    assert analysis.temp_size_in_bytes <= num_held * num_layers * page + 1024


@needs_mosaic
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("index", range(4))
def test_kernels_without_a_copy_engine_move_the_same_bits(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter models Hopper; told that it is an Ampere, it runs what goes through registers there."""
    targets = importlib.import_module("pallas_kernels.target")
    monkeypatch.setattr(targets, "INTERPRETED", AMPERE)
    operation = operations.operation(name)
    call = operation.cases.make(operation.cases.CHECK[index])
    got = jax.jit(partial(operation.function, **call.options, backend="interpret"))(**call.arrays)
    assert operations.judge("pages", np.asarray(got), operation.cases.define(call)[0], None).is_right


@needs_mosaic
def test_pages_that_do_not_divide_are_refused_with_the_reason() -> None:
    kernel = importlib.import_module("pallas_kernels.copy_pages.mosaic")
    assert kernel.unavailable(Target((8, 0), 108), (9, 1, 1, 100), "float32") == (
        "a page of 100 numbers of float32 is no multiple of 128 numbers"
    )
    assert kernel.unavailable(Target((9, 0), 132), (9, 1, 1, 100), "float32") is None
    assert "no multiple of 16 bytes" in kernel.unavailable(Target((9, 0), 132), (9, 1, 1, 7), "int8")


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("copy_pages", {"sources": np.zeros(2, np.int32), "targets": np.zeros(3, np.int32)}, "as long as"),
        ("copy_pages", {"sources": np.zeros(2, np.float32), "targets": np.zeros(2, np.int32)}, "sources is float32[2]"),
        ("gather_pages", {"page_numbers": np.zeros(2, np.int32), "num_layers": 3}, "num_layers is 3"),
        ("gather_pages", {"page_numbers": np.zeros((2, 1), np.int32)}, "page_numbers is int32[2, 1]"),
        ("scatter_pages", {"page_numbers": np.zeros(2, np.int32), "staged": np.zeros((2, 2, 1, 8, 32))}, "staged is"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, given: dict, says: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*") as caught:
        MOVES[name](np.zeros((4, 1, 8, 32), np.float32), **given)
    assert says in str(caught.value)


@pytest.mark.parametrize("backend", ["reference", "xla", pytest.param("interpret", marks=needs_mosaic)])
@pytest.mark.parametrize("name", MOVES)
def test_no_pages_are_no_work(name: str, backend: Any) -> None:
    case = Case(1)
    call = operations.operation(name).cases.make(case)
    arrays = {key: x if key == "pages" else x[:0] for key, x in call.arrays.items()}
    got = np.asarray(MOVES[name](**arrays, num_layers=1, backend=backend))
    assert got.tobytes() == (b"" if name == "gather_pages" else arrays["pages"].tobytes())
