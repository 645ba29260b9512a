"""What the demo model is trained to do, one function per skill, and the score that any engine can be held to.

Knows the tasks and their only right answers. Refuses to know who answers: `score` takes any function from prompts to texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from jaxpaged.demo import words
from jaxpaged.demo.corpus import Example, Message, chat, tool_call
from jaxpaged.demo.stories import a

# --- copy --------------------------------------------------------------------------------------------------------

_PLAIN_WORDS = words.OBJECTS + words.ANIMALS + words.COLORS + words.PLACES + words.FOODS
_SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./#@"


def _sentence(rng: Random) -> str:
    kind = rng.randrange(4)
    color, thing, animal, place, name = (
        rng.choice(group) for group in (words.COLORS, words.OBJECTS, words.ANIMALS, words.PLACES, words.NAMES)
    )
    if kind == 0:
        return f"The {color} {animal} is in the {place}."
    if kind == 1:
        return f"{name} has {a(color)} {thing}."
    if kind == 2:
        return f"I saw {name} and {a(animal)} at the {place}!"
    return f"The {thing} is {color}, and the {rng.choice(words.OBJECTS)} is {rng.choice(words.COLORS)}."


def _foreign(rng: Random) -> str:
    pool = [form for forms in words.WORDS.values() for form in forms]
    return rng.choice((" ", " ", ", ", "")).join(rng.sample(pool, rng.randint(2, 5)))


def _random_text(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return _sentence(rng)
    if kind < 0.5:
        return " ".join(rng.choice(_PLAIN_WORDS) for _ in range(rng.randint(1, 9)))
    if kind < 0.65:
        return "".join(rng.choice(_SYMBOLS) for _ in range(rng.randint(3, 12)))
    if kind < 0.75:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 12)))
    if kind < 0.9:
        return _foreign(rng)
    return ", ".join(rng.choice(words.NAMES) for _ in range(rng.randint(2, 6)))


def copy(rng: Random) -> Example:
    text = _random_text(rng)
    form = rng.random()
    if form < 0.1:
        return chat("copy", f"Say this twice: {text}", f"{text} {text}")
    ask = rng.choice(
        ("Repeat after me: {}", "Repeat after me: {}", "Repeat: {}", "Copy this: {}", "Say: {}", "Repeat this text: {}")
    )
    return chat("copy", ask.format(text), text)


# --- order -------------------------------------------------------------------------------------------------------


def order(rng: Random) -> Example:
    kind = rng.randrange(7)
    if kind == 0:
        return _count(rng)
    if kind in (1, 2):
        numbers = rng.sample(range(1, rng.choice((10, 30, 100))), rng.randint(3, 6))
        falling = kind == 2 and rng.random() < 0.6
        ask = rng.choice(("Sort these numbers", "Put these numbers in order")) + (", largest first" if falling else "")
        return chat("order", f"{ask}: {_listed(numbers)}", _listed(sorted(numbers, reverse=falling)))
    pool = rng.choice((words.NAMES, words.ANIMALS, words.OBJECTS, words.COLORS))
    items = rng.sample(pool, rng.randint(3, 5))
    if kind in (3, 4):
        return chat("order", f"Sort these words from A to Z: {_listed(items)}", _listed(sorted(items)))
    if kind == 5:
        return chat("order", f"Reverse this list: {_listed(items)}", _listed(items[::-1]))
    place, at = rng.choice((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    return chat("order", f"What is the {place} word of this list? {_listed(items)}", items[at])


def _listed(items: list[Any]) -> str:
    return ", ".join(str(item) for item in items)


def _count(rng: Random) -> Example:
    low = rng.randint(1, 40)
    high = low + rng.randint(2, 12)
    if rng.random() < 0.3:
        return chat("order", f"Count down from {high} to {low}.", _listed(list(range(high, low - 1, -1))))
    return chat("order", f"Count from {low} to {high}.", _listed(list(range(low, high + 1))))


# --- arithmetic --------------------------------------------------------------------------------------------------


def _sum(rng: Random) -> tuple[str, int]:
    kind = rng.random()
    if kind < 0.2:
        left, right = rng.randint(0, 9), rng.randint(0, 9)
        return f"{left} + {right}", left + right
    if kind < 0.6:
        left, right = rng.randint(10, 99), rng.randint(10, 99)
        return f"{left} + {right}", left + right
    if kind < 0.85:
        right, left = sorted((rng.randint(0, 99), rng.randint(0, 99)))
        return f"{left} - {right}", left - right
    left, right = rng.randint(1, 10), rng.randint(1, 10)
    return f"{left} * {right}", left * right


def arithmetic(rng: Random) -> Example:
    kind = rng.random()
    if kind < 0.8:
        formula, value = _sum(rng)
        ask = rng.choice(("What is {}?", "What is {}?", "Compute {}.", "{} = ?", "How much is {}?"))
        return chat("arithmetic", ask.format(formula), f"{formula} = {value}")
    name, things = rng.choice(words.NAMES), rng.choice(words.COUNTED)
    had, change = rng.randint(2, 20), rng.randint(2, 20)
    if rng.random() < 0.5:
        question = f"{name} has {had} {things} and gets {change} more. How many {things} does {name} have now?"
        return chat("arithmetic", question, f"{had} + {change} = {had + change}, so {name} has {had + change} {things}.")
    had += change
    question = f"{name} has {had} {things} and gives away {change}. How many {things} does {name} have now?"
    return chat("arithmetic", question, f"{had} - {change} = {had - change}, so {name} has {had - change} {things}.")


# --- reading -----------------------------------------------------------------------------------------------------


def _owners(rng: Random) -> tuple[list[str], str, str]:
    count = rng.randint(2, 5)
    people, things = rng.sample(words.NAMES, count), rng.sample(words.OBJECTS, count)
    colors = [rng.choice(words.COLORS) for _ in things]
    told = [f"{name} has {a(color)} {thing}." for name, color, thing in zip(people, colors, things, strict=True)]
    at, kind = rng.randrange(count), rng.randrange(3)
    if kind == 0:
        return told, f"What does {people[at]} have?", f"{people[at]} has {a(colors[at])} {things[at]}."
    if kind == 1:
        return told, f"Who has the {things[at]}?", f"{people[at]} has the {things[at]}."
    return told, f"What color is the {things[at]}?", f"The {things[at]} is {colors[at]}."


def _places(rng: Random) -> tuple[list[str], str, str]:
    count = rng.randint(2, 5)
    people, places = rng.sample(words.NAMES, count), rng.sample(words.PLACES, count)
    told = [f"{name} went to the {place}." for name, place in zip(people, places, strict=True)]
    at = rng.randrange(count)
    if rng.random() < 0.5:
        return told, f"Where did {people[at]} go?", f"{people[at]} went to the {places[at]}."
    return told, f"Who went to the {places[at]}?", f"{people[at]} went to the {places[at]}."


def _hidden(rng: Random) -> tuple[list[str], str, str]:
    count = rng.randint(2, 5)
    things, places = rng.sample(words.OBJECTS, count), rng.sample(words.PLACES, count)
    told = [f"The {thing} is in the {place}." for thing, place in zip(things, places, strict=True)]
    at = rng.randrange(count)
    if rng.random() < 0.5:
        return told, f"Where is the {things[at]}?", f"The {things[at]} is in the {places[at]}."
    return told, f"What is in the {places[at]}?", f"The {things[at]} is in the {places[at]}."


def _jobs(rng: Random) -> tuple[list[str], str, str]:
    count = rng.randint(2, 4)
    people, jobs = rng.sample(words.NAMES, count), rng.sample(words.JOBS, count)
    cities, ages = rng.sample(words.CITIES, count), [rng.randint(5, 80) for _ in range(count)]
    told = [
        f"{name} is {age} years old, lives in {city} and works as {a(job)}."
        for name, age, city, job in zip(people, ages, cities, jobs, strict=True)
    ]
    at, kind = rng.randrange(count), rng.randrange(4)
    if kind == 0:
        return told, f"How old is {people[at]}?", f"{people[at]} is {ages[at]} years old."
    if kind == 1:
        return told, f"Where does {people[at]} live?", f"{people[at]} lives in {cities[at]}."
    if kind == 2:
        return told, f"Who is the {jobs[at]}?", f"{people[at]} is the {jobs[at]}."
    return told, f"What is the job of {people[at]}?", f"{people[at]} works as {a(jobs[at])}."


def reading(rng: Random) -> Example:
    told, question, answer = rng.choice((_owners, _owners, _places, _hidden, _jobs))(rng)
    text = " ".join(told)
    form = rng.random()
    if form < 0.25:
        return chat("reading", f"{text}\n\n{question}", answer)
    if form < 0.4:
        return chat("reading", f"Read this text and answer the question.\n\n{text}\n\nQuestion: {question}", answer)
    return chat("reading", f"{text} {question}", answer)


# --- json --------------------------------------------------------------------------------------------------------


def _person(rng: Random) -> tuple[str, dict[str, Any]]:
    name, age, city, job = rng.choice(words.NAMES), rng.randint(5, 80), rng.choice(words.CITIES), rng.choice(words.JOBS)
    if rng.random() < 0.5:
        return f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}
    return f"{name} is {age} years old and works as {a(job)}.", {"name": name, "age": age, "job": job}


def _stock(rng: Random) -> tuple[str, dict[str, Any]]:
    count, color, thing = rng.randint(2, 99), rng.choice(words.COLORS), rng.choice(words.COUNTED)
    return f"There are {count} {color} {thing}.", {"item": thing, "color": color, "count": count}


def _pet(rng: Random) -> tuple[str, dict[str, Any]]:
    owner, animal, hungry = rng.choice(words.NAMES), rng.choice(words.ANIMALS), rng.random() < 0.5
    text = f"{owner} has {a(animal)}, and it is {'' if hungry else 'not '}hungry."
    return text, {"owner": owner, "pet": animal, "hungry": hungry}


def _shopping(rng: Random) -> tuple[str, dict[str, Any]]:
    name, foods = rng.choice(words.NAMES), rng.sample(words.FOODS, rng.randint(2, 4))
    bought = ", ".join(a(food) for food in foods[:-1]) + f" and {a(foods[-1])}"
    return f"{name} bought {bought}.", {"name": name, "foods": foods}


def _weather(rng: Random) -> tuple[str, dict[str, Any]]:
    city, degrees, weather = rng.choice(words.CITIES), rng.randint(-20, 40), rng.choice(words.WEATHER)[0]
    return f"In {city} it is {weather} at {degrees} degrees.", {"city": city, "weather": weather, "degrees": degrees}


def json_answer(rng: Random) -> Example:
    text, value = rng.choice((_person, _person, _stock, _pet, _shopping, _weather))(rng)
    answer = json.dumps(value, ensure_ascii=False)
    keys = list(value)
    form = rng.randrange(3)
    if form == 0:
        return chat("json", f"Write as JSON with the keys {', '.join(keys[:-1])} and {keys[-1]}: {text}", answer)
    if form == 1:
        return chat("json", f"{text} Answer in JSON.", answer)
    return chat("json", f"Write as JSON: {text}", answer)


# --- tools -------------------------------------------------------------------------------------------------------

# name: description, arguments with their JSON types.
_TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "get_weather": ("Get the weather of a city", {"city": "string"}),
    "get_time": ("Get the time in a city", {"city": "string"}),
    "add": ("Add two numbers", {"a": "integer", "b": "integer"}),
    "search": ("Search for a text", {"query": "string"}),
    "send_message": ("Send a message to a person", {"to": "string", "text": "string"}),
    "set_lamp": ("Switch a lamp on or off", {"color": "string", "on": "boolean"}),
    "buy": ("Buy something", {"item": "string", "count": "integer"}),
    "translate": ("Translate a word", {"word": "string", "language": "string"}),
}


def tool_schema(name: str) -> dict[str, Any]:
    """The tool as an OpenAI client would send it."""
    description, arguments = _TOOLS[name]
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _tool_task(name: str, rng: Random) -> tuple[str, dict[str, Any], str, str]:
    """A request, the arguments of the call, what the tool returns and what the model then says."""
    city, person, color = rng.choice(words.CITIES), rng.choice(words.NAMES), rng.choice(words.COLORS)
    if name == "get_weather":
        weather, degrees = rng.choice(words.WEATHER)[0], rng.randint(-20, 40)
        ask = rng.choice(
            (f"What is the weather in {city}?", f"How is the weather in {city}?", f"What's the weather like in {city}?")
        )
        result = json.dumps({"weather": weather, "degrees": degrees})
        return ask, {"city": city}, result, f"It is {weather} in {city} at {degrees} degrees."
    if name == "get_time":
        time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        return (
            rng.choice((f"What time is it in {city}?", f"Tell me the time in {city}.")),
            {"city": city},
            time,
            f"It is {time} in {city}.",
        )
    if name == "add":
        left, right = rng.randint(100, 9999), rng.randint(100, 9999)
        return f"What is {left} + {right}?", {"a": left, "b": right}, str(left + right), f"{left} + {right} = {left + right}"
    if name == "search":
        query = f"{color} {rng.choice(words.OBJECTS)}"
        hits = rng.randint(2, 90)
        return f"Search for {query}.", {"query": query}, f"{hits} results", f"I found {hits} results for {query}."
    if name == "send_message":
        text = rng.choice(("Hello!", "See you soon!", "Good luck!", "Happy birthday!", "I am late.", "Thank you!"))
        return f'Send {person} the message "{text}"', {"to": person, "text": text}, "sent", f"I sent the message to {person}."
    if name == "set_lamp":
        on = rng.random() < 0.5
        switched = "on" if on else "off"
        return f"Switch the {color} lamp {switched}.", {"color": color, "on": on}, "done", f"The {color} lamp is {switched}."
    if name == "buy":
        item, count = rng.choice(words.COUNTED), rng.randint(2, 50)
        return f"Buy {count} {item}.", {"item": item, "count": count}, "bought", f"I bought {count} {item}."
    word, language = rng.choice(list(words.WORDS)), rng.choice(words.LANGUAGES[1:])
    translated = words.WORDS[word][words.LANGUAGES.index(language)]
    ask = f'Translate "{word}" into {language}.'
    return ask, {"word": word, "language": language}, translated, f'"{word}" is "{translated}" in {language}.'


def tools(rng: Random) -> Example:
    offered = rng.sample(list(_TOOLS), rng.choice((1, 1, 2, 2, 3)))
    name = rng.choice(offered)
    request, arguments, result, reply = _tool_task(name, rng)
    system: list[Message] = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.3 else []
    schemas = tuple(tool_schema(each) for each in offered)
    asked: Message = {"role": "user", "content": request}
    form = rng.random()
    if form < 0.15:
        greetings, answer = rng.choice(words.SMALL_TALK)
        return Example("tools", answer, (*system, {"role": "user", "content": rng.choice(greetings)}), schemas)
    if form < 0.65:
        return Example("tools", tool_call(name, arguments), (*system, asked), schemas)
    called: Message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    return Example("tools", reply, (*system, asked, called, {"role": "tool", "content": result}), schemas)


# --- chat --------------------------------------------------------------------------------------------------------


def multi_turn(rng: Random) -> Example:
    """Two to five turns; the last one needs something said earlier, in the system prompt or by the user."""
    model, user = rng.sample(words.NAMES, 2)
    persona, signed = rng.random() < 0.5, rng.random() < 0.25
    sign = rng.choice(("⭐", "🐱", "🌸", "Over.", "Ahoy!"))
    rules = ([f"You are {model}."] if persona else []) + ([f"End every answer with {sign}"] if signed else [])
    if not rules and rng.random() < 0.5:
        rules = ["You are a helpful assistant."]

    def said(answer: str) -> str:
        return f"{answer} {sign}" if signed else answer

    animal, food, color, city = (rng.choice(group) for group in (words.ANIMALS, words.FOODS, words.COLORS, words.CITIES))
    told = rng.sample(
        [
            (f"My name is {user}.", f"Nice to meet you, {user}!", "What is my name?", f"Your name is {user}."),
            (
                f"I have {a(animal)}.",
                f"{a(animal).capitalize()} is a good friend.",
                "Which pet do I have?",
                f"You have {a(animal)}.",
            ),
            (
                f"I like {color} best.",
                f"{color.capitalize()} is a nice color.",
                "Which color do I like?",
                f"You like {color} best.",
            ),
            (f"I live in {city}.", f"I would like to see {city} one day.", "Where do I live?", f"You live in {city}."),
            (f"I ate {a(food)}.", f"I hope that the {food} was good.", "What did I eat?", f"You ate {a(food)}."),
        ],
        rng.randint(1, 3),
    )
    turns: list[tuple[str, str]] = [(statement, reply) for statement, reply, _, _ in told]
    if rng.random() < 0.3:
        greetings, reply = rng.choice(words.SMALL_TALK[:2])
        turns.insert(0, (rng.choice(greetings), reply))
    if rng.random() < 0.3:
        formula, value = _sum(rng)
        turns.append((f"What is {formula}?", f"{formula} = {value}"))
    _, _, question, answer = rng.choice(told)
    if persona and rng.random() < 0.3:
        question, answer = rng.choice((("Who are you?", f"I am {model}."), ("What is your name?", f"My name is {model}.")))

    messages: list[Message] = [{"role": "system", "content": " ".join(rules)}] if rules else []
    for user_says, model_says in turns:
        messages += [{"role": "user", "content": user_says}, {"role": "assistant", "content": said(model_says)}]
    return Example("chat", said(answer), (*messages, {"role": "user", "content": question}))


# --- facts, words ------------------------------------------------------------------------------------------------


def facts(rng: Random) -> Example:
    kind = rng.random()
    if kind < 0.15:
        questions, answer = rng.choice(words.SMALL_TALK)
        return chat("facts", rng.choice(questions), answer)
    if kind < 0.3:
        country, city = rng.choice(words.CAPITALS)
        return chat("facts", f"What is the capital of {country}?", f"The capital of {country} is {city}.")
    questions, answer = rng.choice(words.FACTS)
    return chat("facts", rng.choice(questions), answer)


def foreign_words(rng: Random) -> Example:
    word = rng.choice(list(words.WORDS))
    at = rng.randrange(len(words.LANGUAGES))
    form, language = words.WORDS[word][at], words.LANGUAGES[at]
    if language == "emoji":
        return chat("words", rng.choice((f"Show me the emoji for {word}.", f"What is the emoji for {word}?")), form)
    asks = (f"What is {word} in {language}?", f"How do you say {word} in {language}?", f"Translate {word} into {language}.")
    return chat("words", rng.choice(asks), form)


# --- plain text --------------------------------------------------------------------------------------------------


def drill(rng: Random) -> str:
    """Plain lines of one kind: dense practice in digits and in copying, without the chat around it."""
    kind = rng.random()
    if kind < 0.4:
        return "\n".join(f"{formula} = {value}" for formula, value in (_sum(rng) for _ in range(rng.randint(4, 12))))
    if kind < 0.7:
        # Nothing but repetition can predict the second half: the shortest way to learn to look back.
        pool = words.NAMES + _PLAIN_WORDS + words.CITIES + words.JOBS
        text = " ".join(rng.choice(pool) for _ in range(rng.randint(3, 12)))
        return " ".join([text] * rng.randint(2, 4))
    if kind < 0.9:
        text = _random_text(rng)
        return "\n".join([text] * rng.randint(2, 3))
    example = _count(rng)
    return f"{example.messages[0]['content']}\n{example.answer}"


def plain(rng: Random) -> str:
    """Prose for prompts that are no chat."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join(answer for _, answer in rng.sample(words.FACTS, rng.randint(1, 3)))
    if kind < 0.5:
        return " ".join(f"The capital of {country} is {city}." for country, city in rng.sample(words.CAPITALS, rng.randint(1, 4)))
    if kind < 0.7:
        name, city, job = rng.choice(words.NAMES), rng.choice(words.CITIES), rng.choice(words.JOBS)
        text = f"Hello, my name is {name}. I live in {city} and work as {a(job)}."
        return f"{text} I have {a(rng.choice(words.ANIMALS))}, and I like {rng.choice(words.COLORS)} best."
    if kind < 0.85:
        return " ".join(_sentence(rng) for _ in range(rng.randint(2, 5)))
    return rng.choice(words.OPENERS)


