"""What a user asks for and how far it has come: SamplingParams, Request, Sequence, TokenEvent.

Knows tokens and their limits. Refuses to know text, arrays and pages' contents.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from jaxpaged.config import nearest
from jaxpaged.host.beams import BeamGroup, Candidates
from jaxpaged.host.checks import RequestError, check_int, check_number, shown
from jaxpaged.host.structured import StructuredOutputsParams, checked_structured_outputs

MAX_RULES = 1024  # token ids whose logits a request may change by name in one step: what a row of a compiled step has room for
MAX_BAD_WORD_LEN = 64  # in tokens; each word is compared with the end of the output in every step
MAX_STOP_STRINGS = 64  # each new character is compared with one of each
MAX_STOP_LEN = 256  # characters of one
MAX_EXTRA = 1e38  # what the step has room for: its numbers are float32
_OF_TEXTS = "include_stop_str_in_output", "logprobs", "prompt_logprobs"
MAX_N = 128  # outputs of one request, as many as OpenAI's API has: one request must not be able to fill the engine


class RequestOutputKind(enum.Enum):
    """What a streamed output holds; the names and values are vLLM's."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # everything, once


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are those of the OpenAI and vLLM answers, but for PRUNED, which no answer has."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    PRUNED = "pruned"  # a beam that others have left behind


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names, meanings and defaults are vLLM's.

    Args:
      n: outputs for the prompt, which is computed once; their pages are shared as far as they are equal.
      best_of: draw so many outputs, and return the n whose tokens the model finds likeliest together, the best first, when all
        have ended; None draws n, and none is left out.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
      top_k: keep the k likeliest tokens; 0 or -1 keeps all.
      min_p: keep tokens at least this likely relative to the likeliest; 0 keeps all.
      seed: the same seed gives the same tokens, whatever else is in the batch; of several outputs, the i-th has seed + i. None
        draws one from the engine's own seed.
      max_tokens: at most this many new tokens; None means up to the model's limit.
      stop_token_ids: end after any of these, besides the model's own end-of-sequence ids.
      ignore_eos: do not end at the model's end-of-sequence ids.
      detokenize: also return text.
      skip_special_tokens: leave special tokens out of the text.
      use_beam_search: the n outputs are those of a beam search of width n, best first; they come when all of them have ended. The
        temperature divides the logits, 0 does not; the other options of sampling must be left alone.
      length_penalty: beams compete by their log-probability over length ** length_penalty; above 0 favours long ones.
      early_stopping: True ends the search when n beams have ended; False when the best running one, at its length, is behind all
        of these; "never" when it cannot get ahead of them.
      presence_penalty: taken off the logits of tokens that the output has; below 0 favours them.
      frequency_penalty: taken off the logits of tokens as often as the output has them.
      repetition_penalty: logits of tokens that prompt or output have are divided by it if positive, else multiplied; 1 is none.
      min_tokens: no end-of-sequence id and none of stop_token_ids before so many new tokens.
      logit_bias: token id -> what is added to its logit.
      allowed_token_ids: no token but these; None is all of them.
      bad_words: words whose last token is not chosen after their others; with and without a space before them. Text, so for
        `LLM` alone.
      bad_words_token_ids: the same as token ids, for `Engine`.
      stop: end where one of these strings ends in the text, which is cut before it; a string or a list of them. Of several the
        one that ends first counts, of those that end there the longest. An `Engine` knows no text: see `Engine.stop`.
      include_stop_str_in_output: the text keeps the string, or the token, that ended it.
      logprobs: return the log-probability of each new token, and those of so many likeliest ones; at most max_logprobs.
      prompt_logprobs: likewise of each token of the prompt but the first. Such a prompt is computed as a whole: pages of the
        prefix cache know no log-probabilities.
      extra_args: name -> number, for the engine's `logits_processors` that ask for it by this name.
      output_kind: what `LLM.stream` yields: everything so far, what is new, or the end alone. `LLM.generate` returns the end.
      structured_outputs: what the text has to be: a JSON schema, a regular expression, a choice, a grammar. It ends when nothing
        can follow; where the grammar accepts what there is, the ids that end the output are allowed too, and nowhere else.
        Special tokens are no text. Strings of `stop`, ids of stop_token_ids and max_tokens may cut it short of its form;
        min_tokens does not keep it from ending where nothing can follow. For `LLM`, or an `Engine` with grammars.

    With best_of, log-probabilities are those before any of these. Beam search takes none of them, as in vLLM.

    Raises:
      RequestError: a value is out of range or of the wrong type.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    stop: str | tuple[str, ...] | None = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    extra_args: Mapping[str, float] | tuple[tuple[str, float], ...] | None = ()

    def __new__(cls, *args: object, **options: object) -> SamplingParams:
        # A misspelt option must name its neighbour; the generated __init__ would only say "unexpected keyword argument".
        known = _defaults()
        for name in options:
            if name not in known:
                raise RequestError(f"SamplingParams: unknown option {name!r}{nearest(name, list(known))}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            check_int("best_of", self.best_of, 1, MAX_N)
            if self.best_of < self.n:
                raise RequestError(f"best_of: got {self.best_of}, expected at least n, which is {self.n}")
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_int("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "use_beam_search"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}: got {shown(getattr(self, name))}, expected True or False")
        if isinstance(self.stop_token_ids, (str, bytes, bytearray)) or not isinstance(self.stop_token_ids, Seq):
            raise RequestError(f"stop_token_ids: got {shown(self.stop_token_ids)}, expected a list of token ids")
        _check_count("stop_token_ids", self.stop_token_ids, "ids")
        for token_id in self.stop_token_ids:
            check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_texts()
        check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f"early_stopping: got {shown(self.early_stopping)}, expected True, False or 'never'")
        object.__setattr__(self, "extra_args", _checked_extra_args(self.extra_args))
        for name, value in _checked_logit_options(self).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "structured_outputs", checked_structured_outputs(self.structured_outputs))
        sampling = "best_of", "top_p", "top_k", "min_p", "seed", "stop", *_OF_TEXTS, *_LOGIT_OPTIONS, "structured_outputs"
        search = "length_penalty", "early_stopping"
        defaults = _defaults()
        for name in sampling if self.use_beam_search else search:
            if getattr(self, name) != defaults[name]:
                where = "beam search draws no tokens" if self.use_beam_search else "without use_beam_search there are no beams"
                raise RequestError(f"{name}: got {shown(getattr(self, name))}, expected {defaults[name]}: {where}")
        if self.num_drawn > self.n and not self.temperature:
            raise RequestError(f"best_of: got {self.best_of} for n {self.n} at temperature 0, where all outputs are equal")

    def _check_texts(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if isinstance(stop, (bytes, bytearray)) or not isinstance(stop, Seq):
            raise RequestError(f"stop: got {shown(stop)}, expected a string or a list of strings")
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop: got {len(stop)} strings, the limit is {MAX_STOP_STRINGS}")
        for string in stop:
            if not isinstance(string, str) or not string:
                raise RequestError(f"stop: got {shown(string)}, expected strings that are not empty")
            if len(string) > MAX_STOP_LEN:
                raise RequestError(f"stop: got a string of {len(string):,} characters, the limit is {MAX_STOP_LEN}")
        object.__setattr__(self, "stop", tuple(stop))
        if stop and not self.detokenize:
            raise RequestError("stop: strings are found in the text, and detokenize is False: set it, or use stop_token_ids")
        if not isinstance(self.include_stop_str_in_output, bool):
            got = shown(self.include_stop_str_in_output)
            raise RequestError(f"include_stop_str_in_output: got {got}, expected True or False")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, 2**31 - 1)
        kind = self.output_kind
        if isinstance(kind, int) and not isinstance(kind, bool) and kind in [one.value for one in RequestOutputKind]:
            kind = RequestOutputKind(kind)  # as a recording has it
        if not isinstance(kind, RequestOutputKind):
            raise RequestError(f"output_kind: got {shown(kind)}, expected a RequestOutputKind")
        object.__setattr__(self, "output_kind", kind)

    @property
    def num_drawn(self) -> int:
        """Outputs that are generated, `n` of which are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_ranked(self) -> bool:
        """Whether it takes the end of all outputs to know which of them are returned, and in which order."""
        return self.num_drawn > 1 and self.best_of is not None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probability of each new token is wanted, be it for their sum alone."""
        return self.best_of is not None or self.logprobs is not None

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept: (token id, bias)."""
        return self.logit_bias  # type: ignore[return-value]

    @property
    def extra_numbers(self) -> dict[str, float]:
        """`extra_args` by name."""
        return dict(self.extra_args or ())

    @functools.cached_property
    def has_penalties(self) -> bool:
        """Whether it matters which tokens have been."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @functools.cached_property
    def changes_logits(self) -> bool:
        """Whether any logit is changed before a token is chosen."""
        named = self.biases, self.bad_words_token_ids, self.min_tokens
        return self.has_penalties or self.allowed_token_ids is not None or any(named)


