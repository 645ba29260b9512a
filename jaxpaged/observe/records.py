"""The records of a flight recording: one binary frame for each event that reached the scheduler and each decision it made.

Knows the layout of frames, and reads them back as values. Refuses to know files, rings and the scheduler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.host.plan import NO_TRANSFERS, Transfers
from jaxpaged.host.request import Request, SamplingParams
from jaxpaged.host.structured import StructuredOutputsParams

KEY_WORDS = 4  # of a key of the prefix cache
MAX_ERROR = 1000  # characters of an exception that are kept
FRAME = struct.Struct("<BId")  # kind, bytes of the payload, seconds on the engine's clock
_WORDS = "I" if array("I").itemsize == 4 else "L"  # 32 bits


class RecordingError(ValueError):
    """A recording that cannot be read, written or replayed. One line: which file, what is wrong."""


class Kind(enum.IntEnum):
    """What a frame holds. What the scheduler was told is below DECISION, what it decided above."""

    ADD = 1
    ABORT = 2
    RESET = 3
    COMMIT = 4
    FAIL = 5
    FETCHED = 6
    STOP = 7
    SEGMENT = 8
    DRAFTS = 9
    ONLY = 10
    DECISION = 16
    ADMIT = 17
    PREEMPT = 18
    PLAN = 19
    IDLE = 20
    FINISH = 21


@dataclass(frozen=True)
class Frame:
    """One record as it was written. Two runs made the same decision when kind and payload are equal; the times never are."""

    kind: Kind
    time_s: float
    payload: bytes

    @property
    def is_decision(self) -> bool:
        """Whether the scheduler decided this, as opposed to having been told."""
        return self.kind > Kind.DECISION


def frames(body: bytes, where: str) -> Iterator[Frame]:
    """Split a stream of frames. Raises RecordingError when it is cut off or no such stream."""
    at = 0
    while at < len(body):
        if at + FRAME.size > len(body):
            raise RecordingError(f"{where}: damaged: a frame is cut off at byte {at:,}")
        kind, num_bytes, time_s = FRAME.unpack_from(body, at)
        at += FRAME.size
        if at + num_bytes > len(body):
            raise RecordingError(f"{where}: damaged: a frame is cut off at byte {at:,}")
        try:
            yield Frame(Kind(kind), time_s, body[at : at + num_bytes])
        except ValueError:
            raise RecordingError(f"{where}: damaged: no such kind of frame, {kind}, at byte {at - FRAME.size:,}") from None
        at += num_bytes


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """What frames of no sense lead to, as one line: a file may pass its checksum and still not be ours."""
    try:
        yield
    except RecordingError:
        raise
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise RecordingError(f"{where}: damaged: {' '.join(str(error).split())}") from None


def words(*numbers: int) -> bytes:
    """Whole numbers of 32 bits."""
    return packed(numbers)


def packed(numbers: Sequence[int]) -> bytes:
    """Likewise."""
    return array(_WORDS, numbers).tobytes()


def unwords(payload: bytes) -> array:
    """Inverse of `words`."""
    found = array(_WORDS)
    found.frombytes(payload)
    return found


# --- events -------------------------------------------------------------------------------------------------------------


def pack_request(request: Request) -> bytes:
    """Everything that the scheduler and the sampler know of a request, the prompt's tokens as words."""
    fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request) if f.name != "prompt_token_ids"}
    fields["params"] = {f.name: getattr(request.params, f.name) for f in dataclasses.fields(request.params)}
    head = json.dumps(fields, default=_plain).encode()
    return words(len(head)) + head + array(_WORDS, request.prompt_token_ids).tobytes()


def unpack_request(payload: bytes) -> Request:
    """Inverse of `pack_request`. Raises TypeError or RequestError when the fields are those of another version."""
    num_bytes = unwords(payload[:4])[0]
    fields = {name: _frozen(value) for name, value in json.loads(payload[4 : 4 + num_bytes]).items()}
    params = {name: _frozen(value) for name, value in fields.pop("params").items()}
    fields["stop_ids"] = frozenset(fields["stop_ids"])
    return Request(
        prompt_token_ids=tuple(unwords(payload[4 + num_bytes :])),
        params=SamplingParams(**params),
        **fields,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, StructuredOutputsParams):
        return value.given
    return repr(value)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def pack_stop(request_id: str, index: int) -> bytes:
    """An output whose text says that it is over."""
    return words(index) + request_id.encode()


def unpack_stop(payload: bytes) -> tuple[str, int]:
    """Inverse of `pack_stop`."""
    return payload[4:].decode(), unwords(payload[:4])[0]


def pack_drafts(drafts: Mapping[int, Sequence[int]]) -> bytes:
    """Proposed tokens by row, which the next plan has been given."""
    return packed([number for row, tokens in drafts.items() for number in (row, len(tokens), *tokens)])


