"""`jaxpaged simulate`: how an engine would do on a GPU that is not here, and the memory experiment. Imports no jax."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxpaged.cli.options import (
    Parser,
    UsageError,
    add_fields,
    add_verbose,
    goals_of,
    number,
    numbers_of,
    set_up_logging,
    whole_number,
)
from jaxpaged.config import ConfigError, EngineConfig, ModelConfig, nearest
from jaxpaged.simulate import cost, memory, report, sharing
from jaxpaged.simulate.arrivals import Arrival, random_traffic
from jaxpaged.simulate.gpus import GPUS, Gpu, named_gpu
from jaxpaged.simulate.lengths import DATASETS, Fixed, Lengths, LogNormal, Uniform
from jaxpaged.simulate.random_model import KINSHIP, OPEN_SHARE, RandomModel
from jaxpaged.simulate.run import OPTIONS, build_scheduler, simulate
from jaxpaged.simulate.shapes import MODELS, named_model, num_weight_bytes, plan_pages
from jaxpaged.simulate.trace import read_trace

logger = logging.getLogger("jaxpaged")

DESCRIPTION = """\
Serve made-up or recorded traffic with the engine's own scheduler and page pool on a virtual clock: steps take what a GPU's
published bandwidth and operations say they take at least, or what was measured. Nothing is computed, and jax is not needed.

'jaxpaged simulate memory' compares memory set aside for the longest sequence with pages, on the same bytes.
'jaxpaged simulate sharing' counts the pages that outputs of one prompt share, beside what the PagedAttention paper published."""
EPILOG = """\
examples:
  jaxpaged simulate --gpu H100 --model llama-3-8b --dataset-name sharegpt --request-rate 20 --goodput ttft:500 tpot:50
  jaxpaged simulate --input-len 2048 --output-len lognormal:200:0.8 --burstiness 0.3 --request-rate 4 --json
  jaxpaged simulate --trace day.csv --enable-prefix-caching --block-size 16
  jaxpaged simulate --dataset-name sharegpt --request-rate 2 --use-beam-search --n 4
  jaxpaged simulate --request-rate 40 --scheduling-policy priority --num-priorities 3
  jaxpaged simulate memory
  jaxpaged simulate memory --model llama-2-13b --kv-cache-memory-bytes 32G --max-model-len 4096
  jaxpaged simulate sharing