@functools.cache
def _defaults() -> dict[str, Any]:
    """What each option of SamplingParams is where it is not given."""
    return {field.name: field.default for field in fields(SamplingParams)}


_LOGIT_OPTIONS = (
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens"),
    *("logit_bias", "allowed_token_ids", "bad_words", "bad_words_token_ids"),
)


def _checked_logit_options(params: SamplingParams) -> dict[str, object]:
    """Those of the options that change logits that are lists, as tuples: a request never changes once it is checked."""
    check_number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    check_number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    # Both bounds keep every product with a finite logit finite.
    check_number("repetition_penalty", params.repetition_penalty, 1e-3, 1e3)
    check_int("min_tokens", params.min_tokens, 0, 2**31 - 1)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(f"min_tokens: got {params.min_tokens}, expected at most max_tokens, which is {params.max_tokens}")

    bias: object = () if params.logit_bias is None else params.logit_bias  # None is vLLM's way to say nothing
    pairs = tuple(bias.items() if isinstance(bias, Mapping) else _listed("logit_bias", bias, "a dict of token ids and numbers"))
    _check_count("logit_bias", pairs, "token ids")
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise RequestError(f"logit_bias: got {shown(pair)}, expected a token id and a number")
        check_int("logit_bias", pair[0], 0, 2**31 - 1)
        check_number("logit_bias", pair[1], -100.0, 100.0)
    if len(dict(pairs)) < len(pairs):
        raise RequestError("logit_bias: a token id is in it twice")

    allowed = params.allowed_token_ids
    if allowed is not None:
        allowed = _checked_ids("allowed_token_ids", allowed)
        if not allowed:
            raise RequestError("allowed_token_ids: got an empty list, expected at least one token id, or None for all")

    words = _listed("bad_words", () if params.bad_words is None else params.bad_words, "a list of words")
    _check_count("bad_words", words, "words")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise RequestError(f"bad_words: got {shown(word)}, expected a word")
        if len(word) > MAX_STOP_LEN:
            raise RequestError(f"bad_words: got a word of {len(word):,} characters, the limit is {MAX_STOP_LEN}")
    several = _listed("bad_words_token_ids", params.bad_words_token_ids)
    _check_count("bad_words_token_ids", several, "words")
    ids = tuple(_checked_ids("bad_words_token_ids", one) for one in several)
    for one in ids:
        if not 1 <= len(one) <= MAX_BAD_WORD_LEN:
            raise RequestError(f"bad_words_token_ids: got a word of {len(one)} tokens, expected 1 to {MAX_BAD_WORD_LEN}")
    return {"logit_bias": pairs, "allowed_token_ids": allowed, "bad_words": words, "bad_words_token_ids": ids}


