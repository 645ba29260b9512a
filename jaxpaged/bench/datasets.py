"""What a benchmark asks: prompts with the number of tokens that each is to be answered with.

Knows datasets by vLLM's names and options. Refuses to know who answers: a server, or an engine in this process.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxpaged.config import ConfigError, nearest
from jaxpaged.simulate import lengths

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
Prompt = str | tuple[int, ...]
_ROUNDS = 12  # in which a text gets the length that was asked for
# As vLLM's `bench` takes from ShareGPT: what is shorter or longer says little about serving.
_MIN_TOKENS, _MAX_PROMPT_TOKENS, _MAX_TOTAL_TOKENS = 4, 1024, 2048


@dataclass(frozen=True)
class Ask:
    """One request, of a text or of token ids. `num_prompt` is counted here; `num_output` is what it asks for."""

    prompt: Prompt
    num_prompt: int
    num_output: int


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What is asked, under vLLM's names.

    Args:
      dataset_name: random, sharegpt, custom or prefix_repetition.
      dataset_path: of sharegpt the published JSON file, without which lengths are drawn that are like its own (log-normal, means
        of 161 and 338 tokens as in the PagedAttention paper); of custom JSONL with a prompt, perhaps output_tokens.
      num_prompts: requests.
      random_input_len: tokens of a random prompt, behind its prefix.
      random_output_len: tokens of its answer.
      random_range_ratio: lengths are drawn from (1 - ratio) to (1 + ratio) times these, each as likely.
      random_input_len_range: N,N: random prompts are from so many to so many tokens long, as often 16 to 32 as 256 to 512
        (log-uniform), instead of random_input_len; None is off.
      random_output_len_range: N,N: likewise of the answers, instead of random_output_len; None is off.
      random_prefix_len: tokens in front of each random prompt that all of them share.
      custom_output_len: tokens of an answer where the file does not say; -1 takes what the file says and nothing else.
      sharegpt_output_len: tokens of every answer; None is as long as the one in the file.
      prefix_repetition_prefix_len: tokens that several prompts begin with.
      prefix_repetition_suffix_len: tokens behind them that no other prompt has.
      prefix_repetition_num_prefixes: different beginnings.
      prefix_repetition_output_len: tokens of an answer.
      seed: of everything that is drawn.

    Raises:
      ConfigError: a value out of range.
    """

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 1000
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_input_len_range: tuple[int, ...] | None = None
    random_output_len_range: tuple[int, ...] | None = None
    random_prefix_len: int = 0
    custom_output_len: int = 256
    sharegpt_output_len: int | None = None
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            hint = nearest(self.dataset_name, DATASETS)
            raise ConfigError(f"dataset_name: got {self.dataset_name!r}{hint} (of: {', '.join(DATASETS)})")
        lowest = {"random_prefix_len": 0, "prefix_repetition_prefix_len": 0, "custom_output_len": -1, "seed": 0}
        for name in ("num_prompts", "random_input_len", "random_output_len", "sharegpt_output_len", *lowest):
            _check_whole(name, getattr(self, name), lowest.get(name, 1))
        for name in ("suffix_len", "num_prefixes", "output_len"):
            _check_whole(f"prefix_repetition_{name}", getattr(self, f"prefix_repetition_{name}"), 1)
        if not 0 <= self.random_range_ratio < 1:
            raise ConfigError(f"random_range_ratio: got {self.random_range_ratio:g}, expected a number in [0, 1)")
        for name in ("random_input_len_range", "random_output_len_range"):
            found = getattr(self, name)
            if found is not None and not (len(found) == 2 and 1 <= found[0] <= found[1]):
                raise ConfigError(f"{name}: got {','.join(map(str, found))}, expected two whole numbers N,N with 1 <= N <= N")
        if self.custom_output_len == 0:
            raise ConfigError("custom_output_len: got 0, expected a whole number of at least 1, or -1")
        if self.dataset_name == "custom" and self.dataset_path is None:
            raise ConfigError("dataset_path: missing, dataset_name custom reads a file")
        if self.dataset_name in ("random", "prefix_repetition") and self.dataset_path is not None:
            raise ConfigError(f"dataset_path: not with dataset_name {self.dataset_name}, which reads none")

    @property
    def needs_tokenizer(self) -> bool:
        """Whether prompts are to have a certain length."""
        return not (self.dataset_name == "custom" and self.custom_output_len > 0)


