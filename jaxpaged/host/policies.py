"""Scheduling policies: small pure functions that say who comes first among the sequences that wait.

A policy maps what is known of one sequence and of the whole to a key; the smallest key is admitted first, and of the running the
largest gives way first when pages run out. Refuses to know pages, plans and steps, so a policy can be wrong only about the order:
that everybody finishes is the scheduler's business (MAX_PREEMPTIONS there, ageing in host/waiting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.config import ConfigError, nearest

# An output token costs a row in a step of its own, prompt tokens are computed many at a time; the ratio of Sheng et al. 2024 and
# of the prices that providers ask.
PROMPT_COST = 1
OUTPUT_COST = 2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a policy may know of one sequence, all of it settled for as long as the sequence waits.

    Args:
      number: of its request in order of arrival, each larger than all before.
      since_step: the scheduler's step at which it joined the line: it arrived, or it was preempted.
      num_tokens: prompt and output so far; the pages of all of them are computed (again) when it is admitted.
      max_len: tokens at which it ends at the latest, prompt and output together.
      priority: lower is earlier, as in vLLM.
      tenant: whose request it is; "" is everybody who gave no name.
      num_preemptions: how often it has given way.
      cached_len: tokens at its beginning that the prefix cache has right now; counted when called.
    """

    request_id: str
    number: int
    since_step: int
    num_prompt: int
    num_tokens: int
    max_len: int
    priority: int = 0
    tenant: str = ""
    num_preemptions: int = 0
    cached_len: Callable[[], int] = int  # int() is 0


@dataclass(frozen=True)
class Situation:
    """What a policy may know of the whole.

    Args:
      step: steps planned so far, so that `step - candidate.since_step` is how long a candidate has waited.
      served: what each tenant has cost so far, with the lifts of `TenantCounters`; tenants without an entry have cost nothing.
    """

    step: int
    served: Mapping[str, float]


Policy = Callable[[Candidate, Situation], Any]
"""A key that can be compared with those of other candidates; the smallest goes first, equal ones in order of arrival."""


def fcfs(candidate: Candidate, situation: Situation) -> int:
    """First come, first served."""
    return candidate.number


def lifo(candidate: Candidate, situation: Situation) -> int:
    """Last come, first served: short waits for most, ageing for the rest."""
    return -candidate.number


def priority(candidate: Candidate, situation: Situation) -> int:
    """Lower priority values first."""
    return candidate.priority


def sjf(candidate: Candidate, situation: Situation) -> int:
    """Least work first, were each to use all of its max_tokens: nothing better is known of an output before it is there."""
    num_new = candidate.max_len - candidate.num_tokens
    return PROMPT_COST * candidate.num_tokens + OUTPUT_COST * num_new


def prefix(candidate: Candidate, situation: Situation) -> int:
    """Longest cached prefix first, so that pages are shared before they are evicted. Source: SGLang (arXiv 2312.07104), 3."""
    return -candidate.cached_len()


def fair_share(candidate: Candidate, situation: Situation) -> float:
    """The tenant that has been served least first. Source: Sheng et al. 2024, VTC (arXiv 2401.00588), Algorithm 2."""
    return situation.served.get(candidate.tenant, 0)


POLICIES: dict[str, Policy] = {policy.__name__: policy for policy in (fcfs, lifo, priority, fair_share, sjf, prefix)}
# Their keys do not change while a candidate waits, so one look is enough.
STATIC: frozenset[Policy] = frozenset((fcfs, lifo, priority, sjf))


def find_policy(name: str | Policy) -> Policy:
    """A policy by its name; a function is one already.

    Raises:
      ConfigError: no policy has this name.
    """
    if callable(name):
        return name
    if name not in POLICIES:
        hint = nearest(name, list(POLICIES)) if isinstance(name, str) else ""
        raise ConfigError(f"scheduling_policy: got {name!r}, expected a function or one of {', '.join(POLICIES)}{hint}")
    return POLICIES[name]


class TenantCounters:
    """The virtual token counters of VTC: what each tenant's requests have cost.

    A tenant that comes back to the line is lifted to the least counter there, so that nobody saves up credit by staying away; one
    that has cost more keeps its debt. Invariant: `served` never falls, but for tenants that are forgotten, and only those are
    whose debt the next lift would wipe out.
    """

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._num_waiting: dict[str, int] = {}
        self._floor = 0.0  # of the tenant that left the line last: where one starts that comes to an empty line

    def join(self, tenant: str) -> None:
        """One more sequence of this tenant waits."""
        if tenant not in self._num_waiting:
            least = min((self.served[other] for other in self._num_waiting), default=self._floor)
            self.served[tenant] = max(self.served.get(tenant, 0), least)
            # Now and then, so that names that are used once do not pile up.
            if len(self.served) > 64 + 2 * len(self._num_waiting):
                self.served = {
                    name: cost
                    for name, cost in self.served.items()
                    if cost > least or name in self._num_waiting or name == tenant
                }
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One sequence of this tenant waits no more."""
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]
            self._floor = self.served[tenant]

    def charge(self, tenant: str, cost: float) -> None:
        """Something was done for this tenant."""
        self.served[tenant] = self.served.get(tenant, 0) + cost