def _check_count(name: str, found: Seq[object], what: str) -> None:
    """Refuse what no step has room for before it is looked through."""
    if len(found) > MAX_RULES:
        raise RequestError(f"{name}: got {len(found):,} {what}, the limit is {MAX_RULES:,}")


def _checked_extra_args(given: object) -> tuple[tuple[str, float], ...]:
    """As pairs: a request never changes once it is checked."""
    expected = "a dict of names and numbers"
    pairs = given.items() if isinstance(given, Mapping) else _listed("extra_args", () if given is None else given, expected)
    checked = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise RequestError(f"extra_args: got {shown(pair)}, expected a name and a number")
        check_number(f"extra_args[{shown(pair[0], 24)}]", pair[1], -MAX_EXTRA, MAX_EXTRA)
        checked.append(pair)
    if len(dict(checked)) < len(checked):
        raise RequestError("extra_args: a name is in it twice")
    return tuple(checked)


def _listed(name: str, value: object, expected: str = "a list of lists of token ids") -> tuple:
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Seq):
        raise RequestError(f"{name}: got {shown(value)}, expected {expected}")
    return tuple(value)


def _checked_ids(name: str, value: object) -> tuple[int, ...]:
    token_ids = _listed(name, value, "a list of token ids")
    for token_id in token_ids:
        check_int(name, token_id, 0, 2**31 - 1)
    return token_ids