def unpack_drafts(payload: bytes) -> dict[int, tuple[int, ...]]:
    """Inverse of `pack_drafts`."""
    numbers, at, drafts = unwords(payload), 0, {}
    while at < len(numbers):
        row, count = numbers[at : at + 2]
        drafts[row] = tuple(numbers[at + 2 : at + 2 + count])
        at += 2 + count
    return drafts


def pack_fetched(key: bytes, ok: bool) -> bytes:
    """A page that has come from disk, or not."""
    return bytes([ok]) + key


def unpack_fetched(payload: bytes) -> tuple[bytes, bool]:
    """Inverse of `pack_fetched`."""
    return payload[1:], bool(payload[0])


def pack_commit(token_ids: Sequence[int], is_finite: Sequence[bool], candidates: Any = None) -> bytes:
    """What a step sampled; a row that is not finite may hold any 32 bits. `candidates` of its beams, if it had any."""
    flags = bytes(is_finite)
    payload = words(len(flags)) + flags + array("i", token_ids).tobytes()
    if candidates is None:
        return payload
    flat = [candidate for row in candidates for candidate in row]
    counts = words(*map(len, candidates))
    # As wide as Python's floats: a replay has to decide between the same numbers.
    return payload + counts + array("i", [one for one, _ in flat]).tobytes() + array("d", [one for _, one in flat]).tobytes()


def unpack_commit(payload: bytes) -> tuple[Any, ...]:
    """Inverse of `pack_commit`: two lists, or three."""
    count = unwords(payload[:4])[0]
    flags, token_ids, at = payload[4 : 4 + count], array("i"), 4 + 5 * count
    token_ids.frombytes(payload[4 + count : at])
    result = token_ids.tolist(), [bool(flag) for flag in flags]
    if at == len(payload):
        return result
    counts, at = unwords(payload[at : at + 4 * count]), at + 4 * count
    ids, logprobs = array("i"), array("d")
    ids.frombytes(payload[at : at + 4 * sum(counts)])
    logprobs.frombytes(payload[at + 4 * sum(counts) :])
    flat = zip(ids, logprobs, strict=True)
    return *result, [[next(flat) for _ in range(length)] for length in counts]


# --- decisions ----------------------------------------------------------------------------------------------------------
#
# A row is one stay of a sequence among the running ones: it begins with ADMIT and ends with PREEMPT or FINISH.


@dataclass(frozen=True)
class Admission:
    """A sequence that owns pages from here on; the first `num_computed` of its tokens are in them already."""

    row: int
    index: int  # which of the request's outputs
    num_computed: int
    num_prompt: int
    pages: tuple[int, ...]
    request_id: str

    @property
    def name(self) -> str:
        """As the row is shown: of several outputs of a request, those after the first have a number."""
        return f"{self.request_id}#{self.index}" if self.index else self.request_id

    def pack(self) -> bytes:
        """As bytes."""
        numbers = words(self.row, self.index, self.num_computed, self.num_prompt, len(self.pages), *self.pages)
        return numbers + self.request_id.encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Admission:
        """Inverse of `pack`."""
        row, index, num_computed, num_prompt, count = unwords(payload[:20])
        pages = tuple(unwords(payload[20 : 20 + 4 * count]))
        return cls(row, index, num_computed, num_prompt, pages, payload[20 + 4 * count :].decode())


@dataclass(frozen=True)
class Work:
    """One chunk of a plan: tokens [start, start + num_tokens) of a row, and the pages that they are written to.

    The last `num_drafts` tokens are proposed ones.
    """

    row: int
    start: int
    num_tokens: int
    samples: bool
    pages: tuple[int, ...]
    num_drafts: int = 0


@dataclass(frozen=True)
class Decision:
    """One plan, and the state of pool and queues that it left."""

    num_free: int
    num_cached: int
    num_running: int
    num_waiting: int
    copies: tuple[tuple[int, int], ...]
    decodes: tuple[Work, ...]
    prefills: tuple[Work, ...]
    transfers: Transfers = NO_TRANSFERS

    HEAD = 7  # words before the arrays: the four counts above, then decodes, prefills, copies

    @classmethod
    def unpack(cls, payload: bytes) -> Decision:
        """Inverse of `encoder.pack_plan`."""
        numbers = unwords(payload)
        num_decodes, num_prefills, num_copies = numbers[4:7]
        at = cls.HEAD

        def take(count: int) -> array:
            nonlocal at
            at += count
            return numbers[at - count : at]

        rows, starts, pages = take(num_decodes), take(num_decodes), take(num_decodes)
        decodes = [Work(row, start, 1, True, (page,)) for row, start, page in zip(rows, starts, pages, strict=True)]
        copies = tuple(zip(take(num_copies), take(num_copies), strict=True))
        prefills = []
        for _ in range(num_prefills):
            row, start, num_tokens, samples, count = take(5)
            # A decode with drafts is among these: it tells how many it has.
            works = decodes if samples > 1 else prefills
            works.append(Work(row, start, num_tokens, bool(samples), tuple(take(count)), max(0, samples - 1)))
        num_free, num_cached, num_running, num_waiting = numbers[:4]
        transfers = NO_TRANSFERS
        if at < len(numbers):
            counts = take(4)
            spills = tuple((take(1)[0], take(KEY_WORDS).tobytes()) for _ in range(counts[0]))
            saves, loads = (tuple(zip(take(count), take(count), strict=True)) for count in counts[1:3])
            fetches = tuple((take(KEY_WORDS).tobytes(), take(1)[0]) for _ in range(counts[3]))
            transfers = Transfers(spills, saves, loads, fetches)
        return cls(num_free, num_cached, num_running, num_waiting, copies, tuple(decodes), tuple(prefills), transfers)


