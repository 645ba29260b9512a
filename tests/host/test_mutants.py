"""How strong is the simulation? Each known kind of bug is planted into the source, and the simulation has to fail.

A planted bug is a replacement in the text of one module. When the text is gone the test says so: plant the bug anew, or drop it.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import simulation
from overload import overload, staircase

from jaxpaged.host.policies import POLICIES

BEAMS, REQUEST, _, PREFIX, PLAN, TIERS, PAGES, _, RECALL, WAITING, SEARCHES, SCHEDULER, BATCH = simulation.MODULES
MOST_SCENARIOS = 60  # what a bug may survive


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the source of `module`."""

    name: str
    module: str
    old: str
    new: str


MUTANTS = [
    Mutant("hands out the null page", PAGES, "deque(range(1, num_pages))", "deque(range(num_pages))"),
    Mutant("hands out a page twice", PAGES, "self._free.popleft() for", "self._free[0] for"),
    Mutant("hands out fewer pages than asked", PAGES, "for _ in range(count)]", "for _ in range(max(count - 1, 0))]"),
    Mutant("forgets a freed page", PAGES, "self._free.append(page)", "page != 1 and self._free.append(page)"),
    Mutant("last token takes a place in the pool", REQUEST, "max_pool_len + 1)", "max_pool_len)"),
    Mutant("one token more than the pool holds", REQUEST, "max_pool_len + 1)", "max_pool_len + 2)"),
    Mutant("one token too many", REQUEST, "num_prompt + max_new,", "num_prompt + max_new + 1,"),
    Mutant("refuses a prompt that fits the model", REQUEST, "num_prompt >= max_model_len", "num_prompt >= max_model_len - 1"),
    Mutant("refuses a prompt that fits the pool", REQUEST, "num_prompt > max_pool_len", "num_prompt >= max_pool_len"),
    Mutant("ignores ignore_eos", REQUEST, "if params.ignore_eos else", "if False else"),
    Mutant("forgets the stop ids", REQUEST, "frozenset(params.stop_token_ids) |", "frozenset() |"),
    Mutant(
        "counts computed tokens one short",
        REQUEST,
        "len(self.tokens) + self.num_pending - self.num_computed",
        "len(self.tokens) + self.num_pending - self.num_computed - 1",
    ),
    Mutant(
        "reserves a page too few", SCHEDULER, "-(-num_tokens // self.limits.page_size)", "num_tokens // self.limits.page_size"
    ),
    Mutant(
        "reserves for one token less",
        SCHEDULER,
        "-(-num_tokens // self.limits.page_size)",
        "-(-(num_tokens - 1) // self.limits.page_size)",
    ),
    Mutant("preempted, num_computed is kept", SCHEDULER, "        sequence.num_computed = 0\n", ""),
    Mutant(
        "preempted, a computed token is kept",
        SCHEDULER,
        "sequence.num_computed = 0\n",
        "sequence.num_computed = min(1, sequence.num_computed)\n",
    ),
    Mutant(
        "preempted, pages are kept",
        SCHEDULER,
        "        self._release(sequence, is_kept=is_kept)\n        sequence.num_computed",
        "        sequence.num_computed",
    ),
    Mutant(
        "preempted, output is forgotten",
        SCHEDULER,
        "sequence.num_computed = 0\n",
        "sequence.num_computed = 0; del sequence.tokens[sequence.num_prompt :]\n",
    ),
    Mutant("preempts the oldest", SCHEDULER, "reversed(self.running[index:])", "self.running"),
    Mutant(
        "preempted, goes to the end of the queue",
        SCHEDULER,
        "        self.num_preemptions += is_counted\n",
        "        self.num_preemptions += is_counted\n        sequence.number = self._num_added\n",
    ),
    Mutant(
        "preempts nobody, sits out", SCHEDULER, "                    self._preempt(last)\n", "                    index += 1\n"
    ),
    Mutant("frees pages twice", SCHEDULER, "self.pool.free(sequence.owned_pages, ", "self.pool.free(sequence.owned_pages * 2, "),
    Mutant(
        "frees all pages but the last",
        SCHEDULER,
        "self.pool.free(sequence.owned_pages, ",
        "self.pool.free(sequence.owned_pages[:-1], ",
    ),
    Mutant("released, the page list is kept", SCHEDULER, "        sequence.pages = []\n", ""),
    Mutant(
        "an abort frees nothing",
        SCHEDULER,
        "        self._release(sequence)\n        if",
        "        reason is FinishReason.ABORT or self._release(sequence)\n        if",
    ),
    Mutant(
        "an aborted request stays in the queue", SCHEDULER, "            self.waiting.remove(sequence)\n", "            pass\n"
    ),
    Mutant(
        "an aborted request's step is committed",
        SCHEDULER,
        "            if sequence.finish_reason is not None:  # aborted",
        "            if False:  # aborted",
    ),
    Mutant(
        "max_len is passed by one",
        SCHEDULER,
        "len(sequence.tokens) >= sequence.request.max_len",
        "len(sequence.tokens) > sequence.request.max_len",
    ),
    Mutant(
        "length before stop",
        SCHEDULER,
        "if sequence.tokens[-1] in sequence.request.stop_ids:",
        "if len(sequence.tokens) < sequence.request.max_len and sequence.tokens[-1] in sequence.request.stop_ids:",
    ),
    Mutant(
        "chunk starts a token late",
        PLAN,
        "cls(sequence, sequence.num_computed, num_tokens,",
        "cls(sequence, sequence.num_computed + 1, num_tokens,",
    ),
    Mutant(
        "chunk starts a token early",
        PLAN,
        "cls(sequence, sequence.num_computed, num_tokens,",
        "cls(sequence, max(sequence.num_computed - 1, 0), num_tokens,",
    ),
    Mutant("samples in the middle of a prompt", PLAN, "num_tokens == sequence.num_uncomputed)", "True)"),
    Mutant(
        "commits one computed token too many",
        SCHEDULER,
        "sequence.num_computed = start + num_tokens - len(drafts)",
        "sequence.num_computed = min(start + num_tokens + 1, len(sequence.tokens))",
    ),
    Mutant(
        "admits without looking at the pool",
        SCHEDULER,
        "num_lacking + num_needed > self.pool.num_free",
        "False",
    ),
    Mutant(
        "admits one sequence too many",
        SCHEDULER,
        "num_slots + num_more <= self.limits.max_num_seqs",
        "num_slots + num_more <= self.limits.max_num_seqs + 1",
    ),
    Mutant(
        "admits the youngest first",
        SCHEDULER,
        "one for one in self.waiting if one not in held_back",
        "one for one in reversed(list(self.waiting)) if one not in held_back",
    ),
    Mutant("never uses up the budget", SCHEDULER, "tokens_left, tiles_left = tokens_left - num_tokens, ", "tiles_left = "),
    Mutant(
        "never uses up the tiles",
        SCHEDULER,
        "return 0 if chunk.is_decode else -(-chunk.num_tokens // self.limits.tile)",
        "return 0",
    ),
    Mutant("ignores the chunk threshold", SCHEDULER, "if self.limits.long_prefill_token_threshold:", "if False:"),
    Mutant("keeps a row that is not finite", SCHEDULER, "if finite else FinishReason.ERROR", "if finite else None"),
    Mutant(
        "forgets the stop reason",
        SCHEDULER,
        "if reason is FinishReason.STOP and token_id in",
        "if False and token_id in",
    ),
    Mutant("a step in flight is not counted", SCHEDULER, "        self._advance_in_flight(is_pending=True)\n", ""),
    Mutant("a pending token is not counted", SCHEDULER, "int(is_pending and samples and", "int(False and"),
    Mutant("every chunk has a pending token", SCHEDULER, "int(is_pending and samples and", "int(is_pending and"),
    Mutant(
        "a token stays pending",
        SCHEDULER,
        "            sequence.num_pending, sequence.is_drafted = 0, False\n            if finite:",
        "            if finite:",
    ),
    Mutant(
        "goes on after the last pending token",
        SCHEDULER,
        "            return 0  # nobody knows how many tokens are pending, or the one that is comes last",
        "            pass",
    ),
    Mutant("an ended sequence takes the token after", SCHEDULER, "if sequence.finish_reason is not None:", "if False:"),
    Mutant("the last step is advanced at every commit", SCHEDULER, "if len(self._in_flight) == 1:", "if True:"),
    Mutant("a pending token is fed from another row", BATCH, "= 1 + feed.rows[sequence], 0", "= feed.rows[sequence], 0"),
    Mutant("a pending token is not fed", BATCH, "if -1 in token_ids:", "if False:"),
    Mutant(
        "a page is behind the window a token early",
        SCHEDULER,
        "num_computed + 1 - self.limits.sliding",
        "num_computed + 2 - self.limits.sliding",
    ),
    Mutant(
        "a page behind the window is not recorded before",
        SCHEDULER,
        "num_behind = min(num_behind, sequence.num_recorded)",
        "pass",
    ),
    Mutant(
        "a page behind the window is given back twice, with cache",
        SCHEDULER,
        "            sequence.num_behind = num_behind\n",
        "",
    ),
    Mutant(
        "a page behind the window stays in the table", SCHEDULER, "sequence.pages[:num_behind] = [NULL_PAGE] * num_behind", "pass"
    ),
    Mutant("a fork owns what is behind the window", SCHEDULER, "        fork.num_behind = sequence.num_behind\n", ""),
    Mutant(
        "set back, it remembers what was behind the window",
        SCHEDULER,
        "sequence.num_recorded = sequence.num_behind = 0",
        "sequence.num_recorded = 0",
    ),
    Mutant("takes an id twice", SCHEDULER, "if request.request_id in self._by_id:", "if False:"),
    Mutant(
        "prefills before decodes in the results",
        PLAN,
        "[*self.decodes, *(chunk for chunk in self.prefills if chunk.samples)]",
        "[*(chunk for chunk in self.prefills if chunk.samples), *self.decodes]",
    ),
    Mutant("slot one too far", BATCH, "places % page_size", "(places + 1) % page_size"),
    Mutant("slot in the next page", BATCH, "pages[places // page_size]", "pages[(places // page_size + 1) % len(pages)]"),
    Mutant("a decode's slot one too far", BATCH, "* page_size + places\n", "* page_size + (places + 1) % page_size\n"),
    Mutant("a decode's slot in its first page", BATCH, "tables[rows, pages]", "tables[rows, 0]"),
    Mutant(
        "padding writes to slot -1",
        BATCH,
        '    arrays["top_p"].fill(1.0)\n',
        '    arrays["top_p"].fill(1.0)\n    arrays["slots"][:] = -1\n',
    ),
    Mutant(
        "padding writes to the first real page",
        BATCH,
        '    arrays["top_p"].fill(1.0)\n',
        '    arrays["top_p"].fill(1.0)\n    arrays["slots"][:] = page_size\n',
    ),
    Mutant("length one short", BATCH, "= positions + 1\n", "= positions\n"),
    Mutant("length one long", BATCH, "= positions + 1\n", "= positions + 2\n"),
    Mutant(
        "length of a tile one short",
        BATCH,
        "np.arange(start, end, tile) + tile, end)",
        "np.arange(start, end, tile) + tile, end) - 1",
    ),
    Mutant(
        "length of the chunk",
        BATCH,
        "np.arange(start, end, tile) + tile, end)",
        "np.arange(start, end, tile) + tile, end) - start",
    ),
    Mutant("block table shifted by one", BATCH, ": len(pages)] = pages", ": len(pages)] = np.roll(pages, 1)"),
    Mutant(
        "block table without its last page",
        BATCH,
        "self._tables[row, : len(own)] = own\n",
        "self._tables[row, : len(own) - 1] = own[:-1]\n",
    ),
    Mutant("a new page is not told", BATCH, "elif lens[row] > known:", "elif False:"),
    Mutant("a sequence has the row of another", BATCH, "np.maximum(known, 0)", "np.arange(len(known)) % len(self._tables)"),
    Mutant("a plain token goes to a shared page", SCHEDULER, "num_owners(pages[index]) == 1", "num_owners(pages[index]) >= 1"),
    Mutant("tokens of the sequence's start", BATCH, "chunk.sequence.tokens[start:end]", "chunk.sequence.tokens[: end - start]"),
    Mutant("samples one token early", BATCH, "[last] = after - 1", "[last] = max(at, after - 2)"),
    Mutant("samples the tile's padding", BATCH, "[last] = after - 1", '[last] = min(after, len(arrays["token_ids"]) - 1)'),
    Mutant("samples the first tile of a chunk", BATCH, "sampling.append(last)", "sampling.append(row)"),
    Mutant("decode position one too far", BATCH, '["positions"][:count] = positions', '["positions"][:count] = positions + 1'),
    Mutant("decode position of the chunk's row", BATCH, '["positions"][:count] = positions', '["positions"][:count] = rows'),
    Mutant("tile positions count from zero", BATCH, "np.arange(start, start + num_tiles * tile)", "np.arange(num_tiles * tile)"),
    Mutant(
        "tile positions from the chunk's start",
        BATCH,
        "np.arange(start, start + num_tiles * tile)",
        "np.tile(np.arange(start, start + tile), num_tiles)",
    ),
    Mutant("prefills start at row 0", BATCH, "sampling, row, at = [], num_rows, num_rows", "sampling, row, at = [], 0, num_rows"),
    Mutant("tiles pack without padding", BATCH, "row, at = last + 1, at + num_tiles * tile", "row, at = last + 1, after"),
    Mutant("all results have halves of the seed swapped", REQUEST, "divmod(self.seed, 2**32)", "divmod(self.seed, 2**32)[::-1]"),
    Mutant("temperature of the first row", BATCH, "arrays[name][last] = value", "arrays[name][0] = value"),
    Mutant("all rows are drawn as the first", BATCH, "arrays[name][:count] = values", "arrays[name][:count] = values[0]"),
    Mutant(
        "bucket with too few rows",
        BATCH,
        "bucket.decode_rows >= plan.num_rows",
        "bucket.decode_rows >= plan.num_rows - 1",
    ),
    Mutant("keys forget what the results of a page depend on", PREFIX, "blake2b(parent + tokens", "blake2b(tokens"),
    Mutant("a known prefix leaves no token to compute", PREFIX, "(len(sequence.tokens) - 1) //", "len(sequence.tokens) //"),
    Mutant(
        "records a page that is not full",
        PREFIX,
        "for index in range(sequence.num_recorded, sequence.num_computed // self.page_size):",
        "for index in range(sequence.num_recorded, len(sequence.pages)):",
    ),
    Mutant("forgets a page but not its key", PREFIX, "        del self._pages[held.key]\n", ""),
    Mutant("a page takes the key of another", PREFIX, "if held.key not in self._pages:", "if True:"),
    Mutant("a cached page that is shared stays cached", PAGES, "            self._cached.pop(page, None)\n", ""),
    Mutant("evicts and does not tell", PAGES, "held = self.cache.forget(page)", "held = self.cache._held[page]"),
    Mutant("cached pages are not for handing out", PAGES, "len(self._free) + len(self._cached)", "len(self._free)"),
    Mutant("reset forgets cached pages", PAGES, "        self._free.extend(self._cached)\n", ""),
    Mutant("caches what nobody knows", PAGES, "self.cache is not None and page in self.cache:", "self.cache is not None:"),
    Mutant(
        "known pages cost nothing, owned or not",
        SCHEDULER,
        "sum(self.pool.num_owners(page) > 0 for page in known.pages)",
        "len(known.pages)",
    ),
    Mutant("known pages are not shared", RECALL, "        pool.share(page for page in found.pages if page != NULL_PAGE)\n", ""),
    Mutant(
        "computes what is known again",
        SCHEDULER,
        "sequence.num_computed = sequence.num_recorded * self.limits.page_size",
        "sequence.num_computed = 0",
    ),
    Mutant(
        "reserves as if nothing were known",
        SCHEDULER,
        "else num_known + num_tokens)",
        "else num_tokens)",
    ),
    Mutant(
        "forks before the prompt is computed",
        SCHEDULER,
        "not sequence.num_forks or sequence.num_to_compute",
        "not sequence.num_forks",
    ),
    Mutant(
        "forks and counts no reference", SCHEDULER, "        self.pool.share(fork.owned_pages)\n        insort", "        insort"
    ),
    Mutant(
        "forks all pages, the reserved ones too",
        SCHEDULER,
        "sequence.pages[: self._num_pages(sequence.num_computed)]",
        "sequence.pages",
    ),
    Mutant(
        "forks beyond the rows of a step",
        SCHEDULER,
        "room = self.limits.max_num_seqs - len(self.running)",
        "room = len(siblings)",
    ),
    Mutant(
        "forks go behind everyone",
        SCHEDULER,
        "        insort(self.running, fork, key=by_rank)\n\n    def _writes",
        "        self.running.append(fork)\n\n    def _writes",
    ),
    Mutant(
        "a fork's tokens are its sibling's", REQUEST, "tokens, page_keys = list(self.tokens),", "tokens, page_keys = self.tokens,"
    ),
    Mutant("all forks have the results of one seed", REQUEST, "(self.request.seed + self.index)", "self.request.seed"),
    Mutant("a shared page is written", SCHEDULER, "return num_owners > 1 and num_owners - sum(", "return 0 * sum("),
    Mutant("a page of its own is copied", SCHEDULER, "return num_owners > 1 and num_owners - sum(", "return 2 + sum("),
    Mutant(
        "copies the page before",
        SCHEDULER,
        "self._copies.append((sequence.pages[index], pages[0]))",
        "self._copies.append((sequence.pages[index - 1], pages[0]))",
    ),
    Mutant(
        "copies onto itself",
        SCHEDULER,
        "self._copies.append((sequence.pages[index], pages[0]))",
        "self._copies.append((pages[0], pages[0]))",
    ),
    Mutant(
        "does not tell the device to copy", SCHEDULER, "tuple(prefills), copies, transfers)", "tuple(prefills), (), transfers)"
    ),
    Mutant("keeps the source of a copy", SCHEDULER, "        self.pool.free(source for source, _ in copies)\n", ""),
    Mutant("a page for the copy is not counted", SCHEDULER, "len(sequence.pages) + is_copied\n", "len(sequence.pages)\n"),
    Mutant("a fork believes that it has computed what it has not", REQUEST, '"num_computed": 0, "num_behind"', '"num_behind"'),
    Mutant("ends all outputs with the first", SCHEDULER, "        if not siblings:\n", "        if True:\n"),
    Mutant("bucket with too few tiles", BATCH, "-(-chunk.num_tokens // tile)", "chunk.num_tokens // tile"),
]

