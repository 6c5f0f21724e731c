"""Values to rows: the format of a file, and every row in it, readable or not.

| format | one row | becomes |
|---|---|---|
| messages | `{"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}` (OpenAI) | Conversation |
| sharegpt | `{"conversations": [{"from": "human", "value": "Hi"}, ...]}` (Hermes and Glaive tool calls too) | Conversation |
| instruction | `{"instruction", "input", "output" or "response", "system", "history"}` (Alpaca) | Conversation |
| prompt_completion | `{"prompt", "completion"}`, texts or messages | Conversation |
| xlam | `{"query", "tools", "answers": [{"name", "arguments"}]}`; no answer: no tool fits | Conversation |
| text | `{"text": "..."}`; in a .txt file: a block between blank lines | TextRow |
| preference | `{"prompt", "chosen", "rejected"}`, or the prompt at the beginning of both sides | PreferencePair |
| hh | `{"chosen": "\\n\\nHuman: ...", "rejected": "\\n\\nHuman: ..."}` (HH-RLHF) | PreferencePair |
| comparison | `{"instruction", "output_1", "output_2", "preference"}` (AlpacaEval) | PreferencePair |
| ranked | `{"context", "completions": [{"rank", "completion"}]}` | RankedResponses |
| ultrafeedback | `{"instruction", "completions": [{"response", "overall_score"}]}` | RankedResponses |
| helpsteer | `{"prompt", "response", "helpfulness", ...}`, or two responses and a strength | ScoredResponse, PreferencePair |
| labelled | `{"prompt", "completion", "labels": {"turns": 3, "returns": true, "gap": {"time": 2.5, "observed": false}}}` or with messages | ScoredResponse |
| unpaired | `{"prompt", "completion", "label"}` or `{"messages", "label"}` (KTO) | LabelledResponse |
| gsm8k | `{"question", "answer": "... #### 72"}` | VerifiableProblem |
| problem | `{"prompt", "answer"}` | VerifiableProblem |
| human_eval | `{"prompt", "canonical_solution", "test", "entry_point"}` | VerifiableProblem |
| prompts | `{"turns": [...]}` (MT-Bench), `{"prompt", "label"}` (XSTest), `{"prompt"}` | Prompt |
| judge_prompts | `{"name", "system_prompt", "prompt_template"}` (MT-Bench) | JudgePrompt |

`read_records` yields these; `read_rows` what supervised training takes of them (`SFT_TAKES`). A row that cannot
be used is never fatal here and never silent: it comes out as a `BadRow` with its line and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megalign.data import judged, questions
from megalign.data.files import values
from megalign.data.kinds import kind
from megalign.data.rows import (
    AnyRow,
    BadRow,
    Conversation,
    DataError,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    RankedResponses,
    Row,
    ScoredResponse,
    TextRow,
    Unusable,
    Values,
    VerifiableProblem,
)
from megalign.data.tools import read_calls
from megalign.data.turns import answer_turns, dialogue, prompt_turns, string, turns

# Said when no tool fits the question: xLAM's irrelevance rows give an empty list, which is no sentence.
NO_TOOL_FITS = "None of the available tools can answer this."

# What supervised training takes of a format that is not a dialogue or text already.
SFT_TAKES = {
    "preference": "the chosen side",
    "hh": "the chosen side",
    "comparison": "the preferred output",
    "ranked": "the best completion",
    "ultrafeedback": "the best completion",
    "helpsteer": "every response, or the preferred one of two",
    "labelled": "every response",
    "unpaired": "the responses with label true",
    "gsm8k": "the worked solution",
    "problem": "the answer",
    "human_eval": "the canonical solution",
    "prompts": "the answers, where there are any",
    "xlam": f'the calls; where no tool fits, "{NO_TOOL_FITS}"',
}


def detect(path: str | Path) -> str:
    """The format of a file, a name of the table above, told by the keys of the first row that is a JSON object.

    Raises DataError if the file is missing or no row tells.
    """
    path = Path(path)
    if kind(path) == ".txt":
        return "text"
    unusable = None
    for line, value in values(path):
        if isinstance(value, dict):
            found = next((name for name, tells in _TELLS.items() if tells(value)), None)
            if found:
                return found
            keys = list(value)[:8]
            raise DataError(
                f"{path}: format not recognised; keys of the first object: {keys}; formats: {', '.join(FORMATS)}; "
                "convert the file, or name its format in data.format (or --format)"
            )
        reason = str(value) if isinstance(value, Unusable) else f"not a JSON object but {type(value).__name__}"
        unusable = unusable or f"{path}:{line}: {reason}"
    if unusable:
        raise DataError(f"{unusable}; no row of the file is a JSON object, and each must be one")
    raise DataError(f"{path}: the file holds no rows; give a file with at least one")


def announcement(source: str, format: str) -> str:
    """The line that tells how a file is read."""
    takes = SFT_TAKES.get(format)
    return f"{source}: format {format}" + (f", of which supervised training takes {takes}" if takes else "")


def read_records(path: str | Path, format: str = "auto") -> Iterator[AnyRow]:
    """Every row of a file in order, typed as the file has it.

    Raises DataError if the file as a whole cannot be read.
    """
    path = Path(path)
    format = detect(path) if format == "auto" else format
    if format not in FORMATS:
        raise DataError(f"data.format is {format!r}; known: auto, {', '.join(FORMATS)}")
    if kind(path) == ".txt" and format != "text":
        raise DataError(f"{path}: a .txt file holds text, but data.format is {format!r}; set it to text or auto")
    read = FORMATS[format]
    for line, value in values(path):
        try:
            if isinstance(value, Unusable):
                raise value
            if not isinstance(value, dict):
                raise Unusable(f"not a JSON object but {type(value).__name__}")
            yield read(value, str(path), line)
        except Unusable as error:
            yield BadRow(str(path), line, str(error))
        except RecursionError:
            yield BadRow(str(path), line, "nested too deep")


def read_rows(path: str | Path, format: str = "auto") -> Iterator[Row]:
    """Every row of a file as supervised training takes it. Raises DataError as `read_records` does."""
    return map(for_training, read_records(path, format))


def for_training(row: AnyRow) -> Row:
    """The dialogue to imitate in any row, or the reason why it holds none."""
    match row:
        case PreferencePair(prompt=prompt, chosen=response):
            messages = (*prompt, *response.messages)
        case RankedResponses(prompt=prompt, responses=(response, *_)):
            messages = (*prompt, *response.messages)
        case LabelledResponse(label=False):
            return BadRow(row.source, row.line, "label is false: an answer not to imitate")
        case LabelledResponse(prompt=prompt, response=response) | ScoredResponse(prompt=prompt, response=response):
            messages = (*prompt, *response.messages)
        case VerifiableProblem(prompt=prompt):
            messages = (*prompt, Message("assistant", row.solution or row.answer))
        case Prompt(turns=(first,), answer=str(answer)):
            messages = (Message("user", first), Message("assistant", answer))
        case Conversation() | TextRow() | BadRow():
            return row
        case _:
            return BadRow(row.source, row.line, "a question without an answer: nothing to train on")
    tools = row.tools if isinstance(row, PreferencePair) else ()
    return Conversation(messages, row.source, row.line, tools)


def _messages(value: Values, source: str, line: int) -> Conversation:
    if value.get("messages") is None:
        raise Unusable("key 'messages' is missing")
    return dialogue(turns(value["messages"]), value, source, line)


def _sharegpt(value: Values, source: str, line: int) -> Conversation:
    if value.get("conversations") is None:
        raise Unusable("key 'conversations' is missing")
    said = turns(value["conversations"], "'conversations'")
    return dialogue(_with_system(value, said), value, source, line)


def _instruction(value: Values, source: str, line: int) -> Conversation:
    answers = [key for key in ("response", "output") if key in value]
    if len(answers) != 1:
        raise Unusable(f"needs one of the keys 'response' and 'output', has {len(answers)}")
    user, given = string(value, "instruction"), ""
    if value.get("input") not in (None, ""):
        given = string(value, "input")
        user += "\n\n" + given
    said = [*_history(value), Message("user", user, input=given), Message("assistant", string(value, answers[0]))]
    return dialogue(_with_system(value, said), value, source, line)


def _history(value: Values) -> Iterator[Message]:
    """Alpaca's earlier exchanges: `[[question, answer], ...]`."""
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("'history' is not a list of [question, answer]")
    for number, pair in enumerate(history, 1):
        for role, text in zip(("user", "assistant"), pair):
            yield Message(role, string({"text": text}, "text", f"exchange {number} of 'history': "))


