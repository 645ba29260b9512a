"""Short stories from a narrow grammar: who, where, what happened, how it ended.

Knows plots and the order of their sentences. Refuses to know chats and scores: a story has no right answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from jaxpaged.demo import words


@dataclass(frozen=True)
class Cast:
    """The choices of one story. Every sentence reads from here, so that a story never contradicts itself."""

    name: str
    friend: str
    he: str
    his: str
    him: str
    kind: str
    place: str
    other_place: str
    animal: str
    color: str
    thing: str
    size: str
    food: str
    weather: str
    precaution: str
    feeling: str
    worry: str
    job: str

    @classmethod
    def draw(cls, rng: Random, **fixed: str) -> Cast:
        """A random cast; the choices named in `fixed` keep their values."""
        girl = rng.random() < 0.5 if "name" not in fixed else fixed["name"] in words.GIRLS
        name = fixed.pop("name", None) or rng.choice(words.GIRLS if girl else words.BOYS)
        place, other_place = rng.sample(words.PLACES, 2)
        weather, precaution = rng.choice(words.WEATHER)
        drawn = {
            "name": name,
            "friend": rng.choice([other for other in words.NAMES if other != name]),
            "he": "she" if girl else "he",
            "his": "her" if girl else "his",
            "him": "her" if girl else "him",
            "kind": "girl" if girl else "boy",
            "place": place,
            "other_place": other_place,
            "animal": rng.choice(words.ANIMALS),
            "color": rng.choice(words.COLORS),
            "thing": rng.choice(words.OBJECTS),
            "size": rng.choice(words.SIZES),
            "food": rng.choice(words.FOODS),
            "weather": weather,
            "precaution": precaution,
            "feeling": rng.choice(words.FEELINGS),
            "worry": rng.choice(words.WORRIES),
            "job": rng.choice(words.JOBS),
        }
        return cls(**{**drawn, **fixed})


# Each plot is a list of steps, each step a tuple of sentences of which one is told. {He} is {he} with a capital letter.
OPENINGS = (
    ("One day {name} went to the {place}.",),
    ("One day {name} and {friend} went to the {place}.",),
    ("One morning {name} walked to the {place}.",),
    ("Once upon a time there was a {kind} called {name}.", "Once upon a time there was a {kind} named {name}."),
    ("Once upon a time, a {kind} called {name} lived near the {place}.",),
    ("There was once a {kind} called {name} who wanted to be a {job}.",),
    ("{name} was a {kind} who lived near the {place}.",),
    ("It was a {weather} day, and {name} wanted to go to the {place}.",),
    ("It was a {weather} morning, and {name} got up early.", "It was a {weather} afternoon, and {name} had nothing to do."),
)
SECONDS = (
    "It was {weather}, so {he} {precaution}.",
    "{He} loved the {place} and knew every corner of it.",
    "{He} had a {size} {color} {thing}.",
    "{He} felt a little {worry} that day.",
    "{name} liked to walk to the {place} with {friend}.",
    "{name} was very {feeling} that day.",
)
PLOTS = (
    (  # the lost thing
        ("{name} had lost {his} {color} {thing}.", "{name} looked for {his} {color} {thing}, but it was gone."),
        (
            "{He} felt {worry} and did not know what to do.",
            "{He} looked under the bench and behind the tree.",
            "{He} asked everyone.",
        ),
        ('"Have you seen my {thing}?" {he} asked.', '"Where is my {color} {thing}?" {name} asked.'),
        (
            "A {animal} came and pointed to the {other_place}.",
            "A {size} {animal} ran to the {other_place}, and {name} followed it.",
        ),
        ("There, near the {other_place}, was the {color} {thing}.", "And there it was: the {color} {thing}!"),
        ('"Thank you!" said {name}.', "{name} gave the {animal} a {food} and said thank you."),
    ),
    (  # the animal in need
        ("There {he} saw a {animal}.", "There {he} met a {size} {animal}.", "On the way {he} found a {size} {animal}."),
        ("The {animal} was hungry and {worry}.", "The {animal} could not find the way home."),
        ('"What do you need?" asked {name}.', '"Do not be afraid," said {name}.', '"Can I help you?" asked {name}.'),
        ("{He} gave it some {food} and some water.", "{He} had a {food} in {his} bag and shared it."),
        ("The {animal} ate it all and felt better.", "Soon the {animal} was not hungry any more."),
        ("Then they walked to the {other_place} together.", "From that day on the {animal} followed {name} everywhere."),
    ),
    (  # the gift
        ("It was the birthday of {friend}.", "{friend} had a birthday, and {name} needed a gift."),
        ("{name} wanted to give {friend} a {thing}.", "{He} went to the {other_place} to buy a {thing}."),
        ("{He} found one that was {size} and {color}.", "There {he} saw a {size} {color} {thing}."),
        ('"This is just right," thought {name}.', '"{friend} will love it," {he} said.'),
        ("{name} gave the {thing} to {friend}.", "In the evening {he} gave it to {friend}."),
        ('"What a lovely {thing}!" said {friend}.', '"Thank you, {name}!" said {friend}.'),
    ),
    (  # learning
        ("{name} wanted to be a {job}.", "More than anything, {name} wanted to be a {job}."),
        ("{friend} was a good {job} and showed {him} how.", "So {he} asked {friend}, who was a {job}, for help."),
        ("The first day was hard, and {name} felt {worry}.", "At first nothing worked."),
        ('"Try again," said {friend}.', '"Every {job} starts small," said {friend}.'),
        ("{He} tried again and again, every day.", "{name} worked at it all week."),
        ("At last it worked, and {friend} was {feeling}.", "After a year {he} was the best {job} in the village."),
    ),
    (  # the picnic
        ("{name} and {friend} packed a {food} and some water.", "{friend} brought a basket with a {food} in it."),
        ("They sat down at the {other_place} and began to eat.", "At the {other_place} they found a good spot."),
        ("Then a {animal} came and took the {food}!", "Suddenly a {size} {animal} jumped on the basket."),
        ("{friend} laughed, but {name} was {worry}.", "They ran after it, but the {animal} was too fast."),
        ('"It was hungry too," said {friend}.', '"We can share," said {name}.'),
        ("So they all shared what was left.", "In the end there was enough for everyone."),
    ),
    (  # the secret
        ("Behind the {other_place} {he} saw a {size} {color} box.", "Under a tree {he} found a {color} box."),
        ("{name} opened it very slowly.", "It took some time to open it."),
        ("Inside was a {size} {thing} and an old map.", "In the box there was a {thing}."),
        ('"Who put it here?" {he} asked.', '"Look what I found!" {he} called.'),
        ("{friend} came and looked at it too.", "{He} showed it to {friend}."),
        ("They put it back for the next child to find.", "They kept the secret for many years."),
    ),
)
ENDINGS = (
    "{name} was {feeling}.",
    "Then {name} went home, {feeling} and tired.",
    "And {name} and {friend} were friends for ever.",
    "That night {name} slept very well.",
    "It was the best day of the year.",
    "Later {he} told {friend} all about it.",
    "{He} never forgot that day.",
)


def tell(cast: Cast, rng: Random) -> str:
    """One story of 6 to 11 sentences in one or two paragraphs."""
    sentences = [rng.choice(rng.choice(OPENINGS))]
    sentences += rng.sample(SECONDS, rng.randint(0, 2))
    first_paragraph = len(sentences)
    sentences += [rng.choice(step) for step in rng.choice(PLOTS)]
    sentences += rng.sample(ENDINGS, rng.randint(1, 2))

    # An f-string field can not be called {He} without a value for it.
    values = {**vars(cast), "He": cast.he.capitalize()}
    told = [re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence.format_map(values)) for sentence in sentences]
    if rng.random() < 0.3:
        return " ".join(told[:first_paragraph]) + "\n\n" + " ".join(told[first_paragraph:])
    return " ".join(told)


def story(rng: Random) -> str:
    return tell(Cast.draw(rng), rng)


def asked_story(rng: Random) -> tuple[str, str]:
    """A request for a story and a story that keeps to it."""
    name, animal, place = rng.choice(words.NAMES), rng.choice(words.ANIMALS), rng.choice(words.PLACES)
    please = rng.choice(
        ("Tell me a story", "Tell me a short story", "Write a story", "Write a short story", "Please tell me a story")
    )
    wish = rng.randrange(4)
    if wish == 0:
        return f"{please}.", story(rng)
    if wish == 1:
        return f"{please} about {name}.", tell(Cast.draw(rng, name=name), rng)
    if wish == 2:
        return f"{please} about {name} and {a(animal)}.", _tell_with(animal, rng, name=name, animal=animal)
    return f"{please} about {name} at the {place}.", _tell_with(place, rng, name=name, place=place)


def _tell_with(word: str, rng: Random, **fixed: str) -> str:
    """A story in which the word occurs: not every plot has an animal."""
    while not re.search(rf"\b{word}\b", text := tell(Cast.draw(rng, **fixed), rng)):
        pass
    return text


def a(noun: str) -> str:
    """The noun with its article: 'a cat', 'an apple'."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
