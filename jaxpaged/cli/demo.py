"""`jaxpaged demo`: eight prompts share one page pool, step by step, and then the proof that they did not disturb each other.

Drives the engine through its public methods, so that it is also an example of how to: queue, step, read the events.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxpaged.cli.generate import counted, open_llm
from jaxpaged.cli.options import Parser, add_fields, add_verbose, given_fields, set_up_logging
from jaxpaged.config import DTYPE_BYTES, EngineConfig
from jaxpaged.host.request import SamplingParams
from jaxpaged.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jaxpaged.host.request import TokenEvent
    from jaxpaged.llm import LLM
    from jaxpaged.tokenizer import Detokenizer

DESCRIPTION = "Watch paged attention at work: eight prompts of different lengths, generated together from one small page pool."
EPILOG = """\
examples:
  jaxpaged demo
  jaxpaged demo --num-gpu-blocks-override 17          so few pages that sequences have to give theirs back
  jaxpaged demo ./llama --dtype bfloat16              any model that jaxpaged can load

Flags left out take small values here: float32, 8 sequences of at most 1,024 tokens, a pool of 32 pages of 16 tokens.
Ends with a check: each prompt alone has to give the tokens that it gave in the crowd. Exit code 1 if one does not."""

_TEXT = (
    "Tom lives in Paris and works as a baker. He has a gray cat. Every morning Tom opens the shop, and the cat sleeps in the "
    "window. Tom likes green best, so the door of the shop is green."
)
# (question, max_tokens): short and long in both directions, so that pages come and go at different times.
PROMPTS = (
    ("Tell me a short story about Anna and a fox.", 160),
    ("Sort these words from A to Z: river, apple, moon, chair", 32),
    ("What is 12 + 30?", 24),
    ("Repeat after me: The red fox is in the garden.", 40),
    ("What is the capital of France?", 24),
    (f"{_TEXT} What does Tom have?", 40),
    ("Write as JSON with the keys name and city: Anna lives in Rome.", 48),
    ("Tell me a story about a dog.", 128),
)

# Two compiled steps instead of eight, and a pool that could not hold one sequence of full length, were it reserved in advance.
_OPTIONS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "prefill_tile_buckets": (8,),
    "decode_row_buckets": (8,),
}
_MAX_LEN = 1024
_PAGE_TOKENS, _NUM_PAGES = 16, 32
_FRAME_S = 0.025  # a step takes about 2 ms: too fast to watch. Only the steps themselves are timed
_BARS = "▁▂▃▄▅▆▇█"


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged demo [FLAGS] [MODEL]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or hub id (default: the bundled model)")
    add_verbose(parser)
    add_fields(parser, EngineConfig, "engine", leave_out=("model", "skip_tokenizer_init"))


@dataclass(eq=False)
class _Shown:
    """One request as it is drawn."""

    question: str
    prompt_token_ids: list[int]
    params: SamplingParams
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    num_pages: int = 0
    state: str = "waiting"

    def record(self, event: TokenEvent) -> None:
        """Take in one new token, or the end."""
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
            if event.finish_reason != "stop":  # the token that stops a text is no part of it
                self.detokenizer.add(event.token_id)
        if event.finish_reason is not None:
            self.detokenizer.finish()
            self.state = event.finish_reason.value


@dataclass
class _Record:
    """What was seen after each step: how many requests ran in it, and how many pages were taken."""

    batch_sizes: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    seconds: float = 0.0


def run(arguments: argparse.Namespace) -> int:
    """The whole show; 1 when the check at its end fails."""
    from rich.console import Console

    set_up_logging(arguments)
    started = time.perf_counter()
    is_terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=not is_terminal, width=None if is_terminal else 110)
    with open_llm(arguments, **_defaults(arguments)) as llm:
        _introduce(console, llm)
        shown = [_prepare(llm, question, max_tokens) for question, max_tokens in PROMPTS]
        record = _generate(console, llm, shown, is_live=is_terminal)
        _print_answers(console, shown)
        _print_numbers(console, llm, shown, record)
        is_same = _check(console, llm, shown)
    console.print(f"\nAll in {time.perf_counter() - started:.1f} s. Next: jaxpaged chat, or jaxpaged generate --help")
    return 0 if is_same else 1


def _defaults(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the show, as far as the command line leaves them open."""
    given = given_fields(arguments, EngineConfig)
    EngineConfig.from_options(**given)  # refuse bad values before jax is imported
    # A bfloat16 matrix is slow on a CPU, and only float32 leaves no near ties to the final check.
    defaults: dict[str, Any] = {"dtype": "float32"}
    if not given.keys() & (_OPTIONS.keys() | {"prefill_tile"}):
        defaults |= _OPTIONS
    from jaxpaged.llm import open_model

    if "max_model_len" not in given:
        limit = open_model(given.get("model"), given.get("revision")).config.max_position_embeddings
        defaults["max_model_len"] = min(limit, _MAX_LEN)
    if not given.keys() & {"num_gpu_blocks_override", "kv_cache_memory_bytes", "gpu_memory_utilization", "block_size"}:
        defaults |= {"block_size": _PAGE_TOKENS, "num_gpu_blocks_override": _NUM_PAGES + 1}
    return defaults