# Bugs that only another order than that of arrival, or a sequence that has given way often, can show.
POLICY_MUTANTS = [
    Mutant("who gave way often gives way again", SCHEDULER, "if not _is_protected(other)", "if True"),
    Mutant("it is not given all its pages", SCHEDULER, "_num_places(sequence) if _is_protected(sequence) else ", ""),
    Mutant(
        "it is given one page too few",
        SCHEDULER,
        "return sequence.request.max_len - 1\n",
        "return sequence.request.max_len - 2\n",
    ),
    Mutant(
        "what the others need is not kept", SCHEDULER, ", sum(map(self._num_pages_to_end, self.running))\n", ", num_lacking\n"
    ),
    Mutant(
        "its spare pages are the others'",
        SCHEDULER,
        "(lacking if lacking > 0 else 0)",
        "lacking",
    ),
    Mutant("its forks stay with it", SCHEDULER, "            self._part(sequence)\n", "            pass\n"),
    Mutant(
        "runs in order of admission", SCHEDULER, "insort(self.running, sequence, key=by_rank)", "self.running.append(sequence)"
    ),
    Mutant("nobody ages", WAITING, "> self.ageing_steps:", "> self.ageing_steps + 10**9:"),
    Mutant("ages too late", WAITING, "> self.ageing_steps:", "> self.ageing_steps + 2:"),
    Mutant("the aged go last", WAITING, "sequence.rank = (0, 0, ", "sequence.rank = (2, 0, "),
    Mutant("the aged are young again", WAITING, "sequence.rank[0] == 0", "False"),
    Mutant(
        "the line is not sorted",
        WAITING,
        "        insort(self._line, sequence, key=by_rank)\n        self",
        "        self._line += [sequence]\n        self",
    ),
]


