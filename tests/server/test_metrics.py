"""/metrics: vLLM's names, types, labels and buckets, and numbers that are what happened.

`vllm_series.json` is what vLLM 0.32.0 printed on a CPU with a model of 256 places, without the `_created` series.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for name in ("fastapi", "uvicorn", "httptools", "httpx2", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from asgi import ask  # noqa: E402
from prometheus_client import Metric  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families as parse  # noqa: E402
from prometheus_client.samples import Sample  # noqa: E402
from running import Running, is_empty, running, wait_until  # noqa: E402

from jaxpaged.async_llm import AsyncLLM  # noqa: E402
from jaxpaged.config import ConfigError  # noqa: E402
from jaxpaged.series import SERIES  # noqa: E402
from jaxpaged.server.app import build_app  # noqa: E402
from jaxpaged.server.histograms import Histogram, one_two_five  # noqa: E402
from jaxpaged.server.metrics import Metrics  # noqa: E402
from jaxpaged.server.options import ServerOptions  # noqa: E402
from jaxpaged.streams import StalledError, Times  # noqa: E402

VLLM = json.loads((Path(__file__).parent / "vllm_series.json").read_text())
# What vLLM has and jaxpaged has nothing to say about: other hardware, inputs and stages; and FastAPI's own second opinions.
ABSENT = {
    *(f"vllm:estimated_{what}_per_gpu_total" for what in ("flops", "read_bytes", "write_bytes")),
    *("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total", "vllm:engine_sleep_state"),
    "vllm:num_requests_waiting_by_reason",
    *("http_request_duration_highr_seconds", "http_request_size_bytes", "http_response_size_bytes"),
}
# What the board that vLLM publishes asks for.
BOARD = (
    *("e2e_request_latency_seconds", "prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds"),
    *("num_requests_running", "num_requests_waiting", "time_to_first_token_seconds", "kv_cache_usage_perc"),
    *("request_prompt_tokens", "request_generation_tokens", "request_success_total", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_max_num_generation_tokens"),
)
TUTORIAL = ("kv_active_blocks", "scheduler_pending", "block_reuse_rate", "gpu_mem_usage", "token_latency_ms", "prefetch_hit_rate")
BY_LENGTH = [name for name, one in VLLM.items() if one.get("buckets", [])[::7] == ["1.0", "200.0"]]
DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def shared(model: AsyncLLM) -> Iterator[Running]:
    with running(model, api_key=("k" * 16,)) as one:
        yield one


def client(server: Running):
    return server.client(authorization="Bearer " + "k" * 16)


def families(server: Running) -> dict[str, Metric]:
    with client(server) as one:
        answer = one.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in parse(answer.text)}


def values(server: Running) -> dict[str, float]:
    """Sample -> value, with the labels that are not the model's and the engine's."""
    found = {}
    for family in families(server).values():
        for sample in family.samples:
            labels = [f"{key}={value}" for key, value in sorted(sample.labels.items()) if key not in ("model_name", "engine")]
            found[",".join([sample.name.removeprefix("jaxpaged:"), *labels])] = sample.value
    return found


def described(found: dict[str, Metric]) -> dict[str, dict[str, Any]]:
    """As vllm_series.json has it."""
    out = {}
    for family in found.values():
        name = family.name + "_total" * (family.type == "counter")
        labels = {key for sample in family.samples for key in sample.labels} - {"le"}
        out[name] = {"type": family.type, "labels": sorted(labels)}
        if family.type == "histogram":
            out[name]["buckets"] = list(dict.fromkeys(s.labels["le"] for s in family.samples if s.name.endswith("_bucket")))
    return out


def test_names_types_labels_and_buckets_are_vllms(server: Running):
    with client(server) as one:
        assert one.post("/v1/completions", json={"prompt": "One day", "max_tokens": 4, "temperature": 0}).status_code == 200
    ours = described(families(server))
    for name, theirs in VLLM.items():
        mine = ours.get(name.replace("vllm:", "jaxpaged:"))
        if name in ABSENT:
            assert mine is None, f"{name} is there: compare it"
            continue
        assert mine is not None, name
        assert mine["type"] == theirs["type"], name
        if name == "vllm:cache_config_info":
            wanted = {"block_size", "cache_dtype", "num_gpu_blocks", "enable_prefix_caching", "gpu_memory_utilization", "engine"}
            assert wanted <= set(mine["labels"]) & set(theirs["labels"])
            continue
        assert mine["labels"] == theirs["labels"], name
        if name in BY_LENGTH:
            theirs = {"buckets": [f"{bound}.0" for bound in one_two_five(1024)] + ["+Inf"]}
        assert mine.get("buckets") == theirs.get("buckets"), name
    assert [f"{bound}.0" for bound in one_two_five(256)] + ["+Inf"] == VLLM["vllm:request_prompt_tokens"]["buckets"]
    assert {f"jaxpaged:{name}" for name in TUTORIAL} <= ours.keys()


def test_numbers_are_what_happened(server: Running):
    before, usages = values(server), []
    bodies = [
        {"prompt": "a list: " + "a b " * 20, "max_tokens": 12, "temperature": 0, "ignore_eos": True},
        {"prompt": "a list: " + "a b " * 20, "max_tokens": 12, "temperature": 0, "ignore_eos": True},  # from the prefix cache
        {"prompt": ["One day", "Two days"], "max_tokens": 3, "n": 2, "ignore_eos": True},
        {"prompt": "One", "max_tokens": 1, "ignore_eos": True},
    ]
    with client(server) as one:
        for body in bodies:
            usages.append(one.post("/v1/completions", json=body).json()["usage"])
    after = values(server)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    num_prompt, num_generated = (sum(one[name] for one in usages) for name in ("prompt_tokens", "completion_tokens"))
    assert grown["prompt_tokens_total"] == num_prompt and grown["generation_tokens_total"] == num_generated == 12 + 12 + 12 + 1
    cached = grown["prompt_tokens_by_source_total,source=local_cache_hit"]
    assert cached == grown["prompt_tokens_cached_total"] == grown["prefix_cache_hits_total"] > 0
    assert cached == grown["request_prompt_tokens_sum"] - grown["request_prefill_kv_computed_tokens_sum"]
    assert grown["request_success_total,finished_reason=length"] == 7
    assert sum(value for name, value in grown.items() if name.startswith("request_success")) == 7
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "time_to_first_token_seconds", "request_params_n"):
        assert grown[f"{name}_count"] == 5, name
    assert grown["request_generation_tokens_sum"] == num_generated and grown["request_prompt_tokens_sum"] == num_prompt
    assert grown["request_max_num_generation_tokens_sum"] == 12 + 12 + 3 + 3 + 1
    assert grown["request_params_n_sum"] == 1 + 1 + 2 + 2 + 1
    # The spans of a request fit into one another.
    whole = ("request_queue_time", "request_inference_time", "e2e_request_latency")
    spans = {name: grown[f"{name}_seconds_sum"] for name in whole}
    assert sum(spans.values()) == pytest.approx(2 * spans["e2e_request_latency"], abs=1e-6)
    inside = grown["request_prefill_time_seconds_sum"] + grown["request_decode_time_seconds_sum"]
    assert 0 < inside <= spans["request_inference_time"]
    queued_and_prefilled = spans["request_queue_time"] + grown["request_prefill_time_seconds_sum"]
    assert grown["time_to_first_token_seconds_sum"] == pytest.approx(queued_and_prefilled, abs=1e-6)
    # Every step's tokens are counted once; the gaps between them are the decoding.
    assert grown["iteration_tokens_total_sum"] == num_generated + num_prompt - cached
    assert grown["iteration_tokens_total_count"] <= grown["num_steps_total"]
    assert 26 <= grown["inter_token_latency_seconds_count"] <= 28  # two outputs of one request may take turns at first
    assert grown["inter_token_latency_seconds_sum"] == pytest.approx(grown["request_decode_time_seconds_sum"], rel=0.2, abs=0.3)
    assert grown["http_requests_total,handler=/v1/completions,method=POST,status=2xx"] == 4
    assert 0 < grown["num_padding_places_total"] < grown["num_step_places_total"]
    assert after["num_compilations_total"] == len(server.engine.runner.compiled) and after["compilation_seconds_total"] > 0
    assert after["engine_healthy"] == 1 and after["num_requests_running"] == after["kv_active_blocks"] == 0
    assert 0 < after["gpu_mem_usage"] < 1 and after["token_latency_ms"] > 0 and after["block_reuse_rate"] > 0


def test_endings_and_refusals_are_counted(server: Running):
    before = values(server)
    with client(server) as one:
        held = server.llm.admission.admit(256, 1)
        assert one.post("/v1/completions", json={"prompt": "One", "max_tokens": 1}).status_code == 429
        held.release()
        held = server.llm.admission.admit(1, 262_144)
        assert one.post("/v1/completions", json={"prompt": "One", "max_tokens": 1}).status_code == 429
        held.release()
        endless = {"prompt": "One", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with one.stream("POST", "/v1/completions", json=endless) as got:
            next(got.iter_lines())
        one.get("/v1/models", headers={"authorization": ""})
    wait_until(lambda: is_empty(server.llm))
    grown = {name: value - before.get(name, 0.0) for name, value in values(server).items()}
    assert grown["admission_rejections_total,reason=max_num_queued_reqs"] == 1
    assert grown["admission_rejections_total,reason=max_num_queued_tokens"] == 1
    assert grown["http_requests_total,handler=/v1/completions,method=POST,status=4xx"] == 2
    assert grown["http_requests_total,handler=none,method=GET,status=4xx"] == 1  # without a key no route is told from another
    assert grown["request_success_total,finished_reason=abort"] == 1 and grown["e2e_request_latency_seconds_count"] == 1


def test_drafts_are_counted_by_their_position(server: Running):
    class Drafting(Borrowed):
        async def stats(self) -> dict[str, float]:
            per_position = {f"spec_decode_num_accepted_tokens_per_pos_{at}": 5.0 - at for at in range(3)}
            return {"spec_decode_num_drafts": 4.0, "spec_decode_num_draft_tokens": 12.0, **per_position}

    text = asyncio.run(Metrics(Drafting(server.llm), "demo").text())  # type: ignore[arg-type]
    found = {family.name: family for family in parse(text.decode())}
    assert found["jaxpaged:spec_decode_num_drafts"].type == found["jaxpaged:spec_decode_num_draft_tokens"].type == "counter"
    by_position = {one.labels["position"]: one.value for one in found["jaxpaged:spec_decode_num_accepted_tokens_per_pos"].samples}
    assert by_position == {"0": 5.0, "1": 4.0, "2": 3.0}


def test_vllms_board_works_under_its_namespace(server: Running):
    metrics = Metrics(server.llm, "a name", namespace="vllm")
    text = asyncio.run(metrics.text())
    found = described({family.name: family for family in parse(text.decode())})
    assert {f"vllm:{name}" for name in BOARD} <= found.keys() and not any(name.startswith("jaxpaged:") for name in found)
    assert all(found[f"vllm:{name}"] == VLLM[f"vllm:{name}"] for name in BOARD if f"vllm:{name}" not in BY_LENGTH)
    with pytest.raises(ConfigError, match="metrics_namespace"):
        ServerOptions(metrics_namespace="a b")


def test_prometheus_gets_the_names_as_they_are_whatever_it_asks_for(server: Running):
    """What Prometheus 2 and 3 ask for: a newer format must not come with other names."""
    for accept in (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4",
        "text/plain;version=nonsense;escaping=odd",
    ):
        with client(server) as one:
            answer = one.get("/metrics", headers={"accept": accept})
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        samples = [sample.name for family in parse(answer.text) for sample in family.samples]
        assert {f"jaxpaged:{name}" for name in TUTORIAL} <= set(samples)
        assert not any(name.startswith("jaxpaged_") for name in samples)


def test_an_engine_that_has_gone_leaves_its_last_numbers(server: Running):
    async def silent() -> dict[str, float]:
        await asyncio.sleep(60)
        return {}

    async def scrapes() -> tuple[str, str]:
        gone = Borrowed(server.llm)
        metrics = Metrics(gone, "demo")  # type: ignore[arg-type]
        lively = (await metrics.text()).decode()
        gone.stats, gone.check_health = silent, _stalled
        return lively, (await metrics.text()).decode()

    lively, silent_text = asyncio.run(scrapes())
    for name in ("num_gpu_blocks", "num_steps_total"):
        line = next(line for line in lively.splitlines() if line.startswith(f"jaxpaged:{name}{{"))
        assert line in silent_text.splitlines()
    assert 'jaxpaged:engine_healthy{engine="0",model_name="demo"} 0.0' in silent_text


class Borrowed:
    """What metrics need of a model, to be put in another's place."""

    def __init__(self, llm: AsyncLLM):
        self.clock, self.config, self.admission = llm.clock, llm.config, llm.admission
        if not hasattr(self, "stats"):
            self.stats = llm.stats
        self.check_health = llm.check_health


