"""The step profile: every thunk is of a part by name, the parts add up, and floors are what is counted by hand."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged import cli
from jaxpaged.bench import machine
from jaxpaged.bench.models import open_engine
from jaxpaged.bench.step_profile import BETWEEN, PARTS, Part, profile
from jaxpaged.bench.thunks import Program, Share, Thunk, heaviest, read_trace, shares

LIMITS = machine.Limits(bytes_per_s=1e9, flops=1e10)


@jax.named_scope("outer")
def toy(x: jax.Array) -> jax.Array:
    with jax.named_scope("product"):
        y = x @ x
    with jax.named_scope("looped"):
        y = jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) @ x, y)
    return jnp.cumsum(y)


def trace(folder: Path) -> tuple[Program, list[Thunk]]:
    x = np.eye(256, dtype=np.float32)
    compiled = jax.jit(toy).lower(x).compile()
    program = Program.read(compiled.as_text() or "", ("outer", "product", "looped"))
    compiled(x).block_until_ready()
    with jax.profiler.trace(folder):
        for _ in range(4):
            compiled(x).block_until_ready()
    return program, read_trace(folder, program.name)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, list[Thunk]]:
    return trace(tmp_path_factory.mktemp("trace"))


def test_each_run_has_the_same_thunks_of_the_same_scopes(traced: tuple[Program, list[Thunk]]) -> None:
    program, thunks = traced
    runs: dict[int, list[str]] = {}
    for thunk in thunks:
        assert thunk.end_ns >= thunk.start_ns
        assert thunk.name in program.opcodes
        runs.setdefault(thunk.run, []).append(thunk.name)
    assert len(runs) == 4
    assert len({tuple(sorted(names)) for names in runs.values()}) == 1


def test_thunks_are_of_the_innermost_scope(traced: tuple[Program, list[Thunk]], tmp_path: Path) -> None:
    def check(program: Program, thunks: list[Thunk]) -> None:
        found, busy, whole = shares(thunks, program)
        assert {"outer", "product", "looped"} <= set(found)
        # What XLA makes of its own, such as a loop's counter, has no name.
        assert found.pop("", Share(0.0, 0)).seconds < 0.2 * whole
        assert set(found) == {"outer", "product", "looped"}
        assert 0 < busy <= whole
        # Three products of the loop and the sines against one: and the loop itself is not counted beside what runs in it.
        assert found["looped"].seconds > found["product"].seconds
        assert sum(share.seconds for share in found.values()) < 1.5 * whole

    for number in range(2):  # a thunk that the machine has interrupted outweighs the others: that is so in one trace of three
        with contextlib.suppress(AssertionError):
            return check(*traced)
        traced = trace(tmp_path / str(number))
    check(*traced)


def test_a_thunk_that_runs_others_counts_what_is_left() -> None:
    text = """HloModule jit_f, entry={}
ENTRY %main (x: f32[2]) -> f32[2] {
  %loop.1 = (s32[], f32[2]{0}) while(%x), metadata={op_name="jit(f)/a/while"}
  %inner.1 = f32[2]{0} fusion(%x), calls=%c, metadata={op_name="jit(f)/a/while/body/b/sin"}
  %nameless.1 = f32[2]{0} fusion(%inner.1), kind=kLoop
}"""
    program = Program.read(text, ("a", "b"))
    thunks = [
        Thunk("loop.1", 1, 0, 100),
        Thunk("inner.1", 1, 10, 40),
        Thunk("inner.1", 1, 50, 80),
        Thunk("nameless.1", 1, 150, 160),
    ]
    found, busy, whole = shares(thunks, program)
    seconds = {scope: (round(1e9 * share.seconds), share.count) for scope, share in found.items()}
    assert seconds == {"a": (40, 1), "b": (70, 3)}  # what has no name is of what it takes
    assert (round(1e9 * busy), round(1e9 * whole)) == (110, 160)
    assert [(one.name, round(1e9 * one.seconds)) for one in heaviest(thunks, program, 2)] == [("inner.1", 60), ("nameless.1", 10)]


def test_a_folder_without_a_trace_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace"):
        read_trace(tmp_path, "jit_f")


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert Part("x", 1.0, 1, num_bytes=10**9, flops=10**9).floor_s(LIMITS) == 1.0
    assert Part("x", 1.0, 1, num_bytes=10**8, flops=10**10).floor_s(LIMITS) == 1.0
    assert Part("x", 1.0, 1).floor_s(LIMITS) == 0.0


def test_the_bundled_model_step_is_told_apart() -> None:
    with open_engine(
        None, dtype="float32", max_num_seqs=4, decode_row_buckets=(4,), max_model_len=128, enforce_eager=True
    ) as engine:
        num_free = engine.pool.num_free
        found = profile(engine, rows=4, context=64, prefill_tokens=32, turns=2, host_steps=0, limits=LIMITS)
        assert engine.pool.num_free == num_free
        model = engine.model
    parts = {part.name: part for part in found.parts}
    assert list(parts) == [*PARTS, BETWEEN]
    for name in PARTS:
        assert parts[name].count > 0, name
        assert parts[name].seconds > 0, name
    # What the model's code does has a name: else the scopes are gone from it.
    assert parts["other"].count < 0.25 * sum(part.count for part in found.parts)
    # 4 rows of 64 tokens; 32 tokens of a prompt are two tiles, whose last ends at 64.
    token_bytes = 2 * model.num_kv_heads * model.head_dim * model.num_layers * 4
    assert parts["attention"].num_bytes == (4 * 64 + 64) * token_bytes
    num_pairs = 4 * 64 + sum(range(33, 65))
    assert parts["attention"].flops == 4 * num_pairs * model.num_heads * model.head_dim * model.num_layers
    assert parts["head"].num_bytes == model.vocab_size * model.hidden_size * 4
    assert found.floor_s == pytest.approx(sum(part.floor_s(LIMITS) for part in found.parts))


def test_the_machine_is_measured_in_sensible_numbers() -> None:
    found = machine.measure("bfloat16", turns=1, num_bytes=1 << 22, side=64)
    assert 1e8 < found.bytes_per_s < 1e14
    assert 1e6 < found.flops < 1e16


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    flags = ["--rows", "2", "--context", "24", "--turns", "2", "--host-steps", "3", "--output-json", str(path), "--thunks", "2"]
    flags += ["--skip-tokenizer-init"]  # it loads none in any case
    assert cli.main(["bench", "profile", *flags]) == 0
    printed = capsys.readouterr().out
    assert "attention" in printed
    assert "of floor" in printed
    (found,) = json.loads(path.read_text())
    assert found["rows"] == 2
    assert set(found["host_us"]) == {"processor time", "wall"}
    assert len(found["heaviest"]) == 2


def test_the_command_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "profile", "--rows", "0"]) == 2
    assert "--rows" in capsys.readouterr().err
