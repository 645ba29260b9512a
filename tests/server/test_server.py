"""The server as a client meets it, over a real socket, with the bundled model: what it answers is what the model says.

Every test must leave the engine empty.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.growing import GrowingRequest
from jaxpaged.host.request import SamplingParams
from jaxpaged.server.guard import OPEN_PATHS
from jaxpaged.server.options import ServerOptions

for name in ("fastapi", "uvicorn", "httptools", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser  # noqa: E402
from running import Running, is_empty, new_llm, running, wait_until  # noqa: E402

MESSAGES = [{"role": "user", "content": "Sort these words: pear, apple, fig"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
GREEDY = {"temperature": 0, "max_tokens": 24}


def post(server: Running, path: str, body: Any, *, status: int = 200, **headers: str) -> dict[str, Any]:
    with server.client(**headers) as client:
        answer = client.post(path, json=body) if not isinstance(body, bytes) else client.post(path, content=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    return answer.json()


def events(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream; [DONE] is the last line."""
    with server.client() as client, client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def put_together(found: list[dict[str, Any]], *, is_chat: bool) -> dict[int, dict[str, Any]]:
    """What the chunks of each choice add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            one = choices.setdefault(choice["index"], {"text": "", "finish_reason": None, "calls": {}, "logprobs": []})
            assert one["finish_reason"] is None, "a chunk after the last"
            delta = choice["delta"] if is_chat else choice
            one["text"] += delta.get("content" if is_chat else "text") or ""
            for call in delta.get("tool_calls", ()):
                kept = one["calls"].setdefault(call["index"], {"id": call.get("id"), "name": "", "arguments": ""})
                kept["name"] += call["function"].get("name", "")
                kept["arguments"] += call["function"]["arguments"]
            if choice.get("logprobs"):
                one["logprobs"] += choice["logprobs"]["content" if is_chat else "token_logprobs"]
            one["finish_reason"] = choice["finish_reason"]
    return choices


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_model_says_streamed_or_not(server: Running) -> None:
    options = {"n": 2, "temperature": 0.8, "seed": 5, "max_tokens": 20, "stop": ["zzz"], "logprobs": 2}
    whole = post(server, "/v1/completions", {"prompt": ["One day", "A dog"], **options})
    pieces = events(server, "/v1/completions", {"prompt": ["One day", "A dog"], **options})

    async def direct() -> list[str]:
        texts = []
        for prompt in ("One day", "A dog"):
            params = SamplingParams(n=2, temperature=0.8, seed=5, max_tokens=20)
            async for output in server.llm.generate(prompt, params):
                last = output
            texts += [one.text for one in last.outputs]
        return texts

    texts = [choice["text"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3] and len(set(texts)) > 2
    assert texts == asyncio.run(direct())
    choices = put_together(pieces, is_chat=False)
    assert [choices[index]["text"] for index in range(4)] == texts
    assert [choices[index]["finish_reason"] for index in range(4)] == [one["finish_reason"] for one in whole["choices"]]
    assert [choices[index]["logprobs"] for index in range(4)] == [one["logprobs"]["token_logprobs"] for one in whole["choices"]]
    assert whole["usage"]["completion_tokens"] == sum(len(one["logprobs"]["tokens"]) for one in whole["choices"])
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]


def test_a_chat_is_the_same_streamed_or_not(server: Running) -> None:
    body = {"messages": MESSAGES, **GREEDY, "n": 2, "logprobs": True, "top_logprobs": 2, "model": "demo"}
    whole = post(server, "/v1/chat/completions", body)
    pieces = events(server, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    choices = put_together(pieces, is_chat=True)
    for choice in whole["choices"]:
        one = choices[choice["index"]]
        assert (one["text"], one["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])
        assert one["logprobs"] == choice["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in one["logprobs"])
        named = b"".join(bytes(token["bytes"]) for token in one["logprobs"]).decode()
        assert named.startswith(one["text"])  # the token that ends it has a name too
    usage = {name: count for name, count in pieces[-1]["usage"].items() if name != "prompt_tokens_details"}
    assert pieces[-1]["choices"] == [] and usage.items() <= whole["usage"].items()
    assert all(chunk["usage"] is None for chunk in pieces[:-1]) and len({chunk["id"] for chunk in pieces}) == 1


def test_echo_with_logprobs_scores_a_text(server: Running) -> None:
    """As lm-eval asks: the log-probabilities of prompt tokens, max_tokens 0 among it."""
    text = "One day Omar and Anna went to the station."
    token_ids = post(server, "/tokenize", {"prompt": text})["tokens"]
    for prompt in (text, token_ids):
        alone, one = (
            post(
                server, "/v1/completions", {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": count, "temperature": 0}
            )
            for count in (0, 1)
        )
        assert alone["choices"][0]["text"] == text and one["choices"][0]["text"].startswith(text)
        found = alone["choices"][0]["logprobs"]
        assert len(found["tokens"]) == len(token_ids) == len(one["choices"][0]["logprobs"]["tokens"]) - 1
        assert found["token_logprobs"][0] is None and all(value <= 0 for value in found["token_logprobs"][1:])
        assert "".join(found["tokens"]) == text and found["text_offset"] == [
            sum(map(len, found["tokens"][:place])) for place in range(len(token_ids))
        ]
    pieces = events(server, "/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0})
    whole = post(server, "/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0})
    assert put_together(pieces, is_chat=False)[0]["text"] == whole["choices"][0]["text"]
    assert put_together(pieces, is_chat=False)[0]["logprobs"] == whole["choices"][0]["logprobs"]["token_logprobs"]


def test_fields_of_sampling_arrive(server: Running) -> None:
    base = {"prompt": "One day", "temperature": 0, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    plain = post(server, "/v1/completions", base)["choices"][0]
    first = plain["token_ids"][0]
    assert len(plain["token_ids"]) == 12 and plain["prompt_token_ids"]
    changed = {
        "logit_bias": {str(first): -100},
        "allowed_token_ids": [first],
        "stop_token_ids": [first],
        "stop": plain["text"][:6],
        "min_p": 1.0,
        "bad_words": [plain["text"].split()[0]],
        "structured_outputs": {"choice": ["apple", "fig"]},
        "response_format": {"type": "json_object"},
        "max_tokens": 3,
    }
    for name, value in changed.items():
        options = {**base, name: value, **({"temperature": 2.0} if name == "min_p" else {})}
        one = post(server, "/v1/completions", options)["choices"][0]
        assert (one["token_ids"] == plain["token_ids"]) == (name == "min_p"), name
    one = post(server, "/v1/completions", {**base, "stop_token_ids": [first]})["choices"][0]
    assert (one["finish_reason"], one["stop_reason"]) == ("stop", first)
    answers = [post(server, "/v1/completions", {**base, "temperature": 1.5, "seed": seed}) for seed in (3, 3, 4)]
    seeds = [answer["choices"][0]["text"] for answer in answers]
    assert seeds[0] == seeds[1] != seeds[2]
    beams = post(server, "/v1/completions", {"prompt": "One day", "use_beam_search": True, "n": 2, "max_tokens": 6})
    assert len({choice["text"] for choice in beams["choices"]}) == 2


def test_bytes_of_logprobs_are_those_of_the_text(server: Running) -> None:
    """OpenAI: bytes of tokens are there to be put together where a character is several tokens."""
    asked = [{"role": "user", "content": "What is bear in German?"}]
    body = {"messages": asked, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    choice = post(server, "/v1/chat/completions", body)["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "Bär" and any("\ufffd" in token["token"] for token in tokens)
    for told in (tokens, [token["top_logprobs"][0] for token in tokens]):
        assert b"".join(bytes(token["bytes"]) for token in told) == "Bär<|im_end|>".encode()


def test_a_strict_schema_has_closed_objects(server: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    [comma] = post(server, "/tokenize", {"prompt": ","})["tokens"]
    said = {}
    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}}
        body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 100, "response_format": form}
        body["logit_bias"] = {str(comma): 100}  # wherever one is allowed, it comes
        said[strict] = post(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert set(json.loads(said[True])) == {"n"} and "," in said[False]
    form["json_schema"]["strict"] = "yes"
    assert "strict" in post(server, "/v1/chat/completions", body, status=400)["error"]["message"]


def test_structured_outputs_have_their_form(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    body = {"messages": MESSAGES, "temperature": 1, "max_tokens": 100, "seed": 1, "response_format": form}
    whole = post(server, "/v1/chat/completions", body)["choices"][0]
    found = json.loads(whole["message"]["content"])
    assert whole["finish_reason"] == "stop" and set(found) == {"name", "age"} and 0 <= found["age"] <= 9
    pieces = events(server, "/v1/chat/completions", body)
    assert put_together(pieces, is_chat=True)[0]["text"] == whole["message"]["content"]


@pytest.mark.parametrize("choice", ["auto", "required", "none", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_are_called_streamed_or_not(server: Running, choice: Any) -> None:
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    body = {"messages": asked, "tools": [WEATHER], "tool_choice": choice, "temperature": 0, "max_tokens": 60}
    body["parallel_tool_calls"] = False
    whole = post(server, "/v1/chat/completions", body)["choices"][0]
    streamed = put_together(events(server, "/v1/chat/completions", body), is_chat=True)[0]
    calls = whole["message"].get("tool_calls", [])
    kept = [(call["name"], call["arguments"]) for call in streamed["calls"].values()]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == kept
    assert streamed["finish_reason"] == whole["finish_reason"] and streamed["text"] == (whole["message"]["content"] or "")
    if choice == "none":
        assert not calls
    else:
        assert len(calls) == 1 and calls[0]["id"] and json.loads(kept[0][1])
        assert whole["finish_reason"] == ("stop" if isinstance(choice, dict) else "tool_calls")
        if choice != "auto":  # what a grammar guarantees
            assert kept[0][0] == "get_weather" and json.loads(kept[0][1])["city"] in ("Paris", "Oslo")
    said = {"role": "assistant", **{name: whole["message"].get(name) for name in ("content", "tool_calls")}}
    if calls:
        told = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"}
        post(server, "/v1/chat/completions", {"messages": [*asked, said, told], "tools": [WEATHER], **GREEDY})


def test_states_and_texts(server: Running) -> None:
    with server.client() as client:
        for path in ("/live", "/health", "/ready", "/version", "/v1/models", "/v1/models/demo", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        schema = client.get("/openapi.json").json()
        assert {"/v1/chat/completions", "/v1/completions"} <= schema["paths"].keys()
    text = "One day, a small dog. Grüße 日本語"
    found = post(server, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 1024
    assert post(server, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": text}
    chat = post(server, "/tokenize", {"messages": MESSAGES})
    usage = post(server, "/v1/chat/completions", {"messages": MESSAGES, **GREEDY})["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    again = post(server, "/v1/chat/completions", {"messages": MESSAGES * 9, **GREEDY})["usage"]
    again = post(server, "/v1/chat/completions", {"messages": MESSAGES * 9, **GREEDY})["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] > 16
    assert post(server, "/reset_prefix_cache", {}) == {"success": True}
    again = post(server, "/v1/chat/completions", {"messages": MESSAGES * 9, **GREEDY})["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 0


def test_responses_say_what_the_chat_says_streamed_or_not(server: Running) -> None:
    """Every event and object is of the openai package's types, extra fields aside."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        options: dict[str, Any] = {"model": "demo", "temperature": 0, "max_output_tokens": 12, "instructions": "Be kind."}
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello, who are you?"}]
        chat = client.chat.completions.create(messages=messages, model="demo", temperature=0, max_tokens=12)  # type: ignore[arg-type]
        text = chat.choices[0].message.content
        as_list = [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello, who "}, {"type": "text", "text": "are you?"}]}
        ]
        for given in ("Hello, who are you?", as_list):
            whole = client.responses.create(input=given, **options)  # type: ignore[call-overload]
            assert whole.output_text == text and whole.object == "response"
            assert whole.usage.input_tokens == chat.usage.prompt_tokens and whole.usage.output_tokens == 12
            assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
            assert whole.model_extra["store"] is False
        events = list(client.responses.create(input="Hello, who are you?", stream=True, **options))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        head = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
        tail = ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
        assert (kinds[:4], kinds[-4:]) == (head, tail) and set(kinds[4:-4]) == {"response.output_text.delta"}
        assert "".join(event.delta for event in events[4:-4]) == text == events[-4].text == events[-1].response.output_text
        assert events[-1].response.usage == whole.usage
        for event in events:
            type(event).model_validate(event.to_dict(), strict=False)
        # The client's own way of putting a stream together, and an answer that ends by itself.
        with client.responses.stream(input="x", model="demo", text={"format": CHOICE_FORMAT}) as stream:
            done = stream.get_final_response()
        assert done.status == "completed" and json.loads(done.output_text)["a"] in ("b", "c")