def _introduce(console: Console, llm: LLM) -> None:
    import jax

    from jaxpaged.model import weights

    console.print(f"[bold]jaxpaged {__version__}[/bold]: eight prompts, one page pool")
    num_parameters = weights.num_bytes(llm.model_config, "float32") // 4
    device = jax.devices()[0]
    name = llm.config.model or "the bundled model"
    kind = llm.config.weights_dtype
    console.print(f"{name}: {num_parameters:,} parameters, {kind}, on {device.device_kind or device.platform}")
    console.print(f"Loaded in {llm.load_s:.1f} s, compiled {len(llm.config.buckets())} steps in {llm.warm_up_s:.1f} s.")
    num_pages = llm.engine.pool.num_usable
    console.print(
        f"The pool: {num_pages:,} pages of {llm.config.block_size} tokens, "
        f"which is {num_pages * (llm.config.block_size or 0) / (llm.config.max_model_len or 1):.1f} sequences of full length.\n"
    )


def _prepare(llm: LLM, question: str, max_tokens: int) -> _Shown:
    tokenizer = llm.get_tokenizer()
    if tokenizer.chat_templates:
        token_ids = llm.chat_prompt([{"role": "user", "content": question}])["prompt_token_ids"]
    else:
        token_ids = tokenizer.encode(question)
    return _Shown(question, token_ids, SamplingParams(temperature=0.0, max_tokens=max_tokens), tokenizer.detokenizer())


# --- generating --------------------------------------------------------------------------------------------------


def _generate(console: Console, llm: LLM, shown: list[_Shown], *, is_live: bool) -> _Record:
    """Queue everything, step until nothing is left, and show each step."""
    from rich.live import Live

    engine, record = llm.engine, _Record()
    by_id = {}
    for index, one in enumerate(shown):
        request = engine.add_request(one.prompt_token_ids, one.params, request_id=f"demo-{index + 1}")
        by_id[request.request_id] = one

    with Live(console=console, refresh_per_second=15, transient=True) if is_live else nullcontext() as live:
        while engine.has_unfinished:
            started = time.perf_counter()
            events = engine.step()
            record.seconds += time.perf_counter() - started
            for event in events:
                by_id[event.request_id].record(event)
            _look(engine, by_id, record, num_rows=len(events))
            if live is not None:
                live.update(_table(shown, record, engine.pool.num_usable))
                time.sleep(max(0.0, _FRAME_S - (time.perf_counter() - started)))
                continue
            for event in events:
                if event.finish_reason is not None:
                    console.print(_finish_line(by_id[event.request_id], event.request_id, record, engine.pool.num_usable))
    return record


def _look(engine: Any, by_id: dict[str, _Shown], record: _Record, *, num_rows: int) -> None:
    """Note who owns which pages after a step."""
    owned = {sequence.request.request_id: len(sequence.pages) for sequence in engine.scheduler.running}
    for request_id, one in by_id.items():
        one.num_pages = owned.get(request_id, 0)
        if one.state in ("waiting", "running", "preempted"):
            one.state = "running" if request_id in owned else "preempted" if one.token_ids else "waiting"
    record.batch_sizes.append(num_rows)
    record.pages.append(engine.pool.num_used)


def _finish_line(one: _Shown, request_id: str, record: _Record, num_pages: int) -> str:
    return (
        f"step {len(record.pages):3}  {request_id} ends ({one.state}) after {len(one.token_ids):3} tokens, its pages are free: "
        f"{record.pages[-1]:3} of {num_pages} are still taken"
    )


def _table(shown: list[_Shown], record: _Record, num_pages: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, expand=True)
    for name, width in (("#", 2), ("prompt", 24), ("text so far", None), ("tokens", 6), ("pages", 13), ("state", 9)):
        table.add_column(name, width=width, ratio=None if width else 1, no_wrap=True, overflow="ellipsis")
    colors = {"running": "cyan", "waiting": "dim", "preempted": "yellow"}
    for index, one in enumerate(shown):
        color = colors.get(one.state, "green")
        done = one.state not in colors
        tail = " ".join(one.detokenizer.text.split())[-60:]
        table.add_row(
            str(index + 1),
            Text(one.question, style="dim"),
            Text(tail),
            f"{len(one.token_ids):4}",
            Text("■" * min(one.num_pages, 13), style=color),
            Text(f"✓ {one.state}" if done else one.state, style=color),
        )
    width = 48
    used = record.pages[-1] * width // num_pages
    bar = Text("■" * used, style="cyan") + Text("·" * (width - used), style="dim")
    table.caption = Text(f"step {len(record.pages)}   pages ") + bar + Text(f" {record.pages[-1]} of {num_pages}")
    table.caption_justify = "left"
    return table