class Texts(Protocol):
    """Texts of a certain length, and the length of texts."""

    def draw(self, num_tokens: int, rng: random.Random, prefix: Any = "") -> Prompt:
        """A prompt that is about so long, exactly so where that can be had; `prefix` is its beginning, and counts."""
        ...

    def count(self, text: Any) -> int:
        """Tokens, with those that stand before every prompt. Raises ConfigError where texts cannot be read."""
        ...


class Words:
    """Random words of a tokenizer's vocabulary: one token each, so that a text has the length that it should.

    A text of random ids would be cut into other tokens again. Where a vocabulary has no words, ids are drawn after all.
    """

    def __init__(self, tokenizer: Any):
        """`tokenizer`: a `jaxpaged.tokenizer.Tokenizer`."""
        self._tokenizer = tokenizer
        names = tokenizer.backend.get_vocab(with_added_tokens=False)
        self._words = sorted(name[1:] for name in names if name[:1] in ("Ġ", "▁") and name[1:].isascii() and name[1:].isalpha())
        self._ids = sorted(tokenizer.known_ids - tokenizer.special_ids)

    def draw(self, num_tokens: int, rng: random.Random, prefix: str = "") -> str:
        """See `Texts.draw`."""
        before = [prefix] if prefix else []
        wanted = max(1, num_tokens - (self.count(prefix) if prefix else 0))
        if len(self._words) < 16:
            return " ".join([*before, self._tokenizer.decode([rng.choice(self._ids) for _ in range(wanted)])])
        words = [rng.choice(self._words) for _ in range(wanted)]
        for _ in range(_ROUNDS):
            missing = num_tokens - self.count(" ".join(before + words))
            if not missing:
                break
            if missing > 0:
                words += [rng.choice(self._words) for _ in range(missing)]
            else:
                del words[max(1, len(words) + missing) :]
        return " ".join(before + words)

    def count(self, text: str) -> int:
        """See `Texts.count`."""
        return len(self._tokenizer.encode(text))


class Ids:
    """Random token ids, for a model that has no tokenizer."""

    def __init__(self, num_ids: int):
        """Ids from 0 to `num_ids` - 1."""
        self._num_ids = num_ids

    def draw(self, num_tokens: int, rng: random.Random, prefix: Any = "") -> tuple[int, ...]:
        """See `Texts.draw`."""
        before = tuple(prefix)
        return (*before, *(rng.randrange(self._num_ids) for _ in range(max(1, num_tokens - len(before)))))

    def count(self, text: Any) -> int:
        """See `Texts.count`."""
        if isinstance(text, str):
            raise ConfigError("tokenizer: missing, and the dataset is of texts (skip_tokenizer_init is set)")
        return len(text)


def asks(options: DatasetOptions, texts: Texts | None) -> list[Ask]:
    """The requests; the same ones for the same options.

    Args:
      texts: None where `DatasetOptions.needs_tokenizer` is false: then the length of a prompt is told as 0.

    Raises:
      ConfigError: the file cannot be read, or has no request.
    """
    if texts is None:
        if options.needs_tokenizer:
            raise ConfigError(f"tokenizer: missing, dataset_name {options.dataset_name} needs one")
        texts = _Uncounted()
    rng = random.Random(f"prompts {options.seed}")
    makers: dict[str, Callable[[DatasetOptions, Texts, random.Random], Iterator[Ask]]] = {
        "random": _random,
        "sharegpt": _sharegpt_file if options.dataset_path is not None else _sharegpt_lengths,
        "custom": _custom,
        "prefix_repetition": _prefix_repetition,
    }
    found = list(makers[options.dataset_name](options, texts, rng))
    if not found:
        raise ConfigError(f"dataset_path: {options.dataset_path}: there is no request in it")
    return [found[place % len(found)] for place in range(options.num_prompts)]


class _Uncounted:
    def draw(self, num_tokens: int, rng: random.Random, prefix: Any = "") -> str:
        raise ConfigError("tokenizer: missing")

    def count(self, text: Any) -> int:
        return 0