CHOICE_FORMAT: Any = {
    **{"type": "json_schema", "name": "x", "strict": True},
    "schema": {
        **{"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"], "additionalProperties": False},
    },
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("tools", [{"type": "web_search"}]), ("previous_response_id", "resp_1"), ("store", True), ("background", True)),
        *(("reasoning", {"effort": "low"}), ("truncation", "auto"), ("input", []), ("input", 5), ("input", [{"role": "boss"}])),
        *(("input", [{"type": "function_call_output"}]), ("max_output_tokens", 0), ("text", {"format": {"type": "xml"}})),
        *(("input", [{"role": "user", "content": [{"type": "input_image"}]}]), ("timeout", 0), ("n", 2), ("temperature", -1)),
    ],
)
def test_what_responses_do_not_serve_is_refused_by_name(server: Running, field: str, value: Any) -> None:
    with server.client() as client:
        answer = client.post("/v1/responses", json={"input": "x", field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


def test_embeddings_are_of_length_1_and_the_same_however_they_are_asked(server: Running) -> None:
    openai = pytest.importorskip("openai")
    texts = ["One day", "a small dog went to the garden"]
    ids = [post(server, "/tokenize", {"prompt": text})["tokens"] for text in texts]
    size = server.llm.model_config.hidden_size
    for kind in ("last", "mean"):
        whole = post(server, "/v1/embeddings", {"input": texts, "pooling_type": kind})
        vectors = [one["embedding"] for one in whole["data"]]
        assert [one["index"] for one in whole["data"]] == [0, 1] and [len(one) for one in vectors] == [size, size]
        assert [round(sum(x * x for x in one), 5) for one in vectors] == [1.0, 1.0]
        assert whole["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
        for given, expected in ((ids, vectors), (ids[0], vectors[:1]), (texts[0], vectors[:1])):
            found = post(server, "/v1/embeddings", {"input": given, "pooling_type": kind, "dimensions": size})["data"]
            assert [one["embedding"] for one in found] == [pytest.approx(one, abs=1e-5) for one in expected]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:  # it asks for base64
        found = client.embeddings.create(input=texts, model="demo", extra_body={"pooling_type": "mean"})
        assert [one.embedding for one in found.data] == [pytest.approx(one, abs=1e-6) for one in vectors]
        for field, value in {
            **{"dimensions": 5, "encoding_format": "hex", "input": [], "pooling_type": "cls", "normalize": 1, "timeout": -1},
        }.items():
            with pytest.raises(openai.BadRequestError) as refused:
                client.post("/embeddings", body={"input": "x", field: value}, cast_to=object)
            assert refused.value.param == field
        with pytest.raises(openai.BadRequestError, match=r"prompts\[1\]") as refused:
            client.embeddings.create(input=["x", "a " * 2000], model="demo")
        assert (refused.value.param, refused.value.code) == ("input", "context_length_exceeded")
    wait_until(lambda: is_empty(server.llm))


def test_what_operators_ask(server: Running, model: AsyncLLM, tmp_path: Path) -> None:
    with server.client() as client:
        assert client.get("/ping").status_code == client.post("/ping").status_code == 200
        assert client.get("/load").json() == {"server_load": 0}
        known = client.get("/tokenizer_info").json()
        assert known["chat_template"] and known["eos_token"] and known["model_max_length"] == 1024
        assert client.post("/start_profile").status_code == 404, "where no folder is configured there is no such route"
    with running(model, profiler_dir=str(tmp_path / "traces")) as other, other.client() as client:
        assert client.post("/stop_profile").status_code == 409
        assert client.post("/start_profile").json() == {"success": True}
        twice = client.post("/start_profile")
        assert twice.status_code == 409 and str(tmp_path) not in twice.text
        post(other, "/v1/completions", {"prompt": "One day", "max_tokens": 4})
        assert client.post("/stop_profile").json() == {"success": True}
    assert list((tmp_path / "traces").rglob("*.xplane.pb"))


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_openai_client_is_at_home(server: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert client.completions.create(prompt="One day", extra_body={"top_k": 1}, model="demo", max_tokens=4).choices[0].text
    assert [one.id for one in client.models.list()] == ["demo"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=MESSAGES, model="demo", temperature=-1)
    assert refused.value.param == "temperature" and refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=MESSAGES, model="gpt-4")
    client.close()

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(client.chat.completions.create(messages=MESSAGES, **options) for _ in range(12)))
        return [answer.choices[0].message.content for answer in answers]

    assert set(asyncio.run(many())) == {text}


# --- what is refused -------------------------------------------------------------------------------------------------

HUGE = 10**30
BAD_SAMPLING = {
    "temperature": [-1, "1", True, [], 1e6, HUGE], "top_p": [0, 1.1, "x", True, -0.1], "top_k": [-2, 1.5, "5", True, 2**40],
    "min_p": [-1, 2, "0"], "n": [0, -1, 10**9, 1.5, True, "2", 65], "seed": [2**64, 1.5, "7", True],
    "max_tokens": [-1, 10**12, 2.5, "8", True], "min_tokens": [-1, "1", 17], "presence_penalty": [3, "1"],
    "frequency_penalty": [-3, True], "repetition_penalty": [0, -1, "2"], "stop": [5, [""], [1], ["x"] * 65, ["x" * 300]],
    "stop_token_ids": ["5", [-1], [1.5], [True], [2**31], [10**6]],
    "logit_bias": [5, {"x": 1}, {"-1": 1}, {"5": 1e9}, {"9999999": 1}],
    "allowed_token_ids": [[], [-1], [10**6], "a"], "bad_words": ["x", [""], [5]], "ignore_eos": ["true", 1],
    "skip_special_tokens": [1], "stream": ["true", 1], "stream_options": [{"include_usage": True}, 5],
    "model": [5, "x" * 1000], "structured_outputs": [5, {}, {"regex": "("}, {"json": "{", "x": 1}, {"json": {"type": "x"}}],
    "response_format": [
        "json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 5}},
    ],
    "priority": [2**63, "1", 1.5], "cache_salt": ["", 5, "x" * 2000], "prompt_logprobs": [-1, 21, 10**6, True], "request_id": [5],
    "length_penalty": [50, "x", 2], "early_stopping": ["soon"], "use_beam_search": ["yes"],
}  # fmt: skip
BAD_COMPLETION = {
    "prompt": [5, [], [[]], [-1], [1.5], [True], [10**6], ["a", 5], [[1], "a"], {"a": 1}, [1] * 2000, ["a"] * 65, ["a", [1]], ""],
    "best_of": [0, 65, "2"], "logprobs": [-1, 21, 10**6, True, "1"], "suffix": ["end", 5], "echo": ["x"],
    "add_special_tokens": [5],
}  # fmt: skip
BAD_CHAT = {
    "messages": [
        5, [], ["x"], [{}], [{"role": "boss", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "tool_calls": 5}], [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
    ],
    "logprobs": [1, "true"], "top_logprobs": [3], "tools": [5, [5], [{}], [{"type": "function", "function": {"name": ""}}]],
    "tool_choice": ["required", "x", 5, {"type": "function", "function": {"name": "x"}}], "parallel_tool_calls": [1],
    "chat_template_kwargs": [5, {"messages": []}, {"_x": 1}], "max_completion_tokens": [0, -1, "5"],
    "continue_final_message": ["x"], "add_generation_prompt": [0],
}  # fmt: skip


def test_every_bad_value_is_a_400_that_names_its_field(server: Running) -> None:
    tables = (
        ("/v1/completions", {"prompt": "One day", "max_tokens": 2}, BAD_SAMPLING | BAD_COMPLETION),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}, BAD_SAMPLING | BAD_CHAT),
    )
    count = 0
    with server.client() as client:
        for path, base, table in tables:
            for name, values in table.items():
                for value in values:
                    answer = client.post(path, json={**base, name: value})
                    is_unknown_model = name == "model" and isinstance(value, str)
                    told = (path, name, str(value)[:80], answer.status_code, answer.text[:300])
                    assert answer.status_code == (404 if is_unknown_model else 400), told
                    error = answer.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) <= 500, told
                    assert error["param"] == name, told
                    assert error["type"] == ("not_found_error" if is_unknown_model else "invalid_request_error"), told
                    count += 1
    assert count > 200


