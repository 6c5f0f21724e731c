"""Judged answers: the many ways in which files say that one answer is better than another, or good, or bad.

Ties and missing sides are `Unusable`: nothing can be learnt from them, and the count of bad rows shows them.
"""

from __future__ import annotations

import json
import os
from typing import Any

from megalign.data.labels import read_labels, read_user
from megalign.data.rows import (
    LabelledResponse,
    Message,
    PreferencePair,
    Provenance,
    RankedResponses,
    Response,
    ScoredResponse,
    Unusable,
    Values,
    margin,
)
from megalign.data.tools import read_tools
from megalign.data.turns import answer_turns, check_order, hh_turns, plain, prompt_turns, string, turns

HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_PROVENANCE = {
    "judge": ("judge", "annotator", "annotator_id"),
    "rubric": ("rubric", "rubric_version"),
    "time": ("time", "timestamp", "created_at"),
    "licence": ("licence", "license"),
}


def preference(value: Values, source: str, line: int) -> PreferencePair:
    """`{prompt, chosen, rejected}`, the prompt in a key of its own or the beginning that both sides share.

    The prompt may be text, messages, or ShareGPT's `conversations`; a side text, a message, or messages.
    """
    sides = value.get("chosen"), value.get("rejected")
    for key, side in zip(("chosen", "rejected"), sides):
        if not side:
            raise Unusable(f"{key!r} is missing")
    key = next((k for k in ("prompt", "conversations", "messages", "context", "question") if value.get(k)), None)
    whole = [_opens_a_dialogue(side) for side in sides]
    if all(whole):
        prompt, chosen, rejected = _split(*(prompt_turns(side, k) for side, k in zip(sides, ("chosen", "rejected"))))
    elif any(whole):
        raise Unusable("one side holds the prompt too, the other does not")
    elif key is not None:
        prompt = prompt_turns(value[key], repr(key))
        chosen, rejected = answer_turns(sides[0], "'chosen'"), answer_turns(sides[1], "'rejected'")
    elif all(isinstance(side, str) for side in sides):
        prompt, chosen, rejected = _split_text(plain(sides[0], "'chosen'"), plain(sides[1], "'rejected'"))
    else:
        raise Unusable("has no prompt")
    if isinstance(value.get("system"), str) and value["system"].strip() and prompt[0].role != "system":
        prompt = [Message("system", string(value, "system")), *prompt]
    better = Response(chosen, _number(value, "score_chosen", "chosen_score", "chosen_rating"), None, _policy(value, "chosen"))
    worse = Response(
        rejected, _number(value, "score_rejected", "rejected_score", "rejected_rating"), None, _policy(value, "rejected")
    )
    return _pair(prompt, better, worse, value, source, line, _number(value, "margin"))


def hh(value: Values, source: str, line: int) -> PreferencePair:
    """`{chosen, rejected}`, two HH transcripts, split after the last turn that they have in common."""
    sides = [hh_turns(string(value, key), f"{key!r}") for key in ("chosen", "rejected")]
    prompt, chosen, rejected = _split(*sides)
    return _pair(prompt, Response(chosen), Response(rejected), value, source, line)


def comparison(value: Values, source: str, line: int) -> PreferencePair:
    """`{instruction, output_1, output_2, preference}` (AlpacaEval): 1 is the first, 2 the second, 0 and 1.5 ties.

    Between 1 and 2 a judge's probability: the margin is the distance from the tie, at most 1.
    """
    text = string(value, "instruction")
    if value.get("input"):
        text += "\n\n" + string(value, "input")
    wanted = _number(value, "preference")
    if wanted is None:
        raise Unusable("'preference' is missing")
    if wanted in (0, 1.5):
        raise Unusable(f"tie: 'preference' is {wanted:g}")
    if not 1 <= wanted <= 2:
        raise Unusable(f"'preference' is {wanted:g}: 1, 2 or between, or 0 for a tie")
    answers = [
        Response(answer_turns(value.get(f"output_{n}"), f"'output_{n}'"), policy=_text(value, f"generator_{n}"))
        for n in (1, 2)
    ]
    better, worse = answers if wanted < 1.5 else reversed(answers)
    return _pair([Message("user", text)], better, worse, value, source, line, abs(wanted - 1.5) * 2)


