"""Two attention backends side by side inside the engine: what is kept of their differences, and the file that a breach leaves.

Knows rows of a step and numpy. Refuses to know how attention is computed.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxpaged.config import ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.plan import StepPlan
from jaxpaged.model.cache import KVCache
from jaxpaged.model.duel import Evidence
from jaxpaged.model.step import StepInputs
from pallas_kernels import operations

logger = logging.getLogger("jaxpaged")

# Largest distance of two right backends over the largest number of the row. A result is rounded to 2^-8 (bfloat16) or 2^-11
# (float16) of itself and so are the weights on a tensor core; float32 sums differ by their order alone.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Breach:
    """The first difference beyond the tolerance, and the file that replays it: `python -m pallas_kernels.check --case FILE`."""

    step: int
    request_id: str
    position: int  # of the row's or tile's last real token
    layer: int
    head: int
    error: float
    path: str


@dataclass(frozen=True)
class Flip:
    """The first token that would have been another on the rival: the likeliest one of each side."""

    step: int
    request_id: str
    position: int  # where the token goes in its sequence
    token_id: int
    rival_token_id: int


@dataclass
class Duel:
    """The running record of one engine's duel.

    `errors` [L, N]: for each layer and query head the largest distance so far, over the rival's largest number in that row.
    """

    backend: str
    rival: str
    tolerance: float
    folder: Path
    config: ModelConfig
    num_steps: int = 0
    errors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    breach: Breach | None = None
    flip: Flip | None = None

    @classmethod
    def between(cls, backend: str, rival: str, config: EngineConfig, model: ModelConfig) -> Duel:
        """A duel as the resolved options say.

        Raises:
          ConfigError: the two are one.
        """
        if backend == rival:
            raise ConfigError(
                f"compare_with: got {config.compare_with!r}, which is what attention_backend runs as well ({backend})"
            )
        tolerance = config.compare_tolerance if config.compare_tolerance is not None else TOLERANCES[config.dtype]
        return cls(backend, rival, tolerance, Path(config.compare_dir), model)

    def record(self, plan: StepPlan, inputs: StepInputs, rows: list[int], evidence: Evidence, cache: KVCache) -> None:
        """Take in one step, right after it ran: `cache` is what it left.

        Args:
          rows: the row of each of `plan.outputs()`.
        """
        self.num_steps += 1
        errors = np.asarray(evidence.errors)
        largest = errors.max(axis=1)
        self.errors = largest if self.num_steps == 1 else np.maximum(self.errors, largest)
        if self.flip is None:
            self._look_for_a_flip(plan, rows, np.asarray(evidence.best))
        if self.breach is None and (largest > self.tolerance).any():
            self._breach(plan, inputs, errors, evidence, cache)

    def _look_for_a_flip(self, plan: StepPlan, rows: list[int], best: np.ndarray) -> None:
        for (chunk, num_drafts), row in zip(plan.outputs(), rows, strict=True):
            ours, theirs = (int(x) for x in best[:, row])
            if ours != theirs:
                position = chunk.end - len(chunk.drafts) + num_drafts
                self.flip = Flip(self.num_steps, chunk.sequence.request.request_id, position, ours, theirs)
                logger.warning("[Duel] First token that differs: %s", dataclasses.asdict(self.flip))
                return

    def _breach(self, plan: StepPlan, inputs: StepInputs, errors: np.ndarray, evidence: Evidence, cache: KVCache) -> None:
        """Write the worst row of the first layer beyond the tolerance as a call of its own."""
        layer = int(np.argmax((errors > self.tolerance).any(axis=(1, 2))))
        row, head = (int(x) for x in np.unravel_index(np.argmax(errors[layer]), errors.shape[1:]))
        name, call = self._call(inputs, np.asarray(evidence.queries[layer]), row, layer, cache)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"duel-{self.backend}-{self.rival}-step{self.num_steps}-layer{layer}.npz"
        operations.save(path, name, call)
        owner = _owners(plan, inputs.tokens.tile)[row if row < plan.num_rows else row - inputs.tokens.num_rows + plan.num_rows]
        position = int(call.arrays["kv_lens"][0]) - 1
        self.breach = Breach(self.num_steps, owner, position, layer, head, float(errors[layer, row, head]), str(path))
        logger.warning(
            "[Duel] %s and %s differ by %.3g of the largest number (allowed %.3g) in step %d, layer %d, head %d, request %s at "
            "position %d. Replay it alone: python -m pallas_kernels.check --case %s",
            *(self.backend, self.rival, self.breach.error, self.tolerance, self.num_steps, layer, head, owner, position, path),
        )

    def _call(self, inputs: StepInputs, queries: np.ndarray, row: int, layer: int, cache: KVCache) -> tuple[str, operations.Call]:
        """One row or tile of the step with its layer's null page, the pages it owns and no others, renumbered in order."""
        tokens = inputs.tokens
        D, tile = tokens.num_rows, tokens.tile
        is_tile = row >= D
        if is_tile:
            row, q = row - D, queries[D:].reshape(-1, tile, *queries.shape[1:])
            table, kv_len = tokens.tile_tables[row], tokens.tile_lens[row]
        else:
            q, table, kv_len = queries[:D, None], tokens.row_tables[row], tokens.row_lens[row]
        num_pages = -(-int(kv_len) // cache.page_size)
        # As wide as in the step: a kernel that looks past the row's pages shows it here too.
        renumbered = np.zeros((1, len(table)), np.int32)
        renumbered[0, :num_pages] = np.arange(1, num_pages + 1)
        pages = np.concatenate([[0], table[:num_pages]]) + layer * cache.pages_per_layer(self.config)
        arrays = {
            "q": q[row][None],
            "k_pages": np.asarray(cache.k[pages]).view(np.dtype(cache.k_pages.dtype)),
            "v_pages": np.asarray(cache.v[pages]).view(np.dtype(cache.k_pages.dtype)),
            "block_tables": renumbered,
            "kv_lens": np.array([kv_len], np.int32),
        }
        if is_tile:
            arrays["first_positions"] = np.asarray(tokens.first_positions)[row : row + 1]
        window = self.config.windows[layer] if self.config.windows else 0
        options = {"scale": self.config.head_dim**-0.5, "window": window, "return_lse": True}
        return "paged_prefill_attention" if is_tile else "paged_decode_attention", operations.Call(arrays, options)


def _owners(plan: StepPlan, tile: int) -> list[str]:
    """The request of each decode row, then of each tile."""
    owners = [chunk.sequence.request.request_id for chunk in plan.decodes for _ in range(chunk.num_tokens)]
    for chunk in plan.prefills:
        owners += [chunk.sequence.request.request_id] * -(-chunk.num_tokens // tile)
    return owners