def _stalled() -> None:
    raise StalledError("stalled")


def test_an_observer_that_fails_ends_no_request(server: Running, caplog: pytest.LogCaptureFixture):
    class Bad:
        def started(self, *_: Any) -> None: ...

        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError(name)

    before = server.llm._thread.observer
    server.llm.observe(Bad())  # type: ignore[arg-type]
    try:
        with client(server) as one:
            answer = one.post("/v1/completions", json={"prompt": "One", "max_tokens": 3, "ignore_eos": True})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
        assert server.llm._thread.observer is None and "is told no more" in caplog.text
    finally:
        server.llm._thread.observer = before


@pytest.mark.parametrize("count", [600, pytest.param(33_400, marks=pytest.mark.slow)])
def test_whatever_is_sent_makes_no_series(server: Running, count: int):
    """R48: three odd requests each."""
    before = server.llm._thread.observer
    app = build_app(server.llm, ServerOptions(access_log=False))

    async def odd() -> list[int]:
        counts = []
        await ask(app, "GET", "/metrics")  # its own series comes with it
        for number in range(count):
            name = f"odd-{number}"
            await ask(app, name.upper() if number % 2 else "GET", f"/{name}\n\x1b[31m/{'x' * (number % 50)}")
            await ask(app, "GET", f"/v1/models/{name}")
            body = json.dumps({"model": name, "prompt": "x", "user": name}).encode()
            await ask(app, "POST", "/v1/completions", body, {"x-request-id": name, "user-agent": name})
            if number in (99, count - 1):
                counts.append((await ask(app, "GET", "/metrics"))[1].count(b"\n"))
        return counts

    try:
        early, late = asyncio.run(odd())
    finally:
        server.llm._thread.observer = before
    assert early == late