# --- afterwards --------------------------------------------------------------------------------------------------


def _print_answers(console: Console, shown: list[_Shown]) -> None:
    from rich.text import Text

    console.print("\n[bold]Answers[/bold]")
    for index, one in enumerate(shown):
        console.print(Text(f"{index + 1} {one.question}", style="dim"))
        console.print(Text(f"  {one.detokenizer.text.strip() or '(nothing)'}"))


def _print_numbers(console: Console, llm: LLM, shown: list[_Shown], record: _Record) -> None:
    config, model = llm.config, llm.model_config
    num_prompt, num_new = sum(len(one.prompt_token_ids) for one in shown), sum(len(one.token_ids) for one in shown)
    steps, peak, num_pages = len(record.pages), max(record.pages), llm.engine.pool.num_usable
    console.print("\n[bold]What happened[/bold]")
    console.print(
        f"  {num_prompt:,} prompt tokens and {num_new:,} new tokens in {steps} steps and {record.seconds:.2f} s: "
        f"{num_new / record.seconds:,.0f} tokens/s, {counted(int(llm.stats()['num_preemptions']), 'preemption')}"
    )
    console.print(f"  batch by step   {_sparkline(record.batch_sizes)}  {max(record.batch_sizes)} at most")
    console.print(f"  pages by step   {_sparkline(record.pages)}  {peak} of {num_pages} at most")

    dtype_bytes = DTYPE_BYTES[config.kv_cache_dtype]
    token_bytes = 2 * model.num_kv_heads * model.head_dim * model.num_layers * dtype_bytes
    page_tokens, max_len = config.block_size or 0, config.max_model_len or 0
    rows = max(record.batch_sizes)
    paged, contiguous = peak * page_tokens * token_bytes, rows * max_len * token_bytes
    console.print("\n[bold]Memory of the cache[/bold]")
    console.print(
        f"  one token       2 (K and V) x {model.num_kv_heads} heads x {model.head_dim} x {model.num_layers} layers x "
        f"{dtype_bytes} bytes = {_size(token_bytes)}"
    )
    console.print(f"  paged           {peak} pages x {page_tokens} tokens x {_size(token_bytes)} = {_size(paged)}, at the peak")
    console.print(f"  contiguous      {rows} sequences x {max_len:,} tokens x {_size(token_bytes)} = {_size(contiguous)}, always")
    console.print(
        f"  {contiguous / paged:.1f} times less, because nobody reserves the {max_len:,} tokens of max_model_len in advance."
    )


def _size(count: int) -> str:
    if count < 2**20:
        return f"{count / 2**10:,.4g} KiB"
    return f"{count / 2**20:,.4g} MiB"


def _sparkline(values: list[int], width: int = 48) -> str:
    """The values as one line of bars; neighbours share a bar, which shows the larger, when there are more than `width`."""
    count = min(width, len(values))
    tops = [max(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]
    return "".join(_BARS[value * (len(_BARS) - 1) // max(max(values), 1)] for value in tops)


def _check(console: Console, llm: LLM, shown: list[_Shown]) -> bool:
    """Each prompt alone again: whether all give the tokens that they gave together."""
    console.print("\n[bold]Check[/bold]")
    started = time.perf_counter()
    wrong = 0
    for index, one in enumerate(shown):
        alone = llm.generate({"prompt_token_ids": one.prompt_token_ids}, one.params, use_tqdm=False)[0].outputs[0]
        if alone.token_ids == one.token_ids:
            continue
        wrong += 1
        at = next((i for i, pair in enumerate(zip(alone.token_ids, one.token_ids, strict=False)) if pair[0] != pair[1]), 0)
        console.print(f"  [red]demo-{index + 1} differs alone, from token {at}[/red]: {alone.text!r}", markup=True)
    llm.engine.scheduler.check()
    if llm.engine.pool.num_used:
        raise RuntimeError(f"{llm.engine.pool.num_used} pages are still taken")
    color, seconds = ("green" if not wrong else "red"), time.perf_counter() - started
    console.print(
        f"  [{color}]{len(shown) - wrong} of {len(shown)}[/{color}] prompts give the very same tokens alone as in the crowd "
        f"({seconds:.1f} s); every page is back in the pool."
    )
    return not wrong
