"""Two answers to one request, and where they differ: statuses, names of fields, texts, tokens, log-probabilities, metrics.

Knows forms of answers. Refuses to know which differences are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parity_cases import Case

LOGPROB_TOLERANCE = 2e-3  # float32, two ways to add up; the largest seen is 2e-6
_VOLATILE = {"id", "created", "system_fingerprint", "version"}  # a server's own
_METRIC = re.compile(r"^# TYPE (?:vllm|jaxpaged):(\S+) (\S+)", re.MULTILINE)
_SAMPLE = re.compile(r"^(?:vllm|jaxpaged):(\w+)\{([^}]*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_MISSING = "(not there)"


@dataclass(frozen=True)
class Difference:
    """One difference: where in which answer, and what each has there."""

    case: str
    place: str
    theirs: str
    ours: str

    @property
    def cells(self) -> tuple[str, ...]:
        """Its line of a table."""
        return self.case, self.place, self.theirs[:120], self.ours[:120]


def compare(case: Case, theirs: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """All differences of two answers to a case. Where statuses differ, nothing below them is compared."""
    found = list(_differences(case, theirs, ours))
    return [Difference(case.name, *one) for one in found]


def _differences(case: Case, theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if theirs["status"] != ours["status"]:
        yield "status", _with_message(theirs), _with_message(ours)
        return
    if case.path == "/metrics":
        yield from _of_metrics(theirs["text"], ours["text"])
        return
    if case.is_text:
        return
    if theirs["media_type"] != ours["media_type"]:
        yield "media type", theirs["media_type"], ours["media_type"]
    if theirs.get("is_repeated") != ours.get("is_repeated"):
        yield "is_repeated", str(theirs.get("is_repeated")), str(ours.get("is_repeated"))
    left, right = (put_together(one["events"]) if "events" in one else one.get("json", one.get("text")) for one in (theirs, ours))
    yield from _of_values("", left, right, is_drawn=case.is_drawn or theirs["status"] >= 400)


def put_together(events: list[Any]) -> dict[str, Any]:
    """What a stream says: texts of each choice in one piece, lists in one list, and everything else as it was said last."""
    found: dict[str, Any] = {"last event": events[-1], "names of events": sorted({tuple(sorted(one)) for one in events[:-1]})}
    found["choices"] = {}
    for event in events[:-1]:
        found |= {name: value for name, value in event.items() if name != "choices"}
        for choice in event["choices"]:
            _grow(found["choices"].setdefault(str(choice["index"]), {}), choice)
    return found


def _grow(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        before = whole.get(name)
        if name == "tool_calls":
            calls = whole.setdefault(name, {})
            for call in value or ():
                _grow(calls.setdefault(str(call["index"]), {}), call)
        elif isinstance(value, dict):
            _grow(whole.setdefault(name, {}) if before is not None else whole.setdefault(name, None) or _put(whole, name), value)
        elif isinstance(value, list):
            whole[name] = (before or []) + value
        elif isinstance(value, str) and name in ("content", "text", "arguments"):
            whole[name] = (before or "") + value
        elif value is not None or name not in whole:
            whole[name] = value


def _put(whole: dict[str, Any], name: str) -> dict[str, Any]:
    whole[name] = {}
    return whole[name]


def _of_values(place: str, theirs: Any, ours: Any, *, is_drawn: bool) -> Iterator[tuple[str, str, str]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        part = ", part of a character" if "\ufffd" in str(ours.get("token")) else ""
        for name in (*theirs, *(name for name in ours if name not in theirs)):
            inside = f"{place}.{name}".lstrip(".")
            if name not in ours or name not in theirs:
                # A field that is there and says nothing is told apart: a client that reads it sees the same.
                has = theirs[name] if name in theirs else ours[name]
                kind = "null field" if has is None else "field"
                left, right = (_short(one[name]) if name in one else _MISSING for one in (theirs, ours))
                yield f"{kind} {_general(inside)}", left, right
            elif part and name in ("token", "bytes"):
                if theirs[name] != ours[name]:
                    yield f"{_general(inside)}{part}", _short(theirs[name]), _short(ours[name])
            elif name not in _VOLATILE:
                yield from _of_values(inside, theirs[name], ours[name], is_drawn=is_drawn)
    elif isinstance(theirs, list) and isinstance(ours, list) and _are_objects(theirs) and _are_objects(ours):
        if len(theirs) != len(ours) and not is_drawn:
            yield f"length of {_general(place)}", str(len(theirs)), str(len(ours))
        for at, (left, right) in enumerate(zip(theirs, ours, strict=False)):
            yield from _of_values(f"{place}[{at}]", left, right, is_drawn=is_drawn)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours) and _has_numbers(theirs):
        for left, right in zip(theirs, ours, strict=True):
            yield from _of_values(f"{place}[]", left, right, is_drawn=is_drawn)
    elif isinstance(theirs, float) and isinstance(ours, float):
        if abs(theirs - ours) > LOGPROB_TOLERANCE and not is_drawn:
            yield _general(place), repr(theirs), repr(ours)
    elif theirs != ours and not (is_drawn and _is_drawn_place(place)):
        yield _general(place), _short(theirs), _short(ours)


def _is_drawn_place(place: str) -> bool:
    """Whether a value is a text, or follows from one: where tokens are drawn, and where an error is told in words."""
    return place.rpartition(".")[2].partition("[")[0] in (
        *("text", "content", "message", "completion_tokens", "total_tokens", "finish_reason", "stop_reason", "cached_tokens"),
        *("token_ids", "logprob", "tokens", "text_offset"),
    )


def _of_metrics(theirs: str, ours: str) -> Iterator[tuple[str, str, str]]:
    """Names and kinds; of those that both have, labels and buckets."""
    kinds = [dict(_METRIC.findall(text)) for text in (theirs, ours)]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        left, right = (one.get(name, _MISSING) for one in kinds)
        if left != right:
            yield f"{'further metric' if left == _MISSING else 'metric'} {name}", left, right
    labels = [_labels(text) for text in (theirs, ours)]
    for name in sorted(labels[0].keys() & labels[1].keys()):
        for label in sorted(labels[0][name].keys() | labels[1][name].keys()):
            left, right = (one[name].get(label) for one in labels)
            if left is None or right is None or (label == "le" and left != right):
                yield f"label {label} of {name}", *(" ".join(sorted(one or [_MISSING])) for one in (left, right))


def _labels(text: str) -> dict[str, dict[str, set[str]]]:
    """The labels of every series and the values that they have; `le` as numbers, so that 1 and 1.0 are the same."""
    found: dict[str, dict[str, set[str]]] = {}
    for name, labels in _SAMPLE.findall(text):
        for label, value in _LABEL.findall(labels):
            kept = str(float(value)) if label == "le" else value
            found.setdefault(name, {}).setdefault(label, set()).add(kept)
    return found


def _are_objects(values: list[Any]) -> bool:
    return (
        bool(values)
        and all(isinstance(one, (dict, type(None))) for one in values)
        and any(isinstance(one, dict) for one in values)
    )


def _has_numbers(values: list[Any]) -> bool:
    return any(isinstance(one, float) for one in values)


def _general(place: str) -> str:
    """A place without the numbers in it: what is the same of every choice is said of all."""
    return re.sub(r"\[\d*\]|(?<=choices)\.\d+|(?<=tool_calls)\.\d+", "", place)


def _with_message(answer: dict[str, Any]) -> str:
    told = answer.get("json")
    error = told.get("error") if isinstance(told, dict) else None
    message = error.get("message", "") if isinstance(error, dict) else ""
    return f"{answer['status']} {message}".strip()


def _short(value: Any) -> str:
    return repr(value)[:160]
