"""Grammars are tried out where they may be killed, kept within limits, and what harms that process harms nobody else."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import text_model

from jaxpaged.bench.forms import form, hostile
from jaxpaged.demo import MODEL_DIR
from jaxpaged.host.request import RequestError
from jaxpaged.host.structured import GrammarError, StructuredOutputsParams
from jaxpaged.structured.grammars import Grammars
from jaxpaged.structured.limits import Limits

TOKENIZER = Path(MODEL_DIR) / "tokenizer.json"
# Ambiguous beyond measure, and no library's limit sees it coming.
AMBIGUOUS, LESS_SO = (StructuredOutputsParams(grammar='start: x\nx: "a"' + ' | "a" x x' * count) for count in (900, 30))


def new(limits: Limits | None = None) -> Grammars:
    """Grammars of the bundled model."""
    return Grammars(TOKENIZER.read_text, limits)


@pytest.fixture(scope="module")
def grammars():
    found = new()
    yield found
    found.close()


def test_every_kind_is_compiled(grammars: Grammars) -> None:
    tag = '{"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f"]}'
    given = [
        ({"json": {"type": "integer", "minimum": 3}}, "41", "x"),
        ({"json_object": True}, '{"a": [1]}', "[1]"),
        ({"regex": "a|bc"}, "bc", "ab"),
        ({"choice": ['say "no"', "\n\\d", "日本 😀", "<|im_end|>"]}, "日本 😀", "d"),
        ({"choice": ["<|im_end|>", "b"]}, "<|im_end|>", "c"),
        ({"grammar": 'start: "a" start "b" | "c"'}, "aacbb", "ab"),
        ({"grammar": 'root ::= "x" [0-9]+ root | "y"'}, "x12y", "x"),
        ({"structural_tag": tag}, "and <f>12</f> so", "<f>x</f>"),
        ({"json": {"type": "array"}, "disable_any_whitespace": True}, "[1,2]", "[1, 2]"),
        ({"json": {"type": "array"}, "whitespace_pattern": "_"}, "[_1,2]", "[ 1]"),
        ({"json": {"type": "array"}}, "[" + " " * 32 + "]", "[" + " " * 33 + "]"),
    ]
    for options, good, bad in given:
        prototype = grammars.find(StructuredOutputsParams(**options)).prototype
        for text, is_good in ((good, True), (bad, False)):
            matcher = prototype.deep_copy()
            # A special token's spelling is text here as everywhere in an output.
            ids = grammars.vocabulary.tokenize_bytes(text.encode())
            is_whole = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            assert is_whole == is_good, (options, text)


def test_properties_nobody_has_named(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    ids = grammars.vocabulary.tokenize_str('{"a": 1, "b": 2}')
    for closed in (False, True):
        params = StructuredOutputsParams(json=schema, disable_additional_properties=closed)
        assert (grammars.find(params).prototype.deep_copy().try_consume_tokens(ids) == len(ids)) != closed


def test_one_that_is_kept_is_not_tried_again() -> None:
    grammars = new(Limits(num_cached=2))
    params = [StructuredOutputsParams(regex=one) for one in ("a", "b", "c")]
    first = grammars.find(params[0])
    process = grammars._probe
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # whoever asks it now waits
    assert grammars.find(StructuredOutputsParams(regex="a")) is first
    os.kill(process.pid, signal.SIGCONT)
    grammars.find(params[1])
    grammars.find(params[0])
    grammars.find(params[2])  # the second was used longest ago
    assert [key for key in grammars._kept] == [params[0].key, params[2].key]
    grammars.close()
    assert grammars.find(params[2]) is not None  # what is kept needs no process
    assert grammars._probe is None


def test_bytes_are_counted() -> None:
    grammars = new(Limits(cached_bytes=5000))
    texts = [StructuredOutputsParams(choice=[f"{number}" + "x" * 2000]) for number in range(4)]
    for params in texts:
        grammars.find(params)
    assert 1 <= len(grammars._kept) < len(texts)
    assert grammars._num_bytes == sum(one.num_bytes for one in grammars._kept.values())
    grammars.close()


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(wall_s=0.3, step_s=60, row_items=10**6, step_items=10**9), "compiling it takes more than 0.3 s"),
        (Limits(step_s=0.02, row_items=10**6, step_items=10**9), "a token of it takes more than 0.02 s"),
        (Limits(row_items=100, step_s=60), "Current row has"),
    ],
    ids=["time", "step", "library"],
)
def test_one_that_takes_too_long_dies_alone(limits: Limits, problem: str) -> None:
    grammars = new(limits)
    grammars.find(StructuredOutputsParams(regex="a"))
    process = grammars._probe
    started = time.monotonic()
    with pytest.raises(GrammarError, match=f"structured_outputs.grammar: grammar_too_complex: .*{problem}") as caught:
        grammars.find(LESS_SO if limits.row_items < 1000 else AMBIGUOUS)
    assert caught.value.code == "grammar_too_complex"
    assert time.monotonic() - started < 10
    assert grammars.find(StructuredOutputsParams(regex="b")).prototype is not None
    assert grammars._probe is process  # only its child has died
    grammars.close()


def test_one_that_takes_too_much_memory_dies_alone() -> None:
    grammars = new(Limits(memory_bytes=1 << 18))
    with pytest.raises(GrammarError, match=r"takes more than 0\.25 MiB"):
        grammars.find(StructuredOutputsParams(json={"enum": [f"value number {number}" for number in range(700)]}))
    assert grammars.find(StructuredOutputsParams(regex="b")).prototype is not None
    grammars.close()


def test_the_process_may_die_at_any_time() -> None:
    grammars = new()
    grammars.find(StructuredOutputsParams(regex="a"))
    for round_ in range(2):
        grammars._probe.kill()  # type: ignore[union-attr]
        grammars._probe.wait()  # type: ignore[union-attr]
        assert grammars.find(StructuredOutputsParams(regex=f"b{round_}")) is not None
    os.kill(grammars._probe.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    killer = threading.Timer(0.3, grammars._probe.kill)  # type: ignore[union-attr]
    killer.start()
    with pytest.raises(GrammarError, match="ends the process"):
        grammars.find(StructuredOutputsParams(regex="c"))
    assert grammars.find(StructuredOutputsParams(regex="c")) is not None
    grammars.close()


def test_nothing_is_left_behind() -> None:
    gc.collect()
    before = set(psutil.Process().children(recursive=True))
    grammars, other = new(), new()
    for one in (grammars, other):
        one.find(StructuredOutputsParams(regex="a"))
        with pytest.raises(GrammarError):
            one.find(AMBIGUOUS)
    assert len(set(psutil.Process().children(recursive=True)) - before) == 2
    grammars.close()
    del other, one
    gc.collect()
    deadline = time.monotonic() + 5
    while set(psutil.Process().children(recursive=True)) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(psutil.Process().children(recursive=True)) - before


def test_threads_share_them(grammars: Grammars) -> None:
    params = [StructuredOutputsParams(regex=f"[a-z]{{{number}}}") for number in range(1, 5)]
    found: dict[int, list] = {}

    def ask(number: int) -> None:
        found[number] = [grammars.find(one) for one in random.Random(number).sample(params, 4)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({grammar for one in found.values() for grammar in one}) == 4


@pytest.mark.parametrize("kind", text_model.KINDS)
def test_kinds_of_tokenizers(kind: str) -> None:
    tokenizer = text_model.KINDS[kind]()
    grammars = Grammars(tokenizer.to_str)
    matcher = grammars.find(StructuredOutputsParams(choice=["lo é"])).prototype.deep_copy()
    ids = grammars.vocabulary.tokenize_str("lo é")
    assert ids and grammars.vocabulary.decode_str(ids) == "lo é"
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_stopped()
    assert grammars.vocabulary.eos_token == tokenizer.get_vocab_size()
    grammars.close()


@pytest.mark.parametrize("text", ["{}", "", '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'])
def test_a_tokenizer_of_no_known_kind(text: str) -> None:
    grammars = Grammars(lambda: text)
    with pytest.raises(RequestError, match="structured_outputs: not with this model's tokenizer"):
        grammars.find(StructuredOutputsParams(regex="a"))
    assert grammars._probe is None


def test_hostile_grammars(grammars: Grammars) -> None:
    num_refused = 0
    for options, _ in zip(hostile(random.Random(0)), range(102), strict=False):
        try:
            grammars.find(StructuredOutputsParams(**options))
        except RequestError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            num_refused += 1
    assert num_refused > 70
    for _ in range(5):
        assert grammars.find(form(random.Random(1))) is not None
