"""Judged answers: each spelling of a preference becomes the typed row that its file means, ties and gaps bad rows."""

from __future__ import annotations

import gzip
import json

import pytest

from megalign.data.formats import announcement, detect, for_training, read_records, read_rows
from megalign.data.rows import (
    BadRow,
    Conversation,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    RankedResponses,
    ScoredResponse,
    VerifiableProblem,
)

USER, GOOD, BAD = Message("user", "Hi"), Message("assistant", "Hello"), Message("assistant", "Go away")
U, G, B = ({"role": m.role, "content": m.content} for m in (USER, GOOD, BAD))


def read(tmp_path, *values, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    return path


def only(tmp_path, value):
    """The format found, and the one row."""
    path = read(tmp_path, value)
    (row,) = read_records(path)
    return detect(path), row


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [U], "chosen": [G], "rejected": [B]},
        {"prompt": "Hi", "chosen": [U, G], "rejected": [U, B]},  # UltraFeedback, binarised
        {"chosen": [U, G], "rejected": [U, B]},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "Go away"}},
        {"chosen": "Hi Hello", "rejected": "Hi Go away"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
        {"instruction": "Hi", "output_1": "Go away", "output_2": "Hello", "preference": 2},
        {"prompt": "Hi", "response_1": "Hello", "response_2": "Go away", "preference_strength": -3},
        {"context": [U], "response1": "Go away", "response2": "Hello", "overall_preference": 1},
    ],
    ids=range(10),
)  # fmt: skip
def test_every_spelling_of_the_same_pair(tmp_path, value):
    _, row = only(tmp_path, value)
    assert isinstance(row, PreferencePair)
    assert (row.prompt, row.chosen.messages, row.rejected.messages, row.weight) == ((USER,), (GOOD,), (BAD,), 1.0)
    assert row.line == 1
    assert for_training(row) == Conversation((USER, GOOD), row.source, 1)


def test_formats_are_told_apart(tmp_path):
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    for value, name in [
        (pair, "hh"),
        ({"prompt": "a"} | pair, "preference"),
        ({"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1}, "comparison"),
        ({"context": "a", "completions": [{"rank": 0, "completion": "b"}]}, "ranked"),
        ({"instruction": "a", "completions": [{"response": "b"}], "models": []}, "ultrafeedback"),
        ({"prompt": "a", "response": "b", "helpfulness": 4}, "helpsteer"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"prompt": "a", "completion": "b", "label": 0}, "unpaired"),
        ({"messages": [], "label": False}, "unpaired"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "answer": "b"}, "problem"),
        ({"question": "a", "answer": "b #### 3"}, "gsm8k"),
        ({"question": "a", "answer": "3"}, "problem"),
        ({"query": "a", "tools": "[]", "answers": "[]"}, "xlam"),
        ({"turns": ["a"]}, "prompts"),
        ({"conversations": [], "text": ""}, "sharegpt"),
    ]:
        assert detect(read(tmp_path, value)) == name


def test_margins_scores_and_provenance(tmp_path):
    given = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "score_chosen": 8.5, "score_rejected": 6, "chosen_model": "a",
             "model": "b", "judge": "gpt-4", "rubric": "v2", "created_at": "2026-01-02", "license": "MIT"}  # fmt: skip
    _, row = only(tmp_path, given)
    assert isinstance(row, PreferencePair)
    assert (row.chosen.score, row.rejected.score, row.margin) == (8.5, 6.0, 2.5)
    assert (row.chosen.policy, row.rejected.policy) == ("a", "b")
    assert vars(row.provenance) == {"judge": "gpt-4", "rubric": "v2", "time": "2026-01-02", "licence": "MIT"}
    _, row = only(tmp_path, given | {"margin": 1})
    assert isinstance(row, PreferencePair) and row.margin == 1.0
    weak = {"instruction": "Hi", "input": "there", "output_1": "a", "output_2": "b", "preference": 1.7, "generator_2": "m", "annotator": "j"}
    _, row = only(tmp_path, weak)
    assert isinstance(row, PreferencePair) and row.margin == pytest.approx(2 * (1.7 - 1.5))
    assert (row.chosen.policy, row.chosen.text, row.prompt[0].content, row.provenance.judge) == ("m", "b", "Hi\n\nthere", "j")


