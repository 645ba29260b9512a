"""llama.cpp through llama-cpp-python's low-level interface, with continuous batching of our own around `llama_decode`.

Its high-level `Llama` answers one request at a time; llama.cpp's server, which does batch, speaks texts over HTTP. What is here
does what that server does: in every step one token of each running sequence, and prompts in the room that is left.
"""

from __future__ import annotations

import os
import time
from collections import deque
from importlib.metadata import version
from typing import Any

import gguf_file
import numpy as np


class Side:
    """See `child.Side`. `dtype` is the type of the GGUF file, which is written where it is not there yet."""

    def load(
        self, model: str, dtype: str, max_model_len: int, max_num_seqs: int, num_threads: int, options: dict
    ) -> dict[str, Any]:
        """See `child.Side`. `options` are fields of `llama_context_params`; gguf_dir is the folder of the file."""
        import llama_cpp  # pyright: ignore[reportMissingImports]

        given = dict(options)
        path = os.path.join(given.pop("gguf_dir"), f"{dtype}.gguf")
        if not os.path.exists(path):
            gguf_file.write(model, path, dtype)
        self._lib = lib = llama_cpp
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = lib.llama_context_default_params()
        max_num_seqs = min(max_num_seqs, lib.llama_max_parallel_sequences())
        params.n_seq_max, params.n_ctx = max_num_seqs, max_num_seqs * max_model_len
        params.n_threads = params.n_threads_batch = num_threads
        for name, value in given.items():
            if not hasattr(params, name):
                raise ValueError(f"llama_context_params has no {name}")
            setattr(params, name, value)
        self._ctx = lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise RuntimeError("llama.cpp makes no context of these limits")
        self._num_batch, self._max_num_seqs = lib.llama_n_batch(self._ctx), max_num_seqs
        self._num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(self._num_batch, 0, 1)
        return {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "system": lib.llama_print_system_info().decode(),
            "dtype": dtype,
            "threads": lib.llama_n_threads(self._ctx),
            "max_num_seqs": max_num_seqs,
        }

    def run(self, prompts: list[list[int]], num_outputs: list[int]) -> tuple[float, list[list[int]]]:
        """See `child.Side`. What has no sequence yet waits for one."""
        started = time.perf_counter()
        tokens = self._generate(prompts, num_outputs, [])
        return time.perf_counter() - started, tokens

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """See `child.Side`."""
        times: list[float] = []
        started = time.perf_counter()
        tokens = self._generate([prompt], [num_output], times)[0]
        return [moment - started for moment in times], tokens

    def _generate(self, prompts: list[list[int]], num_outputs: list[int], times: list[float]) -> list[list[int]]:
        """All tokens; when each step that made some ended goes to `times`."""
        lib, batch = self._lib, self._batch
        memory = lib.llama_get_memory(self._ctx)
        lib.llama_memory_clear(memory, False)
        found: list[list[int]] = [[] for _ in prompts]
        waiting = deque(range(len(prompts)))
        free = list(range(self._max_num_seqs))
        running: dict[int, int] = {}  # request -> its sequence
        num_done = [0] * len(prompts)  # tokens of each request that are in the cache
        while waiting or running:
            while waiting and free:
                running[waiting.popleft()] = free.pop()
            batch.n_tokens = 0
            sampled: dict[int, int] = {}  # request -> place in the batch of its last token
            # Those that decode come first: the rest of the batch is for prompts.
            for request in sorted(running, key=lambda one: not found[one]):
                left = prompts[request][num_done[request] :] or found[request][-1:]
                piece = left[: self._num_batch - batch.n_tokens]
                self._add(piece, num_done[request], running[request], is_last=len(piece) == len(left))
                num_done[request] += len(piece)
                if piece and len(piece) == len(left):
                    sampled[request] = batch.n_tokens - 1
            if lib.llama_decode(self._ctx, batch):
                raise RuntimeError(f"llama_decode failed on {batch.n_tokens} tokens of {len(running)} sequences")
            for request, place in sampled.items():
                logits = lib.llama_get_logits_ith(self._ctx, place)
                found[request].append(int(np.argmax(np.ctypeslib.as_array(logits, (self._num_vocab,)))))
                if len(found[request]) == num_outputs[request]:
                    sequence = running.pop(request)
                    lib.llama_memory_seq_rm(memory, sequence, -1, -1)
                    free.append(sequence)
            if sampled:
                times.append(time.perf_counter())
        return found

    def _add(self, tokens: list[int], first: int, sequence: int, *, is_last: bool) -> None:
        """Append to the batch; the last token's logits are wanted where it is the last of what is known."""
        batch = self._batch
        for number, token in enumerate(tokens):
            place = batch.n_tokens
            batch.token[place], batch.pos[place] = token, first + number
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = is_last and number == len(tokens) - 1
            batch.n_tokens = place + 1
