"""Pictures of the page under load, for a person's eye and the README: `python tests/server/show_page.py docs`. A minute and more.

64 clients of mixed lengths with a shared beginning, the prefix cache and drafts on, the bundled model.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from browser import Browser, Page
from running import Running, running

from jaxpaged.async_llm import AsyncLLM

ENGINE = {
    "max_num_seqs": 48,
    "max_num_batched_tokens": 256,
    "decode_row_buckets": (48,),
    "prefill_tile_buckets": (8,),
    "num_gpu_blocks_override": 2400,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}
NUM_CLIENTS = 64
BEGINNING = "Once upon a time there was a town at the sea with many boats. " * 9
LOAD_S = 45
PICTURES = {"ui-light": (1280, 800, 1, False), "ui-dark": (1280, 800, 1, True), "ui-phone": (390, 844, 2, False)}


def ask(server: Running, number: int, is_over: threading.Event) -> None:
    """One request after the other, each of another length."""
    rng = random.Random(number)
    with server.client() as client:
        while not is_over.is_set():
            prompt = BEGINNING + f"The old man said {number}. " * rng.randint(1, 16)
            body = {"prompt": prompt, "max_tokens": rng.randint(40, 400), "ignore_eos": True, "temperature": 0.8}
            client.post("/v1/completions", json=body)


def chat(page: Page, question: str) -> None:
    """Ask in the page, and wait for the answer."""
    page.type("#prompt", question)
    page.press("Enter")
    page.until("document.getElementById('send').textContent === 'Send' && document.querySelector('.message .note') !== null")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    is_over = threading.Event()
    llm = AsyncLLM.from_options(None, use_tqdm_on_load=False, **ENGINE)
    browser = Browser(Path(tempfile.mkdtemp()))
    with running(llm) as server, browser.page() as page:
        clients = [threading.Thread(target=ask, args=(server, number, is_over), daemon=True) for number in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        page.open(f"{server.url}/ui")
        page.until("document.getElementById('status').textContent === 'live'")
        page.run("document.getElementById('temperature').value = 0")
        chat(page, "What is the capital of Denmark?")
        time.sleep(LOAD_S)
        page.run("document.activeElement.blur()")
        with server.client() as client:
            client.post("/reset_prefix_cache")  # or all that is free is cached by now
        time.sleep(5)
        for name, (width, height, scale, is_dark) in PICTURES.items():
            page.resize(width, height, scale, is_dark=is_dark)
            time.sleep(1.5)
            page.screenshot(folder / f"{name}.png")
        print(f"{len(page.requests):,} requests of the page, problems: {page.problems or 'none'}")
        is_over.set()
        for client in clients:
            client.join()
    browser.close()
    llm.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
