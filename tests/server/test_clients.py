"""The commands that talk to a server, and those that answer as one, on the real thing: one engine for all of them."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path

import pytest

from jaxpaged import cli

for name in ("fastapi", "uvicorn", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from running import Running  # noqa: E402

from jaxpaged.server.app import build_app  # noqa: E402
from jaxpaged.server.batch_file import Output, answer_all, read_lines  # noqa: E402
from jaxpaged.server.options import ServerOptions  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_logger")


# --- bench serve -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_bench_serve_says_how_many_tokens_there_were(server: Running, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--num-prompts", "12", "--input-len", "20", "--output-len", "16", "--ignore-eos", "--request-rate", "100"]
    assert cli.main(["bench", "serve", "--base-url", server.url, "--backend", backend, *argv, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["completed"] == 12 and numbers["total_output_tokens"] == 12 * 16 and numbers["tokens_counted_by_chunk"]
    assert numbers["total_input_tokens"] == 12 * 20 or (backend == "openai-chat" and numbers["total_input_tokens"] > 12 * 20)
    assert 0 < numbers["median_ttft_ms"] < numbers["median_e2el_ms"] < numbers["duration"] * 1e3
    first = numbers["mean_e2el_ms"] - numbers["mean_ttft_ms"]
    assert numbers["mean_tpot_ms"] * 15 == pytest.approx(first)


# --- chat and complete -----------------------------------------------------------------------------------------------


def test_a_server_says_what_the_same_model_says_in_process(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    from jaxpaged.host.request import SamplingParams
    from jaxpaged.prompts import chat_prompt

    params = SamplingParams(temperature=0, max_tokens=20)
    messages = [{"role": "user", "content": "What is 17 + 25?"}]

    async def direct() -> list[str]:
        found = []
        for prompt in (chat_prompt(server.llm.tokenizer, messages), "One day"):  # type: ignore[arg-type]
            async for output in server.llm.generate(prompt, params):
                last = output
            found.append(last.outputs[0].text)
        return found

    flags = ["--url", server.url, "--temperature", "0", "--max-tokens", "20"]
    assert cli.main(["chat", *flags, "-q", messages[0]["content"]]) == 0
    assert cli.main(["complete", *flags, "-q", "One day", "--stats"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(f"{text}\n" for text in asyncio.run(direct()))
    assert "20 tokens out" in shown.err
    assert cli.main(["chat", *flags, "-q", "x", "--top-p", "0.5", "--min-p", "0.1", "--model-name", "zz"]) == cli.EXIT_USAGE
    assert "model: got 'zz', expected one of demo" in capsys.readouterr().err


# --- run-batch -------------------------------------------------------------------------------------------------------


def test_a_batch_is_answered_as_over_http(server: Running, tmp_path: Path) -> None:
    bodies = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Sort these words: pear, apple"}]}),
        ("/v1/completions", {"prompt": ["One day", "A dog"], "n": 2, "seed": 4, "temperature": 0.9, "logprobs": 1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}),
        ("/v1/chat/completions", {"messages": [], "model": "demo"}),
        ("/v1/completions", {"prompt": "A number:", "structured_outputs": {"regex": "[0-9]{3}"}}),
    ]
    bodies = [(url, {"max_tokens": 12, "temperature": 0, **body}) for url, body in bodies]
    lines = [json.dumps({"custom_id": str(i), "method": "POST", "url": u, "body": b}) for i, (u, b) in enumerate(bodies)]
    with Output(tmp_path / "out", {}) as output:
        app = build_app(server.llm, ServerOptions())
        counts = asyncio.run(answer_all(app, read_lines(io.BytesIO("\n".join(lines).encode())), output, max_concurrency=3))
        output.finish()
    found = {one["custom_id"]: one for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert (counts.answered, counts.failed) == (3, 2) and len(found) == 5
    with server.client() as client:
        for place, (url, body) in enumerate(bodies):
            response = found[str(place)]["response"]
            over_http = client.post(url, json=body)
            assert response["status_code"] == over_http.status_code
            for name in ("choices", "error", "object"):
                assert response["body"].get(name) == over_http.json().get(name), (place, name)
