"""Questions: problems that a verifier checks, and sets of prompts for evaluation."""

from __future__ import annotations

from megalign.data.rows import JudgePrompt, Message, Prompt, Unusable, Values, VerifiableProblem
from megalign.data.turns import check_order, plain, prompt_turns, string

MARK = "####"  # GSM8K's, before the final answer


def gsm8k(value: Values, source: str, line: int) -> VerifiableProblem:
    """`{question, answer}`: the answer is a worked solution that ends "#### 72"; commas in the number are left out."""
    solution = string(value, "answer")
    before, mark, final = solution.rpartition(MARK)
    answer = final.strip().replace(",", "")
    if not mark or not answer:
        raise Unusable(f"'answer' has no final answer after {MARK!r}")
    prompt = (Message("user", string(value, "question")),)
    return VerifiableProblem(prompt, answer, solution, source=source, line=line)


def problem(value: Values, source: str, line: int) -> VerifiableProblem:
    """`{prompt, answer}`, with a worked `solution` or without; the prompt is text or messages."""
    key = "prompt" if value.get("prompt") is not None else "question"
    prompt = tuple(prompt_turns(value.get(key), repr(key)))
    answer = value.get("answer")
    answer = str(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else answer
    solution = string(value, "solution") if value.get("solution") else None
    text = string({"answer": answer} if "answer" in value else {}, "answer")
    check_order((*prompt, Message("assistant", text)))
    return VerifiableProblem(prompt, text, solution, source=source, line=line)


def human_eval(value: Values, source: str, line: int) -> VerifiableProblem:
    """`{prompt, canonical_solution, test, entry_point}`: a function to complete, and the tests that it must pass."""
    prompt, answer, tests = (string(value, key) for key in ("prompt", "canonical_solution", "test"))
    entry = string(value, "entry_point")
    return VerifiableProblem((Message("user", prompt),), answer, None, tests, entry, source, line)


def prompts(value: Values, source: str, line: int) -> Prompt:
    """`{turns: [...]}`, or `{prompt}` with a label, and an answer that the label is about."""
    given = value["turns"] if "turns" in value else [value.get("prompt")]
    if not isinstance(given, list) or not given:
        raise Unusable("'turns' is not a list of texts")
    texts = tuple(plain(text, f"turn {number}") for number, text in enumerate(given, 1))
    labels = (value.get(key) for key in ("final_label", "label"))
    label = next((str(found) for found in labels if found not in (None, "")), None)
    category = next((str(value[key]) for key in ("category", "type") if value.get(key)), None)
    answer = string(value, "completion") if value.get("completion") else None
    return Prompt(texts, category, label, answer, source, line)


def judge_prompts(value: Values, source: str, line: int) -> JudgePrompt:
    """`{name, system_prompt, prompt_template}`."""
    name, template = string(value, "name"), string(value, "prompt_template")
    return JudgePrompt(name, string(value, "system_prompt", empty=True), template, source, line)
