"""Prompts in, one vector each out: the final hidden states of the served model, pooled.

Beside the engine, not in it: the same weights and the same forward pass over pages of its own, so that no request that is served
waits for a page, is preempted, or is planned otherwise. Refuses to know texts.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import jax
import numpy as np

from jaxpaged.batch import put_tiles
from jaxpaged.engine import Engine
from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError
from jaxpaged.model.attention import PagedTokens
from jaxpaged.model.pooling import TileStates, tile_states
from jaxpaged.runner import attention_backend

_LEAST_TILES = 4  # of a call: a shape less to compile is worth the padding
POOLING_TYPES = ("LAST", "MEAN")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How the hidden states of a prompt become one vector; the names are vLLM's.

    Args:
      pooling_type: LAST is the state of the last token, MEAN the mean of all.
      normalize: whether the vector is scaled to length 1.

    Raises:
      RequestError: a value out of range.
    """

    pooling_type: str = "LAST"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling_type not in POOLING_TYPES:
            raise RequestError(f"pooling_type: got {shown(self.pooling_type)}, expected one of {', '.join(POOLING_TYPES)}")
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize: got {shown(self.normalize)}, expected True or False")


class Embedder:
    """Embeds prompts with an engine's weights. Threads may share it, and call while the engine runs: they take turns.

    A call of the device has at most as many tokens as a step of the engine, or as one prompt that is longer: what is served waits
    for no more. Shapes, powers of two of tiles, are compiled when they are first needed.
    """

    def __init__(self, engine: Engine):
        self._engine, self._lock = engine, threading.Lock()
        config = engine.config
        self._tile: int = config.prefill_tile  # type: ignore[assignment]
        self._page_size: int = config.block_size  # type: ignore[assignment]
        self._most_tiles = max(1, config.max_num_batched_tokens // self._tile)  # type: ignore[operator]
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def embed(
        self,
        prompts: Seq[Seq[int]],
        params: PoolingParams | None = None,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> list[list[float]]:
        """A vector of each prompt, which the engine has checked; of fewer when nobody wants them any more.

        Raises:
          RequestError: the model's numbers are not finite, or the engine has been closed.
        """
        params = params or PoolingParams()
        found: list[list[float]] = []
        for group in self._groups(prompts):
            with self._lock:
                if not is_wanted():
                    break
                found += [vector.tolist() for vector in self._embed(group, params)]
        return found

    def _groups(self, prompts: Seq[Seq[int]]) -> list[list[Seq[int]]]:
        """The prompts in their order, as many together as a call may have; one that is longer is alone."""
        groups: list[list[Seq[int]]] = []
        num_tiles = 0
        for prompt in prompts:
            count = self._num_tiles(prompt)
            if not groups or num_tiles + count > self._most_tiles:
                groups.append([])
                num_tiles = 0
            groups[-1].append(prompt)
            num_tiles += count
        return groups

    def _num_tiles(self, prompt: Seq[int]) -> int:
        return -(-len(prompt) // self._tile)

    def _embed(self, prompts: list[Seq[int]], params: PoolingParams) -> list[np.ndarray]:
        counts = [self._num_tiles(prompt) for prompt in prompts]
        size = max(_LEAST_TILES, 1 << (sum(counts) - 1).bit_length())
        tokens = self._tokens(prompts, size)
        try:
            if size not in self._compiled:
                self._compiled[size] = self._compile(tokens, size)
            states: TileStates = jax.device_get(self._compiled[size](self._engine.runner.weights, tokens))  # type: ignore[attr-defined]
        except RuntimeError:
            if all(not array.is_deleted() for array in jax.tree.leaves(self._engine.runner.weights)):  # type: ignore[attr-defined]
                raise
            raise RequestError("the engine is closed") from None
        found, at = [], 0
        for prompt, count in zip(prompts, counts, strict=True):
            if not states.is_sound[at : at + count].all():
                raise RequestError("prompt: the model's numbers are not finite for it")
            is_mean = params.pooling_type == "MEAN"
            vector = states.sums[at : at + count].sum(axis=0) / len(prompt) if is_mean else states.lasts[at + count - 1]
            norm = float(np.linalg.norm(vector.astype(np.float64))) if params.normalize else 1.0
            found.append((vector / max(norm, 1e-12)).astype(np.float32))
            at += count
        return found

    def _tokens(self, prompts: list[Seq[int]], num_tiles: int) -> PagedTokens:
        """The prompts' tiles; each prompt has pages of its own."""
        T, S = self._tile, self._page_size
        arrays: dict[str, np.ndarray] = {name: np.zeros(num_tiles * T, np.int32) for name in ("token_ids", "positions", "slots")}
        arrays["tables"] = np.zeros((num_tiles, self._table_len(num_tiles)), np.int32)
        arrays["lens"] = np.zeros(num_tiles, np.int32)
        row, first_page = 0, 1
        for prompt in prompts:
            pages = np.arange(first_page, first_page - (-len(prompt) // S), dtype=np.int32)
            first_page += len(pages)
            put_tiles(arrays, row, row * T, prompt, 0, pages, T, S)
            row += self._num_tiles(prompt)
        tables, lens = arrays.pop("tables"), arrays.pop("lens")
        rows = np.zeros((0, tables.shape[1]), np.int32), np.zeros(0, np.int32)
        return PagedTokens(*arrays.values(), *rows, tables, lens)  # type: ignore[arg-type]

    def _num_pages(self, num_tiles: int) -> int:
        """Of a call: each tile's tokens, and where tiles are shorter than pages, one of each tile at most; and the null page."""
        return num_tiles * max(1, -(-self._tile // self._page_size)) + 1

    def _table_len(self, num_tiles: int) -> int:
        return min(self._num_pages(num_tiles) - 1, self._engine.config.max_blocks_per_seq)

    def _compile(self, tokens: PagedTokens, num_tiles: int) -> jax.stages.Compiled:
        config, model = self._engine.config, self._engine.model
        compute = functools.partial(
            tile_states,
            config=model,
            num_pages=self._num_pages(num_tiles),
            page_size=self._page_size,
            dtype=config.kv_cache_dtype,  # type: ignore[arg-type]
            backend=attention_backend(config, model),
            batch_invariant=config.batch_invariant,
        )
        return jax.jit(compute).lower(self._engine.runner.weights, tokens).compile()  # type: ignore[attr-defined]
