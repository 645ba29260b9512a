"""A real server on a loopback socket with the bundled model, in this process, and what tests ask of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx

from jaxpaged.admission import QueueOptions
from jaxpaged.async_llm import AsyncLLM
from jaxpaged.server.options import ServerOptions
from jaxpaged.server.run import Server, address_of, bind

# Two compiled steps: what is compiled is no business of these tests.
ENGINE = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "decode_row_buckets": (8,),
    "prefill_tile_buckets": (8,),
    "num_gpu_blocks_override": 400,
}


class Running:
    """A server and its address."""

    def __init__(self, llm: AsyncLLM, options: ServerOptions, port: int = 0):
        self.llm, self.server = llm, Server(llm, options)
        self._socket = bind(options.host, port)
        self.url = address_of(self._socket)
        self.thread = threading.Thread(target=lambda: self.server.run([self._socket]), daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    @property
    def engine(self):
        return self.llm._engine

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@contextlib.contextmanager
def running(llm: AsyncLLM, *, port: int = 0, **options: Any) -> Iterator[Running]:
    """Served until the block ends, on any port by default; the model is ended by whoever made it."""
    one = Running(llm, ServerOptions(**options), port)
    try:
        yield one
    finally:
        # The model is shared between tests: the server ends, not the model.
        one.server.should_exit = True
        one.thread.join(20)
        assert not one.thread.is_alive()


def new_llm(**queue: Any) -> AsyncLLM:
    return AsyncLLM.from_options(None, queue=QueueOptions(**queue), use_tqdm_on_load=False, **ENGINE)


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def is_empty(llm: AsyncLLM) -> bool:
    """Whether nothing is left of any request."""
    return not (llm.num_unfinished or llm.admission.num_outputs or llm.admission.num_tokens or llm._engine.pool.num_used)
