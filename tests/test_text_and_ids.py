"""Laws of text: the same ids and chats as transformers, and streamed text that adds up to the decoded whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import texts
from text_model import KINDS, write_tokenizer

from jaxpaged.checkpoint import CheckpointError
from jaxpaged.demo.corpus import CHAT_TEMPLATE as DEMO_TEMPLATE
from jaxpaged.host.request import RequestError
from jaxpaged.templates.process import MAX_RENDERED
from jaxpaged.tokenizer import Tokenizer

TEXTS = ["", "hello world", "  two  spaces ", "Grüße 日本語 😀!", "a\nb\tc", "<eos> and </s>", "\x00", "e\u0301", "lo lo lo" * 50]


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def ours(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


# --- ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(ours: Tokenizer, theirs, text: str):
    for add_special_tokens in (True, False):
        assert ours.encode(text, add_special_tokens) == theirs.encode(text, add_special_tokens=add_special_tokens)
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs)


def test_tokens_of_the_config_alone_are_added_as_transformers_does(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    added = {"321": {"content": "<b>", "special": True}, "320": {"content": "<a>", "special": False, "normalized": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added, "pad_token": "<pad>"}))
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = ours.encode("one<a><b><pad>day")
    assert ids == theirs.encode("one<a><b><pad>day")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "one<a>day"


def test_a_lone_surrogate_is_refused_in_one_line(ours: Tokenizer):
    with pytest.raises(RequestError, match="Unicode") as error:
        ours.encode("\ud800")
    assert "\n" not in str(error.value)


# --- text that grows ---------------------------------------------------------------------------------------------


def test_bytes_of_tokens_are_those_of_the_text(ours: Tokenizer):
    text = "日本語é😀"
    token_ids = ours.encode(text, add_special_tokens=False)
    names = [ours.decode([token_id], False) for token_id in token_ids]
    found = [ours.token_bytes(token_id) for token_id in token_ids]
    assert any("\ufffd" in name for name in names), "no token here is a part of a character"
    assert all(said is not None for name, said in zip(names, found, strict=True) if "\ufffd" in name)
    assert b"".join(said or name.encode() for name, said in zip(names, found, strict=True)).strip() == text.encode()
    assert ours.token_bytes(ours.special_tokens and ours.token_id(next(iter(ours.special_tokens.values())))) is None
    assert ours.token_bytes(10**6) is None


def test_streamed_text_is_the_decoded_text(ours: Tokenizer):
    assert texts.streamed(ours, 10_000) == 10_000
    assert texts.vocabulary(ours) == 25 * (ours.max_token_id + 3)


def test_no_piece_ends_inside_a_character(ours: Tokenizer):
    text = "日本語😀é" * 3
    growing = ours.detokenizer()
    pieces = [growing.add(token_id) for token_id in ours.encode(text, add_special_tokens=False)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + growing.finish() == text


def test_an_incomplete_character_comes_out_at_the_end(ours: Tokenizer):
    ids = ours.encode("😀", add_special_tokens=False)[:-1]
    growing = ours.detokenizer()
    assert "".join(growing.add(token_id) for token_id in ids).strip() == ""
    assert growing.finish().strip("\ufffd ") == ""
    assert growing.text == ours.decode(ids)
    assert growing.finish() == ""


# --- chat --------------------------------------------------------------------------------------------------------

LLAMA3 = (
    "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n    {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}"
)
BLOCKS = """\
{% set ns = namespace(found=false, count=0) %}
{% for message in messages %}
    {% if message.role == 'user' %}
        {% set ns.count = ns.count + 1 %}
U{{ ns.count }}: {{ message.content | tojson }} {{ message | tojson(indent=2) }}
    {% else %}
A: {% generation %}{{ message.content }}{% endgeneration %}
    {% endif %}
{% endfor %}
{{ {'b': 1, 'a': '<é>'} | tojson }} {{ dict(x=1).x }} {{ eos_token }} {{ tools is none }} {{ extra | default('no') }}
{% if add_generation_prompt %}A:{% endif %}
"""
CHATS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "a <b> \"c\" 'd' 😀\n"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
]


@pytest.mark.parametrize("template", [LLAMA3, BLOCKS, DEMO_TEMPLATE], ids=["llama3", "blocks", "demo"])
@pytest.mark.parametrize("messages", CHATS, ids=["one", "system", "turns"])
def test_chats_are_those_of_transformers(ours: Tokenizer, theirs, template: str, messages: list[dict[str, str]]):
    for add_generation_prompt in (True, False):
        options = {"add_generation_prompt": add_generation_prompt, "chat_template": template}
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.apply_chat_template(messages, **options) == expected
    more = {"chat_template": template, "extra": {"x": [1, "é"]}, "tools": [{"type": "function", "function": {"name": "f"}}]}
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)
    assert ours.apply_chat_template(messages, **more) == expected


def test_the_template_file_wins_over_the_config(tmp_path: Path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert Tokenizer.load(tmp_path).apply_chat_template(CHATS[0]) == "file hello"


def test_a_list_of_templates_is_chosen_by_tools(tmp_path: Path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    path.write_text(json.dumps({"chat_template": templates}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template(CHATS[0]) == "plain"
    assert tokenizer.apply_chat_template(CHATS[0], tools=[{}]) == "tools"


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].missing.further }}", "missing"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "range"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{% include 'x' %}", "."),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% if %}", "."),
        (f"{{% for i in range(99999) %}}{'x' * 100}{{% endfor %}}", f"{MAX_RENDERED:,}"),
        ("{{ namespace(_x=1) }}", "_x"),
    ],
)
def test_what_a_template_does_wrong_is_one_line(ours: Tokenizer, template: str, problem: str):
    with pytest.raises(RequestError, match=problem) as error:
        ours.apply_chat_template(CHATS[0], chat_template=template)
    assert "\n" not in str(error.value) and str(error.value).startswith("chat template: ")


def test_a_template_cannot_change_the_messages_and_kwargs_cannot_replace_them(ours: Tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    ours.apply_chat_template(messages, chat_template="{% set m = messages[0] %}{{ m }}")
    assert messages == [{"role": "user", "content": "hello"}]
    with pytest.raises(RequestError, match="documents"):
        ours.apply_chat_template(messages, documents=[])


def test_a_template_sees_plain_values_only(ours: Tokenizer):
    class Content:
        called = False

        def call(self) -> str:
            Content.called = True
            return "called"

    messages = [{"role": "user", "content": Content()}]
    assert ours.apply_chat_template(messages, chat_template="{{ messages[0].content }}") == "<Content>"
    with pytest.raises(RequestError, match="call"):
        ours.apply_chat_template(messages, chat_template="{{ messages[0].content.call() }}")
    assert not Content.called


def test_without_a_template_the_error_says_so(directory: Path):
    with pytest.raises(RequestError, match="the model has no chat template"):
        Tokenizer(Tokenizer.load(directory).backend).apply_chat_template(CHATS[0])


# --- damaged files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "", "tokenizer.json: "),
        ("tokenizer.json", "{}", "tokenizer.json: "),
        ("tokenizer.json", '{"version": "1.0"', "tokenizer.json: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: got int"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: expected"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template: expected"),
        ("chat_template.jinja", "{% for %}", "chat template 'default'"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: str | bytes | None, problem: str):
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=problem) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_slow_tokenizer_alone_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"missing \(tokenizer.model alone is not supported"):
        Tokenizer.load(tmp_path)