def _check_logit_rules(params: SamplingParams, vocab_size: int, eos_token_ids: Seq[int]) -> None:
    """Refuse ids that the model does not have, more of them than a step has room for, and what leaves no token to choose."""
    if params.bad_words and not params.bad_words_token_ids:
        raise RequestError("bad_words: this engine takes no text; give bad_words_token_ids")
    named = {
        "logit_bias": [token_id for token_id, _ in params.biases],
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words_token_ids": [token_id for word in params.bad_words_token_ids for token_id in word],
    }
    for name, token_ids in named.items():
        if token_ids and max(token_ids) >= vocab_size:
            raise RequestError(f"{name}: got {max(token_ids)}, expected token ids in [0, {vocab_size - 1}]")
    ends = {*params.stop_token_ids, *eos_token_ids} if params.min_tokens else set()
    num_rules = len(params.biases) + len(params.bad_words_token_ids) + len(ends)
    if num_rules > MAX_RULES:
        what = "ids of logit_bias, words of bad_words and, with min_tokens, ids that end the output"
        raise RequestError(f"logit_bias: got {num_rules:,} {what}, the limit is {MAX_RULES:,}")
    never = ends | {word[0] for word in params.bad_words_token_ids if len(word) == 1}
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if never and all(token_id in never for token_id in allowed):  # the first that is not ends it
        raise RequestError("allowed_token_ids: bad_words and min_tokens leave no token to choose")


