"""A part of R12: what is not finite ends its own request, at once, and no page ever holds it; `make fuzz` has the rest."""

from __future__ import annotations

import dataclasses

import faults
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.host.scheduler import Scheduler
from jaxpaged.model import transformer
from jaxpaged.model.attention import PagedAttention, PagedTokens
from jaxpaged.model.cache import init_cache
from jaxpaged.runner import JaxRunner
from pallas_kernels import Heads, rotate_heads
from pallas_kernels.rotate_heads import xla as rotate_xla


def test_a_number_that_is_not_finite_ends_its_own_request_within_its_step() -> None:
    assert faults.sick_crowds(range(12)) > 40


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 7e4])
def test_pages_stay_finite_and_the_token_tells(number: float) -> None:
    """The last is finite until it is in pages of float16."""
    config = dataclasses.replace(faults.runner().model, windows=())
    K, H = config.num_kv_heads, config.head_dim
    cache = init_cache(config, 3, 8, "float16")
    ones, none = jnp.ones(2, jnp.int32), jnp.zeros((0, 1), jnp.int32)
    tokens = PagedTokens(ones, ones * 0, jnp.array([8, 16]), jnp.array([[1], [2]]), ones, none, none[:, 0])
    k = jnp.ones((2, K, H), jnp.float32).at[0, 1, 3].set(number)
    for new_k, new_v in ((k, jnp.ones_like(k)), (jnp.ones_like(k), k)):
        heads = Heads(*rotate_xla.told(jnp.ones((2, config.num_heads, H)), new_k, new_v))
        attended, after = PagedAttention(tokens, config, "xla")(0, heads, cache)
        assert all(np.isfinite(np.asarray(pages, np.float32)).all() for pages in (after.k_pages, after.v_pages))
        assert np.isnan(np.asarray(attended[0])).all() and np.isfinite(np.asarray(attended[1])).all()


# --- what they are for would show ---


def test_pages_that_are_not_cleaned_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JaxRunner, "clean", lambda self, pages: None)
    with pytest.raises(AssertionError, match="not zeroed"):
        faults.sick_crowds(range(4))


def test_what_is_written_as_it_is_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_xla, "told", lambda *heads, told=rotate_xla.told: (*heads, told(*heads)[-1]))
    monkeypatch.setattr(transformer, "rotate_heads", lambda *given, backend, **more: rotate_heads(*given, backend="xla", **more))
    faults.runner.cache_clear()
    try:
        with pytest.raises(AssertionError, match="not finite"):
            faults.sick_crowds(range(4))
    finally:
        faults.runner.cache_clear()
        faults.alone.cache_clear()


def test_a_prompt_that_goes_on_to_its_end_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Scheduler.commit

    def deaf(self, plan, token_ids, is_finite, *rest):
        count = len(plan.sampling())
        return commit(self, plan, token_ids[:count], is_finite[:count], *rest)

    monkeypatch.setattr(Scheduler, "commit", deaf)
    with pytest.raises(AssertionError, match="a sick"):
        faults.sick_crowds(range(20))


def test_what_failed_and_stays_known_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self, sequence, pages):
        self.spoiled += [page for page in pages if not self.pool.num_owners(page)]

    monkeypatch.setattr(Scheduler, "_spoil", careless)
    with pytest.raises(AssertionError, match=r"found by others|is in the prefix cache"):
        faults.sick_crowds(range(20))
