"""The toy dialogues: what training never shows, and that each answer follows from its prompt by the rules."""

import re
from collections import defaultdict

import pytest

from megalign.data.grammar import ANIMALS, PERSONAS, PLACES, generate, held_out, showcase_prompts

PAIR = re.compile(rf"\b({'|'.join(ANIMALS)})\b")
PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b")


def pair(conversation) -> tuple[str, str]:
    """(animal, place), read from the text of the first question."""
    question = next(message.content for message in conversation.messages if message.role == "user")
    (animal,), (place,) = PAIR.findall(question), PLACE.findall(question)
    return animal, place


def exchanges(conversations):
    """(everything before, answer) of each assistant turn."""
    for conversation in conversations:
        for number, message in enumerate(conversation.messages):
            if message.role == "assistant":
                yield conversation.messages[:number], message.content


@pytest.fixture(scope="module")
def train():
    return generate(8000, seed=1)


@pytest.fixture(scope="module")
def unseen():
    return held_out(2000, seed=1)


def test_no_held_out_combination_is_ever_trained_on(train, unseen):
    seen, kept = set(map(pair, train)), set(map(pair, unseen))
    assert not seen & kept
    assert (len(seen), len(kept)) == (48, 16)
    assert not {prompt for prompt, _ in exchanges(train)} & {prompt for prompt, _ in exchanges(unseen)}


def test_every_word_of_a_held_out_dialogue_is_known_from_training(train, unseen):
    words = [
        {word for dialogue in part for message in dialogue.messages for word in message.content.split()}
        for part in (unseen, train)
    ]
    assert words[0] <= words[1]


def test_the_prompt_decides_the_answer(train, unseen):
    answers = defaultdict(set)
    for prompt, answer in exchanges([*train, *unseen]):
        answers[prompt].add(answer)
    assert {len(found) for found in answers.values()} == {1}


ANSWERS = {  # kind of answer -> what decides each of its parts
    r"(\w+) eats (\w+) (.*)": ("name", "animal: food", "place: hour"),
    r"(\w+) puts on (.*) and takes the (\w+) (.*)": (
        "name",
        "weather: clothes",
        "animal: treasure",
        "place: hour",
    ),
    r"(\w+) fills (\w+) cups and serves (\w+) (.*)": ("name", "guests: cups", "animal: food", "place: hour"),
    r"(\w+) sleeps (.*) beside the (\w+)": ("name", "place: bed", "animal: treasure"),
}


def test_answers_follow_the_key(train, unseen):
    """Each part of an answer depends on one thing in the first question, and tells it apart."""
    tables = defaultdict(lambda: defaultdict(set))
    for prompt, answer in exchanges([*train, *unseen]):
        system = prompt[0].content if prompt[0].role == "system" else ""
        before, after = PERSONAS[system].split("{}")
        assert answer.startswith(before) and answer.endswith(after)
        answer = answer[len(before) : -len(after)]
        question = next(message.content for message in prompt if message.role == "user")
        said = {
            "name": re.findall(r"(\w+) the (?:" + "|".join(ANIMALS) + ")", question)[0],
            "animal": PAIR.findall(question)[0],
            "place": PLACE.findall(question)[0],
            "weather": next(iter(re.findall(r"It is (\w+)", question)), ""),
            "guests": next(iter(re.findall(r"has (\w+) friends", question)), ""),
        }
        (match, parts), *others = [
            (m, parts) for kind, parts in ANSWERS.items() if (m := re.fullmatch(kind, answer))
        ]
        assert not others
        for rule, value in zip(parts, match.groups()):
            tables[rule][said[rule.partition(":")[0]]].add(value)

    sizes = {"animal: food": 8, "animal: treasure": 8, "place: hour": 8, "place: bed": 8}
    sizes |= {"weather: clothes": 5, "guests: cups": 5, "name": 16}
    assert {rule: len(table) for rule, table in tables.items()} == sizes
    for rule, table in tables.items():
        assert {len(values) for values in table.values()} == {1}, rule
        assert len(set.union(*table.values())) == sizes[rule]
    assert tables["name"] == {name: {name} for name in tables["name"]}
    numbers = ("two", "three", "four", "five", "six", "seven")
    assert tables["guests: cups"] == {guests: {cups} for guests, cups in zip(numbers, numbers[1:])}
    assert len({tuple(frame.split("{}")) for frame in PERSONAS.values()}) == 5


def test_half_the_dialogues_ask_again_without_naming_anything(train):
    second = [row.messages[-2].content for row in train if sum(m.role == "user" for m in row.messages) == 2]
    assert 0.45 < len(second) / len(train) < 0.55
    assert set(second) == {
        "And where does she sleep, and what is beside her?",
        "And where does he sleep, and what is beside him?",
    }


def test_answers_are_one_short_line(train):
    assert {5 <= len(answer.split()) <= 15 and "\n" not in answer for _, answer in exchanges(train)} == {True}


def test_the_seed_decides_and_a_longer_draw_goes_on(train):
    assert generate(50, seed=1) == train[:50]
    assert generate(50, seed=2) != train[:50]
    assert held_out(5, seed=3) == held_out(9, seed=3)[:5]
    assert [(row.source, row.line) for row in train[:2]] == [("grammar", 1), ("grammar", 2)]


def test_showcase_is_held_out_and_reads_like_this(unseen):
    shown = showcase_prompts()
    assert {pair(dialogue) for dialogue in shown} <= set(map(pair, unseen))
    assert [[message.content for message in dialogue.messages] for dialogue in shown] == [
        [
            "You are a pirate.",
            "Mina the fox lives near the castle. What does she eat, and when?",
            "Arr, Mina eats plums after lunch, matey.",
        ],
        [
            "You are a wizard.",
            "Hugo the owl has five friends to tea in the garden. How many cups, what food, and when?",
            "Behold, Hugo fills six cups and serves pancakes on Sundays, apprentice.",
        ],
        [
            "It is foggy under the bridge, and Ivy the bear goes for a walk. What does she need, and when?",
            "Ivy puts on a red cape and takes the drum before school.",
            "And where does she sleep, and what is beside her?",
            "Ivy sleeps on a raft beside the drum.",
        ],
    ]