def _random(options: DatasetOptions, texts: Texts, rng: random.Random) -> Iterator[Ask]:
    prefix = texts.draw(options.random_prefix_len, rng) if options.random_prefix_len else ""

    def distribution(mean: int, bounds: tuple[int, ...] | None) -> lengths.Lengths:
        if bounds is not None:
            return lengths.LogUniform(*bounds)
        ratio = options.random_range_ratio
        return lengths.Uniform(max(1, int(mean * (1 - ratio))), max(1, int(mean * (1 + ratio))))

    of_prompts = distribution(options.random_input_len, options.random_input_len_range)
    of_answers = distribution(options.random_output_len, options.random_output_len_range)
    for _ in range(options.num_prompts):
        num_prompt, num_output = of_prompts.draw(rng), of_answers.draw(rng)
        text = texts.draw(options.random_prefix_len + num_prompt, rng, prefix)
        yield Ask(text, texts.count(text), num_output)


def _sharegpt_lengths(options: DatasetOptions, texts: Texts, rng: random.Random) -> Iterator[Ask]:
    """Random words of ShareGPT's lengths; see `jaxpaged.simulate.lengths.DATASETS` for their source."""
    of_prompts, of_answers = lengths.DATASETS["sharegpt"]
    for _ in range(options.num_prompts):
        num_prompt = max(_MIN_TOKENS, min(of_prompts.draw(rng), _MAX_PROMPT_TOKENS))
        num_output = max(_MIN_TOKENS, min(of_answers.draw(rng), _MAX_TOTAL_TOKENS - num_prompt))
        text = texts.draw(num_prompt, rng)
        yield Ask(text, texts.count(text), options.sharegpt_output_len or num_output)


def _sharegpt_file(options: DatasetOptions, texts: Texts, rng: random.Random) -> Iterator[Ask]:
    """The first question of each conversation, answered as long as there."""
    path = options.dataset_path or ""
    try:
        conversations = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"dataset_path: {path}: {_why(error)}") from None
    if not isinstance(conversations, list):
        raise ConfigError(f"dataset_path: {path}: expected a list of conversations")
    turns = [one.get("conversations") for one in conversations if isinstance(one, dict)]
    pairs = [[part.get("value") for part in turn[:2]] for turn in turns if isinstance(turn, list) and len(turn) >= 2]
    rng.shuffle(pairs)
    num_found = 0
    for question, answer in pairs:
        if not isinstance(question, str) or not isinstance(answer, str):
            continue
        num_prompt, num_answer = texts.count(question), texts.count(answer)
        num_output = options.sharegpt_output_len or num_answer
        if min(num_prompt, num_answer) < _MIN_TOKENS or num_prompt > _MAX_PROMPT_TOKENS:
            continue
        if num_prompt + num_output > _MAX_TOTAL_TOKENS:
            continue
        yield Ask(question, num_prompt, num_output)
        num_found += 1
        if num_found == options.num_prompts:
            return


def _custom(options: DatasetOptions, texts: Texts, rng: random.Random) -> Iterator[Ask]:
    path = options.dataset_path or ""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if number > options.num_prompts:
                    return
                if line.strip():
                    yield _custom_ask(json.loads(line), f"{path}:{number}", options, texts)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"dataset_path: {path}: {_why(error)}") from None


def _custom_ask(value: Any, where: str, options: DatasetOptions, texts: Texts) -> Ask:
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"dataset_path: {where}: expected an object with a prompt")
    num_output = value.get("output_tokens", options.custom_output_len)
    if options.custom_output_len > 0 and num_output is None:
        num_output = options.custom_output_len
    _check_whole(f"dataset_path: {where}: output_tokens", num_output, 1)
    return Ask(prompt, texts.count(prompt), num_output)


def _prefix_repetition(options: DatasetOptions, texts: Texts, rng: random.Random) -> Iterator[Ask]:
    """Requests in turn of each of the prefixes, shuffled, as many of one as of another."""
    length, num_prefixes = options.prefix_repetition_prefix_len, options.prefix_repetition_num_prefixes
    prefixes = [texts.draw(length, rng) if length else "" for _ in range(num_prefixes)]
    order = [prefixes[place % len(prefixes)] for place in range(options.num_prompts)]
    rng.shuffle(order)
    for prefix in order:
        text = texts.draw(options.prefix_repetition_prefix_len + options.prefix_repetition_suffix_len, rng, prefix)
        yield Ask(text, texts.count(text), options.prefix_repetition_output_len)


def _check_whole(name: str, value: Any, low: int) -> None:
    if value is None and name == "sharegpt_output_len":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}: got {value!r}, expected a whole number of at least {low}")


def _why(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}"