@dataclass(frozen=True)
class Request:
    """One prompt, checked against the model: every field has its final value, nothing is None that the engine must know.

    Built by `Request.checked` alone, so that the scheduler and the step never meet a bad value.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int  # 64 unsigned bits; with a token's position it is the whole state of the sampler
    max_len: int  # tokens of prompt and output together at which the sequence ends
    stop_ids: frozenset[int]
    arrival_s: float
    cache_salt: str | None = None  # requests share cached prefixes only within one salt
    priority: int = 0  # lower is earlier
    tenant: str = ""  # whose it is, for policies that share between tenants
    eos_token_ids: tuple[int, ...] = ()  # the model's; with min_tokens they are not chosen early, even where they end nothing

    @classmethod
    def checked(
        cls,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        vocab_size: int,
        max_model_len: int,
        max_pool_len: int,
        eos_token_ids: Seq[int] = (),
        default_seed: int = 0,
        arrival_s: float = 0.0,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Request:
        """Check a prompt and its parameters against the model's and the pool's limits.

        Args:
          max_model_len: in tokens, prompt and output together.
          max_pool_len: tokens that fit in the whole page pool, were this sequence alone in it.

        Raises:
          RequestError: with the field, the value and the limit; no page has been taken.
        """
        if not isinstance(request_id, str) or not request_id or not request_id.isprintable():
            raise RequestError(f"request_id: got {shown(request_id)}, expected a non-empty string of printable characters")
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise RequestError(f"cache_salt: got {shown(cache_salt)}, expected a non-empty string")
        check_int("priority", priority, -(2**63), 2**63 - 1)
        if not isinstance(tenant, str):
            raise RequestError(f"tenant: got {shown(tenant)}, expected a string")
        if isinstance(prompt_token_ids, (str, bytes, bytearray)) or not isinstance(prompt_token_ids, Seq):
            raise RequestError(f"prompt_token_ids: got {type(prompt_token_ids).__name__}, expected a list of token ids")
        if not prompt_token_ids:
            raise RequestError("prompt is empty: at least one token is needed")
        # Of plain numbers the least and the greatest say it all; only where they refuse is it looked for which it was.
        are_plain = set(map(type, prompt_token_ids)) == {int} and 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size
        for token_id in () if are_plain else prompt_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise RequestError(f"prompt_token_ids: got {shown(token_id)}, expected token ids in [0, {vocab_size - 1}]")
        for token_id in params.stop_token_ids:
            if token_id >= vocab_size:
                raise RequestError(f"stop_token_ids: got {token_id}, expected token ids in [0, {vocab_size - 1}]")
        if params.changes_logits or params.bad_words:
            _check_logit_rules(params, vocab_size, eos_token_ids)
        num_prompt = len(prompt_token_ids)
        # One place must be left for the first new token.
        if num_prompt >= max_model_len:
            limit = f"{max_model_len - 1:,} (max_model_len {max_model_len:,} less one new token)"
            raise RequestError(f"prompt has {num_prompt:,} tokens, the limit is {limit}")
        if num_prompt > max_pool_len:
            limit = f"{max_pool_len:,} (raise num_gpu_blocks_override or kv_cache_memory_bytes)"
            raise RequestError(f"prompt has {num_prompt:,} tokens, the whole page pool holds {limit}")
        max_new = params.max_tokens if params.max_tokens is not None else max_model_len
        # The last token is sampled but never written to a page, so the pool's limit is one token further.
        max_len = min(num_prompt + max_new, max_model_len, max_pool_len + 1)
        return cls(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            seed=(params.seed if params.seed is not None else default_seed) % 2**64,
            max_len=max_len,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids)),
            arrival_s=arrival_s,
            cache_salt=cache_salt,
            priority=priority,
            tenant=tenant,
            eos_token_ids=tuple(eos_token_ids),
        )

    def beam_group(self) -> BeamGroup | None:
        """A search of this request that has not begun; None when it asks for none."""
        params = self.params
        if not params.use_beam_search:
            return None
        options = {"length_penalty": params.length_penalty, "early_stopping": params.early_stopping}
        return BeamGroup(params.n, self.max_len - len(self.prompt_token_ids), self.stop_ids, **options)


class Drawing(NamedTuple):
    """How the tokens of a sequence are drawn, as a row of the step has it. The defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seeds: tuple[int, int] = (0, 0)  # high and low half
    beam_temperature: float = 0.0  # what divides the logits of a beam; 1 where the likeliest are wanted
    wants_logprobs: bool = False