def ranked(value: Values, source: str, line: int) -> RankedResponses:
    """`{context, completions: [{rank, completion}]}`: the lowest rank is the best; equal ranks are ties."""
    found = []
    for number, item in enumerate(_list(value, "completions"), 1):
        where = f"completion {number}"
        rank = _number(item, "rank")
        if rank is None:
            raise Unusable(f"{where} has no 'rank'")
        answer = answer_turns(item.get("completion"), f"'completion' of {where}")
        found.append(Response(answer, rank=rank, policy=_text(item, "model") or _text(item, "policy")))
    key = "context" if value.get("context") else "prompt"
    return _ranking(prompt_turns(value.get(key), repr(key)), found, value, source, line)


def ultrafeedback(value: Values, source: str, line: int) -> RankedResponses:
    """`{instruction, completions: [{response, overall_score, annotations, model}]}`: the highest score is the best.

    Without an overall score, the mean of the ratings that the annotations give.
    """
    found = []
    for number, item in enumerate(_list(value, "completions"), 1):
        score = _number(item, "overall_score", "fine-grained_score")
        if score is None:
            score = _mean_rating(item.get("annotations"))
        if score is None:
            raise Unusable(f"completion {number} has no score")
        answer = answer_turns(item.get("response"), f"'response' of completion {number}")
        found.append(Response(answer, score=score, policy=_text(item, "model")))
    return _ranking([Message("user", string(value, "instruction"))], found, value, source, line)


def helpsteer(value: Values, source: str, line: int) -> ScoredResponse | PreferencePair:
    """`{prompt, response, helpfulness, ...}`, scored 0 to 4, or two responses and how strong the preference is.

    HelpSteer2: `response_1`, `response_2`, `preference_strength`; HelpSteer3: `context`, `response1`, `response2`,
    `overall_preference`; -3 is the first much better, 3 the second.
    """
    key = "prompt" if value.get("prompt") else "context"
    prompt = prompt_turns(value.get(key), repr(key))
    if "response" in value:
        scores = tuple((k, s) for k in HELPSTEER_SCORES if (s := _number(value, k)) is not None)
        if not scores:
            raise Unusable(f"has no score: one of {', '.join(HELPSTEER_SCORES)}")
        answer = answer_turns(value["response"], "'response'")
        check_order([*prompt, *answer])
        response = Response(answer, policy=_text(value, "model"))
        return ScoredResponse(tuple(prompt), response, scores, provenance(value), source, line)
    strength = _number(value, "preference_strength", "overall_preference")
    if strength is None:
        raise Unusable("'preference_strength' is missing")
    if strength == 0:
        raise Unusable("tie: the preference is 0")
    names = ("response_1", "response_2") if "response_1" in value else ("response1", "response2")
    answers = [Response(answer_turns(value.get(name), repr(name))) for name in names]
    better, worse = answers if strength < 0 else reversed(answers)
    return _pair(prompt, better, worse, value, source, line, abs(strength))


def labelled(value: Values, source: str, line: int) -> ScoredResponse:
    """`{prompt, completion, labels}` or `{messages, labels}`: what is known of an answer, by name (see `read_labels`), and of its `user`."""
    labels = read_labels(value["labels"]) if isinstance(value.get("labels"), dict) else ()
    if not labels:
        raise Unusable("'labels' names nothing")
    prompt, answer = _prompt_and_answer(value)
    user, facts = read_user(value.get("user"))
    return ScoredResponse(tuple(prompt), Response(answer, policy=_policy(value, "")), (*labels, *facts), provenance(value), source, line, user)


def unpaired(value: Values, source: str, line: int) -> LabelledResponse:
    """`{prompt, completion, label}` or `{messages, label}` (KTO): `label` says whether the answer is wanted."""
    label = value.get("label")
    if isinstance(label, str) and label.lower() in ("true", "false"):  # from CSV
        label = label.lower() == "true"
    if label not in (True, False):
        raise Unusable(f"'label' is {label!r}: true or false" if "label" in value else "key 'label' is missing")
    prompt, answer = _prompt_and_answer(value)
    response = Response(answer, policy=_policy(value, ""))
    return LabelledResponse(tuple(prompt), response, bool(label), 1.0, provenance(value), source, line)


def _prompt_and_answer(value: Values) -> tuple[list[Message], tuple[Message, ...]]:
    """`messages` up to the assistant's last, or `prompt` and `completion`."""
    key = next((k for k in ("messages", "conversations") if value.get(k)), None)
    if key:
        *prompt, last = turns(value[key], repr(key)) or [Message("", "")]
        if last.role != "assistant":
            raise Unusable("the last message is not the assistant's: nothing is labelled")
        answer: tuple[Message, ...] = (last,)
    else:
        prompt = prompt_turns(value.get("prompt"))
        answer = answer_turns(value.get("completion"), "'completion'")
    check_order([*prompt, *answer])
    return prompt, answer


