"""Other people's paged and dense attention on the cases of ours, for `gpu_check`: what runs there is timed beside us.

Each peer is a function of a case's copies that returns something to time, or raises what keeps it from running. Those that know
no pages get the keys and values gathered beforehand; their times leave the gather out, which is to their advantage. Nothing here
is needed to use the library, and nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_kernels.operations import Call
from pallas_kernels.timing import Candidate, Copies


def of(operation: str) -> Sequence[Callable[[Copies], Any]]:
    """The peers of an operation, those that start fastest first."""
    return {"paged_decode_attention": DECODE, "paged_prefill_attention": PREFILL}.get(operation, ())


@dataclass(frozen=True)
class Dense:
    """A call without pages: q [R, Q, N, H], k and v [R, C, K, H], and how its results go back to [B, T, N, H]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    is_causal: bool
    back: Callable[[np.ndarray], np.ndarray]


def dense(call: Call) -> Dense:
    """Gather a call's pages: rows of one length for decode, the tiles of one prompt for prefill.

    Raises:
      NotImplementedError: it is neither, or it has options that dense attention has not.
    """
    a, options = call.arrays, call.options
    if options.get("window") or options.get("soft_cap") or "sinks" in a or "k_scales" in a:
        raise NotImplementedError("a call with options that it does not have")
    q, lens, tables = a["q"], a["kv_lens"], a["block_tables"]
    B, T, N, H = q.shape
    S, C = a["k_pages"].shape[2], int(lens.max())

    def gathered(name: str, table: np.ndarray) -> np.ndarray:
        pages = a[name][table[:, : -(-C // S)]]  # [R, M, K, S, H]
        return np.ascontiguousarray(np.moveaxis(pages, 2, 3).reshape(len(table), -1, *a[name].shape[1::2])[:, :C])

    if "first_positions" not in a:
        if T > 1 or len(set(lens)) > 1:
            raise NotImplementedError("rows of several lengths, or of several tokens")
        return Dense(q, gathered("k_pages", tables), gathered("v_pages", tables), options["scale"], False, lambda out: out)

    first = a["first_positions"]
    if (tables != tables[0]).any() or (np.diff(lens) != T).any():
        raise NotImplementedError("tiles that are not of one prompt")
    begin = int(lens[0]) - T
    at = first[:, None] + np.arange(T) - begin  # where each query stands in the prompt; padding queries lie outside their tile
    is_real = np.arange(T) < (lens - first)[:, None]
    prompt = np.zeros((1, B * T, N, H), q.dtype)
    prompt[0, at[is_real]] = q[is_real]

    def back(out: np.ndarray) -> np.ndarray:
        tiles = np.zeros(q.shape, out.dtype)
        tiles[is_real] = out[0, at[is_real]]
        return tiles

    return Dense(prompt, gathered("k_pages", tables[:1]), gathered("v_pages", tables[:1]), options["scale"], True, back)


# --- jax ---


def _in_jax(name: str, function: Callable[..., Any], arrays: dict[str, np.ndarray], like: Copies, back: Callable) -> Candidate:
    runner = Candidate(name, function, Copies(Call(arrays, {}), (), like.num_copies))
    runner.outputs = (back(runner.outputs[0]),)
    return runner


def cudnn(copies: Copies, implementation: str = "cudnn") -> Candidate:
    """jax.nn.dot_product_attention on gathered keys and values."""
    x = dense(copies.call)
    if x.is_causal and x.q.shape[1] != x.k.shape[1]:
        raise NotImplementedError("a chunk in the middle of a prompt: its causal mask begins at the first key")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=x.scale,
            is_causal=x.is_causal,
            implementation=implementation,  # type: ignore[arg-type]
        )

    return _in_jax("cudnn", attend, {"q": x.q, "k": x.k, "v": x.v}, copies, x.back)


def attention_mgpu(copies: Copies) -> Candidate:
    """jax's own Mosaic attention, dense, on gathered keys and values."""
    module: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    x = dense(copies.call)
    if x.q.shape[1] != x.k.shape[1]:
        raise NotImplementedError("a chunk in the middle of a prompt: its causal mask begins at the first key")
    config = module.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=x.is_causal)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return module.attention(q * x.scale, k, v, config)  # it has no scale of its own

    return _in_jax("attention_mgpu", attend, {"q": x.q, "k": x.k, "v": x.v}, copies, x.back)


def jax_paged_attention(copies: Copies) -> Candidate:
    """jax's own paged attention (Triton, deprecated). It wants the heads before the pages."""
    module: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    a, options = copies.call.arrays, copies.call.options
    dense(copies.call)  # for its refusals
    tables = a["block_tables"]
    per_block = 8
    arrays = {
        "q": a["q"][:, 0],
        "k": np.ascontiguousarray(np.swapaxes(a["k_pages"], 0, 1)),
        "v": np.ascontiguousarray(np.swapaxes(a["v_pages"], 0, 1)),
        "tables": np.pad(tables, ((0, 0), (0, -tables.shape[1] % (per_block * 16)))),
        "lens": a["kv_lens"],
    }

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, tables: jax.Array, lens: jax.Array) -> jax.Array:
        scaled = q * options["scale"]
        return module.paged_attention(scaled, k, v, tables, lens, pages_per_compute_block=per_block, k_splits=16)

    return _in_jax("jax_paged_attention", attend, arrays, copies, lambda out: out[:, None])


