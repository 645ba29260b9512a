"""Compile the engine's step for a GPU that is not there: does the pool stay in place? `python -m jaxpaged.bench.compile_check`.

A small bfloat16 model over page arrays of 4 GiB each (shapes only: no memory is taken), for a bucket of decode rows, one of
prefill tiles and one of both. It is wrong when the step does not take over all of the donated pool, needs more than 5% of it
beside it, or has an instruction that copies it. Needs jax's CUDA plugin; no driver and no GPU.

Exit code: 0 all right, 1 something is wrong, 2 nothing could be compiled.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpaged.batch import Feed, pad
from jaxpaged.config import Bucket, ModelConfig
from jaxpaged.host.plan import StepPlan
from jaxpaged.model import weights
from jaxpaged.model.cache import KVCache, init_cache
from jaxpaged.model.step import step
from pallas_kernels import compile_check, deviceless
from pallas_kernels.backends import BACKENDS

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
PAGE_SIZE, TILE, NUM_PAGES = 64, 64, 32769  # 4 layers of them, 2 heads of 128: a little more than 4 GiB of keys, and of values
BUCKETS = {"decode": Bucket(32, 0), "prefill": Bucket(0, 8), "mixed": Bucket(32, 8)}
TEMPORARY_SHARE = 0.05


def arguments(config: ModelConfig, bucket: Bucket) -> dict[str, Any]:
    """The shapes of a step's arguments."""
    feed = Feed(np.zeros(bucket.decode_rows + bucket.prefill_tiles, np.int32), {})
    padded = pad(StepPlan((), ()), bucket, feed, tile=TILE, page_size=PAGE_SIZE, max_blocks_per_seq=8192 // PAGE_SIZE)
    return {
        "weights": jax.eval_shape(functools.partial(weights.init, config, dtype="bfloat16"), jax.random.key(0)),
        "cache": jax.eval_shape(functools.partial(init_cache, config, NUM_PAGES, PAGE_SIZE, "bfloat16")),
        "inputs": padded.inputs,
    }


def copies(hlo: str, num_elements: int) -> int:
    """Instructions of a compiled program that copy an array of that many elements or more."""
    shapes = re.findall(r"= \(?\w+\[([\d,]+)\][^=\n]*? copy(?:-start)?\(", hlo)
    return sum(math.prod(map(int, shape.split(","))) >= num_elements for shape in shapes)


def problems(program: deviceless.Program, cache: KVCache) -> list[str]:
    """What is wrong with a compiled step, a line each."""
    pool_bytes = cache.k.size * cache.k.dtype.itemsize + cache.v.size * cache.v.dtype.itemsize
    num_copies = copies(program.hlo, cache.k.size)
    found = [f"{num_copies} copies of a page array"] if num_copies else []
    if program.alias_bytes < pool_bytes:
        found.append(f"{program.alias_bytes} of the pool's {pool_bytes} bytes are taken over")
    if program.temporary_bytes > TEMPORARY_SHARE * pool_bytes:
        found.append(f"{program.temporary_bytes} bytes beside a pool of {pool_bytes}, at most {TEMPORARY_SHARE:.0%} are allowed")
    return found


def compile_buckets(gpu: str, backend: str, names: Sequence[str], dump: Path) -> int:
    """Compile the step for some of BUCKETS in this process and print what came out; 1 when something is wrong."""
    config = ModelConfig.from_hf(MODEL)
    is_wrong = False
    for name in names:
        shapes = arguments(config, BUCKETS[name])
        function = functools.partial(step, config=config, backend=backend)  # type: ignore[arg-type]
        try:
            program = deviceless.program(function, shapes, gpu, dump, donate=("cache",))
        except Exception as error:  # whatever a compiler says of one bucket, the next is still wanted
            said = (str(error).strip().splitlines() or [""])[0]
            print(f"{gpu} {name}: failed: {type(error).__name__}: {said[:300]}", flush=True)
            is_wrong = True
            continue
        found = problems(program, shapes["cache"])
        kernels = ", ".join(f"{kernel.name} ({kernel.num_registers} registers)" for kernel in program.kernels) or "none"
        num_copies = copies(program.hlo, shapes["cache"].k.size)
        print(
            f"{gpu} {name}: {program.alias_bytes} bytes in place, {program.temporary_bytes} beside them, {num_copies} copies",
            flush=True,
        )
        print(f"  Mosaic kernels: {kernels}\n  {'; '.join(found) or 'right'}", flush=True)
        is_wrong |= bool(found)
    return int(is_wrong)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.compile_check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gpu", nargs="+", default=["sm_90a"], choices=list(deviceless.GPUS), help="(%(default)s)")
    parser.add_argument("--bucket", nargs="+", default=list(BUCKETS), choices=list(BUCKETS), help="(default: all)")
    parser.add_argument("--backend", default="mosaic", choices=BACKENDS, help="of the attention and page writes (%(default)s)")
    parser.add_argument("--child", type=Path, help="(for its own processes) compile for the one GPU, with this folder for dumps")
    args = parser.parse_args(argv)
    if args.child:
        return compile_buckets(args.gpu[0], args.backend, args.bucket, args.child)
    if reason := compile_check.missing():
        print(f"compile_check: {reason}", file=sys.stderr)
        return 2
    is_wrong = False
    for gpu in args.gpu:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--child", folder, "--gpu", gpu, "--backend", args.backend, "--bucket", *args.bucket]
            child = subprocess.run(
                [sys.executable, "-m", "jaxpaged.bench.compile_check", *words],
                env=compile_check.environment(Path(folder)),
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        if child.returncode not in (0, 1):
            print(f"{gpu}: {compile_check.death(child.returncode, child.stderr)}")
        is_wrong |= child.returncode != 0
    return int(is_wrong)


if __name__ == "__main__":
    raise SystemExit(main())
