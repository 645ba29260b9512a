"""Text in, text out: the class most people use. A model's directory, its tokenizer and an engine behind four methods.

Knows prompts, chats and results. Refuses to know pages and steps: it feeds the engine and reads its events.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from jaxpaged import profiling
from jaxpaged.config import EngineConfig
from jaxpaged.duel import Duel
from jaxpaged.embedder import Embedder, PoolingParams
from jaxpaged.engine import Engine
from jaxpaged.growing import GrowingRequest
from jaxpaged.host.beam_params import BeamSearchParams
from jaxpaged.host.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.live import record
from jaxpaged.loading import load, load_weights, open_model
from jaxpaged.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    EmbeddingRequestOutput,
    Metric,
    RequestOutput,
    ScoreOutput,
)
from jaxpaged.prompts import Checked, Message, Prompt, chat_prompt, check, embedded, parser_meant, with_special_tokens
from jaxpaged.series import series_of
from jaxpaged.tokenizer import Tokenizer
from jaxpaged.tools import parse

__all__ = ["LLM", "load_weights", "open_model"]


class LLM:
    """A language model on this machine. Not thread-safe: one caller at a time.

    Invariant: whatever ends a call, an error and Ctrl-C included, its requests are out of the engine afterwards.

    Args:
      model: a local Hugging Face or orbax directory, or a hub id; None or "demo" is the model that comes with jaxpaged.
      use_tqdm_on_load: show how far loading and compiling have come, on stderr.
      options: every field of `jaxpaged.EngineConfig`.

    Raises:
      ConfigError: an unknown option, or one out of range.
      CheckpointError: the model cannot be found or loaded.
      ResourceError: the machine has too little memory for what was asked.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, *, use_tqdm_on_load: bool = True, **options: Any):
        loaded = load(model, use_tqdm=use_tqdm_on_load, **options)
        self.engine, self.tokenizer, self.model_config = loaded.engine, loaded.tokenizer, loaded.model_config
        self.config: EngineConfig = loaded.engine.config
        self.generation_defaults, self._default_params = loaded.generation_defaults, loaded.default_params
        self.load_s, self.warm_up_s = loaded.load_s, loaded.warm_up_s
        self._live: dict[str, GrowingRequest] = {}
        self._ids = itertools.count()
        self._is_closed = False
        self._embedder: Embedder | None = None

    # --- generating ---

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Seq[int] | None = None,
        tenant: str | Seq[str] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts together; results in the prompts' order.

        Args:
          prompts: one or a list of: a text, {"prompt": text}, {"prompt_token_ids": ids}, or a list of token ids; see `Prompt`.
          sampling_params: one for all, or one for each; None is `get_default_sampling_params()`.
          use_tqdm: show a progress bar on stderr.
          priority: lower is earlier, with scheduling_policy="priority"; one for all, or one for each. None is 0.
          tenant: whose prompts these are, with scheduling_policy="fair_share"; likewise.

        Raises:
          RequestError: a prompt or its parameters cannot be served; nothing has been generated for any of them.
        """
        return self._run(self._checked(prompts, sampling_params, priority, tenant), use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Seq[int] | None = None,
        tenant: str | Seq[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_call_parser: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them: messages are {"role": ..., "content": ...}.

        Calls of `tools` stand in the text as the model writes them. With a `tool_call_parser` each output also has them as
        `tool_calls`, and as `content` the text without them; `skip_special_tokens` is off then, since the markers are special
        tokens in some models. `jaxpaged.tools.tool_parser` does the same for a text of `stream` while it grows.

        Args:
          priority, tenant: as for `generate`.
          add_generation_prompt, continue_final_message, chat_template, tools, chat_template_kwargs: as for
            `Tokenizer.apply_chat_template`.
          tool_call_parser: one of `jaxpaged.tools.TOOL_CALL_PARSERS`, or "auto": the one that fits the chat template.

        Raises:
          RequestError: as `generate`; also when the model has no chat template, its template refuses the messages, or there is no
            such parser.
        """
        parser = None
        if tool_call_parser is not None:
            source = self.get_tokenizer().chat_template(chat_template, has_tools=bool(tools))
            parser = parser_meant(tool_call_parser, source)
            sampling_params = _all_with_special_tokens(
                self.get_default_sampling_params() if sampling_params is None else sampling_params
            )
        is_one = not messages or isinstance(messages[0], Mapping)
        conversations: Seq[Any] = [messages] if is_one else messages
        prompts = [
            self.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, tenant=tenant)
        return outputs if parser is None else [_with_tool_calls(output, parser) for output in outputs]

    def beam_search(
        self,
        prompts: Prompt | Seq[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        priority: int | Seq[int] | None = None,
        tenant: str | Seq[str] | None = None,
    ) -> list[BeamSearchOutput]:
        """Search for the likeliest completions of each prompt; results in the prompts' order, the best sequence first.

        The beams of a prompt share the pages of what they have in common. `generate` with `SamplingParams(use_beam_search=True)`
        is the same search with RequestOutputs as its result, and takes searches and other requests together; `priority` and
        `tenant` are as there.

        Raises:
          RequestError: a prompt or the parameters cannot be served; nothing has been searched for any of them.
        """
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"params: got {type(params).__name__}, expected BeamSearchParams")
        outputs = self._run(self._checked(prompts, params.sampling_params(), priority, tenant), use_tqdm=use_tqdm)
        return [BeamSearchOutput([self._beam(output, one, params) for one in output.outputs]) for output in outputs]

    def score(self, prompts: Prompt | Seq[Prompt], *, use_tqdm: bool = False) -> list[ScoreOutput]:
        """How likely the model finds each of some texts, token by token; results in the texts' order.

        One place must be left after a text, as for `generate`. Nothing is drawn that the result depends on.

        Raises:
          RequestError: a text cannot be computed; nothing has been computed for any of them.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run(self._checked(prompts, params, None, None), use_tqdm=use_tqdm)
        if failed := [index for index, output in enumerate(outputs) if output.prompt_logprobs is None]:
            raise RequestError(f"prompts[{failed[0]}]: {outputs[failed[0]].outputs[0].finish_reason}")
        scores = []
        for output in outputs:
            places = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)  # type: ignore[index]
            found = [place[token_id].logprob for token_id, place in places]  # type: ignore[index]
            scores.append(ScoreOutput(output.prompt_token_ids, found))
        return scores

    def embed(
        self, prompts: Prompt | Seq[Prompt], pooling_params: PoolingParams | None = None, *, use_tqdm: bool = False
    ) -> list[EmbeddingRequestOutput]:
        """A vector of each prompt, from the model's final hidden states; results in the prompts' order.

        One place must be left after a prompt, as for `generate`. Shapes are compiled when they are first needed.

        Raises:
          RequestError: a prompt cannot be computed; nothing has been computed for any of them.
        """
        checked = self._checked(prompts, SamplingParams(max_tokens=1), None, None)
        if self._embedder is None:
            self._embedder = Embedder(self._open_engine())
        ids = [one.request.prompt_token_ids for one in checked]
        with tqdm(total=len(ids), desc="Embedded prompts", dynamic_ncols=True, disable=not use_tqdm) as progress:
            found = self._embedder.embed(ids, pooling_params)
            progress.update(len(found))
        pairs = zip(checked, found, strict=True)
        return [embedded(one.request, vector) for one, vector in pairs]

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        priority: int | Seq[int] | None = None,
        tenant: str | Seq[str] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Like `generate`, but yield each request whenever it has a new token, the last time with `finished` set.

        Each RequestOutput holds everything so far (text and token ids), not the difference. With output_kind DELTA it holds what
        is new of the outputs that have something new. With FINAL_ONLY there is one, at the end, and so with `best_of` above 1,
        when all that was drawn has ended. Text that may turn out to be the beginning of a string of `stop` is held back.

        Several prompts come interleaved: a result's place in the list of prompts is the order of the request ids. The prompts are
        checked at the call and queued at the first `next`; closing the iterator aborts what is unfinished. Other calls may run
        between two results.

        Raises:
          RequestError: as `generate`, at the call.
        """
        return self._stream(self._checked(prompts, sampling_params, priority, tenant))

    def chat_prompt(self, messages: Seq[Message], *, add_generation_prompt: bool = True, **options: Any) -> dict[str, Any]:
        """One conversation as a prompt for `generate` and `stream`; options are those of `Tokenizer.apply_chat_template`."""
        return chat_prompt(self.get_tokenizer(), messages, add_generation_prompt=add_generation_prompt, **options)

    # --- inside ---

    def _checked(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
        priority: int | Seq[int] | None,
        tenant: str | Seq[str] | None,
    ) -> list[Checked]:
        listed = _list_prompts(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_for_each("sampling_params", sampling_params, listed)
        priorities = _one_for_each("priority", 0 if priority is None else priority, listed)
        tenants = _one_for_each("tenant", "" if tenant is None else tenant, listed)
        checked = []
        for index, prompt in enumerate(listed):
            try:
                checked.append(self._check(prompt, params[index], {"priority": priorities[index], "tenant": tenants[index]}))
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}" if len(listed) > 1 else str(error)) from None
        return checked

    def _check(self, prompt: Prompt, params: SamplingParams, options: dict[str, Any]) -> Checked:
        return check(self._open_engine(), self.tokenizer, prompt, params, request_id=str(next(self._ids)), **options)

    def _beam(self, output: RequestOutput, one: CompletionOutput, params: BeamSearchParams) -> BeamSearchSequence:
        tokens = output.prompt_token_ids + one.token_ids
        if one.finish_reason == "stop" and not params.include_stop_str_in_output:
            tokens.pop()
        text = self.tokenizer.decode(tokens, skip_special_tokens=False) if self.tokenizer is not None else None
        return BeamSearchSequence(tokens, one.cumulative_logprob, text, one.finish_reason, one.stop_reason)

    def _open_engine(self) -> Engine:
        if self._is_closed:
            raise RequestError("the LLM is closed")
        return self.engine

    def _queue(self, checked: Checked) -> GrowingRequest:
        live = GrowingRequest(self._open_engine().queue(checked.request), checked.prompt, self.tokenizer)
        self._live[live.request.request_id] = live
        return live

    def _step(self) -> list[GrowingRequest]:
        """One step of the engine, whoever's requests it serves: those that it changed."""
        engine = self._open_engine()
        changed = record(engine, engine.step(), self._live)
        for live in changed:
            if live.is_finished:
                del self._live[live.request.request_id]
        if not engine.has_unfinished:
            # Someone else took our requests out of the engine: without this we would wait for them for ever.
            for live in self._live.values():
                live.end(engine.clock())
                changed.append(live)
            self._live.clear()
        return changed

    def _drop(self, lives: Seq[GrowingRequest]) -> None:
        """Take what is unfinished out of the engine."""
        for live in lives:
            if self._live.pop(live.request.request_id, None) is not None:
                self.engine.abort(live.request.request_id)

    def _run(self, checked: Seq[Checked], *, use_tqdm: bool) -> list[RequestOutput]:
        progress = tqdm(
            total=len(checked),
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not use_tqdm,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        lives: list[GrowingRequest] = []
        started, num_input, num_output = time.perf_counter(), 0, 0
        try:
            for one in checked:
                lives.append(self._queue(one))
            while not all(live.is_finished for live in lives):
                for live in self._step():
                    if not live.is_finished or live not in lives:
                        continue
                    num_input += len(live.request.prompt_token_ids)
                    num_output += live.num_generated
                    seconds = time.perf_counter() - started
                    speed = f"input: {num_input / seconds:.2f} toks/s, output: {num_output / seconds:.2f} toks/s"
                    progress.postfix = f"est. speed {speed}"
                    progress.update()
        finally:
            self._drop(lives)
            progress.close()
        return [live.output() for live in lives]

    def _stream(self, checked: Seq[Checked]) -> Generator[RequestOutput, None, None]:
        lives: list[GrowingRequest] = []
        try:
            for one in checked:
                lives.append(self._queue(one))
            num_seen = dict.fromkeys(lives, 0)
            running = lives
            while running:
                if all(live.num_events == num_seen[live] for live in running):
                    self._step()
                # Not what the step returned: another call may have moved our requests while the caller held the iterator.
                for live in running:
                    if live.num_events > num_seen[live]:
                        num_seen[live] = live.num_events
                        params = live.request.params
                        if live.is_finished or not (params.is_ranked or params.output_kind is RequestOutputKind.FINAL_ONLY):
                            is_delta = params.output_kind is RequestOutputKind.DELTA
                            yield live.news() if is_delta else live.output()
                running = [live for live in running if not live.is_finished or live.num_events > num_seen[live]]
        finally:
            self._drop(lives)

    # --- for people who look ---

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          RequestError: skip_tokenizer_init is set.
        """
        if self.tokenizer is None:
            raise RequestError("there is no tokenizer: skip_tokenizer_init is set")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends, else the defaults of SamplingParams."""
        return self._default_params

    def stats(self) -> dict[str, int | float]:
        """Counters since the start and the state of the page pool right now."""
        return self._open_engine().stats()

    @property
    def duel(self) -> Duel | None:
        """With `compare_with`: how far the two attention backends are apart so far, layer by layer and head by head."""
        return self._open_engine().duel

    def reset_prefix_cache(self) -> None:
        """Forget what pages hold: no prompt after this shares a page with one before it."""
        self._open_engine().reset_prefix_cache()

    def get_metrics(self) -> list[Metric]:
        """The numbers of `stats` under their Prometheus names."""
        return [Metric(f"jaxpaged:{name}", series_of(name).kind, value) for name, value in self.stats().items()]

    def start_profile(self, directory: str | os.PathLike[str]) -> None:
        """Begin a trace of jax's profiler in a folder. Raises ConfigError where one runs already or it cannot be written."""
        profiling.start(os.fspath(directory))

    def stop_profile(self) -> None:
        """End the trace and write it. Raises ConfigError where none runs."""
        profiling.stop()

    def close(self) -> None:
        """End what runs and give the memory of weights and pages back. Closing twice is nothing."""
        self._is_closed = True
        self._live.clear()
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _all_with_special_tokens(params: SamplingParams | Seq[SamplingParams]) -> Any:
    if isinstance(params, Seq):
        return [_all_with_special_tokens(one) for one in params]
    return with_special_tokens(params) if isinstance(params, SamplingParams) else params  # refused with all others


def _with_tool_calls(output: RequestOutput, parser: str) -> RequestOutput:
    """An output whose texts are taken apart."""
    completions = []
    for one in output.outputs:
        reply = parse(one.text, parser)
        completions.append(replace(one, content=reply.content, tool_calls=reply.tool_calls))
    return replace(output, outputs=completions)


def _one_for_each(name: str, given: Any, prompts: list[Any]) -> list[Any]:
    """What was given for each prompt, when it may have been given once for all."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Seq):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise RequestError(f"{name}: got {len(given)} for {len(prompts)} prompts, expected one, or one for each")
    return list(given)


def _list_prompts(prompts: Prompt | Seq[Prompt]) -> list[Any]:
    """Every form that `generate` takes as a list of single prompts. A list of whole numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()  # type: ignore[union-attr]
    if isinstance(prompts, bytes) or not isinstance(prompts, Seq):
        raise RequestError(f"prompts: got {type(prompts).__name__}, expected a text, token ids, or a list of them")
    if prompts and all(isinstance(entry, int) for entry in prompts):
        return [prompts]
    return list(prompts)
