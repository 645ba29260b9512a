"""The prefix cache: which pages hold which tokens after which, so that equal beginnings of prompts are computed once.

Knows tokens and page numbers. Refuses to know owners and memory: the page pool says which pages nobody owns and evicts them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Seq

from jaxpaged.host.request import Sequence


class PrefixCache:
    """Full pages by what they hold. A page's key is a digest of its tokens and of the key of the page before it.

    Invariants: a page has at most one key and a key at most one page; a page in here is never written again, because a sequence
    writes only to places that it has not computed. The key nominates a page and its token ids decide.
    """

    def __init__(self, page_size: int, context: str = ""):
        """`context` is what else keys and values depend on: the model, its adapters, the dtype."""
        self.page_size = page_size
        self._context = context
        self._pages: dict[bytes, int] = {}
        self._held: dict[int, tuple[bytes, array]] = {}  # page -> its key and its tokens
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_evictions = 0

    def __contains__(self, page: int) -> bool:
        """Whether this page holds a known prefix."""
        return page in self._held

    def __len__(self) -> int:
        """Pages that hold a known prefix, owned or not."""
        return len(self._held)

    def match(self, sequence: Sequence) -> list[int]:
        """The pages of the longest known prefix of a sequence that leaves at least its last token to compute."""
        pages = []
        for index in range((len(sequence.tokens) - 1) // self.page_size):
            key, tokens = self._entry(sequence, index)
            page = self._pages.get(key)
            if page is None or self._held[page][1] != tokens:
                break
            pages.append(page)
        return pages

    def record(self, sequence: Sequence) -> None:
        """Take in the full pages that a sequence has computed since the last call, unless another page holds the same."""
        for index in range(sequence.num_recorded, sequence.num_computed // self.page_size):
            key, tokens = self._entry(sequence, index)
            if key not in self._pages:
                page = sequence.pages[index]
                self._pages[key] = page
                self._held[page] = key, tokens
        sequence.num_recorded = sequence.num_computed // self.page_size

    def forget(self, page: int) -> None:
        """The page is about to be handed out and written."""
        key, _ = self._held.pop(page)
        del self._pages[key]
        self.num_evictions += 1

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self._held.clear()

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Key of a sequence's page; what was computed once stays with the sequence, whose tokens only grow."""
        return self._entry(sequence, index)[0]

    def _entry(self, sequence: Sequence, index: int) -> tuple[bytes, array]:
        """The same with the page's tokens, of which a new key was just made."""
        keys, tokens = sequence.page_keys, None
        while len(keys) <= index:
            parent = keys[-1] if keys else self._root(sequence.request.cache_salt)
            tokens = self._tokens(sequence.tokens, len(keys))
            keys.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return keys[index], tokens if tokens is not None else self._tokens(sequence.tokens, index)

    def _root(self, salt: str | None) -> bytes:
        """The key before the first page: requests of different salts share nothing."""
        return hashlib.blake2b(repr((self._context, salt)).encode(), digest_size=16).digest()

    def _tokens(self, tokens: Seq[int], index: int) -> array:
        return array("q", tokens[index * self.page_size : (index + 1) * self.page_size])

    def check(self) -> None:
        """Raise RuntimeError unless keys and pages are one to one."""
        if {page: key for key, page in self._pages.items()} != {page: key for page, (key, _) in self._held.items()}:
            raise RuntimeError("the prefix cache's keys and pages disagree")
        if any(len(tokens) != self.page_size for _, tokens in self._held.values()):
            raise RuntimeError("the prefix cache knows a page that is not full")