def test_a_step_with_many_in_it_counts_each_by_its_own_wait():
    now = 0.0
    llm = SimpleNamespace(clock=lambda: now, config=SimpleNamespace(max_model_len=1024), admission=None)
    metrics = Metrics(llm, "demo")  # type: ignore[arg-type]
    scheduler = SimpleNamespace(num_preemptions=0, running=[], waiting=[])
    engine: Any = SimpleNamespace(num_generation_tokens=0, scheduler=scheduler)
    streams: list[Any] = []
    for number in range(4):
        request = SimpleNamespace(request_id=str(number), arrival_s=0.0, prompt_token_ids=(1, 2))
        live = SimpleNamespace(first_token_s=0.0, last_token_s=0.0, num_cached_tokens=0)
        streams.append(SimpleNamespace(request=request, live=live, times=Times()))
        metrics.queued(engine, streams[-1])

    def step(at_s: float, *numbers: int) -> None:
        nonlocal now
        now = at_s
        for number in numbers:
            live = streams[number].live
            live.first_token_s, live.last_token_s = live.first_token_s or at_s - 0.001, at_s - 0.001
        engine.num_generation_tokens += len(numbers)
        metrics.stepped(engine, [streams[number] for number in numbers], at_s - 0.5)

    step(1.0, 0, 1, 2)
    step(2.0, 0, 1, 3)  # 2 sits this one out
    scheduler.num_preemptions, scheduler.waiting = 2, [SimpleNamespace(request=streams[2].request, num_preemptions=2)]
    step(2.5, 0, 1, 2, 3)
    waits = metrics._token
    assert sum(waits.counts) == 2 + 4 and waits.total == pytest.approx(2 * 1.0 + 3 * 0.5 + 1.5)
    assert sum(metrics._first_token.counts) == 4 and metrics._first_token.total == pytest.approx(3 * 0.999 + 1.999)
    assert [one.times.scheduled_s for one in streams] == [0.5, 0.5, 0.5, 1.5]
    assert [one.times.num_preemptions for one in streams] == [0, 0, 2, 0]
    assert metrics._iteration.total == 10 + 4 * 2 and sum(metrics._iteration.counts) == 3


