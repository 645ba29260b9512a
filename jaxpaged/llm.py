"""Text in, text out: the class most people use. A model's directory, its tokenizer and an engine behind four methods.

Knows prompts, chats and results. Refuses to know pages and steps: it feeds the engine and reads its events.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxpaged import checkpoint as checkpoints
from jaxpaged.checkpoint import Checkpoint, CheckpointError
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.demo import MODEL_DIR
from jaxpaged.duel import Duel
from jaxpaged.engine import Engine
from jaxpaged.growing import GrowingRequest
from jaxpaged.host.beam_params import BeamSearchParams
from jaxpaged.host.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.model.weights import Weights
from jaxpaged.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Metric, RequestOutput, ScoreOutput
from jaxpaged.runner import attention_backend
from jaxpaged.structured.grammars import Grammars
from jaxpaged.tokenizer import Tokenizer
from jaxpaged.tools import TOOL_CALL_PARSERS, UnknownParserError, check_parser, fitting_parser, parse

logger = logging.getLogger("jaxpaged")

Prompt = str | Mapping[str, Any] | Seq[int]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; with both keys the ids count and the text is shown.

Beside them {"cache_salt": text}: prompts share cached pages only with prompts of the same salt."""

Message = Mapping[str, Any]

# generation_config.json's name -> ours. Its do_sample is not read, as in vLLM: a temperature that is written down is meant.
_GENERATION_FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p")} | {"max_new_tokens": "max_tokens"}


