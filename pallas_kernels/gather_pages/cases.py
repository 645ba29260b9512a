"""The cases of gather_pages, in the pools of copy_pages. See `pallas_kernels.operations`."""

from __future__ import annotations

import numpy as np

from pallas_kernels.copy_pages.cases import BENCH, CHECK, COMPILE, INSTRUCTIONS, Case, cost, pad, plain, pool
from pallas_kernels.operations import Call

__all__ = ["BENCH", "CHECK", "COMPILE", "INSTRUCTIONS", "OUTPUTS", "Case", "cost", "define", "make", "plain"]

OUTPUTS = ("staged",)


def make(case: Case) -> Call:
    """Random pages, the very last among them; padding reads the null page."""
    _, pages, order = pool(case)
    return Call({"pages": pages, "page_numbers": pad(case, order)}, {"num_layers": case.L})


def define(call: Call) -> tuple[np.ndarray]:
    """Page after page and layer after layer."""
    pages, numbers, num_layers = call.arrays["pages"], call.arrays["page_numbers"], call.options["num_layers"]
    P = pages.shape[0] // num_layers
    return (np.stack([np.stack([pages[layer * P + page] for layer in range(num_layers)]) for page in numbers]),)
