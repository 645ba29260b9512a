"""Steps of this machine, measured by the bench, are a cost model that knows every shape of the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_model import FAST, write_text_model

from jaxpaged import cli, llm
from jaxpaged.bench import step_times
from jaxpaged.config import Bucket
from jaxpaged.simulate.cost import MeasuredSteps


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    with llm.LLM(write_text_model(tmp_path_factory.mktemp("text-model")), **FAST) as model:
        yield model.engine


def test_a_plan_fills_its_bucket(engine):
    for bucket in engine.config.buckets():
        for context in (1, 20, 100):
            plan = step_times.full_plan(engine, bucket, context)
            assert len(plan.decodes) == bucket.decode_rows
            assert sum(-(-chunk.num_tokens // 16) for chunk in plan.prefills) == bucket.prefill_tiles
            assert {chunk.end for chunk in plan.decodes} == {context}
            assert all(chunk.end == max(context, chunk.num_tokens) for chunk in plan.prefills)
            step_times.give_back(engine, plan.chunks())
    pages = engine.pool.allocate(engine.pool.num_free - 63)
    assert step_times.full_plan(engine, Bucket(4, 0), 256) is None  # 4 rows of 16 pages, and 63 are left
    assert engine.pool.num_free == 63
    engine.pool.free(pages)


def test_measured_steps_are_a_cost_model(engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = step_times.measure(engine, [1, 100], 2)
    assert {(step["decode_rows"], step["prefill_tiles"]) for step in steps} == {(4, 0), (4, 4)}
    assert [step["num_context"] for step in steps] == [4, 400, 68, 500] and all(step["seconds"] > 0 for step in steps)
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"steps": steps}))
    table = MeasuredSteps.from_file(str(path), 16)
    plan = step_times.full_plan(engine, Bucket(4, 0), 100)
    assert plan is not None and table.step_s(plan) == pytest.approx(steps[1]["seconds"])
    step_times.give_back(engine, plan.decodes)

    options = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--prefill-tile", "16", "--block-size", "16"]
    lengths = ["--input-len", "1:60", "--output-len", "1:40", "--num-prompts", "10"]
    assert cli.main(["simulate", "--step-times", str(path), *options, *lengths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 10