# --- what deploy/ asks for ---


def names_of(expression: str) -> set[str]:
    """The series that an expression of PromQL names."""
    text = re.sub(r'"[^"]*"', '""', expression)
    text = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", text)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\(|[a-zA-Z0-9_:])", text)
    return set(words) - {"and", "or", "unless", "up"}  # `up` is Prometheus's own


def labels_of(expression: str) -> set[str]:
    """The labels that it chooses by."""
    chosen = "".join(re.findall(r"\{([^}]*)\}", expression))
    grouped = ",".join(re.findall(r"\bby\s*\(([^)]*)\)", expression))
    return set(re.findall(r"(\w+)\s*[=!]", chosen)) | set(re.findall(r"\w+", grouped))


def test_every_series_of_the_board_and_the_alerts_is_there(server: Running):
    yaml = pytest.importorskip("yaml")
    with client(server) as one:
        assert one.get("/v1/models").status_code == 200
    samples = [sample for family in families(server).values() for sample in family.samples]
    samples += [Sample(f"jaxpaged:{name}_total", {}, 0) for name in SERIES if name.startswith("spec_decode_")]
    known, labels = {one.name for one in samples}, {label for one in samples for label in one.labels}
    board = json.loads((DEPLOY / "grafana" / "jaxpaged.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    queries = [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    asked += [query.removeprefix("label_values(").rpartition(",")[0] for query in queries]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"][0]["rules"]
    asked += [rule["expr"] for rule in rules]
    assert len(panels) > 15 and len(rules) == 6
    for expression in asked:
        assert names_of(expression) or "up{" in expression, expression
        assert names_of(expression) <= known, names_of(expression) - known
        assert labels_of(expression) <= labels | {"job", "instance"}, expression
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert names_of('sum(rate(a:b_total{x="y"}[5m])) by (le) / c_d > 0.9 and up') == {"a:b_total", "c_d"}


def test_the_routes_that_deploy_names_are_there(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specification = importlib.util.spec_from_file_location("probe", DEPLOY / "probe.py")
    probe = importlib.util.module_from_spec(specification)  # type: ignore[arg-type]
    specification.loader.exec_module(probe)  # type: ignore[union-attr]
    monkeypatch.setattr(probe, "PORT", int(server.url.rpartition(":")[2]))
    keys = tmp_path / "keys"
    keys.write_text("\n" + "k" * 16 + "\n")
    for path in ("/ready", "/metrics"):
        assert (probe.main([path, str(keys)]), probe.main([path])) == (0, 1)
    assert probe.main(["/live"]) == 0 and probe.main(["/no/such/route", str(keys)]) == 1
    monkeypatch.setattr(probe, "PORT", 9)
    assert probe.main(["/live"]) == 1


def test_a_histogram_counts_like_prometheus():
    one = Histogram((1, 2.5))
    for value in (1.0, 1.1, 2.5, 99.0):
        one.observe(value)
    one.observe(0.5, 3)
    assert (one.counts, one.total) == ([4, 2, 1], 105.1)


def test_promtool_finds_only_what_is_vllms_own(server: Running):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    with client(server) as one:
        text = one.get("/metrics").text
    found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False)
    # A colon is what vLLM's names have; two names are vLLM's and the tutorials' as they are.
    allowed = ("should not contain ':'", "iteration_tokens_total non-counter", "token_latency_ms metric names should not")
    assert [line for line in found.stderr.splitlines() if not any(one in line for one in allowed)] == []
    assert found.stderr.count("should not contain ':'") > 50  # it has read them