def _with_system(value: Values, said: list[Message]) -> list[Message]:
    system = value.get("system")
    if system in (None, "") or (said and said[0].role == "system"):
        return said
    return [Message("system", string(value, "system")), *said]


def _prompt_completion(value: Values, source: str, line: int) -> Conversation:
    completion = answer_turns(value.get("completion"), "'completion'")
    return dialogue([*prompt_turns(value.get("prompt")), *completion], value, source, line)


def _xlam(value: Values, source: str, line: int) -> Conversation:
    answers = value.get("answers")
    if answers is None:
        raise Unusable("key 'answers' is missing")
    calls = read_calls(answers)
    reply = Message("assistant", "" if calls else NO_TOOL_FITS, calls)
    return dialogue([Message("user", string(value, "query")), reply], value, source, line)


def _text(value: Values, source: str, line: int) -> TextRow:
    return TextRow(string(value, "text"), source, line)


FORMATS: dict[str, Callable[[Values, str, int], AnyRow]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "prompt_completion": _prompt_completion,
    "xlam": _xlam,
    "text": _text,
    "preference": judged.preference,
    "hh": judged.hh,
    "comparison": judged.comparison,
    "ranked": judged.ranked,
    "ultrafeedback": judged.ultrafeedback,
    "helpsteer": judged.helpsteer,
    "labelled": judged.labelled,
    "unpaired": judged.unpaired,
    "gsm8k": questions.gsm8k,
    "problem": questions.problem,
    "human_eval": questions.human_eval,
    "prompts": questions.prompts,
    "judge_prompts": questions.judge_prompts,
}


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda value: all(key in value for key in keys)