@dataclass(eq=False)
class Sequence:
    """One output of a request with its tokens and pages, owned by the scheduler; or one beam of it, an output to be.

    Invariant: 0 <= num_computed <= num_tokens; the keys and values of tokens[:num_computed] are in `pages`, in order, once the
    steps in flight have run. The first `num_behind` pages are 0, the null page: no layer looks back to them any more.
    A sequence is decoding exactly when one token is left to compute and it has output; nothing else records its phase. A beam
    whose tokens are all computed has `candidates` and waits for the other beams of its group.
    """

    request: Request
    index: int = 0  # which of the request's outputs
    num_forks: int = 0  # outputs to be forked from it when all of the prompt but the last token is computed
    group: BeamGroup | None = None  # of which it is a beam
    candidates: Candidates = ()
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0  # 1 while its next token is sampled by a step in flight: the device has it, `tokens` does not
    is_drafted: bool = False  # a step in flight has drafts of it: how many tokens that makes, nobody knows
    num_behind: int = 0  # its first pages that were given back because they are behind every layer's window
    num_recorded: int = 0  # its first pages that the prefix cache has been told of
    num_cached_tokens: int = 0  # tokens that the prefix cache had when the sequence was first admitted
    page_keys: list[bytes] = field(default_factory=list)  # of its first full pages; see host/prefix_cache.py
    num_preemptions: int = 0
    number: int = 0  # of its request in order of arrival
    rank: tuple = ()  # its place among those that wait and among those that run; see host/waiting.py
    finish_reason: FinishReason | None = None

    @classmethod
    def first(cls, request: Request, number: int = 0) -> Sequence:
        """The sequence that computes a request's prompt, and that its further outputs are forked from."""
        group, tokens = request.beam_group(), list(request.prompt_token_ids)
        return cls(request, num_forks=0 if group else request.params.num_drawn - 1, group=group, tokens=tokens, number=number)

    def fork(self, index: int) -> Sequence:
        """A sequence of the same tokens that has no pages yet and so has computed nothing."""
        tokens, page_keys = list(self.tokens), list(self.page_keys)
        fork = replace(
            self,
            **{"index": index, "num_forks": 0, "tokens": tokens, "page_keys": page_keys},
            **{"pages": [], "num_computed": 0, "num_behind": 0, "num_recorded": 0},
        )
        fork.rank = (*self.rank[:-1], index)
        return fork

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether what it computes of the prompt is wanted with log-probabilities: the first output has them for all."""
        is_wanted = self.request.params.prompt_logprobs is not None and not self.index
        return is_wanted and len(self.tokens) == self.num_prompt and not self.num_pending

    @property
    def owned_pages(self) -> list[int]:
        """`pages` without those that were given back."""
        return self.pages[self.num_behind :] if self.num_behind else self.pages

    @property
    def num_to_come(self) -> int:
        """Sequences that will be forked from it: rows and pages are kept for them."""
        return self.num_forks + (self.group.num_unborn if self.group is not None else 0)

    @property
    def num_own(self) -> int:
        """Its last tokens, which those forks do not share: the prompt's last, or from where the beams part that it stands for."""
        if not self.num_forks:
            return 0
        return 1 if self.group is None else len(self.group.running[0].token_ids) - self.group.num_common

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, the pending one among them."""
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are not yet in a page; at least 1 until the sequence ends, but for a beam that waits."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def num_to_compute(self) -> int:
        """Those of them that can be computed now: the last token of a prompt with forks waits for them, to be each one's own."""
        return self.num_uncomputed - self.num_own

    @property
    def seed(self) -> int:
        """64 unsigned bits, another for each of the request's outputs."""
        return (self.request.seed + self.index) % 2**64

    @functools.cached_property
    def drawing(self) -> Drawing:
        """How its tokens are drawn, in every step."""
        params, halves = self.request.params, divmod(self.seed, 2**32)
        if params.use_beam_search:  # it draws no token, and as for sampling 0 leaves the logits as they are
            return Drawing(beam_temperature=params.temperature or 1.0, wants_logprobs=params.wants_logprobs)
        numbers = params.temperature, params.top_k, params.top_p, params.min_p, halves
        return Drawing(*numbers, 1.0 if params.logprobs else 0.0, params.wants_logprobs)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.num_prompt :]


class Likelihood(NamedTuple):
    """How likely the model alone finds a token: no temperature, nothing cut."""

    logprob: float
    rank: int  # 1 is the likeliest; of equal ones all have the last one's
    likeliest: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first, as many as are wanted


class TokenEvent(NamedTuple):
    """One new token of one output of a request, or its end. `token_id` is None when it ends without a new one (abort, error).

    Of a beam search there is one event for each output, when all of them have ended: the best has index 0. With `best_of` there
    are those of all outputs drawn: to rank them is left to whoever gathers their tokens.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop id that ended it, as in vLLM; None for the model's own end-of-sequence id
    num_cached_tokens: int = 0  # tokens of the prompt that the prefix cache had
    index: int = 0  # which of the request's outputs
    token_ids: tuple[int, ...] = ()  # of a beam, all of its tokens
    cumulative_logprob: float | None = None  # of a beam, the sum over its tokens
    likelihood: Likelihood | None = None  # of `token_id`, where the request wants it
    prompt_likelihoods: tuple[Likelihood, ...] = ()  # of the prompt's tokens but the first; with output 0's first token