def provenance(value: Values) -> Provenance:
    """What the row says of its judgement (D30)."""
    found = {name: next((t for key in keys if (t := _text(value, key))), None) for name, keys in _PROVENANCE.items()}
    return Provenance(**found)


def _pair(
    prompt: list[Message],
    better: Response,
    worse: Response,
    value: Values,
    source: str,
    line: int,
    given_margin: float | None = None,
) -> PreferencePair:
    for side in (better, worse):
        check_order([*prompt, *side.messages])
    if better.messages == worse.messages:
        raise Unusable("tie: both sides are the same")
    if better.score is not None and better.score == worse.score:
        raise Unusable(f"tie: both sides score {better.score:g}")
    distance = margin(better, worse) if given_margin is None else given_margin
    tools = read_tools(value.get("tools"))
    labels = read_labels(value["labels"]) if isinstance(value.get("labels"), dict) else ()
    return PreferencePair(tuple(prompt), better, worse, 1.0, distance, provenance(value), source, line, tools, labels)


def _ranking(prompt: list[Message], found: list[Response], value: Values, source: str, line: int) -> RankedResponses:
    if len(found) < 2:
        raise Unusable(f"needs 2 completions or more, has {len(found)}")
    for response in found:
        check_order([*prompt, *response.messages])
    found.sort(key=lambda response: (response.rank or 0.0, -(response.score or 0.0)))
    row = RankedResponses(tuple(prompt), tuple(found), provenance(value), source, line)
    if not row.pairs():
        raise Unusable("tie: all completions are ranked the same")
    return row


def _opens_a_dialogue(side: Any) -> bool:
    """A side that begins with the prompt: messages, the first of them not the assistant's."""
    return isinstance(side, list) and bool(side) and turns(side, "a side")[0].role in ("system", "user")


def _split(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], tuple[Message, ...], tuple[Message, ...]]:
    """The turns in common, and what follows them on either side, which must be the assistant's."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        raise Unusable("tie: both sides are the same")
    if common == 0:
        raise Unusable("the two sides share no first turn: there is no common prompt")
    ends = chosen[common:], rejected[common:]
    if not all(end and end[0].role == "assistant" for end in ends):
        raise Unusable(f"after turn {common} the two sides do not both go on with an assistant's turn")
    return chosen[:common], tuple(ends[0]), tuple(ends[1])


def _split_text(chosen: str, rejected: str) -> tuple[list[Message], tuple[Message, ...], tuple[Message, ...]]:
    """Two texts that begin alike: the words in common are the prompt."""
    common = len(os.path.commonprefix([chosen, rejected]))
    while common and not chosen[common - 1].isspace():
        common -= 1
    if chosen == rejected:
        raise Unusable("tie: both sides are the same")
    prompt, answers = chosen[:common].strip(), (chosen[common:].strip(), rejected[common:].strip())
    if not prompt:
        raise Unusable("has no prompt, and the two sides share no first word")
    if not all(answers):
        raise Unusable("one side is the beginning of the other: an answer is empty")
    return [Message("user", prompt)], (Message("assistant", answers[0]),), (Message("assistant", answers[1]),)


def _list(value: Values, key: str) -> list[dict[str, Any]]:
    items = value.get(key)
    if isinstance(items, str):
        try:
            items = json.loads(items)
        except ValueError:
            pass
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Unusable(f"{key!r} is not a list of objects")
    return items


def _number(value: Values, *keys: str) -> float | None:
    """The first of `keys` that is given, as a number."""
    for key in keys:
        found = value.get(key)
        if found is None or found == "":
            continue
        try:
            number = float(found) if not isinstance(found, bool) else float("nan")
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if number != number or number in (float("inf"), -float("inf")):
            raise Unusable(f"{key!r} is {repr(found)[:40]}, not a number")
        return number
    return None


def _mean_rating(annotations: Any) -> float | None:
    if not isinstance(annotations, dict):
        return None
    ratings = [_number(part, "Rating") for part in annotations.values() if isinstance(part, dict) and part.get("Rating") != "N/A"]
    given = [rating for rating in ratings if rating is not None]
    return sum(given) / len(given) if given else None


def _text(value: Values, key: str) -> str | None:
    found = value.get(key)
    return str(found) if isinstance(found, (str, int, float)) and not isinstance(found, bool) and found != "" else None


def _policy(value: Values, side: str) -> str | None:
    names = ("model", "policy", "generator")
    beside = (f"{side}_{name}" for name in names) if side else iter(())
    return next((t for key in (*beside, *names) if (t := _text(value, key))), None)
