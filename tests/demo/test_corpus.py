"""The corpus is the same text everywhere, and every example passes the check that the model is scored by."""

import itertools
import json
from random import Random

import jinja2
import pytest

from jaxpaged.demo import corpus, skills, stories, words


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    def first(seed):
        return list(itertools.islice(corpus.documents(seed), 200))

    assert first("a") == first("a")
    assert first("a") != first("b")


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_every_example_passes_its_own_checker_and_no_other_answer_does(skill):
    for example in skills.held_out(skill, 200):
        assert example.skill == skill
        assert skills.is_right(example, example.answer + "\n")
        assert not skills.is_right(example, example.answer + "x")
        assert example.document.startswith(example.prompt)


def test_score_counts_exact_answers():
    answers = {example.prompt: example.answer for example in skills.held_out("order", 20)}
    assert skills.score(lambda prompts: [answers[prompt] for prompt in prompts], "order", 20) == 1.0
    assert skills.score(lambda prompts: ["" for _ in prompts], "order", 20) == 0.0


def test_an_unknown_skill_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="skill: got 'chess', expected one of copy, order"):
        skills.examples("chess", Random(0))


def test_json_answers_parse_and_tool_calls_hold_json():
    for example in skills.held_out("json", 100):
        assert isinstance(json.loads(example.answer), dict)
    calls = [example.answer for example in skills.held_out("tools", 100) if example.answer.startswith("<tool_call>")]
    assert calls
    for call in calls:
        assert set(json.loads(call.removeprefix("<tool_call>").removesuffix("</tool_call>"))) == {"name", "arguments"}


def test_a_story_is_about_what_was_asked_for():
    rng = Random(0)
    for _ in range(200):
        request, told = stories.asked_story(rng)
        asked = [word for word in (*words.NAMES, *words.ANIMALS, *words.PLACES) if word in request.strip(".").split()]
        assert all(word in told for word in asked)
        assert "{" not in told and " a apple" not in told


@pytest.fixture
def template():
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    # As transformers and vLLM define it; jinja's own would escape < and > for HTML.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(corpus.CHAT_TEMPLATE)


def test_the_chat_template_renders_what_the_model_was_trained_on(template):
    for skill in ("copy", "tools", "chat"):
        for example in skills.held_out(skill, 100):
            rendered = template.render(messages=list(example.messages), tools=list(example.tools), add_generation_prompt=True)
            assert rendered == example.prompt


def test_the_chat_template_takes_content_parts_and_argument_strings(template):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert template.render(messages=messages) == (
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n'
    )