@dataclass(frozen=True)
class _Checked:
    """A prompt that the engine will take."""

    prompt: str | None
    prompt_token_ids: Seq[int]
    params: SamplingParams
    options: dict[str, Any]  # of `Engine.add_request`


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
        config = EngineConfig.from_options(model=None if model is None else os.fspath(model), **options)
        checkpoint = open_model(config.model, config.revision)
        # Everything that can be refused is refused before the weights are read.
        resolved = config.resolved(checkpoint.config, jax.default_backend())
        attention_backend(resolved, checkpoint.config)
        self.tokenizer = None if config.skip_tokenizer_init else _load_tokenizer(config, checkpoint)
        self.generation_defaults = checkpoint.generation_defaults
        self._default_params = _default_params(checkpoint)

        started = time.perf_counter()
        weights = checkpoints.load(checkpoint, resolved.dtype, allow_nonfinite=config.allow_nonfinite, use_tqdm=use_tqdm_on_load)
        self.load_s = time.perf_counter() - started
        grammars = Grammars(self.tokenizer.backend.to_str) if self.tokenizer is not None else None
        self.engine = Engine.from_weights(config, checkpoint.config, weights, use_tqdm=use_tqdm_on_load, grammars=grammars)
        self.warm_up_s = time.perf_counter() - started - self.load_s
        self.config: EngineConfig = self.engine.config
        self.model_config: ModelConfig = checkpoint.config
        self._live: dict[str, GrowingRequest] = {}
        self._ids = itertools.count()
        self._is_closed = False

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
            parser = _tool_call_parser(tool_call_parser, source)
            sampling_params = _with_special_tokens(
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
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Seq) or not messages:
            raise RequestError("messages: expected a list of {'role': ..., 'content': ...}, at least one")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"messages[{index}]: expected {{'role': ..., 'content': ...}}")
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)
        # The template writes the special tokens itself.
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    # --- inside ---

    def _checked(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
        priority: int | Seq[int] | None,
        tenant: str | Seq[str] | None,
    ) -> list[_Checked]:
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

    def _check(self, prompt: Prompt, params: SamplingParams, options: dict[str, Any]) -> _Checked:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params: got {type(params).__name__}, expected SamplingParams")
        engine = self._open_engine()
        text, token_ids = self._tokens(prompt)
        params = self._with_bad_words(params)
        if params.structured_outputs is not None and self.tokenizer is None:
            raise RequestError("structured_outputs: need the tokenizer, and skip_tokenizer_init is set")
        options = {**options, "cache_salt": prompt.get("cache_salt") if isinstance(prompt, Mapping) else None}
        engine.check_request(token_ids, params, request_id="prompt", **options)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop: strings need the tokenizer, and skip_tokenizer_init is set: use stop_token_ids")
        return _Checked(text, token_ids, params, options)

    def _with_bad_words(self, params: SamplingParams) -> SamplingParams:
        """Parameters whose bad words are token ids too, as vLLM makes them of the words."""
        if not params.bad_words or self.tokenizer is None:  # the engine refuses the latter
            return params
        found: list[tuple[int, ...]] = []
        for word in params.bad_words:
            plain, spaced = (tuple(self.tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
            if not plain:
                raise RequestError(f"bad_words: {word[:32]!a} has no tokens")
            found.append(plain)
            # Where the space is a token of its own, the word after it is the one without a space.
            if spaced[:1] != plain[:1] and len(spaced) == len(plain):
                found.append(spaced)
        return replace(params, bad_words_token_ids=(*params.bad_words_token_ids, *found))

    def _tokens(self, prompt: Prompt) -> tuple[str | None, Seq[int]]:
        """The text of a prompt, when it has one, and its ids."""
        if isinstance(prompt, Mapping):
            unknown = sorted(map(str, prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}))
            if unknown or not prompt:
                raise RequestError(f"prompt: got the keys {unknown}, expected 'prompt' or 'prompt_token_ids'")
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif isinstance(prompt, str):
            text, token_ids = prompt, None
        else:
            text, token_ids = None, prompt
        if text is not None and not isinstance(text, str):
            raise RequestError(f"prompt: got {type(text).__name__}, expected a text")
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()  # type: ignore[union-attr]  (numpy and jax arrays)
        if token_ids is not None:
            return text, token_ids
        if text is None:
            raise RequestError("prompt: got None, expected a text or a list of token ids")
        if self.tokenizer is None:
            raise RequestError("prompt: a text needs the tokenizer, and skip_tokenizer_init is set: pass token ids")
        return text, self.tokenizer.encode(text)

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

    def _queue(self, checked: _Checked) -> GrowingRequest:
        params = checked.params
        request = self._open_engine().add_request(
            checked.prompt_token_ids, params, request_id=str(next(self._ids)), **checked.options
        )
        live = GrowingRequest(request, checked.prompt, self.tokenizer)
        self._live[request.request_id] = live
        return live

    def _step(self) -> list[GrowingRequest]:
        """One step of the engine, whoever's requests it serves: those that it changed."""
        engine = self._open_engine()
        changed: dict[str, GrowingRequest] = {}
        for event in engine.step():
            live = self._live.get(event.request_id)
            if live is None:  # someone drives the engine beside this LLM
                continue
            if live.record(event, engine.clock()):
                engine.stop(event.request_id, event.index)
            changed[event.request_id] = live
            if live.is_finished:
                del self._live[event.request_id]
        if not engine.has_unfinished:
            # Someone else took our requests out of the engine: without this we would wait for them for ever.
            for live in self._live.values():
                live.end(engine.clock())
                changed[live.request.request_id] = live
            self._live.clear()
        return list(changed.values())

    def _drop(self, lives: Seq[GrowingRequest]) -> None:
        """Take what is unfinished out of the engine."""
        for live in lives:
            if self._live.pop(live.request.request_id, None) is not None:
                self.engine.abort(live.request.request_id)

    def _run(self, checked: Seq[_Checked], *, use_tqdm: bool) -> list[RequestOutput]:
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

    def _stream(self, checked: Seq[_Checked]) -> Generator[RequestOutput, None, None]:
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
        is_gauge = ("num_requests_", "num_gpu_blocks", "kv_")
        return [
            Metric(f"jaxpaged:{name}", "gauge" if name.startswith(is_gauge) else "counter", value)
            for name, value in self.stats().items()
        ]

    def close(self) -> None:
        """End what runs and give the memory of weights and pages back. Closing twice is nothing."""
        self._is_closed = True
        self._live.clear()
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_weights(
    model: str | os.PathLike[str] | None = None, dtype: str = "float32", *, revision: str | None = None
) -> tuple[Weights, ModelConfig]:
    """The parameters of a model as a pytree of arrays, and its shape: what `prefill` and `decode` take.

    Args:
      model: as for `LLM`.

    Raises:
      CheckpointError: the model cannot be found or loaded.
    """
    checkpoint = open_model(None if model is None else os.fspath(model), revision)
    return checkpoints.load(checkpoint, dtype), checkpoint.config


def open_model(model: str | None, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `LLM(model)` means, its weights not yet read. Raises CheckpointError."""
    is_demo = model is None or (model == "demo" and not Path(model).is_dir())
    checkpoint = checkpoints.open_checkpoint(MODEL_DIR if is_demo else model, revision=revision)  # type: ignore[arg-type]
    for warning in checkpoint.warnings:
        logger.warning("%s", warning)
    return checkpoint


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer:
    directory = checkpoint.directory if config.tokenizer is None else checkpoints.resolve(config.tokenizer)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.max_token_id >= checkpoint.config.vocab_size:
        logger.warning(
            "The tokenizer has ids up to %d, the model only up to %d: prompts that use those in between are refused.",
            tokenizer.max_token_id,
            checkpoint.config.vocab_size - 1,
        )
    return tokenizer


def _default_params(checkpoint: Checkpoint) -> SamplingParams:
    given = checkpoint.generation_defaults
    options = {ours: given[name] for name, ours in _GENERATION_FIELDS.items() if given.get(name) is not None}
    try:
        return SamplingParams(**options)
    except RequestError as error:
        raise CheckpointError(f"{checkpoint.directory / 'generation_config.json'}: {error}") from None


def _tool_call_parser(name: str, chat_template: str) -> str:
    """The parser that is meant by `tool_call_parser`."""
    found = fitting_parser(chat_template) if name == "auto" else name
    if found is None:
        allowed = ", ".join(TOOL_CALL_PARSERS)
        raise RequestError(f"tool_call_parser: got 'auto', and no parser fits the model's chat template: name one of {allowed}")
    try:
        check_parser(found)
    except UnknownParserError as error:
        raise RequestError(str(error)) from None
    return found


def _with_special_tokens(params: SamplingParams | Seq[SamplingParams]) -> Any:
    """Parameters whose text has the markers of tool calls."""
    if isinstance(params, Seq):
        return [_with_special_tokens(one) for one in params]
    if not isinstance(params, SamplingParams):
        return params  # refused with all others
    if not params.detokenize:
        raise RequestError("tool_call_parser: calls are found in the text, and detokenize=False gives none")
    return replace(params, skip_special_tokens=False)


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
