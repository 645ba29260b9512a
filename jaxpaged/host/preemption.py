"""Whether a sequence that gives way is worth keeping below the device: the mode, the costs and the comparison.

Knows seconds and counts. Refuses to know sequences and clocks: whoever builds the engine measures.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_S = 25e9  # to and from host memory over PCIe of the fourth generation, as its sixteen lanes are used


@dataclass(frozen=True)
class SwapCosts:
    """Seconds that computing and moving take. The defaults are a reckoning for a model of 8B on one GPU of a data centre.

    Args:
      token_s: to compute one token of a long prompt again; 2 * 8e9 operations at 400 TFLOP/s.
      save_fixed_s: to move a sequence's pages to host memory, however many they are.
      save_page_s: and for each page; 64 tokens of 128 KiB at 25 GB/s.
      load_fixed_s, load_page_s: likewise back.
    """

    token_s: float = 40e-6
    save_fixed_s: float = 500e-6
    save_page_s: float = 330e-6
    load_fixed_s: float = 500e-6
    load_page_s: float = 330e-6

    @classmethod
    def guess(cls, page_bytes: int) -> SwapCosts:
        """The defaults with pages of this size."""
        page_s = page_bytes / BYTES_PER_S
        return cls(save_page_s=page_s, load_page_s=page_s)


def swap_is_cheaper(num_tokens: int, num_pages: int, costs: SwapCosts) -> bool:
    """Whether moving so many pages out and back in takes less time than computing so many tokens."""
    out_s = costs.save_fixed_s + num_pages * costs.save_page_s
    in_s = costs.load_fixed_s + num_pages * costs.load_page_s
    return out_s + in_s < num_tokens * costs.token_s


def is_worth_keeping(mode: str, num_tokens: int, num_pages: int, costs: SwapCosts) -> bool:
    """Whether the pages of a preempted sequence are kept below the device when they are evicted.

    Args:
      mode: recompute, swap or auto; see EngineConfig.preemption_mode.
      num_tokens: in its full pages, of which there are `num_pages`.
    """
    return mode == "swap" or (mode == "auto" and swap_is_cheaper(num_tokens, num_pages, costs))
