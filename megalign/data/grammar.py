"""Bedtime dialogues from a small grammar with hidden rules: a model that found them is right word for word.

No prompt states a rule, and no answer leaves a choice. The answer key:

1. Who speaks. The persona in the system prompt decides the first and the last words: the pirate says
   "Arr, ..., matey.", the wizard "Behold, ..., apprentice."; without a system prompt the answer is plain.
2. What they eat follows from the animal: every fox eats plums. So does what they treasure, which they take
   on walks and keep beside them at night: every fox has a compass (`ANIMALS`).
3. When it happens follows from the place: at the harbour, at dawn. So does where they sleep (`PLACES`).
4. What they put on follows from the weather (`CLOTHES`).
5. How many cups: the host drinks too, so one more than there are guests (`NUMBERS`).
6. "She" and "he" in a second question mean the one of the first: name, animal and place are found only there.

The name is copied. Every answer joins something the animal decides with something the place decides, and
an (animal, place) pair is either for training or held out: a held-out prompt asks for known rules in a
combination that no training row contains. No knowledge of the world helps: the tables are arbitrary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product

from megalign.data.rows import Conversation, Message

PERSONAS = {  # system prompt -> what surrounds the answer
    "": "{}.",
    "You are a pirate.": "Arr, {}, matey.",
    "You are a wizard.": "Behold, {}, apprentice.",
    "You are a knight.": "Hark, {}, brave squire.",
    "You are a grandmother.": "Well, {}, my dear.",
}
SHE = ("Mina", "Ada", "Flora", "Ivy", "Nell", "Rosa", "Tilda", "Wren")
HE = ("Otto", "Finn", "Hugo", "Jasper", "Leo", "Milo", "Percy", "Tobin")
ANIMALS = {  # animal -> food, treasure
    "fox": ("plums", "compass"),
    "owl": ("pancakes", "lantern"),
    "hare": ("acorns", "kite"),
    "bear": ("soup", "drum"),
    "otter": ("cherries", "map"),
    "badger": ("noodles", "fiddle"),
    "goose": ("porridge", "teapot"),
    "mouse": ("cheese", "ladder"),
}
PLACES = {  # place -> hour, bed
    "at the harbour": ("at dawn", "in a boat"),
    "in the forest": ("at noon", "in a tree"),
    "on the hill": ("at midnight", "on a cloud"),
    "by the mill": ("at sunset", "on a flour sack"),
    "near the castle": ("after lunch", "in a tower"),
    "under the bridge": ("before school", "on a raft"),
    "at the station": ("at teatime", "in a suitcase"),
    "in the garden": ("on Sundays", "in a flowerpot"),
}
CLOTHES = {  # weather -> what to put on
    "raining": "boots",
    "snowing": "mittens",
    "sunny": "a straw hat",
    "windy": "a scarf",
    "foggy": "a red cape",
}
NUMBERS = ("two", "three", "four", "five", "six", "seven")  # guests: all but the last; cups: the next one


@dataclass(frozen=True)
class Scene:
    """What a dialogue is about: all that its questions say, and so all that its answers depend on."""

    persona: str
    name: str
    animal: str
    place: str
    event: str  # "supper", "walk" or "tea"
    weather: str = "sunny"
    guests: str = "two"
    bedtime: bool = False  # a second question follows


def is_held_out(animal: str, place: str) -> bool:
    """Whether training never shows this pair: so for two places of each animal, two animals of each place."""
    return (list(ANIMALS).index(animal) + list(PLACES).index(place)) % 4 == 0


def generate(count: int, seed: int) -> list[Conversation]:
    """`count` dialogues to train on, drawn with replacement; the same `seed` gives the same ones."""
    return _draw(count, f"train {seed}", held_out=False)


def held_out(count: int, seed: int) -> list[Conversation]:
    """`count` dialogues over the pairs that training never shows; the last message is the right answer."""
    return _draw(count, f"held out {seed}", held_out=True)


def showcase_prompts() -> list[Conversation]:
    """Three held-out dialogues that use every rule between them; the last message is the right answer."""
    return [
        dialogue(Scene("You are a pirate.", "Mina", "fox", "near the castle", "supper")),
        dialogue(Scene("You are a wizard.", "Hugo", "owl", "in the garden", "tea", guests="five")),
        dialogue(Scene("", "Ivy", "bear", "under the bridge", "walk", weather="foggy", bedtime=True)),
    ]


def dialogue(scene: Scene) -> Conversation:
    """The questions of a scene and their only right answers."""
    turns = [_first_turn(scene), _second_turn(scene)] if scene.bedtime else [_first_turn(scene)]
    messages = [Message("system", scene.persona)] if scene.persona else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", PERSONAS[scene.persona].format(answer))]
    return Conversation(tuple(messages), source="grammar")


def _first_turn(scene: Scene) -> tuple[str, str]:
    name, place, she = scene.name, scene.place, _pronoun(scene.name)
    who = f"{name} the {scene.animal}"
    food, treasure = ANIMALS[scene.animal]
    hour, _ = PLACES[place]
    if scene.event == "supper":
        return f"{who} lives {place}. What does {she} eat, and when?", f"{name} eats {food} {hour}"
    if scene.event == "walk":
        question = (
            f"It is {scene.weather} {place}, and {who} goes for a walk. What does {she} need, and when?"
        )
        return question, f"{name} puts on {CLOTHES[scene.weather]} and takes the {treasure} {hour}"
    cups = NUMBERS[NUMBERS.index(scene.guests) + 1]
    question = f"{who} has {scene.guests} friends to tea {place}. How many cups, what food, and when?"
    return question, f"{name} fills {cups} cups and serves {food} {hour}"


def _second_turn(scene: Scene) -> tuple[str, str]:
    (_, treasure), (_, bed) = ANIMALS[scene.animal], PLACES[scene.place]
    she, her = ("she", "her") if _pronoun(scene.name) == "she" else ("he", "him")
    return (
        f"And where does {she} sleep, and what is beside {her}?",
        f"{scene.name} sleeps {bed} beside the {treasure}",
    )


def _pronoun(name: str) -> str:
    return "she" if name in SHE else "he"


def _draw(count: int, seed: str, *, held_out: bool) -> list[Conversation]:
    rng = random.Random(seed)
    pairs = [pair for pair in product(ANIMALS, PLACES) if is_held_out(*pair) == held_out]

    def scene() -> Scene:
        animal, place = rng.choice(pairs)
        return Scene(
            persona=rng.choice(tuple(PERSONAS)),
            name=rng.choice(SHE + HE),
            animal=animal,
            place=place,
            event=rng.choice(("supper", "walk", "tea")),
            weather=rng.choice(tuple(CLOTHES)),
            guests=rng.choice(NUMBERS[:-1]),
            bedtime=rng.random() < 0.5,
        )

    return [replace(dialogue(scene()), line=number + 1) for number in range(count)]


def wrong(answer: str, shift: int) -> str:
    """The answer with each food, treasure, hour, bed and number replaced by another of its kind: equally fluent, not true.

    shift: >= 1; which other one.
    """
    kinds = (
        [food for food, _ in ANIMALS.values()],
        [treasure for _, treasure in ANIMALS.values()],
        [hour for hour, _ in PLACES.values()],
        [bed for _, bed in PLACES.values()],
        list(NUMBERS),
    )
    for kind in kinds:
        for place, word in enumerate(kind):
            if word in answer:
                answer = answer.replace(word, kind[(place + 1 + shift % (len(kind) - 1)) % len(kind)])
                break
    return answer