def test_bodies_that_are_no_json_of_ours(server: Running) -> None:
    valid = b'{"prompt": "One day", "max_tokens": 2'
    bodies = [
        *(
            b"",
            b"{",
            b"[]",
            b"5",
            b"null",
            b'"x"',
            valid,
            valid + b"} x",
            valid + b"}{}",
            b"\xff\xfe{}",
            b"\xef\xbb\xbf" + valid + b"}",
        ),
        *(valid + b', "temperature": ' + value + b"}" for value in (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"9" * 5000)),
        *(valid + b', "max_tokens": 3}', valid + b', "logit_bias": {"5": 1, "5": 2}}', b"[" * 100_000, b'{"a":' * 5000),
        *(valid + b', "temprature": 1}', valid + b', "\\ud800": 1}', b'{"prompt": "\\ud800"}', b'{"prompt": "x\\u0000\\udfff"}'),
    ]
    with server.client() as client:
        for body in bodies:
            answer = client.post("/v1/completions", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["code"], (body[:60], answer.text)
        assert "did you mean 'temperature'" in client.post("/v1/completions", content=valid + b', "temprature": 1}').text
        assert client.post("/v1/completions", content=valid + b', "user": "\\ud800"}').status_code == 200
        for headers, status in (
            ({"content-type": "text/plain"}, 415),
            ({"content-encoding": "gzip"}, 415),
            ({"content-type": "application/json; charset=latin-1"}, 415),
            ({"x-filler": "y" * 65_000, "x-more": "y" * 1000}, 431),
        ):
            assert client.post("/v1/completions", content=valid + b"}", headers=headers).status_code == status, headers
        large = client.post("/v1/completions", content=b" " * (9 << 20))
        assert large.status_code == 413 and large.json()["error"]["code"] == "too_large"
        pieces = client.post("/v1/completions", content=(b" " * 2**20 for _ in range(10)))
        assert pieces.status_code == 413
        assert client.get("/v1/completions").status_code == 405 and client.post("/nowhere").status_code == 404
        assert client.options("/ping").headers["allow"] == "GET, POST" and client.put("/health").headers["allow"] == "GET"
        odd = client.post("/v1/responses", json={"input": "x", "top_logprobs": False}).json()["error"]
        assert odd["param"] == "top_logprobs" and "got False" in odd["message"], "a bool is no number"
        paths = client.get("/openapi.json").json()["paths"]
        assert set(paths["/ping"]) == {"get", "post"}
        kinds = {path: set(next(iter(paths[path].values()))["responses"]["200"]["content"]) for path in paths}
        streamed = {path for path, found in kinds.items() if "text/event-stream" in found}
        assert streamed == {"/v1/chat/completions", "/v1/completions", "/v1/responses"} and kinds["/metrics"] == {"text/plain"}
        assert client.get("/v1/models/other").status_code == 404


def test_request_ids_are_given_back_in_a_header_alone(server: Running) -> None:
    with server.client() as client:
        assert client.get("/live", headers={"x-request-id": "a.B-1_"}).headers["x-request-id"] == "a.B-1_"
        for bad in ("x" * 129, "a b", "<x>", ""):
            assert client.get("/live", headers={"x-request-id": bad}).headers["x-request-id"] not in (bad, "")
        body = {"prompt": "One day", "max_tokens": 3, "temperature": 0, "request_id": "same"}

        def one(_: int) -> tuple[str, str]:
            answer = client.post("/v1/completions", json=body, headers={"x-request-id": "same"})
            assert answer.headers["x-request-id"] == "same"
            return answer.json()["id"], answer.json()["choices"][0]["text"]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(pool.map(one, range(64)))
    assert len({id for id, _ in found}) == 64 and len({text for _, text in found}) == 1


def test_a_fault_of_ours_is_a_500_that_says_nothing_and_the_next_is_served(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self, event, now):
        raise ZeroDivisionError("/home/secret")

    with monkeypatch.context() as patch:
        patch.setattr(GrowingRequest, "record", faulty)
        error = post(server, "/v1/completions", {"prompt": "One day"}, status=500)["error"]
        assert error["code"] == "internal_error" and "secret" not in str(error) and "Zero" not in str(error)
        last = events(server, "/v1/completions", {"prompt": "One day"})[-1]
        assert last["error"]["code"] == "internal_error"
    post(server, "/v1/completions", {"prompt": "One day"})


# --- who leaves, who may not come in, the end ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stream", "whole"])
def test_a_client_that_leaves_frees_its_pages(server: Running, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = server.engine.runner.submit
    # All of it would take ten seconds.
    monkeypatch.setattr(server.engine.runner, "submit", lambda plan: time.sleep(0.01) or submit(plan))
    for trial in range(8):
        body = json.dumps({"prompt": "One day", "max_tokens": 900, "ignore_eos": True, "stream": how == "stream"}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(server.server.servers[0].sockets[0].getsockname()) as client:
            client.sendall(head.encode() + body)
            wait_until(lambda: server.engine.pool.num_used > 0)
            if how == "stream" and trial % 2:
                client.recv(300)
        left_s = time.monotonic()
        wait_until(lambda: is_empty(server.llm), 5)
        assert time.monotonic() - left_s < 2


def test_a_key_protects_everything_but_the_open_paths(model: AsyncLLM) -> None:
    assert OPEN_PATHS == ("/live", "/ui")
    keys = ("k" * 16, "another-key-of-20-chars")
    with running(model, api_key=keys) as server:
        routes = {route.path for route in server.server.config.app.routes}
        assert len(routes) > 10
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Bearer {keys[0][:-1]}"},
            {"authorization": keys[0]},
        ):
            with server.client(**headers) as client:
                for path in (*routes, "/nowhere", "/live/../v1/models", "//live", "/LIVE", "/live/"):
                    for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT", "PROPFIND"):
                        answer = client.request(method, path)
                        expected = {200, 405} if path in OPEN_PATHS else {401}
                        assert answer.status_code in expected, (method, path, answer.status_code)
        for key in keys:
            with server.client(authorization=f"Bearer {key}") as client:
                assert client.get("/v1/models").status_code == 200
        # R45: what one tenant has asked is in nobody else's cache.
        body, cached = {"messages": MESSAGES * 9, **GREEDY}, []
        for key in (keys[0], keys[0], keys[1], keys[1]):
            with server.client(authorization=f"Bearer {key}") as client:
                usage = client.post("/v1/chat/completions", json=body).json()["usage"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == cached[2] == 0 and cached[1] == cached[3] > 16


def test_a_full_queue_is_a_429_and_draining_ends_what_runs() -> None:
    llm = new_llm(max_queued_requests=2, max_queued_tokens=4000)
    served = Running(llm, ServerOptions(drain_s=60))
    try:
        with served.client() as client, concurrent.futures.ThreadPoolExecutor(24) as pool:
            body = {"prompt": "One day", "max_tokens": 30, "ignore_eos": True, "temperature": 0, "n": 2}
            answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(24)))
            refused = [answer for answer in answers if answer.status_code == 429]
            assert refused and {answer.status_code for answer in answers} == {200, 429}
            for answer in refused:
                assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "queue_full"
            wait_until(lambda: is_empty(llm))
            # One that takes longer than it may, and one that does not.
            gate = llm._engine.runner.submit
            llm._engine.runner.submit = lambda plan: time.sleep(0.02) or gate(plan)
            long = pool.submit(
                lambda: events(served, "/v1/completions", {"prompt": "One", "max_tokens": 900, "ignore_eos": True})
            )
            wait_until(lambda: llm._engine.num_generation_tokens > 0 and llm.num_unfinished == 1)
            short = pool.submit(lambda: client.post("/v1/completions", json={"prompt": "One", "max_tokens": 2}))
            wait_until(lambda: llm.num_unfinished == 2 or short.done())
            served.server.handle_exit(15, None)
            wait_until(lambda: not llm.is_ready)
            for path in ("/ready", "/v1/completions"):
                answer = client.get(path) if path == "/ready" else client.post(path, json={"prompt": "x"})
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
            assert short.result(10).status_code == 200
            assert not long.done()
            clock = llm.clock
            llm.clock = lambda: clock() + 61  # the time to drain is over
            assert long.result(10)[-1]["error"]["code"] == "shutting_down"
        served.thread.join(10)
        assert not served.thread.is_alive()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), 1)
    finally:
        served.server.should_exit = True
        served.thread.join(10)
        llm.shutdown()


