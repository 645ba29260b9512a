"""`bench latency` and `bench throughput`: seconds and tokens are those that were spent and made, under vLLM's keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from text_model import FAST, write_text_model

from jaxpaged import cli
from jaxpaged.bench import latency, throughput
from jaxpaged.bench.datasets import Ask

pytestmark = pytest.mark.usefixtures("own_logger")
SMALL = [f"--{name.replace('_', '-')}={value[0] if isinstance(value, tuple) else value}" for name, value in FAST.items()][:-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text_model(tmp_path_factory.mktemp("text-model")))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_warm_ups_do_not_count_and_ctrl_c_keeps_what_there_is() -> None:
    clock, seconds = Clock(), iter([9.0, 9.0, 1.0, 2.0, 3.0])

    def batch() -> None:
        clock.now += next(seconds)

    numbers = latency.summarise(latency.measure(batch, 3, 2, clock=clock))
    assert numbers["latencies"] == [1.0, 2.0, 3.0] and numbers["avg_latency"] == 2.0
    assert list(numbers["percentiles"]) == ["10", "25", "50", "75", "90", "99"] and numbers["percentiles"]["75"] == 2.5

    def interrupted(times: list[int]) -> Callable[[], None]:
        def batch() -> None:
            times.append(0)
            if len(times) == 3:
                raise KeyboardInterrupt

        return batch

    assert len(latency.measure(interrupted([]), 9, 1)) == 1
    with pytest.raises(KeyboardInterrupt):
        latency.measure(interrupted([]), 9, 5)


def test_throughput_is_tokens_over_seconds() -> None:
    clock = Clock()

    class Side:
        name = "fake"

        def run(self, asks: Sequence[Ask], on_end: Callable[[], object]) -> list[throughput.Done]:
            clock.now += 4.0
            return [throughput.Done(ask.num_prompt, ask.num_output * 2) for ask in asks]

        def close(self) -> None:
            pass

    numbers = throughput.measure(Side(), [Ask("a", 10, 3), Ask("b", 20, 7)], clock=clock)
    assert numbers == {
        **{"elapsed_time": 4.0, "num_requests": 2, "total_num_tokens": 50, "requests_per_second": 0.5, "tokens_per_second": 12.5},
        **{"total_input_tokens": 30, "total_output_tokens": 20, "output_tokens_per_second": 5.0},
    }


def test_the_commands_count_what_was_made(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> dict[str, Any]:
        assert cli.main(["bench", *argv, "--model", model, *SMALL, "--json", "--output-json", str(tmp_path / "x.json")]) == 0
        found = json.loads(capsys.readouterr().out)
        assert json.loads((tmp_path / "x.json").read_text()) == found
        return found

    lengths = ["--input-len", "9", "--output-len", "5"]
    numbers = run("latency", *lengths, "--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1", "--n", "2")
    assert len(numbers["latencies"]) == 3 and min(numbers["latencies"]) > 0
    for more in ([], ["--async-engine", "--n", "2"]):
        numbers = run("throughput", *lengths, "--num-prompts", "7", *more)
        assert numbers["num_requests"] == 7 and numbers["total_output_tokens"] == 7 * 5 * (2 if more else 1)
        assert numbers["total_num_tokens"] == numbers["total_input_tokens"] + numbers["total_output_tokens"]
    argv = ["bench", "throughput", "--model", model, *SMALL, "--input-len", "300", "--num-prompts", "2"]
    assert cli.main(argv) == cli.EXIT_USAGE and "the limit is 256 (max_model_len)" in capsys.readouterr().err
    assert cli.main(["bench", "latency", "--num-iters", "0"]) == cli.EXIT_USAGE