# --- torch, and what is built on it ---


class TorchRunner:
    """A function of torch tensors with its own copies of them."""

    def __init__(self, name: str, function: Callable[..., Any], arrays: Sequence[np.ndarray], like: Copies, back: Callable):
        self._torch = _torch()
        self.name, self.num_calls, self._function = name, like.num_copies, function
        self._arguments = [tuple(map(tensor, arrays)) for _ in range(like.num_copies)]
        found = function(*self._arguments[0])
        self.outputs = (back(found.detach().float().cpu().numpy()),)

    def start(self) -> None:
        """Enqueue one pass."""
        with self._torch.no_grad():
            for arguments in self._arguments:
                self._function(*arguments)

    def finish(self) -> None:
        """Wait for all that was enqueued."""
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()


def _torch() -> Any:
    torch: Any = importlib.import_module("torch")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise NotImplementedError("this torch has no CUDA")
    return torch


def tensor(x: np.ndarray) -> Any:
    """A numpy array as a torch tensor on the device, bfloat16 by its bits."""
    torch = _torch()
    bits = torch.from_numpy(np.array(x.view(np.uint16).astype(np.int16) if x.dtype.name == "bfloat16" else x))
    on = bits.to("cuda" if torch.cuda.is_available() else "cpu")
    return on.view(torch.bfloat16) if x.dtype.name == "bfloat16" else on


def _heads_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(x, 1, 2))


def torch_sdpa(copies: Copies) -> TorchRunner:
    """torch's scaled_dot_product_attention on gathered keys and values; torch chooses flash or cuDNN."""
    torch, x = _torch(), dense(copies.call)
    bias: Any = None
    if x.is_causal and x.q.shape[1] != x.k.shape[1]:
        bias = importlib.import_module("torch.nn.attention.bias").causal_lower_right(x.q.shape[1], x.k.shape[1])
    repeats = 1 if bias is None else x.q.shape[2] // x.k.shape[2]  # the biased form does not group heads

    def attend(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=x.scale, is_causal=x.is_causal and bias is None, enable_gqa=bias is None
        )

    arrays = [_heads_first(x.q), *(np.repeat(_heads_first(each), repeats, axis=1) for each in (x.k, x.v))]
    return TorchRunner("torch_sdpa", attend, arrays, copies, lambda out: x.back(np.swapaxes(out, 1, 2)))


