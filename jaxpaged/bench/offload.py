"""How fast pages move between the device, host memory and a disk: `python -m jaxpaged.bench.offload`.

Shapes and numbers of pages take turns, so that a slow minute of the machine does not fall on one of them; the median over rounds
is reported. A save counts until its pages are in their slots, a load until they are in the pool, a spill until its files have
their names, a fetch until all of them are in their slots. Files come from the system's cache, as they do in an engine that has
lately written them; nothing is forced to the medium.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxpaged.checkpoint.configuration import read_config
from jaxpaged.config import ModelConfig
from jaxpaged.demo import MODEL_DIR
from jaxpaged.model import cache as kv_cache
from jaxpaged.offload.disk_pages import DiskPages
from jaxpaged.offload.host_pages import HostPages
from jaxpaged.offload.transfer import staging_kind

# The shape of Llama 3.2 1B.
SHAPE_1B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
WAYS = ("save", "load", "spill", "fetch")


class Moves:
    """A pool, slots and a folder of one shape; each method moves some pages one way and returns when they are there."""

    def __init__(self, model: ModelConfig, args: argparse.Namespace, num_pages: int):
        self.cache = kv_cache.init_cache(model, 2 * num_pages + 1, args.block_size, args.dtype)
        kind = args.memory_kind or staging_kind(self.cache)
        self.host = HostPages(self.cache, model, num_slots=num_pages, memory_kind=None if kind == "numpy" else kind)
        self.host.warm_up()
        self.disk = DiskPages(args.offload_dir, num_threads=args.offload_num_threads, max_queued_bytes=1 << 40)

    def save(self, count: int) -> None:
        self.host.save(self.cache, [(page + 1, page) for page in range(count)])
        self.host.settle()

    def load(self, count: int) -> None:
        self.cache = self.host.load(self.cache, [(page, self.host.num_slots + page + 1) for page in range(count)])
        jax.block_until_ready(self.cache)

    def spill(self, count: int) -> None:
        for slot in range(count):
            self.disk.spill(slot.to_bytes(16, "big"), self.host.read(slot))
        self.disk.flush()

    def fetch(self, count: int) -> None:
        for slot in range(count):
            self.disk.fetch(slot.to_bytes(16, "big"), self.host.overwrite(slot))
        num_answered = 0
        while num_answered < count:
            answers = self.disk.finished(wait=True)
            num_answered += len(answers)
            if not all(is_there for _, is_there in answers):
                raise RuntimeError("a page that was spilled was not fetched; what was logged says why")

    def close(self) -> None:
        self.disk.close()
        self.host.close()


def measure(moves: dict[str, Moves], counts: list[int], rounds: int) -> dict[tuple[str, str, int], list[float]]:
    """Seconds of each (shape, way, pages), one for each round; a round before them does not count."""
    seconds: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for count in counts:
            for shape, move in moves.items():
                for way in WAYS:
                    call: Callable[[int], None] = getattr(move, way)
                    jax.block_until_ready(move.cache)
                    started_s = time.perf_counter()
                    call(count)
                    if turn:
                        seconds.setdefault((shape, way, count), []).append(time.perf_counter() - started_s)
    return seconds


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.offload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pages", default="1,4,16,64,256", help="pages moved at a time, separated by commas (%(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a page (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the pages (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each, in turn (%(default)s)")
    parser.add_argument("--offload-dir", help="a folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--offload-num-threads", type=int, default=4, help="threads that read and write (%(default)s)")
    parser.add_argument("--memory-kind", help="where saves go first: pinned_host or numpy (default: as the engine chooses)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    counts = [int(word) for word in args.pages.split(",")]

    rows = []
    with tempfile.TemporaryDirectory(dir=args.offload_dir) as folder:
        args.offload_dir = folder
        shapes = {"bundled": read_config(MODEL_DIR), "1B": SHAPE_1B}
        moves = {name: Moves(shape, args, max(counts)) for name, shape in shapes.items()}
        for (shape, way, count), taken in sorted(measure(moves, counts, args.rounds).items(), key=_order):
            num_bytes, median_s = count * moves[shape].host.page_bytes, statistics.median(taken)
            row = {"shape": shape, "way": way, "pages": count, "bytes": num_bytes, "seconds": median_s}
            rows.append({**row, "gb_per_s": num_bytes / median_s / 1e9, "lowest_s": min(taken), "highest_s": max(taken)})
        for move in moves.values():
            move.close()
    for row in rows:
        size = f"{row['pages']:4d} pages of {row['bytes'] // row['pages'] / 1024:6.1f} KiB"
        print(f"{row['shape']:8s} {row['way']:6s} {size}  {row['seconds'] * 1e3:9.3f} ms  {row['gb_per_s']:7.2f} GB/s")
    if args.json:
        options = {name: str(value) for name, value in vars(args).items()}
        device = jax.devices()[0].device_kind
        args.json.write_text(json.dumps({"args": options, "jax": jax.__version__, "device": device, "rows": rows}, indent=1))
    return 0


def _order(item: tuple[tuple[str, str, int], list[float]]) -> tuple[str, int, int]:
    shape, way, count = item[0]
    return shape, WAYS.index(way), count


if __name__ == "__main__":
    raise SystemExit(main())