# --- the list and the score --------------------------------------------------------------------------------------

SKILLS: dict[str, Callable[[Random], Example]] = {
    "copy": copy,
    "order": order,
    "arithmetic": arithmetic,
    "reading": reading,
    "json": json_answer,
    "tools": tools,
    "chat": multi_turn,
    "facts": facts,
    "words": foreign_words,
}


def examples(skill: str, rng: Random) -> Example:
    """The next example of one skill.

    Raises:
      ValueError: there is no such skill.
    """
    if skill not in SKILLS:
        raise ValueError(f"skill: got {skill!r}, expected one of {', '.join(SKILLS)}")
    return SKILLS[skill](rng)


def is_right(example: Example, text: str) -> bool:
    """Exact match, except for white space around the answer."""
    return text.strip() == example.answer.strip()


def held_out(skill: str, n: int, seed: int = 0) -> list[Example]:
    """Examples from a stream that training never draws from. Small tasks (7 + 5, a fact) do occur in both."""
    rng = Random(f"held-out:{skill}:{seed}")
    return [examples(skill, rng) for _ in range(n)]


def score(generate: Callable[[list[str]], list[str]], skill: str, n: int = 50, seed: int = 0) -> float:
    """The share of n held-out examples that are answered exactly, in [0, 1].

    Args:
      generate: from prompts to greedy continuations, each ended by a stop token of the model and without it.
    """
    asked = held_out(skill, n, seed)
    answers = generate([example.prompt for example in asked])
    return sum(is_right(example, text) for example, text in zip(asked, answers, strict=True)) / n
