"""The prefix cache: which pages hold which tokens after which, so that equal beginnings of prompts are computed once.

Knows tokens and page numbers. Refuses to know owners and memory: the page pool says which pages nobody owns and evicts them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxpaged.host.request import Sequence


class Held(NamedTuple):
    """What a page holds: its tokens, which are the last of the first `num_tokens` tokens of a prompt."""

    key: bytes
    tokens: array
    num_tokens: int


class PrefixCache:
    """Full pages by what they hold. A page's key is a digest of its tokens and of the key of the page before it.

    Invariants: a page has at most one key and a key at most one page; a page in here is never written again, because a sequence
    writes only to places that it has not computed. The key nominates a page and its token ids decide.
    """

    def __init__(self, page_size: int, context: str = "", *, is_private: bool = False):
        """`context` is what else keys and values depend on: the model, its adapters, the dtype.

        Args:
          is_private: requests share nothing with each other; what one has computed is known to itself alone, until it is over.
        """
        self.page_size, self.is_private = page_size, is_private
        self.context = context
        self._pages: dict[bytes, int] = {}
        self._held: dict[int, Held] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_evictions = 0

    def __contains__(self, page: int) -> bool:
        """Whether this page holds a known prefix."""
        return page in self._held

    def __len__(self) -> int:
        """Pages that hold a known prefix, owned or not."""
        return len(self._held)

    def known_pages(self) -> list[int]:
        """Pages that hold a known prefix, in no order that means anything."""
        return list(self._held)

    def match(self, sequence: Sequence) -> list[int]:
        """The pages of the longest known prefix of a sequence that leaves at least its last token to compute."""
        pages = []
        for index in range(self.num_shareable(sequence)):
            key, tokens = self._entry(sequence, index)
            page = self._pages.get(key)
            if page is None or self._held[page][:2] != (key, tokens):
                break
            pages.append(page)
        return pages

    def num_shareable(self, sequence: Sequence) -> int:
        """Full pages that leave at least the last token to compute; none where log-probabilities of the prompt are wanted."""
        return 0 if sequence.needs_prompt_logprobs else (len(sequence.tokens) - 1) // self.page_size

    def find(self, held: Held) -> int | None:
        """The page that holds this."""
        page = self._pages.get(held.key)
        return page if page is not None and self._held[page][:2] == held[:2] else None

    def wanted(self, sequence: Sequence, index: int) -> Held:
        """What a sequence's page holds once it is computed."""
        return Held(*self._entry(sequence, index), (index + 1) * self.page_size)

    def page_of(self, key: bytes) -> int | None:
        """The page of this key, whatever it holds."""
        return self._pages.get(key)

    def record(self, sequence: Sequence) -> None:
        """Take in the full pages that a sequence has computed since the last call, unless another page holds the same."""
        for index in range(sequence.num_recorded, sequence.num_computed // self.page_size):
            self.register(sequence.pages[index], self.wanted(sequence, index))
        sequence.num_recorded = sequence.num_computed // self.page_size

    def register(self, page: int, held: Held) -> None:
        """A page holds this from here on, unless another does."""
        if held.key not in self._pages:
            self._pages[held.key] = page
            self._held[page] = held

    def forget(self, page: int) -> Held:
        """The page is about to be handed out and written, or nobody will ask for it any more. What it held."""
        held = self._held.pop(page)
        del self._pages[held.key]
        return held

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self._held.clear()

    def _entry(self, sequence: Sequence, index: int) -> tuple[bytes, array]:
        """Key and tokens of a sequence's page. A key that was made once stays with the sequence, whose tokens only grow."""
        keys, tokens = sequence.page_keys, None
        while len(keys) <= index:
            parent = keys[-1] if keys else self._root(sequence)
            tokens = self._tokens(sequence.tokens, len(keys))
            keys.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return keys[index], tokens if tokens is not None else self._tokens(sequence.tokens, index)

    def _root(self, sequence: Sequence) -> bytes:
        """The key before the first page: requests of different salts share nothing."""
        salt = sequence.request.cache_salt
        context = (self.context, salt, sequence.number) if self.is_private else (self.context, salt)
        return hashlib.blake2b(repr(context).encode(), digest_size=16).digest()

    def _tokens(self, tokens: Seq[int], index: int) -> array:
        return array("q", tokens[index * self.page_size : (index + 1) * self.page_size])

    def check(self) -> None:
        """Raise RuntimeError unless keys and pages are one to one."""
        if {page: key for key, page in self._pages.items()} != {page: held.key for page, held in self._held.items()}:
            raise RuntimeError("the prefix cache's keys and pages disagree")
        if any(len(held.tokens) != self.page_size for held in self._held.values()):
            raise RuntimeError("the prefix cache knows a page that is not full")
