"""What a user asks of a beam search, and whether the engine has room for it.

Knows numbers of beams, tokens and pages. Refuses to know how the search goes: that is `jaxpaged.host.beams`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxpaged.config import nearest
from jaxpaged.host.request import MAX_N, Request, RequestError, SamplingParams, check_int


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How wide and how long to search. Names, meanings and defaults are vLLM's; `early_stopping` is that of transformers.

    Args:
      beam_width: beams, and results.
      max_tokens: at most this many new tokens.
      ignore_eos: do not end at the model's end-of-sequence ids.
      temperature: the logits are divided by it; 0 leaves them.
      length_penalty: beams compete by their log-probability over length ** length_penalty; above 0 favours long ones.
      include_stop_str_in_output: results hold the end-of-sequence id that ended them.
      early_stopping: see `SamplingParams`.

    Raises:
      RequestError: a value is out of range or of the wrong type.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = False

    def __new__(cls, *args: object, **options: object) -> BeamSearchParams:
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(f"BeamSearchParams: unknown option {name!r}{nearest(name, known)}")
        for name in ("beam_width", "max_tokens"):
            if name not in options:
                raise RequestError(f"BeamSearchParams: {name} is missing")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, MAX_N)
        check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if not isinstance(self.include_stop_str_in_output, bool):
            raise RequestError(f"include_stop_str_in_output: got {self.include_stop_str_in_output!r}, expected True or False")
        self.sampling_params()  # checks the others

    def sampling_params(self) -> SamplingParams:
        """The same search as `generate` takes it."""
        return SamplingParams(
            use_beam_search=True,
            n=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )


def check_room(
    request: Request, *, vocab_size: int, page_size: int, num_pages: int, max_num_seqs: int, max_logprobs: int
) -> None:
    """Refuse a beam search that could not have all of its beams in the engine at once.

    Args:
      num_pages: of the pool, the null page left out.
      max_logprobs: candidates that a step yields of each row.

    Raises:
      RequestError: with both numbers.
    """
    group, width = request.beam_group(), request.params.n
    if group is None:
        return
    if width > max_num_seqs:
        raise RequestError(f"n: got {width} beams, which run together; the limit is max_num_seqs {max_num_seqs}")
    if group.num_candidates > vocab_size:
        what = f"{width} beams and {len(group.stop_ids)} ids that end them need {group.num_candidates} different tokens"
        raise RequestError(f"n: {what}, the vocabulary has {vocab_size}")
    if group.num_candidates > max_logprobs:
        what = f"{width} beams and {len(group.stop_ids)} ids that end them need {group.num_candidates} candidates of each beam"
        raise RequestError(f"n: {what}, the limit is max_logprobs {max_logprobs}")
    num_needed = width * -(-(request.max_len - 1) // page_size)  # the last token is never written
    if num_needed > num_pages:
        what = f"{width} beams of up to {request.max_len - 1:,} tokens need {num_needed:,} pages of {page_size}"
        raise RequestError(f"n: {what}, the whole pool has {num_pages:,}; lower max_tokens or n")
