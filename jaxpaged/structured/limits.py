"""How much a grammar may take, to compile and to use; what both processes read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import llguidance


@dataclass(frozen=True)
class Limits:
    """Of one grammar, but for the last two.

    Args:
      wall_s: to compile it and to try it out, in the process that may be killed.
      memory_bytes: above what that process has before.
      walks, walk_len: ways through it that are tried, and tokens of one.
      step_s: of a core, for one token of them.
      initial_fuel, step_fuel, step_items, row_items, grammar_size, lexer_states: llguidance's own, which bound each step of an
        output too: about 20 ms for the beginning, 10 ms for what a step asks of the lexer, and 20 MiB for the states that all
        outputs share. The time of a parser's step grows with the square of row_items: at 2000, llguidance's default, an ambiguous
        grammar took 0.5 s for a token, at 1000 0.16 s (2 CPU cores, busy, November 2026). An object of a schema needs 4 for each
        property that may be left out.
      num_cached: grammars that are kept.
      cached_bytes: of all of them together, as the process that tried them measured it.
    """

    wall_s: float = 2.0
    memory_bytes: int = 256 << 20
    walks: int = 2
    walk_len: int = 24
    step_s: float = 0.2
    initial_fuel: int = 1_000_000
    step_fuel: int = 100_000
    step_items: int = 50_000
    row_items: int = 1_000
    grammar_size: int = 200_000
    lexer_states: int = 50_000
    num_cached: int = 128
    cached_bytes: int = 256 << 20

    def of_parser(self) -> llguidance.LLParserLimits:
        """As llguidance takes them."""
        from llguidance import LLParserLimits

        options: dict[str, Any] = {"max_items_in_row": self.row_items, "initial_lexer_fuel": self.initial_fuel}
        options |= {"step_lexer_fuel": self.step_fuel, "step_max_items": self.step_items}
        options |= {"max_grammar_size": self.grammar_size, "max_lexer_states": self.lexer_states}
        return LLParserLimits(**options, verbose_errors=False)
