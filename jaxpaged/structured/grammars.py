"""Grammars of requests, checked and kept: the process that tries them out, and what has passed, compiled.

Knows forms. Refuses to know sequences: see `jaxpaged.structured.matchers`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpaged import framed
from jaxpaged.host.request import RequestError
from jaxpaged.host.structured import GrammarError, StructuredOutputsParams
from jaxpaged.structured.limits import Limits
from jaxpaged.structured.probe import MAX_REPLY
from jaxpaged.structured.vocabulary import load_vocabulary

if TYPE_CHECKING:
    import llguidance

logger = logging.getLogger("jaxpaged")

_START_S = 60.0  # to import what it needs and to read a tokenizer, on a busy machine
_GRACE_S = 5.0  # beyond the child's own limit of time
_MAIN = "import sys; sys.path[:0] = {path!r}; from jaxpaged.structured.probe import main; main()"


@dataclass(eq=False)
class Grammar:
    """One that has passed. Copies of `prototype` share the states that any of them has met, of which there is a limit."""

    text: str
    num_bytes: int
    compile: Callable[[], llguidance.LLMatcher]
    prototype: llguidance.LLMatcher = field(init=False)

    def __post_init__(self) -> None:
        self.prototype = self.compile()

    def fresh(self, spent: llguidance.LLMatcher) -> llguidance.LLMatcher:
        """A matcher that shares nothing. `spent` is a prototype that nobody more is to have a copy of."""
        if self.prototype is spent:
            self.prototype = self.compile()
        return self.compile()


class Grammars:
    """Compiled grammars of one tokenizer, the latest ones used, in the order of their use. Threads may share it.

    A grammar that is new is tried out in a process of its own, which begins with the first; one that is kept costs a copy.
    """

    def __init__(self, tokenizer_json: Callable[[], str], limits: Limits | None = None):
        """`tokenizer_json`: what `tokenizers.Tokenizer.to_str` gives; asked for once, with the first grammar."""
        self.limits = limits or Limits()
        self._tokenizer_json = tokenizer_json
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._num_bytes = 0
        self._probe: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None  # ends the process, at the latest when this object is no more
        self._lock, self._probing = threading.Lock(), threading.Lock()

    @property
    def vocabulary(self) -> llguidance.LLTokenizer:
        """The tokenizer as llguidance has it. Raises RequestError when it does not know the kind."""
        if self._vocabulary is None:
            try:
                self._vocabulary = load_vocabulary(self._tokenizer_json())
            except Exception as error:
                why = " ".join(str(error).split())[:160]
                raise RequestError(f"structured_outputs: not with this model's tokenizer: {why}") from None
        return self._vocabulary

    def find(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar of these parameters, compiled.

        Raises:
          GrammarError: there is none, or compiling it takes too much.
        """
        with self._lock:
            if params.key in self._kept:
                self._kept.move_to_end(params.key)
                return self._kept[params.key]
        with self._probing:  # one at a time: there are other things to do for the machine
            found = self._kept.get(params.key) or self._try(params)
        self._keep(params.key, found)
        return found

    def _keep(self, key: str, grammar: Grammar) -> None:
        with self._lock:
            if key not in self._kept:
                self._num_bytes += grammar.num_bytes
            self._kept[key] = grammar
            while len(self._kept) > self.limits.num_cached or (
                self._num_bytes > self.limits.cached_bytes and len(self._kept) > 1
            ):
                self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def _compile(self, text: str) -> llguidance.LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self.vocabulary, text, log_level=0, limits=self.limits.of_parser())

    def _try(self, params: StructuredOutputsParams) -> Grammar:
        name = f"structured_outputs.{params.kind}"
        answer = self._ask(params.given)
        if "too_complex" in answer:
            raise GrammarError(f"{name}: grammar_too_complex: {answer['too_complex']}", "grammar_too_complex")
        if "grammar" not in answer:
            raise GrammarError(f"{name}: {answer.get('error')}")
        text = answer["grammar"]
        found = Grammar(text, answer["num_bytes"] + len(text), functools.partial(self._compile, text))
        if found.prototype.is_error():
            raise GrammarError(f"{name}: {' '.join(found.prototype.get_error().split())[:160]}")
        return found

    # --- the process ---

    def _ask(self, given: dict[str, Any]) -> dict[str, Any]:
        """What comes of a grammar in the process that may die of it."""
        probe = self._running_probe()
        try:
            answer = self._answer(probe, given, self.limits.wall_s + _GRACE_S)
        except (OSError, EOFError) as error:
            self._end_probe()
            logger.warning("The process that tries grammars out has died (%s); the next one starts another.", error)
            return {"too_complex": "compiling it ends the process that tries it"}
        return answer

    def _running_probe(self) -> subprocess.Popen[bytes]:
        if self._probe is not None and self._probe.poll() is None:
            return self._probe
        self._end_probe()
        _ = self.vocabulary  # refuses a tokenizer that no process can work with
        path = [str(Path(__file__).parents[2]), *(one for one in sys.path if one)]
        self._probe = probe = framed.start([sys.executable, "-c", _MAIN.format(path=path)])
        self._end = weakref.finalize(self, framed.stop, probe)
        try:
            hello = {"tokenizer": self._tokenizer_json(), "limits": dataclasses.asdict(self.limits)}
            answer = self._answer(probe, hello, _START_S)
        except (OSError, EOFError) as error:
            answer = {"error": str(error)}
        if "error" in answer:
            self._end_probe()
            raise RequestError(f"structured_outputs: the process that tries grammars out does not start: {answer['error']}")
        return probe

    @staticmethod
    def _answer(probe: subprocess.Popen[bytes], question: dict[str, Any], wait_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + wait_s
        framed.send(probe, json.dumps(question).encode(), deadline)
        return json.loads(framed.receive(probe, deadline, MAX_REPLY))

    def _end_probe(self) -> None:
        self._probe = None
        self._end()

    def close(self) -> None:
        """End the process. What is kept stays usable."""
        with self._probing:
            self._end_probe()
