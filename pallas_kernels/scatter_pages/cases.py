"""The cases of scatter_pages, in the pools of copy_pages. See `pallas_kernels.operations`."""

from __future__ import annotations

import numpy as np

from pallas_kernels.copy_pages.cases import BENCH, CHECK, COMPILE, DONATE, INSTRUCTIONS, Case, bits, cost, pad, plain, pool
from pallas_kernels.operations import Call

__all__ = ["BENCH", "CHECK", "COMPILE", "DONATE", "INSTRUCTIONS", "OUTPUTS", "Case", "cost", "define", "make", "plain"]

OUTPUTS = ("pages",)


def make(case: Case) -> Call:
    """Random pages; padding brings what the null page holds already, which is a right answer whether it is written or not."""
    rng, pages, order = pool(case)
    numbers = pad(case, order)
    staged = bits(rng, (case.X, case.L, *pages.shape[1:]), case.dtype)
    staged[numbers == 0] = pages.reshape(case.L, -1, *pages.shape[1:])[:, 0]
    return Call({"pages": pages, "staged": staged, "page_numbers": numbers}, {"num_layers": case.L})


def define(call: Call) -> tuple[np.ndarray]:
    """Page after page and layer after layer."""
    pages, staged, num_layers = call.arrays["pages"].copy(), call.arrays["staged"], call.options["num_layers"]
    P = pages.shape[0] // num_layers
    for page, fresh in zip(call.arrays["page_numbers"], staged, strict=True):
        for layer in range(num_layers):
            pages[layer * P + page] = fresh[layer]
    return (pages,)
