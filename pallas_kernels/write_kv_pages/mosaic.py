"""New tokens to their slots on an NVIDIA GPU, and their scales beside them.

The K rows of one token lie S * H numbers apart in its page: one copy engine store with a box of [K, H] takes them all (sm_90 and
newer); below, 128 threads load and store them. Values come quantised: that is elementwise, and XLA fuses it with what made them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.target import Target

# A block's tokens are in flight together. One token a block while there are multiprocessors for them, so that a decode step waits
# for one load and one store; at most 8, 16 KiB of 8 heads of 128 in 16 bits, of which 12 blocks fit a multiprocessor.
MAX_TOKENS = 8
TOKEN_BYTES = 16 * 1024  # of shared memory, of a block's tokens together
MAX_BOX = 256  # of the copy engine, along one axis
THREADS = 128


def unavailable(target: Target, shape: tuple[int, ...], dtype: str) -> str | None:
    """Why pages of this shape ([P, K, S, H]) and dtype cannot be written on that GPU, or None when they can."""
    _, K, _, H = shape
    size = jnp.dtype(dtype).itemsize
    if size > 4:
        return f"pages of {dtype} have more than 32 bits a number"
    if not target.has_tma:
        is_shared = (K * H) % THREADS == 0
        return None if is_shared else f"{K} heads of {H} numbers do not divide among {THREADS} threads"
    if max(K, H) > MAX_BOX:
        return f"{K} heads of {H} are more than the copy engine's {MAX_BOX} along an axis"
    if H * size % 16:
        return f"a head of {H} {dtype} numbers is no multiple of 16 bytes"
    return None


def write_kv_pages(
    pages: jax.Array,
    new: jax.Array,
    slots: jax.Array,
    scales: jax.Array | None,
    new_scales: jax.Array | None,
    num_layers: int,
    *,
    target: Target,
) -> tuple[jax.Array, jax.Array | None]:
    """The pages and, with `new_scales` [X, K], the scales [P, K, S]; `new` is in the pages' dtype."""
    (P, K, S, H), X = pages.shape, slots.shape[0]
    num_tokens = max(1, min(MAX_TOKENS, -(-X // target.num_sms), TOKEN_BYTES // (K * H * pages.dtype.itemsize)))
    has_scales = scales is not None and new_scales is not None

    def body(slots_ref: Any, new_ref: Any, pages_ref: Any, *refs: Any) -> None:
        scale_refs, buffers = refs[: 2 * has_scales], refs[2 * has_scales : -1]
        arrived: Any = refs[-1] if target.has_tma else None  # a barrier for each token
        first = lax.axis_index("block") * num_tokens

        def place(i: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Token i of this block, its page and offset, and whether it is to be written: padding shares slots."""
            token = first + i
            slot = slots_ref[jnp.minimum(token, X - 1)]
            page = lax.div(slot, jnp.int32(S))
            is_live = (token < X) & (lax.rem(page, jnp.int32(P // num_layers)) != 0)
            return token, page, lax.rem(slot, jnp.int32(S)), is_live

        def load(i: int) -> None:
            token, _page, _offset, is_live = place(i)

            @pl.when(is_live)
            def _() -> None:
                in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                plgpu.copy_gmem_to_smem(new_ref.at[token], buffers[i], arrived.at[i], oob_mode=in_bounds)

        def store(i: int) -> None:
            token, page, offset, is_live = place(i)

            @pl.when(is_live)
            def _() -> None:
                if target.has_tma:
                    plgpu.barrier_wait(arrived.at[i])
                    plgpu.copy_smem_to_gmem(buffers[i], pages_ref.at[page, :, offset])
                else:
                    _compat.store(pages_ref.at[page, :, offset], new_ref[token])
                if has_scales:
                    new_scales_ref, scales_ref = scale_refs
                    for k in range(K):  # S numbers apart: nothing that a bulk copy could take
                        scales_ref[page, k, offset] = new_scales_ref[token, k]

        if target.has_tma:
            for i in range(num_tokens):
                load(i)
        for i in range(num_tokens):
            store(i)
        if target.has_tma:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a block that has exited has no shared memory to read from

    # A buffer for each token: the copy engine wants 128-byte boundaries, which a token of few small heads does not fill.
    buffers = [plgpu.SMEM((K, H), pages.dtype)] * num_tokens + [plgpu.Barrier(num_barriers=num_tokens)]
    call = _compat.kernel(
        body,
        target=target,
        scratch_types=buffers if target.has_tma else [],
        grid=(-(-X // num_tokens),),
        grid_names=("block",),
        name="write_kv_pages",
    )
    pool = jax.new_ref(pages)
    if not has_scales:
        call(slots, new, pool)
        return jax.freeze(pool), None
    scale_pool = jax.new_ref(scales)
    call(slots, new, pool, new_scales, scale_pool)
    return jax.freeze(pool), jax.freeze(scale_pool)
