"""The log lines that tutorials teach, each only when it is true, once until the trouble is over.

Knows a few numbers of scheduler and pool after each step. Refuses to cost anything: what takes longer is looked at now and then.
"""

from __future__ import annotations

import logging

from jaxpaged.host.plan import StepPlan
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.tiers import HostTier
from jaxpaged.observe.snapshot import num_wasted_places

logger = logging.getLogger("jaxpaged")

# A line is said when a number passes the first of two, and again only after it has been on the good side of the second.
FREE_SHARE = 0.10, 0.30  # pages that can be handed out, of all
WASTE_SHARE = 0.25, 0.15  # allocated token places that hold nothing, of all that are allocated
WASTE_MATTERS = 0.5  # of the pool in use: below this nobody is short of what is wasted
WASTE_EVERY = 32  # steps between two looks, which cost a microsecond for every few sequences
LOOK_EVERY = 4  # steps, while nobody comes in: between two device steps even a few look-ups are slow
COLLAPSE = 4  # a batch that is a quarter of what it was
SMALL_BATCH = 4  # below this a batch is not said to shrink
MANY_OWNERS = 32
REFUSED_EVERY = 256  # steps without a page that host memory refused, before the next is worth a line


class Watch:
    """Looks after each step, and says in the log what an operator should know.

    A batch shrinks when sequences lose their pages or wait for pages, never because requests have ended and none are left.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self._is_low = self._is_wasteful = self._has_leaked = False
        self._peak = self._said = 0  # sequences that ran before the batch shrank, and at the last line about it
        self._has_collapsed = False
        self._num_preemptions = 0  # when the batch was at its peak
        self._many = MANY_OWNERS
        self._num_steps = 0
        self._num_refused = 0
        self._last_refusal = -REFUSED_EVERY

    def planned(self, plan: StepPlan) -> None:
        """A step has been decided. Looked at now, not after its commit, when those that end have left and nobody has come in."""
        self._num_steps += 1
        if self._num_steps % LOOK_EVERY and not plan.prefills:
            return
        scheduler = self.scheduler
        pool, running = scheduler.pool, len(scheduler.running)
        if self._is_low != (pool.num_free < FREE_SHARE[self._is_low] * pool.num_usable):
            self._is_low = not self._is_low
            if self._is_low:
                logger.info("[Allocator] Free blocks: %d / %d", pool.num_free, pool.num_usable)
        if running >= self._peak or not scheduler.waiting:
            self._peak = self._said = running
            self._has_collapsed, self._num_preemptions = False, scheduler.num_preemptions
        elif running <= self._said // 2 and self._said >= SMALL_BATCH:
            self._shrunk(running)
        if plan.prefills:
            self._look_at_owners(plan)
        if pool.tier is not None and pool.tier.num_refused != self._num_refused:
            self._refused(pool.tier)

    def committed(self) -> None:
        """A step has been committed."""
        if self._num_steps % WASTE_EVERY == 0:
            self._look_at_waste()
        if not self.scheduler.running and not self.scheduler.has_unfinished:
            self._look_for_leaks()

    def wrong_count(self, error: Exception) -> None:
        """A check of the pool found what must not be."""
        logger.error("[KV] Refcount check failed: %s", error)

    def _shrunk(self, running: int) -> None:
        scheduler = self.scheduler
        num_preempted = scheduler.num_preemptions - self._num_preemptions
        num_needed = -(-len(next(iter(scheduler.waiting)).tokens) // scheduler.limits.page_size)
        if num_needed <= scheduler.pool.num_free:
            return  # the step was full: those who wait come in with one of the next
        if num_preempted:
            cause = f"{num_preempted} preemptions: the pool is too small for what runs"
        else:
            cause = f"no pages for the next of {len(scheduler.waiting)} waiting requests"
        logger.warning("[Scheduler] Batch size reduced: %d -> %d (%s)", self._said, running, cause)
        self._said = running
        if running * COLLAPSE <= self._peak and not self._has_collapsed:
            self._has_collapsed = True
            logger.warning("[Scheduler] Batch collapse detected: %d -> %d (%s)", self._peak, running, cause)

    def _refused(self, tier: HostTier) -> None:
        if self._num_steps - self._last_refusal >= REFUSED_EVERY:
            logger.warning(
                "[Offload] Host memory is too small: %d pages found each of its %d slots in use (raise swap_space)",
                *(tier.num_refused - self._num_refused, tier.num_slots),
            )
        self._num_refused, self._last_refusal = tier.num_refused, self._num_steps

    def _look_at_owners(self, plan: StepPlan) -> None:
        """The first page of a prefix has the most owners of it."""
        pool = self.scheduler.pool
        for chunk in plan.prefills:
            pages = chunk.sequence.pages
            owners = pool.num_owners(pages[0]) if pages else 0
            if owners >= self._many:
                logger.info("[KV] Refcount of page %d: %d owners", pages[0], owners)
                self._many = 2 * owners

    def _look_at_waste(self) -> None:
        pool, size = self.scheduler.pool, self.scheduler.limits.page_size
        allocated = pool.num_used * size
        share = num_wasted_places(self.scheduler.running, size) / allocated if allocated else 0.0
        matters = pool.num_used >= WASTE_MATTERS * pool.num_usable
        if self._is_wasteful:
            self._is_wasteful = share >= WASTE_SHARE[1]
        elif matters and share > WASTE_SHARE[0]:
            self._is_wasteful = True
            logger.info(
                "[Allocator] Fragmentation: %.2f (%d of %d allocated token places are empty; a smaller block_size wastes less)",
                *(share, round(share * allocated), allocated),
            )

    def _look_for_leaks(self) -> None:
        num_used = self.scheduler.pool.num_used
        if num_used and not self._has_leaked:
            logger.error("[KV] Refcount: %d pages have owners and no request is live", num_used)
        self._has_leaked = num_used > 0
