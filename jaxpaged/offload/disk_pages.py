"""Pages on a disk, written and read by threads beside the steps.

Knows keys and bytes. Refuses to fail: whatever goes wrong is a page that is not there, which its sequence computes again.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from jaxpaged.config import ConfigError
from jaxpaged.offload import page_file
from jaxpaged.offload.files import Files
from jaxpaged.offload.folder import Folder
from jaxpaged.offload.trouble import Trouble

MAX_QUEUED_BYTES = 256 << 20
CLOSE_S = 10.0  # for calls of the system that are under way; a disk may hang for ever
NUM_LATENCIES = 1024  # of the last fetches


class _Fetch(NamedTuple):
    key: bytes
    into: memoryview
    asked_s: float


class DiskPages:
    """One file a page, in a folder of its own inside `offload_dir`.

    Every fetch is answered once, by `finished`: whether the bytes are those of the newest spill of its key. A spill has no
    answer, but `lost` names those that failed. Nobody asks for a key that is lost, or was answered with False, before it was
    spilled again.
    """

    def __init__(
        self,
        offload_dir: str,
        *,
        num_threads: int = 4,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        files: Files | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """A tier of files.

        Args:
          offload_dir: made when it is not there.
          max_queued_bytes: of spills that are not written yet; a spill that would be more is lost.

        Raises:
          ConfigError: no folder can be made in `offload_dir`.
        """
        self._files = files or Files()
        self._clock = clock
        self._max_queued_bytes = max_queued_bytes
        self._folder = Folder(offload_dir, self._files)
        self._changed = threading.Condition()  # guards all that follows
        self._spills: dict[bytes, bytes] = {}  # not written yet; a key is in it until its newest content is
        self._to_write: deque[bytes] = deque()  # its keys that no thread has taken
        self._to_read: deque[_Fetch] = deque()
        self._num_asked: Counter[bytes] = Counter()  # fetches that have no answer, by key
        self._answers: list[tuple[bytes, bool]] = []
        self._lost: dict[bytes, None] = {}  # spills that were lost, in this order, of which nobody has been told
        self._is_closed = False
        self._queued_bytes = 0
        self._write_trouble = Trouble("[Offload] A page was not written to %s and will be computed again: %s")
        self._queue_trouble = Trouble("[Offload] The disk is too slow: a page was dropped with %d bytes waiting for %s")
        self._read_trouble = Trouble("[Offload] A page was not read from %s and will be computed again: %s")
        self._offload_dir = offload_dir
        self.num_spilled = self.num_lost = self.num_fetched = self.num_missed = self.num_spilled_bytes = (
            self.num_fetched_bytes
        ) = 0
        self._latencies: deque[float] = deque(maxlen=NUM_LATENCIES)
        self._threads = [threading.Thread(target=self._serve, name=f"offload-{n}", daemon=True) for n in range(num_threads)]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.close()
            raise ConfigError(f"offload_num_threads: got {num_threads}, and not so many threads can be had: {error}") from None

    @property
    def num_waiting(self) -> int:
        """Fetches that have no answer."""
        with self._changed:
            return self._num_asked.total()

    def spill(self, key: bytes, payload: memoryview) -> None:
        """Write a page, in the background, from a copy that is made at once."""
        with self._changed:
            if self._is_closed:
                return
            queued_bytes = self._queued_bytes + len(payload) - len(self._spills.get(key, b""))
            copied = _copied(payload) if queued_bytes <= self._max_queued_bytes else None
            if copied is None:
                self._queue_trouble.bad(self._queued_bytes, self._offload_dir)
                self._lose(key)
                return
            self._queue_trouble.good()
            self._lost.pop(key, None)
            if key not in self._spills:
                self._to_write.append(key)
            self._spills[key] = copied
            self._queued_bytes = queued_bytes
            self._changed.notify_all()

    def fetch(self, key: bytes, into: memoryview) -> None:
        """Read a page, in the background, into memory that is the reader's until the answer is there."""
        with self._changed:
            self._num_asked[key] += 1
            fetch = _Fetch(key, into, self._clock())
            if self._is_closed:
                self._answer(fetch, False)
                return
            self._to_read.append(fetch)
            self._changed.notify_all()

    def finished(self, wait: bool = False) -> list[tuple[bytes, bool]]:
        """The answers since the last call; with `wait` at least one, when there is a fetch to wait for."""
        with self._changed:
            while wait and not self._answers and self._num_asked.total():
                self._changed.wait()
            answers, self._answers = self._answers, []
            return answers

    def lost(self) -> list[bytes]:
        """The keys of spills that were lost since the last call, but for those of which a fetch has been told or will be."""
        with self._changed:
            lost = [key for key in self._lost if key not in self._num_asked]
            for key in lost:
                del self._lost[key]
            return lost

    def flush(self) -> None:
        """Wait until every spill is written or lost."""
        with self._changed:
            while self._spills and not self._is_closed:
                self._changed.wait()

    def latency_s(self) -> float:
        """Median seconds from asking to the answer, of the last fetches that were answered with True; 0 before the first."""
        with self._changed:
            return statistics.median(self._latencies or [0.0])

    def close(self) -> None:
        """Stop, answer what was asked with False, and remove the folder."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._spills.clear()
            self._to_write.clear()
            while self._to_read:
                self._answer(self._to_read.popleft(), False)
            self._changed.notify_all()
        last_s = self._clock() + CLOSE_S
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            thread.join(max(0.0, last_s - self._clock()))
        if not any(thread.is_alive() for thread in started):  # one that hangs still uses the folder: the next engine removes it
            self._folder.close()

    def _serve(self) -> None:
        """What a thread does. Reads go first: somebody waits for them."""
        while True:
            with self._changed:
                while not (self._to_read or self._to_write or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                fetch = self._to_read.popleft() if self._to_read else None
                key = self._to_write.popleft() if fetch is None else b""
            if fetch is None:
                self._write(key)
            else:
                self._read(fetch)

    def _write(self, key: bytes) -> None:
        """Write the newest content of a key. No other thread writes this key meanwhile."""
        while True:
            with self._changed:
                payload = self._spills.get(key)
            if payload is None:  # closed
                return
            error = None
            try:
                page_file.write(self._files, self._folder.descriptor, key, payload)
            except Exception as caught:  # a thread that dies would leave its page here for ever
                error = caught
            with self._changed:
                if self._spills.get(key) is not payload and not self._is_closed:
                    continue
                self._spills.pop(key, None)
                self._queued_bytes -= len(payload)
                if error is None:
                    self.num_spilled += 1
                    self.num_spilled_bytes += len(payload)
                    self._write_trouble.good()
                else:
                    self._write_trouble.bad(self._offload_dir, error)
                    self._lose(key)
                self._changed.notify_all()
                return

    def _read(self, fetch: _Fetch) -> None:
        with self._changed:
            payload, is_lost = self._spills.get(fetch.key), fetch.key in self._lost
        error = None
        try:
            if is_lost:  # what an older spill of this key has left is not what was asked for
                raise page_file.Damaged("it was not written")
            if payload is not None:
                fetch.into[:] = payload
            else:
                page_file.read(self._files, self._folder.descriptor, fetch.key, fetch.into)
        except Exception as caught:
            error = caught
        if error is not None:
            page_file.remove(self._files, self._folder.descriptor, fetch.key)
        with self._changed:
            if error is None:
                self._read_trouble.good()
            else:
                self._read_trouble.bad(self._offload_dir, error)
            self._answer(fetch, error is None)

    def _answer(self, fetch: _Fetch, is_there: bool) -> None:
        self._num_asked[fetch.key] -= 1
        if not self._num_asked[fetch.key]:
            del self._num_asked[fetch.key]
        if is_there:
            self.num_fetched += 1
            self.num_fetched_bytes += len(fetch.into)
            self._latencies.append(self._clock() - fetch.asked_s)
        else:
            self.num_missed += 1
            self._lost.pop(fetch.key, None)
        self._answers.append((fetch.key, is_there))
        self._changed.notify_all()

    def _lose(self, key: bytes) -> None:
        self.num_lost += 1
        self._lost[key] = None


def _copied(payload: memoryview) -> bytes | None:
    """A copy, or None where there is no memory for one."""
    try:
        return bytes(payload)
    except MemoryError:
        return None
