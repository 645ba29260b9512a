"""`bench serve` against a server of known delays, and against the real one: what it reports is what happened."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import Fake, Script, fake_server

from jaxpaged import cli
from jaxpaged.bench.datasets import Ask, DatasetOptions, Words, asks
from jaxpaged.bench.serve import Offer, Run, Seen, measure
from jaxpaged.bench.serve_report import summarise, table, times_s, warnings
from jaxpaged.cli import bench_serve
from jaxpaged.client.connection import HttpError
from jaxpaged.client.http import Client
from jaxpaged.client.openai import EventReader
from jaxpaged.config import ConfigError
from jaxpaged.demo import MODEL_DIR
from jaxpaged.simulate.arrivals import Ramp, arrival_times
from jaxpaged.tokenizer import Tokenizer

METRICS = ("ttft", "tpot", "itl", "e2el")
SLACK_S = 0.03  # between a chunk's going and its being seen, in the median: the machine of the tests is shared


def ramp(strategy: str, start: str, end: str) -> list[str]:
    return ["bench", "serve", "--ramp-up-strategy", strategy, "--ramp-up-start-rps", start, "--ramp-up-end-rps", end]


def offer(**changes: Any) -> Offer:
    options = {"backend": "openai", "path": "/v1/completions", "model": "demo", "body": {}, "request_rate": math.inf}
    options |= {"burstiness": 1.0, "max_concurrency": None, "timeout_s": 20.0, "has_counts": True, "seed": 0}
    return Offer(**{**options, **changes})


def measured(url: str, num: int = 4, **changes: Any) -> Run:
    async def main() -> Run:
        async with Client(url) as client:
            return await measure(client, [Ask(f"prompt {place}", 2, 8) for place in range(num)], offer(**changes))

    return asyncio.run(main())


def numbers_of(run: Run, **options: Any) -> dict[str, Any]:
    return summarise(run, metrics=METRICS, percentiles=(99.0,), **options)


def assert_as_sent(fake: Fake, numbers: dict[str, Any], num_tokens: int, *, first: int = 1) -> None:
    """Medians are those of the times at which the server sent; `first` is the chunk with the first token."""

    def close(name: str, values: list[float]) -> None:
        assert numbers[f"median_{name}_ms"] / 1e3 == pytest.approx(statistics.median(values), abs=SLACK_S), name

    close("ttft", [sent[first] - sent[0] for sent in fake.sent])
    close("itl", [after - before for sent in fake.sent for before, after in itertools.pairwise(sent[first:])])
    close("tpot", [(sent[-1] - sent[first]) / (num_tokens - 1) for sent in fake.sent])
    close("e2el", [sent[-1] - sent[0] for sent in fake.sent])


def in_one_of_three(check: Callable[[], None]) -> None:
    """A shared machine may hold up the fake server or the client in between: what is true is seen in one of three turns."""
    for _ in range(2):
        with contextlib.suppress(AssertionError):
            return check()
    check()


# --- times -----------------------------------------------------------------------------------------------------------


def test_each_time_by_its_definition() -> None:
    seen = Seen(5, due_s=0.5, sent_s=1.0, end_s=2.25, tokens=[(1.5, 1), (2.0, 2), (2.25, 1)], num_output=4)
    assert [times_s(seen, name) for name in METRICS] == [[0.5], [0.25], [0.5, 0.25], [1.25]]
    assert times_s(Seen(5, 0.0, tokens=[(1.0, 1)], num_output=1), "tpot") == []


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_times_are_those_of_the_server(backend: str) -> None:
    in_one_of_three(lambda: check_times(backend))


def check_times(backend: str) -> None:
    """0.12 s to the first token, then every 0.04 s one, eight in all."""
    with fake_server(Script([(0.12, 1)] + [(0.04, 1)] * 7)) as fake:
        run = measured(fake.url, 6, backend=backend)
    numbers = numbers_of(run, goodput={"ttft": 500.0})
    assert numbers["completed"] == 6 and numbers["failed"] == 0
    assert numbers["total_output_tokens"] == 48 and numbers["total_input_tokens"] == 42  # the server's count, not ours
    assert_as_sent(fake, numbers, 8)
    assert numbers["median_ttft_ms"] > 119 and numbers["median_itl_ms"] > 35 and numbers["median_e2el_ms"] > 390
    assert numbers["mean_tokens_per_chunk"] == 1.0 and numbers["tokens_counted_by_chunk"]
    assert numbers["max_concurrent_requests"] == 6 and numbers["max_output_tokens_per_s"] == 48
    assert numbers["request_goodput"] == numbers["request_throughput"]
    assert numbers_of(run, goodput={"ttft": 60.0})["request_goodput"] == 0.0
    assert len(fake.asked) == 6 and all(body["stream"] for body in fake.asked)


@pytest.mark.parametrize("has_counts", [True, False])
def test_several_tokens_in_a_chunk_are_told(has_counts: bool) -> None:
    in_one_of_three(lambda: check_chunks(has_counts))


def check_chunks(has_counts: bool) -> None:
    """Four chunks of 1, 4, 4, 3 tokens: chunks are 0.06 s apart, tokens are not."""
    chunks = [(0.05, 1), (0.06, 4), (0.06, 4), (0.06, 3)]
    with fake_server(Script(chunks, has_counts=has_counts)) as fake:
        run = measured(fake.url, 3)
    numbers = numbers_of(run)
    assert_as_sent(fake, numbers, 12)
    assert numbers["median_itl_ms"] > 3 * numbers["median_tpot_ms"]
    assert numbers["mean_tokens_per_chunk"] == 3.0 and numbers["tokens_counted_by_chunk"] is has_counts
    assert any("3.00 tokens came in a chunk" in line for line in warnings(numbers, has_rate=False))
    if has_counts:
        assert [count for _, count in run.seen[0].tokens] == [1, 4, 4, 3]
    assert numbers["max_output_tokens_per_s"] == 36


def test_a_chunk_without_a_token_is_no_first_token() -> None:
    in_one_of_three(check_first_token)


def check_first_token() -> None:
    """A server that sends a chunk of its own before the first token (the role of a chat) has not been quicker for it."""
    with fake_server(Script([(0.0, 0), (0.1, 1), (0.05, 1)])) as fake:
        numbers = numbers_of(measured(fake.url, 2, backend="openai-chat"))
    assert_as_sent(fake, numbers, 2, first=2)
    assert numbers["median_ttft_ms"] > 99


def test_concurrency_is_held_and_waiting_is_no_latency() -> None:
    in_one_of_three(check_concurrency)


def check_concurrency() -> None:
    with fake_server(Script([(0.1, 1)])) as fake:
        numbers = numbers_of(measured(fake.url, 6, max_concurrency=2))
    assert numbers["max_concurrent_requests"] == 2
    assert numbers["duration"] >= 0.3 and numbers["client_p99_late_ms"] < 90
    assert 99 < numbers["median_ttft_ms"] < 190


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 50.0])
def test_the_rate_is_what_was_asked_for_whatever_the_seed(burstiness: float) -> None:
    drawn = set()
    for seed in range(20):
        due = offer(request_rate=8.0, burstiness=burstiness, seed=seed).due_s(33)
        assert due == sorted(due) and due[0] == 0.0 and due[-1] == pytest.approx(32 / 8.0)
        drawn.add(tuple(due))
    assert len(drawn) == 20
    assert offer(request_rate=8.0).due_s(1) == [0.0] and offer(request_rate=math.inf).due_s(3) == [0.0] * 3


def test_an_open_loop_does_not_wait_for_answers() -> None:
    in_one_of_three(check_open_loop)


def check_open_loop() -> None:
    """Arrivals are those of the seed, though each answer takes longer than all gaps together."""
    with fake_server(Script([(0.5, 1)])) as fake:
        run = measured(fake.url, 20, request_rate=80.0, seed=3)
    drawn = list(arrival_times(20, 80.0, 1.0, random.Random("gaps 3")))
    expected = [one * 19 / 80.0 / drawn[-1] for one in drawn]  # 19 gaps of 1/80 s together
    sent = sorted(seen.sent_s - run.started_s for seen in run.seen)
    late = [after - due for after, due in zip(sent, expected, strict=True)]
    assert min(late) >= 0.0 and statistics.median(late) < 0.02
    numbers = numbers_of(run)
    assert numbers["max_concurrent_requests"] >= 15
    assert numbers["client_max_late_ms"] == pytest.approx(max(late) * 1e3, abs=0.01)


def test_a_client_that_is_late_itself_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Offer, ask: Ask, original: Any = Offer.request) -> bytes:
        time.sleep(0.03)  # holds the loop up, as too much work would
        return original(self, ask)

    with fake_server(Script([(0.0, 1)])) as fake:
        quick = numbers_of(measured(fake.url, 10, request_rate=200.0))
        monkeypatch.setattr(Offer, "request", slow)
        numbers = numbers_of(measured(fake.url, 20, request_rate=200.0))
    told = warnings(numbers, has_rate=True)
    assert any("behind its own schedule" in line for line in told) and any("slow (p99)" in line for line in told)
    assert quick["client_median_late_ms"] < numbers["client_median_late_ms"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_failures_are_counted_by_reason() -> None:
    scripts = [Script(), Script(status=429), Script(status=429), Script(ends="cut"), Script(ends="error"), Script(ends="hangs")]
    with fake_server(*scripts, Script()) as fake:
        run = measured(fake.url, 8, max_concurrency=1, timeout_s=3)
    numbers = numbers_of(run)
    assert numbers["failed_by_reason"] == {
        "HTTP 429 queue_full": 2,
        "cut short": 1,
        "error event engine_step_failed": 1,
        "timeout": 1,
    }
    assert numbers["completed"] == 3 and numbers["failed"] == 5 and "HTTP 429 queue_full" in table(numbers, METRICS)
    gone = fake.url  # nobody listens there any more
    assert numbers_of(measured(gone, 2))["failed_by_reason"] == {"connection refused": 2}


def test_a_kept_connection_that_the_server_has_closed_is_no_failure() -> None:
    with fake_server(Script()) as fake:

        async def main() -> list[int]:
            async with Client(fake.url) as client:
                found = [(await client.json("GET", "/v1/models"))[0]]
                [connection] = client._free
                # The server's end arrives only after the next request has been written.
                original = connection.send

                def send(*arguments: Any) -> Any:
                    answer = original(*arguments)
                    connection._transport.abort()
                    return answer

                connection.send = send  # type: ignore[method-assign]
                return [*found, (await client.json("GET", "/v1/models"))[0]]

        assert asyncio.run(main()) == [200, 200]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_wherever_bytes_are_cut(size: int) -> None:
    raw = b': note\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n'
    reader, found = EventReader(), []
    for at in range(0, len(raw), size):
        found += reader.add(raw[at : at + size])
    assert found == [b'{"a": 1}', b"two\nlines", b"[DONE]"]


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://x/?a=1", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        Client(url)


def test_an_answer_that_is_not_http() -> None:
    async def main() -> None:
        async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello there\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(rude, "127.0.0.1", 0)
        async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            with pytest.raises(HttpError, match="not HTTP"):
                await client.json("GET", "/")

    asyncio.run(main())


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL_DIR)


def test_random_prompts_have_the_length_that_was_asked_for(tokenizer: Tokenizer) -> None:
    found = asks(DatasetOptions(num_prompts=30, random_input_len=50, random_output_len=10, seed=4), Words(tokenizer))
    assert [len(tokenizer.encode(ask.prompt)) for ask in found] == [50] * 30 and {ask.num_output for ask in found} == {10}
    assert len({ask.prompt for ask in found}) == 30
    assert found == asks(DatasetOptions(num_prompts=30, random_input_len=50, random_output_len=10, seed=4), Words(tokenizer))
    ranged = asks(DatasetOptions(num_prompts=80, random_input_len=40, random_range_ratio=0.5), Words(tokenizer))
    lengths = [ask.num_prompt for ask in ranged]
    assert min(lengths) >= 20 and max(lengths) <= 60 and len(set(lengths)) > 15


def test_prefixes_are_shared_evenly(tokenizer: Tokenizer) -> None:
    sizes = {"prefix_repetition_prefix_len": 40, "prefix_repetition_suffix_len": 8, "prefix_repetition_num_prefixes": 4}
    found = asks(DatasetOptions(dataset_name="prefix_repetition", num_prompts=20, **sizes), Words(tokenizer))
    beginnings = [tuple(tokenizer.encode(ask.prompt)[:40]) for ask in found]
    assert sorted(beginnings.count(one) for one in set(beginnings)) == [5, 5, 5, 5]
    assert len({ask.prompt for ask in found}) == 20 and {ask.num_prompt for ask in found} == {48}


def test_lengths_like_those_of_sharegpt(tokenizer: Tokenizer) -> None:
    found = asks(DatasetOptions(dataset_name="sharegpt", num_prompts=400), Words(tokenizer))
    assert 120 < statistics.mean(ask.num_prompt for ask in found) < 200
    assert 270 < statistics.mean(ask.num_output for ask in found) < 400


def test_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One day"}\n\n{"prompt": "A dog", "output_tokens": 3}\n')
    options = {"dataset_name": "custom", "dataset_path": str(path)}
    found = asks(DatasetOptions(**options, num_prompts=5, custom_output_len=9), None)
    assert [(ask.prompt, ask.num_output) for ask in found[:3]] == [("One day", 9), ("A dog", 3), ("One day", 9)]
    with pytest.raises(ConfigError, match=r"jsonl:1: output_tokens: got -1"):
        asks(DatasetOptions(**options, custom_output_len=-1), Words(tokenizer))
    path.write_text('{"prompt": 3}\n')
    with pytest.raises(ConfigError, match="expected an object with a prompt"):
        asks(DatasetOptions(**options), None)
    said = [{"from": "human", "value": "One day a dog went home"}, {"from": "gpt", "value": "and slept there all day long"}]
    path.write_text(json.dumps([{"conversations": said}, {"conversations": said[:1]}, {"conversations": [{}, {}]}]))
    [ask] = asks(DatasetOptions(dataset_name="sharegpt", dataset_path=str(path), num_prompts=1), Words(tokenizer))
    assert ask == Ask(said[0]["value"], len(tokenizer.encode(said[0]["value"])), len(tokenizer.encode(said[1]["value"])))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_vllms_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("secret-of-the-test\n")
    argv = ["bench", "serve", "--num-prompts", "4", "--input-len", "8", "--output-len", "2", "--num-warmups", "2"]
    with fake_server(Script([(0.0, 1), (0.01, 1)])) as fake:
        where = ["--base-url", fake.url, "--api-key-file", str(key), "--header", "x-more=1"]
        more = ["--save-result", "--result-dir", str(tmp_path / "out"), "--metadata", "chip=none", "--extra-body", '{"top_k": 3}']
        assert cli.main([*argv, *where, *more, "--json", "--ignore-eos", "--metric-percentiles", "50,99.9"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert cli.main([*argv, *where]) == 0
        shown = capsys.readouterr()
    assert "Time to first token" in shown.out and "requests completed         4" in shown.out
    [file] = (tmp_path / "out").iterdir()
    assert file.name.startswith("openai-infqps-demo-") and json.loads(file.read_text()) == printed
    vllm = {"date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness"}
    vllm |= {"max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"}
    vllm |= {"request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"}
    vllm |= {"max_concurrent_requests", "chip"}
    vllm |= {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p50", "p99.9") for name in METRICS}
    assert vllm <= printed.keys() and printed["request_rate"] == "inf" and printed["completed"] == 4
    assert len(fake.asked) == 12  # the warm-ups are asked and not counted
    assert all(body["top_k"] == 3 and body["ignore_eos"] and body["max_tokens"] == 2 for body in fake.asked[:6])
    assert len({body["prompt"] for body in fake.asked[:6]}) == 6
    assert all("authorization: bearer secret-of-the-test" in head.lower() and "x-more: 1" in head for head in fake.heads)


def test_a_ramp_sends_ever_faster_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight requests at 2 to 160 a second: even gaps of 41, 21, 14, ..., 6 ms."""
    argv = [*ramp("linear", "2", "160"), "--num-prompts", "8", "--input-len", "8", "--output-len", "1", "--burstiness", "1e6"]
    offers: list[Offer] = []

    async def measured(client: Client, asks: list[Ask], offer: Offer, **options: Any) -> Run:
        offers.append(offer)
        return await measure(client, asks, offer, **options)

    monkeypatch.setattr(bench_serve, "measure", measured)
    with fake_server(Script()) as fake:
        assert cli.main([*argv, "--base-url", fake.url, "--json", "--save-result", "--result-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    said = {"ramp_up_strategy": "linear", "ramp_up_start_rps": 2, "ramp_up_end_rps": 160, "request_rate": "inf"}
    assert {name: found[name] for name in said} == said
    assert next(tmp_path.iterdir()).name.startswith("openai-ramp-up-linear-2qps-160qps-demo-")
    assert found["duration"] > 0.1 and [offer.request_rate for offer in offers] == [Ramp("linear", 2, 160)]


def test_results_are_appended_and_the_server_traces_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "serve", "--num-prompts", "2", "--input-len", "8", "--output-len", "1", "--save-result", "--append-result"]
    argv += ["--result-dir", str(tmp_path), "--result-filename", "all.json"]
    with fake_server(Script()) as fake:
        for label in ("first", "second"):
            assert cli.main([*argv, "--base-url", fake.url, "--label", label]) == 0
        assert [json.loads(line)["label"] for line in (tmp_path / "all.json").read_text().splitlines()] == ["first", "second"]
        assert cli.main([*argv, "--base-url", fake.url, "--profile"]) == cli.EXIT_USAGE
        assert "--profile: /start_profile: the server has none" in capsys.readouterr().err
        asked, fake.profiled = len(fake.asked), []
        assert cli.main([*argv, "--base-url", fake.url, "--profile", "--num-warmups", "1"]) == 0
    assert fake.profiled == [("/start_profile", asked + 1), ("/stop_profile", asked + 3)]


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["bench", "serve", "--append-result"], "--append-result: needs --save-result"),
        (["bench", "serv"], "unknown kind 'serv', did you mean 'serve'"),
        (["bench", "serve", "--backend", "vllm"], "--backend: got 'vllm'"),
        (["bench", "serve", "--request-rate", "0"], "--request-rate: got 0"),
        (["bench", "serve", "--ramp-up-strategy", "steep"], "--ramp-up-start-rps: missing"),
        (["bench", "serve", "--ramp-up-end-rps", "3"], "--ramp-up-end-rps: needs --ramp-up-strategy"),
        ([*ramp("linear", "0", "4"), "--request-rate", "3"], "--ramp-up-strategy: not with --request-rate, got 3"),
        (ramp("linear", "4", "3"), "ramp_up_end_rps: got 3"),
        (ramp("linear", "nan", "3"), "ramp_up_start_rps: got nan"),
        (ramp("exponential", "0", "3"), "ramp_up_start_rps: got 0, expected a finite number above 0"),
        (ramp("steep", "1", "3"), "ramp_up_strategy: got 'steep', expected one of linear, exponential"),
        (["bench", "serve", "--dataset-name", "radnom"], "did you mean 'random'"),
        (["bench", "serve", "--goodput", "ttft"], "--goodput: got 'ttft', expected NAME:MS"),
        (["bench", "serve", "--goodput", "itl:3"], "goodput: got 'itl'"),
        (["bench", "serve", "--percentile-metrics", "ttft,tpt"], "percentile_metrics: got 'tpt', did you mean 'tpot'"),
        (["bench", "serve", "--metric-percentiles", "101"], "metric_percentiles: got 101"),
        (["bench", "serve", "--api-key-file", "/nowhere"], "--api-key-file: /nowhere: No such file"),
        (["bench", "serve", "--header", "host=x"], "header: got 'host'"),
        (["bench", "serve", "--base-url", "http://x", "--port", "1"], "--base-url: not with"),
        (["bench", "serve", "--input-len", "3", "--random-input-len", "4"], "--input-len: given twice"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:9"], "http://127.0.0.1:9: "),
    ],
)
def test_usage_errors(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == cli.EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and problem in shown.err


def test_ctrl_c_gives_what_there_is() -> None:
    code = "import sys; from jaxpaged.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["bench", "serve", "--num-prompts", "50", "--input-len", "8", "--max-concurrency", "1", "--json"]
    with (
        fake_server(*[Script()] * 5, Script(ends="hangs")) as fake,
        subprocess.Popen([sys.executable, "-c", code, *argv, "--base-url", fake.url], stdout=subprocess.PIPE, text=True) as one,
    ):
        deadline = time.monotonic() + 60
        while len(fake.asked) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(one.pid, signal.SIGINT)
        out, _ = one.communicate(timeout=30)
    assert one.returncode == cli.EXIT_INTERRUPTED
    numbers = json.loads(out)
    assert numbers["completed"] == 5 and numbers["num_interrupted"] == 45 and numbers["failed"] == 0