def plant(monkeypatch: pytest.MonkeyPatch, mutant: Mutant | None) -> None:
    """Put fresh copies of the modules under test in the place of the real ones, one of them with the bug."""
    for name in simulation.MODULES:
        path = Path(sys.modules[name].__file__ or "")
        source = path.read_text()
        if mutant is not None and mutant.module == name:
            assert mutant.old in source, f"{mutant.name!r}: {mutant.old!r} is no longer in {path.name}; plant this bug anew"
            source = source.replace(mutant.old, mutant.new)
        module = types.ModuleType(name)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, name, module)  # the later modules import the earlier ones from there
        exec(compile(source, str(path), "exec"), vars(module))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()  # imports all of them
    plant(monkeypatch, mutant)
    is_padded = mutant.module == BATCH or "results" in mutant.name
    shares = mutant.module == PREFIX or any(word in mutant.name + mutant.old for word in ("cache", "known", "recorded)"))
    forks = any(word in mutant.name for word in ("fork", "cop", "shared page", "outputs"))
    for seed in range(MOST_SCENARIOS):
        try:
            kinds = {"shares": shares, "forks": forks, "has_window": "window" in mutant.name}
            scenario = simulation.random_scenario(seed, is_padded=is_padded, with_faults=not shares, **kinds)
            simulation.simulate(scenario, is_perturbed=shares or "set back" in mutant.name)
        except Exception:  # an AssertionError of a law, or whatever the broken code ran into
            return
    pytest.fail(f"{mutant.name!r} survives {MOST_SCENARIOS} scenarios")


@pytest.mark.parametrize("mutant", POLICY_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_planted_in_the_order_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()
    plant(monkeypatch, mutant)
    for seed in range(MOST_SCENARIOS):
        monkeypatch.setattr(simulation.house().scheduler, "MAX_PREEMPTIONS", 1 + seed % 2)
        options = {"policy": list(POLICIES)[seed % 6], "ageing_steps": (0, 3, 30)[seed // 6 % 3]}
        try:
            simulation.simulate(staircase(seed), **options)
            simulation.simulate(overload(seed, num_requests=30), **options)
        except Exception:
            return
    pytest.fail(f"{mutant.name!r} survives {MOST_SCENARIOS} scenarios")


@pytest.mark.parametrize("is_padded", [False, True])
def test_without_a_bug_nothing_is_caught(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()
    plant(monkeypatch, None)
    for seed in range(10):
        simulation.simulate(simulation.random_scenario(seed, is_padded=is_padded))