lengths are N, LOW:HIGH (each as likely) or lognormal:MEAN:SIGMA. A trace is CSV with the columns arrival_s, prompt_tokens,
output_tokens and perhaps tenant, priority, prefix_id, prefix_tokens, n, or JSONL of such objects; Azure's and BurstGPT's are read
as they are. 'memory' has --kv-cache-memory-bytes 16G --block-size 16 --max-num-seqs 1024 where nothing else is given,
'sharing' the paper's machine: --gpu A100-40GB --kv-cache-memory-bytes 12G --block-size 16 --max-model-len 2048 and, for OPT-13B,
--model llama-2-13b, whose keys and values take as many bytes; and --num-prompts 200 --max-concurrency 3, because outputs that
give way in a full pool come back one by one, and share less."""

_OTHERS = tuple(field.name for field in dataclasses.fields(EngineConfig) if field.name not in OPTIONS)
# What has no meaning beside a trace, beside `memory`, beside a named dataset, beside measured steps.
_LENGTHS = ("input_len", "output_len")
_RANDOM = (*_LENGTHS, "dataset_name", "request_rate", "burstiness", "prefix_len", "num_prefixes")
_OUTPUTS = ("n", "use_beam_search", "num_priorities")
_MODEL = ("beam_open_share", "beam_kinship")
_REPORT = ("goodput", "metric_percentiles")
_NOT_WITH = {
    "memory": (*_RANDOM, *_OUTPUTS, *_MODEL, *_REPORT, "trace", "max_concurrency", "enable_prefix_caching"),
    "sharing": (*_RANDOM, *_OUTPUTS, *_REPORT, "trace"),
}
_ROOFLINE = ("bandwidth_efficiency", "flops_efficiency", "step_overhead_ms")
_DEFAULTS: dict[str, dict[str, Any]] = {
    # Small pages, more sequences than fit, so that memory alone is the limit.
    "memory": {"block_size": 16, "max_num_seqs": 1024, "kv_cache_memory_bytes": 2**34},
    # Table 1 of the paper: 15.7K tokens of OPT-13B, 12 GiB.
    "sharing": {"block_size": 16, "max_model_len": 2048, "kv_cache_memory_bytes": 12 * 2**30},
}
_MACHINES = {"sharing": ("A100-40GB", "llama-2-13b")}


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged simulate [memory|sharing] [FLAGS]"
    parser.add_argument("what", nargs="*", metavar="memory|sharing", help="one of the two experiments instead")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_verbose(parser)

    def add(group: Any, flag: str, metavar: str, text: str, convert: Any = str, **other: Any) -> None:
        group.add_argument(flag, type=convert, metavar=metavar, help=text, default=argparse.SUPPRESS, **other)

    group = parser.add_argument_group("machine and model")
    add(group, "--gpu", "NAME", f"one of {', '.join(GPUS)} (default: H100)")
    add(group, "--model", "NAME|DIR", f"one of {', '.join(MODELS)}, or a local directory (default: llama-3-8b)")
    add(group, "--bandwidth-efficiency", "X", f"share of the published (default: {cost.BANDWIDTH_EFFICIENCY}, assumed)", number)
    add(group, "--flops-efficiency", "X", f"share of the published (default: {cost.FLOPS_EFFICIENCY}, assumed)", number)
    milliseconds = f"{cost.STEP_OVERHEAD_S * 1e3:g}, assumed"
    add(group, "--step-overhead-ms", "X", f"of each step, when the device waits for the host (default: {milliseconds})", number)
    add(group, "--step-times", "FILE", "measured seconds of steps, JSON, instead of the published peaks")

    group = parser.add_argument_group("traffic")
    add(group, "--num-prompts", "N", "requests (default: 1000, of a trace all)", whole_number)
    add(group, "--request-rate", "X", "per second; inf is all at once (default: inf)", number)
    add(group, "--burstiness", "X", "1 is Poisson, below 1 in bursts, above 1 evenly (default: 1)", number)
    add(group, "--max-concurrency", "N", "requests in the engine at a time; the others wait outside", whole_number)
    add(group, "--dataset-name", "NAME", f"lengths like those of a dataset: {', '.join(DATASETS)}")
    add(group, "--input-len", "LENGTHS", "of prompts in tokens (default: 1024)", _lengths)
    add(group, "--output-len", "LENGTHS", "of answers in tokens (default: 128)", _lengths)
    add(group, "--prefix-len", "N", "tokens in front of each prompt that it shares with others (default: 0)", whole_number)
    add(group, "--num-prefixes", "N", "different beginnings of that kind (default: 1)", whole_number)
    add(group, "--n", "N", "outputs of each prompt (default: 1)", whole_number)
    text = "the n outputs are those of a beam search of width n"
    group.add_argument("--use-beam-search", action="store_true", default=argparse.SUPPRESS, help=text)
    add(group, "--num-priorities", "N", "each request has one of so many, 0 first (default: 1)", whole_number)
    text = "of the steps of a beam, those with several likely tokens (default: {:g}, see simulate/random_model.py)"
    add(group, "--beam-open-share", "X", text.format(OPEN_SHARE), number)
    text = "of the steps, those where beams see the same whatever they have written (default: {:g}, likewise)"
    add(group, "--beam-kinship", "X", text.format(KINSHIP), number)
    add(group, "--trace", "FILE", "recorded traffic, CSV or JSONL")
    add(group, "--seed", "N", "of the traffic (default: 0)", whole_number)

    group = parser.add_argument_group("report")
    add(group, "--goodput", "NAME:MS", "also requests per second with ttft, tpot, e2el within these milliseconds", nargs="+")
    add(group, "--metric-percentiles", "P,P,...", "(default: 50,90,95,99)", numbers_of)
    add_fields(parser, EngineConfig, "engine", leave_out=_OTHERS)


@dataclasses.dataclass(frozen=True)
class _Machine:
    """What traffic runs on. `assumed` names the numbers that nobody measured."""

    gpu: Gpu
    model_name: str
    model: ModelConfig
    config: EngineConfig
    num_pages: int
    costs: cost.CostModel
    assumed: dict[str, Any]

    def setting(self, **more: Any) -> dict[str, Any]:
        """All that a report depends on."""
        options = {name: getattr(self.config, name) for name in sorted(OPTIONS)}
        return {"gpu": self.gpu.name, "model": self.model_name, **self.assumed, **more, **options}


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print; the exit code."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("what", "json", "verbose")}
    if arguments.what not in ([], ["memory"], ["sharing"]):
        what = " ".join(arguments.what)
        raise UsageError(f"got {what!r}, expected nothing, 'memory' or 'sharing' (see 'jaxpaged simulate --help')")
    experiment = arguments.what[0] if arguments.what else ""
    for flag, others in (
        ("trace", (*_RANDOM, *_OUTPUTS, *_MODEL, "seed")),
        ("dataset_name", _LENGTHS),
        ("step_times", _ROOFLINE),
    ):
        _refuse(given, others if flag in given else (), f"not with {_flag(flag)}")
    _refuse(given, _NOT_WITH.get(experiment, ()), f"not with {experiment}, which has loads of its own")
    for name in ("num_prompts", "max_concurrency"):
        if given.get(name, 1) < 1:
            raise ConfigError(f"{name}: got {given[name]}, expected a whole number of at least 1")
    set_up_logging(arguments)
    runs = {"": _run_traffic, "memory": _run_memory, "sharing": _run_sharing}
    return runs[experiment](_machine(given, experiment), given, as_json=arguments.json)


def _machine(given: dict[str, Any], experiment: str) -> _Machine:
    defaults = _DEFAULTS.get(experiment, {})
    gpu_name, model_name = _MACHINES.get(experiment, ("H100", "llama-3-8b"))
    options = {name: value for name, value in given.items() if name in OPTIONS}
    if "gpu_memory_utilization" in options:  # the pool is then what that leaves
        defaults = {name: value for name, value in defaults.items() if name != "kv_cache_memory_bytes"}
    config = EngineConfig.from_options(**{**defaults, **options})
    gpu, name = named_gpu(given.get("gpu", gpu_name)), given.get("model", model_name)
    model = _model(name)
    config = config.resolved(model, "gpu")
    costs, assumed = _costs(given, gpu, model, config)
    num_pages = plan_pages(config, model, gpu)
    max_len: int = config.max_model_len  # type: ignore[assignment]
    num_tokens = (num_pages - 1) * config.block_size  # type: ignore[operator]
    # In the words of an engine that starts; see jaxpaged/runner.py.
    logger.info("weights (%s): %.1f GiB", config.weights_dtype, num_weight_bytes(model, config) / 2**30)
    logger.info("GPU KV cache size: %s tokens", f"{num_tokens:,}")
    logger.info("Maximum concurrency for %s tokens per request: %.2fx", f"{max_len:,}", num_tokens / max_len)
    return _Machine(gpu, name, model, config, num_pages, costs, assumed)


def _run_memory(machine: _Machine, given: dict[str, Any], *, as_json: bool) -> int:
    num_prompts, seed = given.get("num_prompts", 1000), given.get("seed", 0)
    config, model, num_pages = machine.config, machine.model, machine.num_pages
    outcomes = memory.compare(config, model, machine.costs, num_pages=num_pages, num_prompts=num_prompts, seed=seed)
    if as_json:
        loads = [{**dataclasses.asdict(found), "utilisation": found.utilisation, "waste": found.waste} for found in outcomes]
        print(json.dumps({"setting": machine.setting(num_prompts=num_prompts, seed=seed), "loads": loads}))
    else:
        print(f"{memory.arithmetic(config, model, num_pages)}\n\n{memory.table(outcomes)}")
    return 0


def _run_sharing(machine: _Machine, given: dict[str, Any], *, as_json: bool) -> int:
    config, assumed = machine.config, _random_model(given)
    options = {
        "num_prompts": given.get("num_prompts", 200),
        "max_concurrency": given.get("max_concurrency", 3),
        "seed": given.get("seed", 0),
    }
    where, room = (config, machine.model, machine.costs), {"num_pages": machine.num_pages, **options}
    found = sharing.compare(*where, **room, random_model=assumed)
    others = sharing.sensitivity(sharing.other_models(assumed), *where, **room)
    if as_json:
        words = {**options, "beam_open_share": assumed.open_share, "beam_kinship": assumed.kinship}
        print(json.dumps({"setting": machine.setting(**words), **sharing.as_json(found, others)}))
    else:
        what = f"assumed of beams: open share {assumed.open_share:g}, kinship {assumed.kinship:g} (simulate/random_model.py)"
        print(f"{_heading(machine)}\n{what}\n\n{sharing.table(found)}\n\n{sharing.sensitivity_table(assumed, others, found)}")
    return 0


def _random_model(given: dict[str, Any]) -> RandomModel:
    options = {name: given[f"beam_{name}"] for name in ("open_share", "kinship") if f"beam_{name}" in given}
    return RandomModel(**options, seed=given.get("seed", 0))


def _run_traffic(machine: _Machine, given: dict[str, Any], *, as_json: bool) -> int:
    goals = goals_of(given.get("goodput", ()))
    report.check_goodput(goals)
    percentiles = given.get("metric_percentiles", report.PERCENTILES)
    report.check_percentiles(percentiles)
    max_model_len: int = machine.config.max_model_len  # type: ignore[assignment]
    traffic, source = _traffic(given, max_model_len)
    scheduler = build_scheduler(machine.config, machine.model, machine.num_pages)
    started = time.process_time()
    concurrency, searches = given.get("max_concurrency"), given.get("use_beam_search", False)
    seen = simulate(
        *(scheduler, traffic, machine.costs),
        max_model_len=max_model_len,
        max_concurrency=concurrency,
        max_logprobs=machine.config.max_logprobs,
        random_model=_random_model(given) if searches else None,
        is_async=machine.config.async_scheduling,
    )
    seconds = time.process_time() - started

    numbers = report.summarise(seen, percentiles=percentiles, goodput=goals)
    if as_json:
        print(json.dumps({"setting": machine.setting(**source, max_concurrency=concurrency, goodput=goals), **numbers}))
    else:
        print(f"{_heading(machine)}\n\n{report.table(numbers, goals)}")
    if seen.refused:
        print(f"jaxpaged: warning: {len(seen.refused):,} refused, the first: {seen.refused[0]}", file=sys.stderr)
    speed = f"{seen.num_scheduled_tokens / max(seconds, 1e-9):,.0f} tokens/s"
    print(f"jaxpaged: simulated {seen.num_scheduled_tokens:,} tokens in {seconds:.2f} s of one core ({speed})", file=sys.stderr)
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(given: dict[str, Any], names: Iterable[str], why: str) -> None:
    for name in names:
        if name in given:
            raise UsageError(f"{_flag(name)}: {why}")


def _model(name: str) -> ModelConfig:
    if name not in MODELS and Path(name).is_dir():
        from jaxpaged.checkpoint import read_config  # imports jax, a second that a named shape need not pay

        return read_config(name)
    return named_model(name)


def _costs(given: dict[str, Any], gpu: Gpu, model: ModelConfig, config: EngineConfig) -> tuple[cost.CostModel, dict[str, Any]]:
    """The cost model, and what it assumes."""
    if "step_times" in given:
        return cost.MeasuredSteps.from_file(given["step_times"], config.prefill_tile), {"step_times": given["step_times"]}  # type: ignore[arg-type]
    assumed = {
        "bandwidth_efficiency": given.get("bandwidth_efficiency", cost.BANDWIDTH_EFFICIENCY),
        "flops_efficiency": given.get("flops_efficiency", cost.FLOPS_EFFICIENCY),
        "step_overhead_ms": given.get("step_overhead_ms", cost.STEP_OVERHEAD_S * 1e3),
    }
    shares = {name: assumed[name] for name in ("bandwidth_efficiency", "flops_efficiency")}
    return cost.Roofline(gpu, model, config, overhead_s=assumed["step_overhead_ms"] / 1e3, **shares), assumed


def _traffic(given: dict[str, Any], max_model_len: int) -> tuple[Iterable[Arrival], dict[str, Any]]:
    """The requests, and the words that make the same ones again."""
    if "trace" in given:
        source = {name: given[name] for name in ("trace", "num_prompts") if name in given}
        return itertools.islice(read_trace(given["trace"]), given.get("num_prompts")), source
    name = given.get("dataset_name")
    if name is not None and name not in DATASETS:
        raise ConfigError(f"dataset_name: got {name!r}{nearest(name, tuple(DATASETS))} (of: {', '.join(DATASETS)})")
    input_len, output_len = DATASETS[name] if name else (Fixed(1024), Fixed(128))
    input_len, output_len = given.get("input_len", input_len), given.get("output_len", output_len)
    rest = ("request_rate", "burstiness", "prefix_len", "num_prefixes", "seed", *_OUTPUTS)
    options = {"num_prompts": 1000, **{name: given[name] for name in ("num_prompts", *rest) if name in given}}
    words = {"input_len": str(input_len), "output_len": str(output_len), **options}
    if options.get("use_beam_search"):
        words |= {f"beam_{name}": getattr(_random_model(given), name) for name in ("open_share", "kinship")}
    if words.get("request_rate") == math.inf:
        words["request_rate"] = "inf"  # JSON has no word for it; this is vLLM's
    return random_traffic(input_len=input_len, output_len=output_len, max_model_len=max_model_len, **options), words


def _lengths(text: str) -> Lengths:
    """N, LOW:HIGH or lognormal:MEAN:SIGMA."""
    try:
        match text.split(":"):
            case [length]:
                return Fixed(whole_number(length))
            case ["lognormal", mean, sigma]:
                return LogNormal(number(mean), number(sigma))
            case [low, high]:
                return Uniform(whole_number(low), whole_number(high))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError(f"got {text!r}, expected N, LOW:HIGH or lognormal:MEAN:SIGMA")


def _heading(machine: _Machine) -> str:
    gpu, config, assumed = machine.gpu, machine.config, machine.assumed
    pool = f"{machine.num_pages:,} pages of {config.block_size} tokens ({config.kv_cache_dtype})"
    if "step_times" in assumed:
        return f"{machine.model_name} with the measured steps of {assumed['step_times']}, {pool}"
    bandwidth = f"{assumed['bandwidth_efficiency']:.0%} of {gpu.bytes_per_s / 1e12:g} TB/s"
    operations = f"{assumed['flops_efficiency']:.0%} of {gpu.flops_per_s / 1e12:g} TFLOP/s"
    overhead = f"{assumed['step_overhead_ms']:g} ms a step"
    return f"{machine.model_name} on {gpu.name}, {pool}\nassumed: {bandwidth}, {operations}, {overhead} ({gpu.source})"
