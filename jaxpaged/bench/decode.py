"""Decode speed at a fixed context, beside transformers' continuous batching: `python -m jaxpaged.bench.decode --compare hf`.

A model of the 135M shape with random weights is written to a temporary folder and loaded by both. Both report when each token
came; what counts are the tokens between the moment when every sequence has its second token and the first end of a sequence, so
prefill and start-up are left out. `context` is the mean length meanwhile. Peers run in turn after one round that does not count;
the median over rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxpaged.config import ModelConfig
from jaxpaged.host.request import SamplingParams
from jaxpaged.llm import LLM
from jaxpaged.model import weights as model_weights

# SmolLM-135M's shape, which laptops run.
SHAPE_135M = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}

# Prompts and new tokens to generate -> for each prompt, when each of its tokens came, in seconds.
Generate = Callable[[list[list[int]], int], list[list[float]]]


def write_random_model(directory: Path, shape: dict, dtype: str) -> None:
    """A Hugging Face directory of this shape with random weights."""
    from safetensors.numpy import save_file

    config = ModelConfig.from_hf({**shape, "dtype": dtype})
    tensors = dict(model_weights.to_hf(model_weights.init(config, jax.random.key(0), "float32"), config))
    # safetensors' numpy writer knows no bfloat16; both loaders cast to the dtype they are asked for.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**shape, "dtype": dtype, "torch_dtype": dtype}))


def our_generate(directory: Path, dtype: str, num_seqs: int, max_len: int) -> tuple[Generate, LLM]:
    """jaxpaged on the model, compiled for this many sequences."""
    llm = LLM(
        directory,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_num_seqs=num_seqs,
        max_model_len=max_len,
        num_gpu_blocks_override=num_seqs * -(-max_len // 16) + 1,
        use_tqdm_on_load=False,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        times = {llm.engine.add_request(prompt, params).request_id: [] for prompt in prompts}
        while llm.engine.has_unfinished:
            for event in llm.engine.step():
                times[event.request_id].append(time.perf_counter())
        return list(times.values())

    return generate, llm


def hf_generate(directory: Path, dtype: str) -> Generate:
    """transformers' `generate_batch`: continuous batching over its own paged cache."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        results = model.generate_batch(inputs=prompts, generation_config=config, record_timestamps=True)
        times = [list(result.timestamps or []) for result in results.values()]
        if [len(each) for each in times] != [num_tokens] * len(prompts):
            raise RuntimeError(f"transformers made {[len(each) for each in times]} tokens, expected {num_tokens} each")
        return times

    return generate


def decode_speed(times: list[list[float]]) -> float:
    """Tokens per second while all sequences decode."""
    begin, end = max(each[1] for each in times), min(each[-1] for each in times)
    num_tokens = sum(begin < moment <= end for each in times for moment in each)
    if not num_tokens:
        raise RuntimeError("the sequences never decoded together: raise --tokens")
    return num_tokens / (end - begin)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-seqs", default="1,8,16,64", help="sequences at a time, separated by commas (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="mean tokens of context (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32 (%(default)s)")
    parser.add_argument("--compare", choices=["hf"], help="also run transformers' continuous batching")
    parser.add_argument("--output-json", type=Path, help="write the results here")
    args = parser.parse_args(argv)

    rng = random.Random(0)
    prompt_len = args.context - args.tokens // 2
    max_len = prompt_len + args.tokens
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_random_model(directory, SHAPE_135M, args.dtype)
        hf = hf_generate(directory, args.dtype) if args.compare else None
        for num_seqs in map(int, args.num_seqs.split(",")):
            prompts = [[rng.randrange(SHAPE_135M["vocab_size"]) for _ in range(prompt_len)] for _ in range(num_seqs)]
            ours, llm = our_generate(directory, args.dtype, num_seqs, max_len)
            peers = {"jaxpaged": ours} | ({"transformers": hf} if hf else {})
            speeds: dict[str, list[float]] = {name: [] for name in peers}
            for generate in peers.values():
                generate(prompts[:1], 4)
            for _ in range(args.rounds):
                for name, generate in peers.items():
                    speeds[name].append(decode_speed(generate(prompts, args.tokens)))
            llm.close()
            for name, values in speeds.items():
                row = {"peer": name, "num_seqs": num_seqs, "tokens_per_s": statistics.median(values)}
                rows.append({**row, "lowest": min(values), "highest": max(values)})
                spread = f"({min(values):.0f}-{max(values):.0f})"
                print(f"{name:14s} {num_seqs:4d} sequences  {row['tokens_per_s']:8.1f} tokens/s  {spread}", flush=True)
    if args.output_json:
        args.output_json.write_text(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
