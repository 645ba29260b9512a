"""Panels of bfloat16 in three quarters of their bytes, with nothing lost: on a CPU few rows take as long as their weight is read.

Nearly all numbers of a weight have one of sixteen exponents, which four bits tell apart instead of eight; the few that have not
stand by themselves. That weights leave so much room is known from DFloat11 (https://arxiv.org/abs/2504.11651), whose codes of
variable length a CPU could not read at the speed of its memory. Which bits stand where is told in `native/packed.h`, where a tile
of a product takes them as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.panels import LANES

_STEPS = 4  # that stand together, each of two numbers of every output
_LINE = 32  # words of 16 bits
_REST = 0x807F  # sign and fraction


def can_pack(panels: jax.Array) -> bool:
    """Whether panels are of the kind that can be packed, if their numbers allow it, and are smaller then."""
    if panels.ndim != 4 or panels.shape[2:] != (LANES, 2) or panels.dtype != jnp.bfloat16 or panels.shape[1] % _STEPS:
        return False
    return num_words(2 * panels.shape[1]) * panels.shape[0] < panels.size


def is_packed(weight: jax.Array) -> bool:
    """Whether this is what `pallas_kernels.native.matmul.pack_panels` made."""
    return weight.ndim == 2 and weight.dtype == jnp.uint16


def num_words(D: int) -> int:
    """Of a panel: its exponents, room for those that stand by themselves, and three lines for four steps."""
    return (1 + _stray_lines(D) + 3 * D // (2 * _STEPS)) * _LINE


def rows_of(packed: jax.Array, indices: jax.Array, D: int) -> jax.Array:
    """Outputs of the weight by their numbers: bfloat16 [..., D]."""
    flat = indices.reshape(-1, 1)
    panel, lane = flat // LANES, flat % LANES
    places = 2 * lane + jnp.arange(2)  # [N, 2], of a step
    groups = (1 + _stray_lines(D) + 3 * jnp.arange(D // (2 * _STEPS))) * _LINE

    def line(number: int) -> jax.Array:
        """[N, groups, 2]: what a line of each group has at these places."""
        return packed[panel[:, :, None], groups[None, :, None] + number * _LINE + places[:, None, :]]

    def rest(words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sign and fraction of an earlier step and of a later one."""
        return words & _REST, (words << 8 | words >> 8) & _REST

    numbers = line(2)
    which = jnp.stack([numbers >> 4 * step & 15 for step in range(_STEPS)], axis=2)
    exponents = packed[panel[:, :, None, None], which]
    bits = (jnp.stack([*rest(line(0)), *rest(line(1))], axis=2) | exponents).reshape(-1, D)

    strays = packed[panel, _LINE + jnp.arange(_stray_lines(D) * _LINE)].reshape(len(flat), -1, 4)
    step = strays[..., 0].astype(jnp.int32) + (strays[..., 1].astype(jnp.int32) << 16)  # from 1 on, 0 for none
    is_here = (step > 0) & (strays[..., 2] // 2 == lane)
    at = jnp.where(is_here, 2 * (step - 1) + strays[..., 2] % 2, D)
    bits = bits.at[jnp.arange(len(flat))[:, None], at].set(strays[..., 3], mode="drop")
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).reshape(*indices.shape, D)


def from_packed(packed: jax.Array, D: int) -> jax.Array:
    """The weight, bfloat16 [F, D]."""
    return rows_of(packed, jnp.arange(packed.shape[0] * LANES), D)


def _stray_lines(D: int) -> int:
    return 1 + D // 512