def torch_flex(copies: Copies) -> TorchRunner:
    """torch's flex_attention on gathered keys and values, compiled on a GPU."""
    torch, x = _torch(), dense(copies.call)
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")
    is_cuda = torch.cuda.is_available()
    flex = torch.compile(module.flex_attention) if is_cuda else module.flex_attention
    Q, C = x.q.shape[1], x.k.shape[1]
    mask: Any = None
    if x.is_causal:

        def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
            return key <= query + (C - Q)

        mask = module.create_block_mask(sees, None, None, Q, C, device="cuda" if is_cuda else "cpu")

    def attend(q: Any, k: Any, v: Any) -> Any:
        return flex(q, k, v, block_mask=mask, scale=x.scale, enable_gqa=True)

    arrays = [_heads_first(each) for each in (x.q, x.k, x.v)]
    return TorchRunner("torch_flex", attend, arrays, copies, lambda out: x.back(np.swapaxes(out, 1, 2)))


def flashinfer(copies: Copies) -> TorchRunner:
    """FlashInfer's paged kernels on our very pages (their HND layout); its plan is made beforehand and not timed."""
    module: Any = importlib.import_module("flashinfer")
    torch, call = _torch(), copies.call
    x, a = dense(call), call.arrays
    (_, K, S, H), N = a["k_pages"].shape, a["q"].shape[2]
    tables = a["block_tables"] if not x.is_causal else a["block_tables"][:1]
    num_pages = -(-x.k.shape[1] // S)
    R = len(tables)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    indptr = tensor((np.arange(R + 1) * num_pages).astype(np.int32))
    indices = tensor(np.ascontiguousarray(tables[:, :num_pages]).ravel())
    last = tensor(np.full(R, x.k.shape[1] - (num_pages - 1) * S, np.int32))
    dtype = tensor(x.q[:1, :1]).dtype
    if x.is_causal:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        queries = tensor(np.array([0, x.q.shape[1]], np.int32))
        wrapper.plan(queries, indptr, indices, last, N, K, H, S, causal=True, sm_scale=x.scale, q_data_type=dtype)
    else:
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last, N, K, H, S, sm_scale=x.scale, q_data_type=dtype, data_type=dtype)
    arrays = [x.q.reshape(-1, N, H), a["k_pages"], a["v_pages"]]
    return TorchRunner(
        "flashinfer", lambda q, k, v: wrapper.run(q, (k, v)), arrays, copies, lambda out: x.back(out.reshape(x.q.shape))
    )


def vllm_triton(copies: Copies) -> TorchRunner:
    """vLLM's unified Triton kernel; it wants the tokens of a page before its heads."""
    module: Any = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    torch, call = _torch(), copies.call
    x, a = dense(call), call.arrays
    tables = a["block_tables"] if not x.is_causal else a["block_tables"][:1]
    (R, Q, N, H), C = x.q.shape, x.k.shape[1]
    starts = tensor((np.arange(R + 1) * Q).astype(np.int32))
    lens, table = tensor(np.full(R, C, np.int32)), tensor(np.ascontiguousarray(tables))

    def attend(q: Any, k: Any, v: Any) -> Any:
        out = torch.empty_like(q)
        module.unified_attention(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=Q,
            seqused_k=lens,
            max_seqlen_k=C,
            softmax_scale=x.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return out

    pages = [np.ascontiguousarray(np.swapaxes(a[name], 1, 2)) for name in ("k_pages", "v_pages")]
    arrays = [x.q.reshape(-1, N, H), *pages]
    return TorchRunner("vllm_triton", attend, arrays, copies, lambda out: x.back(out.reshape(x.q.shape)))


DECODE = (torch_sdpa, cudnn, jax_paged_attention, flashinfer, vllm_triton, torch_flex)
PREFILL = (torch_sdpa, cudnn, attention_mgpu, flashinfer, vllm_triton, torch_flex)