def test_the_page_chats_as_the_model_does(server: Running, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the page is in `test_ui`."""
    step = server.engine.step
    # Or it is over before it is seen.
    monkeypatch.setattr(server.engine, "step", lambda *given, **how: (time.sleep(0.03), step(*given, **how))[1])
    prompt = "<img src=x onerror=alert(1)> Sort these words: pear, apple, fig"
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 40}
    expected = post(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    with browser.page() as page:
        page.open(f"{server.url}/ui")
        page.until("document.getElementById('status').textContent === 'live'")
        page.run("document.getElementById('temperature').value = 0; document.getElementById('max-tokens').value = 40")
        page.run("seen = new Set(); setInterval(() => seen.add(document.getElementById('messages').textContent), 5); 0")
        page.type("#prompt", prompt)
        page.press("Enter")
        page.until("document.querySelector('.message .note') !== null")
        assert (page.text("[data-role=user] p"), page.text("[data-role=assistant] p")) == (prompt, expected)
        assert page.run("document.querySelectorAll('#messages img').length") == 0
        assert page.run("seen.size") > 4, "it came all at once"
        # To stop is to end the request; and nothing that was said is in what the page is told of the engine.
        page.run("document.getElementById('max-tokens').value = 400")
        page.type("#prompt", "Tell me a long story")
        page.press("Enter")
        wait_until(lambda: bool(server.engine.scheduler.running))
        with server.client() as client:
            assert "long story" not in client.get("/ui/state").text
        page.run("document.getElementById('send').click()")
        page.until("document.getElementById('send').textContent === 'Send'")
        wait_until(lambda: is_empty(server.llm))
        assert page.problems == []