def sets_back(frame: Frame) -> bool:
    """Whether all that runs begins again from there."""
    return frame.kind is Kind.FAIL or (frame.kind is Kind.ONLY and frame.payload != b"null")


def note_names(frame: Frame, names: dict[int, str]) -> None:
    """Keep the names of rows up to date."""
    if frame.kind is Kind.ADMIT:
        admitted = Admission.unpack(frame.payload)
        names[admitted.row] = admitted.name
    elif frame.kind in (Kind.PREEMPT, Kind.FINISH):
        names.pop(unwords(frame.payload[:4])[0], None)
    elif sets_back(frame):
        names.clear()


def describe(frame: Frame, names: dict[int, str]) -> list[str]:
    """A frame as lines of text, whatever it holds.

    Args:
      names: of rows; an ADMIT adds its own.
    """
    try:
        return _describe(frame, names)
    except (ValueError, TypeError, LookupError):
        return [f"{frame.kind.name.lower()}: {len(frame.payload)} bytes that cannot be read"]


def _describe(frame: Frame, names: dict[int, str]) -> list[str]:
    kind, payload = frame.kind, frame.payload
    if kind is Kind.ADMIT:
        admitted = Admission.unpack(payload)
        names[admitted.row] = admitted.name
        known = f", {admitted.num_computed} tokens known" if admitted.num_computed else ""
        return [f"admit    {names[admitted.row]}: pages {_list(admitted.pages)}{known}"]
    if kind in (Kind.PREEMPT, Kind.FINISH):
        row = unwords(payload[:4])[0]
        name = names.get(row, f"row {row}")
        return [f"preempt  {name}" if kind is Kind.PREEMPT else f"finish   {name}: {payload[4:].decode()}"]
    if kind is Kind.PLAN:
        return _describe_plan(Decision.unpack(payload), names)
    if kind is Kind.IDLE:
        return ["nothing to run"]
    if kind is Kind.DRAFTS:
        found = unpack_drafts(payload).items()
        return [f"drafts   {names.get(row, f'row {row}')}: {_list(tokens)}" for row, tokens in found]
    if kind is Kind.FETCHED:
        key, ok = unpack_fetched(payload)
        return [f"fetched  key {key.hex()}{'' if ok else ': a miss'}"]
    if kind is Kind.ONLY:
        return [f"only     {'all' if payload == b'null' else _list(json.loads(payload))}"]
    if kind is Kind.FAIL:
        failure = json.loads(payload)
        return [f"failed in {failure['stage']}: {failure['error']}"]
    return [kind.name.lower()]


def _describe_plan(plan: Decision, names: dict[int, str]) -> list[str]:
    moved = plan.transfers
    lines = [f"spill    slot {slot} to disk, key {key.hex()}" for slot, key in moved.spills]
    lines += [f"save     page {page} to slot {slot}" for page, slot in moved.saves]
    lines += [f"load     slot {slot} to page {page}" for slot, page in moved.loads]
    lines += [f"fetch    key {key.hex()} to slot {slot}" for key, slot in moved.fetches]
    lines += [f"copy     page {source} to {target}" for source, target in plan.copies]
    for what, works in (("decode ", plan.decodes), ("prefill", plan.prefills)):
        for work in works:
            name = names.get(work.row, f"row {work.row}")
            where = f"tokens [{work.start}, {work.start + work.num_tokens}) to pages {_list(work.pages)}"
            drafts = f", {work.num_drafts} of them drafts" if work.num_drafts else ""
            lines.append(f"{what}  {name}: {where}{drafts}{'' if work.samples else ', no sample'}")
    counts = (
        f"{plan.num_free} pages free, {plan.num_cached} of them cached; {plan.num_running} running, {plan.num_waiting} waiting"
    )
    return [*lines, f"state    {counts}"]


def _list(numbers: Sequence[object], limit: int = 12) -> str:
    shown = " ".join(map(str, numbers[:limit]))
    return f"{shown} ... ({len(numbers)})" if len(numbers) > limit else shown or "none"
