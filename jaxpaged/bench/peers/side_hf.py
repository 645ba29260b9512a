"""transformers, by continuous batching (what `generate_batch` does), and by static batches of `generate`."""

from __future__ import annotations

import time
from typing import Any

_PAGE_SIZE = 256  # transformers' default


class Side:
    """See `child.Side`. Continuous batching over its own paged cache."""

    def load(
        self, model: str, dtype: str, max_model_len: int, max_num_seqs: int, num_threads: int, options: dict
    ) -> dict[str, Any]:
        """See `child.Side`. `options` are those of transformers' ContinuousBatchingConfig, with attn_implementation."""
        import torch
        import transformers

        torch.set_num_threads(num_threads)
        given = {"attn_implementation": "sdpa", **options}
        attention = given.pop("attn_implementation")
        # Left alone it makes a cache of all free memory, as on a GPU, and each step walks over it: 0.2 s became 20 to 70 (5.23).
        num_blocks = max_num_seqs * -(-max_model_len // _PAGE_SIZE)
        sizes = {"page_size": _PAGE_SIZE, "num_blocks": num_blocks, "max_batch_tokens": 2048}
        self._options, self._max_num_seqs = {**sizes, **given}, max_num_seqs
        kind = getattr(torch, dtype)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=kind, attn_implementation=attention
        ).eval()
        self._model.generation_config = transformers.GenerationConfig(do_sample=False)  # without a token that ends
        return {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def run(self, prompts: list[list[int]], num_outputs: list[int]) -> tuple[float, list[list[int]]]:
        """See `child.Side`. As `generate_batch`, which however has one length for all."""
        from transformers import GenerationConfig

        config = GenerationConfig(do_sample=False, max_new_tokens=max(num_outputs), eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        with self._manager(config) as manager:
            pairs = zip(prompts, num_outputs, strict=True)
            names = [manager.add_request(ids, max_new_tokens=num) for ids, num in pairs]
            found = self._collect(manager, len(prompts))
            seconds = time.perf_counter() - started
        return seconds, [list(found[name].generated_tokens) for name in names]

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """See `child.Side`. The clock starts when the request is given, behind the allocation of the cache."""
        from transformers import GenerationConfig

        config = GenerationConfig(do_sample=False, max_new_tokens=num_output, eos_token_id=-1, pad_token_id=0)
        with self._manager(config) as manager:
            started = time.perf_counter()
            name = manager.add_request(prompt, max_new_tokens=num_output, record_timestamps=True)
            one = self._collect(manager, 1)[name]
        return [moment - started for moment in one.timestamps], list(one.generated_tokens)

    def _manager(self, config: Any) -> Any:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        given = {"allow_block_sharing": False, "max_requests_per_batch": self._max_num_seqs, **self._options}
        return self._model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**given), block=True, timeout=5
        )

    @staticmethod
    def _collect(manager: Any, num: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while len(found) < num:
            one = manager.get_result(timeout=1)
            if one is not None and one.is_finished():
                if one.error is not None:
                    raise RuntimeError(one.error)
                found[one.request_id] = one
            elif one is None and not manager.is_running():
                raise RuntimeError("the thread of continuous batching has ended")
        return found


class Static(Side):
    """See `child.Side`. At most max_num_seqs rows in a batch. Tokens behind what a request asked for do not count."""

    def run(self, prompts: list[list[int]], num_outputs: list[int]) -> tuple[float, list[list[int]]]:
        """See `child.Side`. Requests stay in their order: nothing is sorted by length."""
        import torch

        found: list[list[int]] = []
        started = time.perf_counter()
        for first in range(0, len(prompts), self._max_num_seqs):
            some, nums = prompts[first : first + self._max_num_seqs], num_outputs[first : first + self._max_num_seqs]
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(one)) + one for one in some])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in some])
            with torch.inference_mode():
                rows = self._model.generate(ids, attention_mask=mask, max_new_tokens=max(nums), do_sample=False, pad_token_id=0)
            found += [row[width : width + num].tolist() for row, num in zip(rows, nums, strict=True)]
        return time.perf_counter() - started, found

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """See `child.Side`."""
        import torch
        from transformers.generation.streamers import BaseStreamer

        class Moments(BaseStreamer):
            def __init__(self) -> None:
                self.times: list[float] = []
                self.tokens: list[int] = []
                self.has_prompt = False

            def put(self, value: torch.Tensor) -> None:
                if not self.has_prompt:  # the prompt comes first
                    self.has_prompt = True
                    return
                self.tokens += value.flatten().tolist()
                self.times.append(time.perf_counter() - started)

            def end(self) -> None:
                pass

        moments, ids = Moments(), torch.tensor([prompt])
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_output,
                do_sample=False,
                pad_token_id=0,
                streamer=moments,
            )
        return moments.times, moments.tokens
