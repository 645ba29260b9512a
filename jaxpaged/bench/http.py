"""What HTTP leaves of the engine's tokens per second: `python -m jaxpaged.bench.http`.

The same prompts with the same seeds go through `LLM.generate`, through `AsyncLLM` without HTTP, and through the server with so
many connections, each of them with whole answers and with answers in pieces. Before each turn the prefix cache is emptied. The
client is a process of its own (`jaxpaged.bench.http_client`), which takes CPU from the server where cores are few: how much is
reported. Turns alternate, because a shared machine's speed changes by the minute, and of the ratios of tokens per second, each
against the offline turns right before and after, the median is reported; so is that of tokens per second of this process's CPU,
which others on the machine change less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from jaxpaged.admission import QueueOptions
from jaxpaged.async_llm import AsyncLLM
from jaxpaged.bench.ratios import spread
from jaxpaged.host.request import RequestOutputKind, SamplingParams
from jaxpaged.llm import LLM
from jaxpaged.server.options import ServerOptions
from jaxpaged.server.run import Server, bind

Turn = Callable[[], dict[str, float]]
_WORDS = [
    "the",
    "cat",
    "and",
    "a",
    "dog",
    "went",
    "to",
    "see",
    "if",
    "it",
    "was",
    "a",
    "good",
    "day",
    "for",
    "one",
    "of",
    "them",
    "to",
    "be",
    "out",
    "in",
    "the",
    "sun",
]


def prompts_of(count: int, num_words: int) -> list[str]:
    """Texts that differ from their first word on."""
    found = []
    for number in range(count):
        places = ((number * 7 + place * (number % 5 + 1)) % len(_WORDS) for place in range(num_words))
        found.append(f"{number} {' '.join(_WORDS[place] for place in places)}")
    return found


def params_of(count: int, num_tokens: int) -> list[SamplingParams]:
    """Between a half and all of `num_tokens`, so that requests end at different times."""
    return [
        SamplingParams(temperature=1.0, seed=number, max_tokens=num_tokens - number * 37 % (num_tokens // 2), ignore_eos=True)
        for number in range(count)
    ]


@contextlib.contextmanager
def serving(llm: AsyncLLM) -> Iterator[tuple[str, int]]:
    """The model on a loopback port until the block ends."""
    with bind("127.0.0.1", 0) as bound:
        server = Server(llm, ServerOptions(port=0, max_outputs=1))
        thread = threading.Thread(target=lambda: server.run([bound]), daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield bound.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join(20)


def offline(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> Turn:
    """All prompts in one call."""

    def turn() -> dict[str, float]:
        llm.reset_prefix_cache()
        return _timed(lambda: sum(len(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)))

    return turn


def in_process(
    llm: AsyncLLM, prompts: list[str], params: list[SamplingParams], num_connections: int, kind: RequestOutputKind
) -> Turn:
    """So many tasks at a time, on a loop of their own."""

    async def ask(prompt: str, one: SamplingParams, room: asyncio.Semaphore) -> int:
        num_tokens = 0
        async with room:
            async for output in llm.generate(prompt, replace(one, output_kind=kind)):
                num_tokens += len(output.outputs[0].token_ids)
        return num_tokens

    async def ask_all() -> int:
        room = asyncio.Semaphore(num_connections)
        return sum(await asyncio.gather(*(ask(*pair, room) for pair in zip(prompts, params, strict=True))))

    def turn() -> dict[str, float]:
        asyncio.run(llm.reset_prefix_cache())
        return _timed(lambda: asyncio.run(ask_all()))

    return turn


def over_http(
    llm: AsyncLLM,
    address: tuple[str, int],
    prompts: list[str],
    params: list[SamplingParams],
    num_connections: int,
    *,
    is_chat: bool,
    is_streamed: bool,
) -> Turn:
    """The client's word for it; it begins when its connections stand."""
    bodies = []
    for prompt, one in zip(prompts, params, strict=True):
        asked = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        body = {**asked, "max_tokens": one.max_tokens, "seed": one.seed, "temperature": one.temperature, "ignore_eos": True}
        bodies.append(json.dumps(body | ({"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {})))
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    job = {"host": address[0], "port": address[1], "path": path, "bodies": bodies, "num_connections": num_connections}

    def turn() -> dict[str, float]:
        asyncio.run(llm.reset_prefix_cache())
        cpu = time.process_time()
        command = [sys.executable, "-m", "jaxpaged.bench.http_client"]
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found = json.loads(done.stdout)
        cpu = time.process_time() - cpu
        return {**found, "tokens_per_s": found["num_tokens"] / found["seconds"], "server_cpu_s": cpu}

    return turn


def _timed(work: Callable[[], int]) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    num_tokens = work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "num_tokens": num_tokens, "tokens_per_s": num_tokens / seconds, "server_cpu_s": cpu}


def compare(turns: dict[str, Turn], rounds: int) -> list[dict[str, Any]]:
    """A row for each way but "offline", which runs between them; one round before does not count."""
    found: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in turns if name != "offline"}
    for number in range(rounds + 1):
        before = turns["offline"]()
        for name, several in found.items():
            one = turns[name]()
            after = turns["offline"]()
            if number:
                beside = {key: (before[key] + after[key]) / 2 for key in ("tokens_per_s", "server_cpu_s")}
                several.append((beside, one))
            before = after
    rows = []
    for name, several in found.items():
        row = {key: statistics.median(one[key] for _, one in several) for key in several[0][1]}
        for key in ("tokens_per_s", "server_cpu_s"):
            row[f"offline_{key}"] = statistics.median(beside[key] for beside, _ in several)
        row["cpu_ratio"] = statistics.median(beside["server_cpu_s"] / one["server_cpu_s"] for beside, one in several)
        rows.append({"way": name, **row, **spread([one["tokens_per_s"] / beside["tokens_per_s"] for beside, one in several])})
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.http", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a directory or hub id (default: the bundled model)")
    parser.add_argument("--connections", type=int, default=64, help="at once, each with one request (%(default)s)")
    parser.add_argument("--requests", type=int, default=128, help="of a turn (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of an answer; at least a half of it (%(default)s)")
    parser.add_argument("--words", type=int, default=24, help="of a prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (%(default)s)")
    parser.add_argument("--ways", help="some of those that the table names, with commas (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if min(args.connections, args.requests, args.words, args.rounds) < 1 or args.tokens < 2:
        parser.error("expected whole numbers of at least 1, and --tokens of at least 2")
    prompts, params = prompts_of(args.requests, args.words), params_of(args.requests, args.tokens)
    options = {"model": args.model, "max_num_seqs": args.connections, "use_tqdm_on_load": False}
    queue = QueueOptions(max_queued_requests=max(256, args.requests))
    with LLM(**options) as llm, AsyncLLM.from_options(**options, queue=queue) as async_llm, serving(async_llm) as address:
        # As `jaxpaged serve` does, for all ways: a collection over all that was loaded takes half a second.
        gc.collect()
        gc.freeze()
        turns: dict[str, Turn] = {"offline": offline(llm, prompts, params)}
        for word, kind in (("whole", RequestOutputKind.FINAL_ONLY), ("streamed", RequestOutputKind.DELTA)):
            how = {"is_streamed": word == "streamed"}
            turns[f"async-{word}"] = in_process(async_llm, prompts, params, args.connections, kind)
            for route, is_chat in (("completions", False), ("chat", True)):
                name = f"{route}-{word}"
                turns[name] = over_http(async_llm, address, prompts, params, args.connections, is_chat=is_chat, **how)
        if args.ways:
            wanted = args.ways.split(",")
            if unknown := set(wanted) - turns.keys():
                parser.error(f"--ways: got {', '.join(sorted(unknown))}, expected some of {', '.join(turns)}")
            turns = {name: turn for name, turn in turns.items() if name == "offline" or name in wanted}
        rows = compare(turns, args.rounds)
    if args.json:
        print(json.dumps({"options": vars(args), "num_cores": os.cpu_count(), "rows": rows}, indent=1))
        return 0
    print(f"{args.requests} requests, {args.connections} at once, {os.cpu_count()} cores")
    print(f"{'way':22} {'tokens/s':>9} {'of offline':>10} {'quartiles':>14} {'by CPU s':>9} {'client CPU s':>12} {'s':>6}")
    for row in rows:
        low, high = row["quartiles"]
        client = f"{row['client_cpu_s']:12.2f}" if "client_cpu_s" in row else f"{'-':>12}"
        head = f"{row['way']:22} {row['tokens_per_s']:9,.0f} {row['ratio']:10.1%} {f'{low:.0%} to {high:.0%}':>14}"
        print(f"{head} {row['cpu_ratio']:9.1%} {client} {row['seconds']:6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