def _first_item(value: dict[str, Any]) -> dict[str, Any]:
    items = value.get("completions")
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


# The first that is true decides: the more telling keys come first (Alpaca's own file has "text" as well).
_TELLS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "hh": lambda v: _has("chosen", "rejected")(v)
    and "prompt" not in v
    and all(isinstance(v[k], str) and v[k].lstrip().startswith("Human:") for k in ("chosen", "rejected")),
    "preference": _has("chosen", "rejected"),
    "comparison": _has("output_1", "output_2", "preference"),
    "ranked": lambda v: "rank" in _first_item(v),
    "ultrafeedback": lambda v: "response" in _first_item(v),
    "helpsteer": lambda v: _has("prompt", "response", "helpfulness")(v)
    or _has("response_1", "response_2", "preference_strength")(v)
    or _has("response1", "response2", "overall_preference")(v),
    "labelled": lambda v: isinstance(v.get("labels"), dict),
    "unpaired": lambda v: isinstance(v.get("label"), (bool, int))
    and ("messages" in v or "conversations" in v or "completion" in v),
    "xlam": _has("query", "tools", "answers"),
    "messages": _has("messages"),
    "sharegpt": _has("conversations"),
    "human_eval": _has("prompt", "canonical_solution", "test"),
    "judge_prompts": _has("system_prompt", "prompt_template"),
    "instruction": _has("instruction"),
    "gsm8k": lambda v: isinstance(v.get("answer"), str) and "question" in v and "####" in v["answer"],
    "prompts": lambda v: isinstance(v.get("turns"), list) or ("prompt" in v and ("label" in v or "final_label" in v)),
    "prompt_completion": _has("prompt", "completion"),
    "problem": lambda v: "answer" in v and ("prompt" in v or "question" in v),
    "text": _has("text"),
}
