"""vLLM, through its offline `LLM`, with its own defaults but for the prefix cache."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any


class Side:
    """See `child.Side`."""

    def load(
        self, model: str, dtype: str, max_model_len: int, max_num_seqs: int, num_threads: int, options: dict
    ) -> dict[str, Any]:
        """See `child.Side`. `options` are those of vLLM's `LLM`. Its threads are set by OMP_NUM_THREADS before the start."""
        import torch
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        given = {
            "model": model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
        }
        self._llm = LLM(**{**given, **options})
        self._num_traced = 0
        return {
            "versions": {"vllm": version("vllm"), "torch": torch.__version__},
            "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "threads": num_threads,
        }

    def run(self, prompts: list[list[int]], num_outputs: list[int]) -> tuple[float, list[list[int]]]:
        """See `child.Side`."""
        params = [self._params(num, "FINAL_ONLY") for num in num_outputs]
        started = time.perf_counter()
        found = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - started, [list(one.outputs[0].token_ids) for one in found]

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """See `child.Side`: by the engine's own steps, as `LLM.generate` takes them."""
        engine, times, tokens = self._llm.llm_engine, [], []
        self._num_traced += 1
        started = time.perf_counter()
        engine.add_request(f"trace-{self._num_traced}", {"prompt_token_ids": prompt}, self._params(num_output, "DELTA"))
        while engine.has_unfinished_requests():
            for output in engine.step():
                new = output.outputs[0].token_ids
                tokens += new
                times += [time.perf_counter() - started] * len(new)
        return times, tokens

    @staticmethod
    def _params(num_output: int, kind: str) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        given = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "max_tokens": num_output}
        return SamplingParams(**given, output_kind=RequestOutputKind[kind])
