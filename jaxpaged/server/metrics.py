"""What happens to requests as Prometheus' series, under vLLM's names: written by the engine's thread, read by /metrics.

Knows what is counted when. Refuses to make a series for anything that a client sends: every label's values are known before.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.engine import Engine
from jaxpaged.series import position_of, series_of
from jaxpaged.server import histograms
from jaxpaged.server.endings import REASONS, finish_reasons, spans
from jaxpaged.server.histograms import Histogram
from jaxpaged.streams import ClosedError, EngineError, Stream

# Never OpenMetrics: prometheus_client 0.26 makes _ of the colon in the names of samples there, which every Prometheus asks for.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENGINE = "0"  # there is one in a process
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT")
OTHER = "other"  # a method that HTTP does not know
NO_ROUTE = "none"
_REFUSALS = {"max_queued_requests": "max_num_queued_reqs", "max_queued_tokens": "max_num_queued_tokens"}  # as vLLM has them
_STATS_WAIT_S = 1.0  # for the engine's own numbers; a step that compiles takes longer, and then the last ones are told
_NOT_TOLD = ("prompt_tokens", "generation_tokens")  # of the engine: counted here when they have been computed
_CONFIG = (
    *("block_size", "kv_cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes"),
    *("num_gpu_blocks_override", "prefix_caching_hash_algo", "max_num_seqs", "max_num_batched_tokens", "max_model_len"),
)


class Metrics(Collector):
    """The series of one server, in a registry of their own. It observes the engine: see `AsyncLLM.observe`.

    Invariant: the series are fixed when it is made but for the handlers of `http`, which are routes.
    """

    def __init__(self, llm: AsyncLLM, model_name: str, *, namespace: str = "jaxpaged"):
        """`namespace` is what the names begin with, before a colon."""
        self._llm, self._prefix, self._names = llm, f"{namespace}:", (model_name, ENGINE)
        self._clock: Callable[[], float] = llm.clock
        self._lock = threading.Lock()  # the engine's thread writes what a scrape reads
        self._histograms = histograms.of_requests(llm.config.max_model_len)  # type: ignore[arg-type]
        self._first_token = self._histograms["time_to_first_token_seconds"]
        self._token = self._histograms["inter_token_latency_seconds"]
        self._iteration = self._histograms["iteration_tokens_total"]
        self._num_prompt_tokens = self._num_cached_tokens = self._num_generated = 0
        self._token_s = 0.0  # of the last step
        self._ended = dict.fromkeys(REASONS, 0)
        self._live: dict[str, Stream] = {}  # by request id; those of the engine's thread alone
        self._unscheduled: dict[str, Stream] = {}  # of these, the ones that no step has computed
        self._seen_generated: int | None = None
        self._seen_preemptions = 0
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._http_s: dict[tuple[str, str], Histogram] = {}
        self._stats: dict[str, int | float] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    # --- as an observer ---

    def started(self, stream: Stream) -> None:
        """See `Observer.started`."""

    def queued(self, engine: Engine, stream: Stream) -> None:
        """See `Observer.queued`."""
        if self._seen_generated is None:
            self._seen_generated, self._seen_preemptions = engine.num_generation_tokens, engine.scheduler.num_preemptions
        self._live[stream.request.request_id] = self._unscheduled[stream.request.request_id] = stream

    def stepped(self, engine: Engine, changed: list[Stream], began_s: float) -> None:
        """See `Observer.stepped`. One bisection a step, not one a token: whoever was in the step before has waited as long."""
        now = self._clock()
        if self._unscheduled:
            self._find_scheduled(engine, changed, began_s)
        if engine.scheduler.num_preemptions != self._seen_preemptions:
            self._find_preempted(engine)
        num_computed, since, num_waited = 0, -1.0, 0
        with self._lock:
            for stream in changed:
                times, live = stream.times, stream.live
                before = times.last_step_s
                if live.last_token_s <= before:  # it has ended without a token
                    continue
                times.last_step_s = now
                if before == since:
                    num_waited += 1
                elif before:
                    self._waited(now - since, num_waited)
                    since, num_waited = before, 1
                else:
                    times.first_token_s = live.first_token_s
                    self._first_token.observe(live.first_token_s - stream.request.arrival_s)
                    num_prompt = len(stream.request.prompt_token_ids)
                    self._num_prompt_tokens += num_prompt
                    self._num_cached_tokens += live.num_cached_tokens
                    num_computed += num_prompt - live.num_cached_tokens
            self._waited(now - since, num_waited)
            num_generated = engine.num_generation_tokens - (self._seen_generated or 0)
            self._seen_generated = engine.num_generation_tokens
            self._num_generated += num_generated
            if num_generated or num_computed:
                self._iteration.observe(num_generated + num_computed)

    def _waited(self, seconds: float, count: int) -> None:
        if count:
            self._token_s = seconds
            self._token.observe(seconds, count)

    def ended(self, stream: Stream) -> None:
        """See `Observer.ended`."""
        request, live, times = stream.request, stream.live, stream.times
        self._live.pop(request.request_id, None)
        self._unscheduled.pop(request.request_id, None)
        times.last_token_s, times.ended_s = live.last_token_s, self._clock()
        values = {f"{name}_seconds": value for name, value in spans(stream).items()}
        num_tokens = [len(output.token_ids) for output in live.outputs]
        decode_s = values.get("request_decode_time_seconds")
        if decode_s is not None and max(num_tokens) > 1:
            values["request_time_per_output_token_seconds"] = decode_s / (max(num_tokens) - 1)
        values["request_prompt_tokens"] = len(request.prompt_token_ids)
        values["request_generation_tokens"] = live.num_generated
        values["request_max_num_generation_tokens"] = max(num_tokens)
        if request.params.max_tokens is not None:
            values["request_params_max_tokens"] = request.params.max_tokens
        values["request_params_n"] = request.params.n
        values["request_num_preemptions"] = times.num_preemptions
        if times.first_token_s:
            values["request_prefill_kv_computed_tokens"] = len(request.prompt_token_ids) - live.num_cached_tokens
        with self._lock:
            for name, value in values.items():
                self._histograms[name].observe(value)
            for reason in finish_reasons(stream):
                self._ended[reason] += 1

    def _find_scheduled(self, engine: Engine, changed: list[Stream], began_s: float) -> None:
        """Whoever was computed for the first time in the step that began then."""
        ids = {stream.request.request_id for stream in changed}
        ids.update(sequence.request.request_id for sequence in engine.scheduler.running)
        for request_id in ids & self._unscheduled.keys():
            self._unscheduled.pop(request_id).times.scheduled_s = began_s

    def _find_preempted(self, engine: Engine) -> None:
        self._seen_preemptions = engine.scheduler.num_preemptions
        for sequence in engine.scheduler.waiting:
            stream = self._live.get(sequence.request.request_id) if sequence.num_preemptions else None
            if stream is not None:
                stream.times.num_preemptions = max(stream.times.num_preemptions, sequence.num_preemptions)

    # --- of the server ---

    def http(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request over HTTP has ended. `status` is 0 when the client left before it had an answer.

        Args:
          route: the pattern of the route, not the path; None where there is none.
        """
        handler = route or NO_ROUTE
        method = method if method in METHODS else OTHER
        with self._lock:
            self._http[handler, method, f"{status // 100}xx" if status else "none"] += 1
            if (handler, method) not in self._http_s:
                self._http_s[handler, method] = Histogram(histograms.HTTP_S)
            self._http_s[handler, method].observe(seconds)

    async def text(self) -> bytes:
        """What /metrics answers, as `CONTENT_TYPE` says."""
        # A stalled or closed engine has no word of its own, and that is when its last numbers are looked at.
        with contextlib.suppress(TimeoutError, ClosedError):
            async with asyncio.timeout(_STATS_WAIT_S):
                self._stats = await self._llm.stats()
        return generate_latest(self.registry)

    # --- as a collector ---

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        yield from self._of_engine()
        yield from self._of_requests()
        yield from self._of_http()

    def _one(self, kind: type, name: str, text: str, value: float) -> Metric:
        family = kind(self._prefix + name, text, labels=("model_name", "engine"))
        family.add_metric(self._names, value)
        return family

    def _labelled(self, kind: type, name: str, text: str, label: str, values: dict[str, Any]) -> Metric:
        family = kind(self._prefix + name, text, labels=("model_name", "engine", label))
        for value, number in values.items():
            family.add_metric((*self._names, value), number)
        return family

    def _of_engine(self) -> Iterator[Metric]:
        stats = {name: value for name, value in self._stats.items() if name not in _NOT_TOLD}
        positions: dict[str, dict[str, float]] = {}
        for name, value in stats.items():
            found = position_of(name)
            if found is not None:
                positions.setdefault(found[0], {})[found[1]] = value
                continue
            series = series_of(name)
            kind = GaugeMetricFamily if series.kind == "gauge" else CounterMetricFamily
            yield self._one(kind, name, series.text, value)
        for name, values in positions.items():
            yield self._labelled(CounterMetricFamily, name, series_of(name).text, "position", values)
        get = stats.get
        by_source = {"device": get("prefix_cache_hits", 0)}
        by_source |= {tier: get(f"{tier}_prefix_cache_hits", 0) for tier in ("host", "disk")}
        text = "Prompt tokens that were found in pages, by the memory that the pages were in."
        yield self._labelled(CounterMetricFamily, "prompt_tokens_cached_by_source", text, "source", by_source)
        yield from self._of_tutorials()
        is_healthy = True
        try:
            self._llm.check_health()
        except EngineError:
            is_healthy = False
        yield self._one(GaugeMetricFamily, "engine_healthy", "1 when the engine begins its steps, as /health has it.", is_healthy)
        config = self._llm.config
        labels = {"engine": ENGINE, **{name: str(getattr(config, name, None)) for name in _CONFIG}}
        labels["cache_dtype"] = labels.pop("kv_cache_dtype")
        labels["num_gpu_blocks"] = str(int(get("num_gpu_blocks", 0)))
        family = GaugeMetricFamily(f"{self._prefix}cache_config_info", "How the page pool was set up.", labels=tuple(labels))
        family.add_metric(tuple(labels.values()), 1)
        yield family

    def _of_tutorials(self) -> Iterator[Metric]:
        """What texts about PagedAttention call things, which are there under other names too."""
        get = self._stats.get
        gauges = {
            "kv_active_blocks": ("Pages that have an owner.", get("kv_blocks_active", 0)),
            "scheduler_pending": ("Sequences that wait for pages.", get("num_requests_waiting", 0)),
            "block_reuse_rate": (
                "Prompt tokens found in pages that were there already, of all that were looked for.",
                _share(get("prefix_cache_hits", 0), get("prefix_cache_queries", 0)),
            ),
            "gpu_mem_usage": ("Of the device's memory, what is in use.", get("device_memory_usage_perc", 0)),
            "token_latency_ms": ("How long the last step's tokens took since those before them.", self._token_s * 1000),
            "prefetch_hit_rate": (
                "Prompt tokens found in host memory and on disk, of all that were looked for there.",
                _share(get("external_prefix_cache_hits", 0), get("external_prefix_cache_queries", 0)),
            ),
        }
        for name, (text, value) in gauges.items():
            yield self._one(GaugeMetricFamily, name, text, value)

    def _of_requests(self) -> Iterator[Metric]:
        with self._lock:
            copies = {name: histogram.copy() for name, histogram in self._histograms.items()}
            ended, refused = dict(self._ended), dict(self._llm.admission.num_refused)
            num_prompt, num_cached, num_generated = self._num_prompt_tokens, self._num_cached_tokens, self._num_generated
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts that have been computed or found in pages.", num_prompt),
            ("prompt_tokens_cached", "Those that were found.", num_cached),
            ("generation_tokens", "Tokens of answers.", num_generated),
        ):
            yield self._one(CounterMetricFamily, name, text, value)
        sources = {"local_compute": num_prompt - num_cached, "local_cache_hit": num_cached}
        text = "Tokens of prompts by where their keys and values came from."
        yield self._labelled(CounterMetricFamily, "prompt_tokens_by_source", text, "source", sources)
        text = "Outputs that have ended, by why."
        yield self._labelled(CounterMetricFamily, "request_success", text, "finished_reason", ended)
        text = "Requests that a limit of the queue has refused."
        family = CounterMetricFamily(f"{self._prefix}admission_rejections", text, labels=("model_name", "reason"))
        for limit, reason in _REFUSALS.items():
            family.add_metric((self._names[0], reason), refused[limit])
        yield family
        for name, histogram in copies.items():
            family = HistogramMetricFamily(self._prefix + name, histograms.TEXTS[name], labels=("model_name", "engine"))
            histogram.add_to(family, self._names)
            yield family

    def _of_http(self) -> Iterator[Metric]:
        with self._lock:
            counts, copies = dict(self._http), {labels: one.copy() for labels, one in self._http_s.items()}
        counter = CounterMetricFamily(
            "http_requests", "Requests by route, method and status; none is no answer.", labels=("handler", "method", "status")
        )
        for labels, count in counts.items():
            counter.add_metric(labels, count)
        yield counter
        text = "Seconds until the answer was complete, by route."
        family = HistogramMetricFamily("http_request_duration_seconds", text, labels=("handler", "method"))
        for labels, histogram in copies.items():
            histogram.add_to(family, labels)
        yield family


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