def test_hh_transcripts_are_split_at_the_last_common_turn(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    _, row = only(tmp_path, {"chosen": start + "\n\nAssistant: d\n\nHuman: e\n\nAssistant: f", "rejected": start + "\n\nAssistant: g"})
    assert isinstance(row, PreferencePair)
    assert [m.content for m in row.prompt] == ["a", "b", "c"]
    assert [m.content for m in row.chosen.messages] == ["d", "e", "f"] and row.chosen.text == "f"
    assert [m.content for m in row.rejected.messages] == ["g"]


def test_ranked_completions_make_pairs_that_sum_to_one(tmp_path):
    answers = [("c", 3), ("a", 1), ("b", 2), ("b2", 2)]
    _, row = only(tmp_path, {"context": [U], "completions": [{"completion": text, "rank": rank} for text, rank in answers]})
    assert isinstance(row, RankedResponses)
    assert [r.text for r in row.responses] == ["a", "b", "b2", "c"]
    pairs = {(p.chosen.text, p.rejected.text): p.weight for p in row.pairs()}
    assert set(pairs) == {("a", "b"), ("a", "b2"), ("a", "c"), ("b", "c"), ("b2", "c")}  # b and b2 tie
    assert set(pairs.values()) == {1 / 5}
    trained = for_training(row)
    assert isinstance(trained, Conversation) and trained.messages[-1].content == "a"


def test_ultrafeedback_best_score_first(tmp_path):
    rating = {"honesty": {"Rating": "3"}, "truthfulness": {"Rating": "4"}, "other": {"Rating": "N/A"}}
    value = {"instruction": "Hi", "completions": [{"response": "a", "overall_score": 3, "model": "m"}, {"response": "b", "annotations": rating}]}
    _, row = only(tmp_path, value)
    assert isinstance(row, RankedResponses)
    assert [(r.text, r.score, r.policy) for r in row.responses] == [("b", 3.5, None), ("a", 3.0, "m")]
    (pair,) = row.pairs()
    assert (pair.weight, pair.margin) == (1.0, 0.5)


def test_helpsteer_scores_and_marked_turns(tmp_path):
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWho?"
    _, row = only(tmp_path, {"prompt": prompt, "response": "I", "helpfulness": 4, "verbosity": 1, "correctness": 0})
    assert isinstance(row, ScoredResponse)
    assert row.prompt == (USER, GOOD, Message("user", "Who?"))
    assert dict(row.scores) == {"helpfulness": 4.0, "correctness": 0.0, "verbosity": 1.0}


def test_unpaired_labels(tmp_path):
    path = read(tmp_path, {"messages": [U, G], "label": True}, {"messages": [U, B], "label": False}, {"prompt": "Hi", "completion": "Hello", "label": 1})
    one, two, three = read_records(path)
    for row, label, answer in ((one, True, GOOD), (two, False, BAD), (three, True, GOOD)):
        assert isinstance(row, LabelledResponse)
        assert (row.prompt, row.response.messages, row.label) == ((USER,), (answer,), label)
    kept, left, also = read_rows(path)
    assert isinstance(kept, Conversation) and isinstance(also, Conversation)
    assert left == BadRow(str(path), 2, "label is false: an answer not to imitate")


def test_problems(tmp_path):
    _, row = only(tmp_path, {"question": "q?", "answer": "1000 + 1\n#### 1,001"})
    assert isinstance(row, VerifiableProblem)
    assert (row.prompt[0].content, row.answer, row.solution) == ("q?", "1001", "1000 + 1\n#### 1,001")
    _, row = only(tmp_path, {"prompt": [U], "answer": 3})
    assert isinstance(row, VerifiableProblem) and (row.prompt, row.answer, row.solution) == ((USER,), "3", None)


PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
COMPARED = {"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1}
RANKED = {"context": "Hi", "completions": [{"rank": 1, "completion": "a"}, {"rank": 2, "completion": "b"}]}
UNUSABLE = [
    (PAIR, PAIR | {"rejected": "Hello"}, "tie: both sides are the same"),
    (PAIR, PAIR | {"score_chosen": 1, "score_rejected": 1}, "tie: both sides score 1"),
    (PAIR, PAIR | {"score_chosen": "high"}, "'score_chosen' is 'high', not a number"),
    (PAIR, PAIR | {"score_chosen": 10**400}, "not a number"),
    (PAIR, PAIR | {"rejected": None}, "'rejected' is missing"),
    (PAIR, PAIR | {"chosen": " "}, "'chosen' is empty"),
    (PAIR, {"chosen": "a", "rejected": "b"}, "has no prompt"),
    (PAIR, {"chosen": "Hi a", "rejected": "Hi "}, "an answer is empty"),
    (PAIR, {"chosen": [U, G], "rejected": "b"}, "one side holds the prompt too"),
    (PAIR, {"chosen": [U, G], "rejected": [{"role": "user", "content": "Ho"}, B]}, "share no first turn"),
    (PAIR, {"chosen": [U, G], "rejected": [U]}, "after turn 1 the two sides do not both go on"),
    (PAIR, PAIR | {"prompt": [G]}, "message 1: role is 'assistant' where 'user' is due"),
    (COMPARED, COMPARED | {"preference": 0}, "tie: 'preference' is 0"),
    (COMPARED, COMPARED | {"preference": 1.5}, "tie: 'preference' is 1.5"),
    (COMPARED, COMPARED | {"preference": None}, "'preference' is missing"),
    (COMPARED, COMPARED | {"preference": 3}, "'preference' is 3"),
    (COMPARED, COMPARED | {"output_2": None}, "'output_2' is missing"),
    (RANKED, RANKED | {"completions": RANKED["completions"][:1]}, "needs 2 completions or more, has 1"),
    (RANKED, RANKED | {"completions": [{"rank": 1, "completion": x} for x in "ab"]}, "tie: all completions"),
    (RANKED, RANKED | {"completions": [*RANKED["completions"], {"completion": "c"}]}, "completion 3 has no 'rank'"),
    (RANKED, RANKED | {"completions": 3}, "'completions' is not a list of objects"),
    ({"messages": [U, G], "label": True}, {"messages": [U, G], "label": 2}, "'label' is 2: true or false"),
    ({"messages": [U, G], "label": True}, {"messages": [U], "label": True}, "last message is not the assistant's"),
    ({"question": "q", "answer": "a #### 1"}, {"question": "q", "answer": "a"}, "no final answer after '####'"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "value", "reason"), UNUSABLE, ids=range(len(UNUSABLE)))
def test_what_cannot_be_learnt_from_says_why(tmp_path, good, value, reason):
    path = read(tmp_path, good, value, good)
    rows = list(read_records(path))
    assert [row.line for row in rows] == [1, 2, 3]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert isinstance(rows[1], BadRow) and reason in rows[1].reason and len(rows[1].reason) < 120


def test_what_supervised_training_takes_is_announced():
    assert announcement("a", "messages") == "a: format messages"
    assert announcement("a", "preference") == "a: format preference, of which supervised training takes the chosen side"


REAL = {
    "demo_formats/dpo_en_demo.json": ("preference", PreferencePair, 300, 300),
    "demo_formats/kto_en_demo.json": ("unpaired", LabelledResponse, 300, 150),
    "demo_formats/glaive_toolcall_en_demo.json": ("sharegpt", Conversation, 299, 299),  # one call breaks its schema
    "demo_formats/alpaca_en_demo.json": ("instruction", Conversation, 999, 999),
    "roleplay/roleplay.json": ("instruction", Conversation, 1600, 1600),
    "hh_harmless/pairs.jsonl.gz": ("hh", PreferencePair, 1791, 1791),  # 4 empty turns, 5 with a speaker twice
    "gsm8k/train.jsonl": ("gsm8k", VerifiableProblem, 7473, 7473),
    "gsm8k/test.jsonl": ("gsm8k", VerifiableProblem, 660, 660),
    "human_eval/HumanEval.jsonl.gz": ("human_eval", VerifiableProblem, 164, 164),
    "mt_bench/question.jsonl": ("prompts", Prompt, 80, 0),
    "mt_bench/judge_prompts.jsonl": ("judge_prompts", None, 8, 0),
    "xstest/xstest_prompts.csv": ("prompts", Prompt, 450, 0),
    "xstest/completions_mistralguard_labelled.csv": ("prompts", Prompt, 450, 450),
    "text/c4_demo.jsonl": ("text", None, 300, 300),
    "text/botchan.txt": ("text", None, 1, 1),
    "text/wiki_demo.txt": ("text", None, 1, 1),
    "text/tinyshakespeare.txt": ("text", None, 7222, 7222),
}  # fmt: skip


def test_every_file_of_the_shared_data_is_read(shared_data):
    found = {str(p.relative_to(shared_data)) for p in shared_data.rglob("*") if p.is_file() and p.suffix != ".md"}
    assert found == {*REAL, *(f"alpaca_eval/{m}.json.gz" for m in ("Yi-34B-Chat", "alpaca-7b", "claude-2", "falcon-7b-instruct"))}
    for name, (format, kind, usable, trained) in REAL.items():
        path = shared_data / name
        assert detect(path) == format, name
        rows = list(read_records(path, format))
        good = [row for row in rows if not isinstance(row, BadRow)]
        assert len(good) == usable and all(isinstance(row, kind) for row in good if kind), name
        assert sum(not isinstance(for_training(row), BadRow) for row in rows) == trained, name


def test_alpaca_eval_prefers_the_output_the_file_says(shared_data):
    for path in sorted((shared_data / "alpaca_eval").iterdir()):
        raw = json.loads(gzip.decompress(path.read_bytes()))
        rows = list(read_records(path))
        assert len(rows) == len(raw) == 805
        for row, value in zip(rows, raw):
            if value["preference"] in (1, 2):
                assert isinstance(row, PreferencePair)
                wanted = int(value["preference"])
                assert row.chosen.text == value[f"output_{wanted}"] and row.rejected.text == value[f"output_{3 - wanted}"]
                assert row.chosen.policy == value[f"generator_{wanted}"]
            else:
                assert isinstance(row, BadRow)
