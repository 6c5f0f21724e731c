"""Best-of-n and RSO with trained reward models as judges: scores by hand, on other layouts, of an ensemble; judges broken on purpose."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import best_of_n_checks
import judge_checks
import numpy as np
import pytest
from best_of_n_checks import metrics, recipe, start
from ranks import run_ranks

N, ALPHA = 6, 0.7
TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
HEADS = {"liked": {}, "words": {"loss": "regression", "weight": 0.1}}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(folder: Path) -> tuple[str, str]:
    """Pairs in which the answer of more words is better, and answers with that number as a label."""
    numbers, pairs, labelled = np.random.default_rng(2), folder / "pairs.jsonl", folder / "labelled.jsonl"
    words = "fox owl river lamp stone bread cart tower garden bell".split()
    short, long = ([" ".join(numbers.choice(words, int(size))) + "." for size in numbers.integers(*bounds, 120)] for bounds in ((1, 5), (6, 14)))
    pairs.write_text("".join(json.dumps({"prompt": f"Tell me {n}", "chosen": a, "rejected": b}) + "\n" for n, (a, b) in enumerate(zip(long, short))))
    labelled.write_text("".join(json.dumps({"prompt": f"Tell me {n}", "completion": b, "labels": {"words": len(b.split())}}) + "\n" for n, b in enumerate(short)))
    return str(pairs), str(labelled)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("judged")
    begin, (pairs, labelled) = base / "start", write_rows(base)

    def reward_model(name: str, seed: int, *files: str, **changes: Any) -> dict[str, Any]:
        data = dict(train=[pairs, *files], max_rows=None, validation_rows=40)
        return recipe(base / name, begin, train={"max_steps": 12, "micro_batch_size": 8, "seed": seed}, data=data, optimizer=dict(lr=3e-3), **changes)

    own_tokens = start(base / "other-tokens", data=dict(train=pairs, max_rows=None, validation_rows=40, sequence_length=192, tokenizer=dict(vocab_size=300)), train=dict(micro_batch_size=8, global_batch_size=8, max_steps=12, seed=3))
    jobs = [
        ("sft", start(begin)),
        ("rm", reward_model("a", 1)),
        ("rm", reward_model("b", 2, labelled, rm={"heads": HEADS})),
        ("rm", own_tokens),
        ("best_of_n", judged(base, "one", "a")),
        ("best_of_n", judged(base, "several", "a", "other-tokens", alpha=ALPHA)),
        ("best_of_n", judged(base, "head", "b", head="words")),
        ("rso", recipe(base / "rso", begin, rso=asks(base, "a", n=12, prompts=12, beta=0.5, accepted=4))),
        ("rounds.dpo_rounds", {**recipe(base / "rounds", begin, rounds={"count": 1, **asks(base, "a", n=4, prompts=8)}, train={"max_steps": 3}), "dpo": {"reference": "model"}}),
    ]
    assert not "".join(run_ranks(best_of_n_checks.work, 1, jobs, timeout=400)[0])
    jobs = [
        ("best_of_n", {**judged(base, "tp2", "a"), "parallel": TP2}),
        ("best_of_n", {**judged(base, "tp2-pp2", "a", "other-tokens", alpha=ALPHA, parallel=PP2), "parallel": TP2}),
    ]
    assert run_ranks(best_of_n_checks.work, 2, jobs)[0] == ["", ""]
    return base


def asks(base: Path, *models: str, n: int = N, prompts: int = 10, beta: float | None = None, accepted: int | None = None, **judge: Any) -> dict[str, Any]:
    """A section whose scorer is these reward models."""
    own = {} if beta is None else {"beta": beta, "accepted": accepted}
    checkpoints = [str(base / name) for name in models]
    return {"n": n, "prompts": prompts, "max_new_tokens": 24, "scorer": "reward_model", "reward_model": {"checkpoints": checkpoints, "max_tokens": 384, **judge}, **own}


def judged(base: Path, name: str, *models: str, **judge: Any) -> dict[str, Any]:
    return recipe(base / name, base / "start", best_of_n=asks(base, *models, **judge), train={"max_steps": 3, "sample_prompts": 0})


def dialogues(drawn: list[dict[str, Any]]) -> list[list[dict[str, str]]]:
    return [[*entry["prompt"], {"role": "assistant", "content": answer["text"]}] for entry in drawn for answer in entry["answers"]]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[float]]:
    """Of the answers of each run, in order: rewards by hand; of an ensemble mean - alpha * population standard deviation."""
    runs = {"one": ("a",), "several": ("a", "other-tokens"), "head": ("b",), "rso": ("a",)}
    files = {name: folder / name / ("drawn.jsonl" if name == "rso" else "round_1/drawn.jsonl") for name in runs}
    jobs = [(name, model) for name, models in runs.items() for model in models]
    found = run_ranks(judge_checks.by_hand, 1, [(str(folder / model), dialogues(lines(files[name])[1:])) for name, model in jobs])[0]
    members: dict[str, list[list[float]]] = {}
    for (name, _), rewards in zip(jobs, found, strict=True):
        members.setdefault(name, []).append(rewards["words" if name == "head" else next(iter(rewards))])
    return {name: together(parts) for name, parts in members.items()}


def together(members: list[list[float]]) -> list[float]:
    """One model's rewards as they are; of several mean - alpha * population standard deviation."""
    return members[0] if len(members) == 1 else [statistics.mean(said) - ALPHA * statistics.pstdev(said) for said in zip(*members)]


@pytest.mark.parametrize("name", ["one", "several", "head", "rso"])
def test_scores_are_those_of_the_heads_by_hand(folder: Path, expected: dict[str, list[float]], name: str):
    key, *drawn = lines(folder / name / ("drawn.jsonl" if name == "rso" else "round_1/drawn.jsonl"))
    scores = [score for entry in drawn for score in entry["scores"]]
    assert scores == pytest.approx(expected[name], abs=2e-4) and np.std(scores) > 0.01
    assert key["scorer"]["name"] == "reward_model" and len(key["scorer"]["models"]) == (2 if name == "several" else 1)


def test_the_answer_with_the_largest_reward_is_imitated(folder: Path, expected: dict[str, list[float]]):
    drawn, chosen = lines(folder / "several" / "round_1" / "drawn.jsonl")[1:], lines(folder / "several" / "round_1" / "chosen.jsonl")
    wanted = []
    for number, entry in enumerate(drawn):
        own = expected["several"][number * N : (number + 1) * N]
        finished = [(reward, answer["text"]) for reward, answer in zip(own, entry["answers"]) if answer["finished"]]
        if finished:
            wanted.append(max(finished)[1])
    assert [line["messages"][-1]["content"] for line in chosen] == wanted and len(wanted) >= 5
    first = metrics(folder / "several")[0]
    assert first["score/best_of_n"] > first["score/mean"]


def test_pairs_of_rejection_sampling_are_ranked_by_reward(folder: Path, expected: dict[str, list[float]]):
    drawn, pairs = lines(folder / "rso" / "drawn.jsonl")[1:], lines(folder / "rso" / "pairs.jsonl")
    rewards = {(entry["prompt"][-1]["content"], answer["text"]): expected["rso"][number * 12 + i] for number, entry in enumerate(drawn) for i, answer in enumerate(entry["answers"])}
    for pair in pairs:
        better, worse = (rewards[pair["prompt"][-1]["content"], pair[side]] for side in ("chosen", "rejected"))
        assert better > worse
    assert len(pairs) >= 3


def test_pairs_of_rounds_are_ranked_by_reward(folder: Path):
    """What is judged there is judged alike: pairs lead by the reward that is kept with the answers."""
    pairs = lines(folder / "rounds" / "round_1" / "pairs.jsonl")
    key, *drawn = lines(folder / "rounds" / "round_1" / "drawn.jsonl")
    usable = [[score for score, answer in zip(entry["scores"], entry["answers"]) if answer["finished"] and answer["text"]] for entry in drawn]
    assert [(pair["score_chosen"], pair["score_rejected"]) for pair in pairs] == [(max(scores), min(scores)) for scores in usable if len(set(scores)) > 1]
    assert key["scorer"]["name"] == "reward_model" and len(pairs) >= 3


@pytest.mark.parametrize("layout, alone", [("tp2", "one"), ("tp2-pp2", "several")])
def test_every_layout_scores_as_one_process(folder: Path, layout: str, alone: str):
    """The policy on TP2; the reward models there too, or on PP2. The same answers have the same scores."""
    there, here = ({(entry["prompt"][-1]["content"], answer["text"]): score for entry in lines(folder / name / "round_1" / "drawn.jsonl")[1:] for answer, score in zip(entry["answers"], entry["scores"])} for name in (layout, alone))
    both = there.keys() & here.keys()
    assert len(both) > 0.9 * len(here)
    assert [there[key] for key in both] == pytest.approx([here[key] for key in both], abs=2e-4)


@pytest.fixture(scope="module")
def broken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Scores by sound and by broken judges: of an ensemble, and of one head of two. Before each question something was said."""
    rows = [([*([{"role": "user", "content": "Hello there, fox"}, {"role": "assistant", "content": "Owl."}]), *entry["prompt"][-1:], {"role": "assistant", "content": entry["reference"]}], [answer["text"] for answer in entry["answers"]]) for entry in lines(folder / "one" / "round_1" / "drawn.jsonl")[1:5]]
    said = [[*messages[:-1], {"role": "assistant", "content": text}] for messages, answers in rows for text in answers]
    scratch = str(tmp_path_factory.mktemp("mutants"))
    found = {}
    for name, models, judge in (("ensemble", ("a", "other-tokens"), {"alpha": ALPHA}), ("head", ("b",), {"head": "liked"})):
        scores = run_ranks(judge_checks.broken, 1, judged(folder, name, *models, **judge), rows, scratch)[0]
        members = [next(iter(rewards.values())) for rewards in run_ranks(judge_checks.by_hand, 1, [(str(folder / model), said) for model in models])[0]]
        found[name] = {"by hand": together(members), **{mutation: sum(parts, []) for mutation, parts in scores.items()}}
    return found


def test_the_sound_judge_says_what_is_found_by_hand(broken: dict[str, dict[str, list[float]]]):
    assert all(found["sound"] == pytest.approx(found["by hand"], abs=2e-4) for found in broken.values())


@pytest.mark.parametrize("mutation", judge_checks.MUTATIONS)
def test_a_broken_judge_is_seen(broken: dict[str, dict[str, list[float]]], mutation: str):
    assert any(found[mutation] != pytest.approx(found["by hand"], abs=2e-4) for found in broken.values())


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path):
    def job(name: str, *models: str, policy: dict[str, Any] | None = None, **judge: Any) -> tuple[str, dict[str, Any]]:
        return "best_of_n", {**judged(folder, name, *models, **judge), "output": str(tmp_path / name), "parallel": policy or {}}

    spoilt = tmp_path / "spoilt"
    unfinished = next(path for path in sorted((folder / "a" / "checkpoints").iterdir()))
    shutil.copytree(unfinished, spoilt)
    (spoilt / "reward.json").unlink()
    forged = tmp_path / "forged"
    shutil.copytree(folder / "a" / "checkpoints" / unfinished.name, forged)
    shutil.rmtree(forged / "tokenizer")
    shutil.copytree(next((folder / "other-tokens" / "checkpoints").iterdir()) / "tokenizer", forged / "tokenizer")
    jobs = [
        job("words", "start"),
        job("nothing", "nowhere"),
        job("which", "b"),
        job("nobody", "a", head="quality"),
        job("layout", "a", parallel={"expert_model_parallel_size": 2}),
        job("short", "a", max_tokens=8),
        job("scales", "a", str(spoilt)),
        job("tokens", str(forged)),
        ("best_of_n", judged(folder, "one", "b", head="liked")),
    ]
    words, nothing, which, nobody, layout, short, scales, tokens, another = run_ranks(best_of_n_checks.work, 1, jobs)[0]
    assert words.startswith("ConfigError") and f"best_of_n.reward_model.checkpoints={folder / 'start'}: " in words and "says words, and gives no rewards" in words
    assert nothing.startswith("ConfigError") and "holds no complete checkpoint of ours; give a run of megalign rm train" in nothing
    assert which.startswith("ConfigError") and "best_of_n.reward_model.head=null: " in which and "has the heads liked, words; name one of them" in which
    assert nobody.startswith("ConfigError") and "best_of_n.reward_model.head=quality: " in nobody and "has the heads reward" in nobody
    assert layout.startswith("ConfigError") and "best_of_n.reward_model.parallel.expert_model_parallel_size=2: the model has no experts" in layout
    assert short.startswith("DataError") and "cannot score an answer to" in short and "raise best_of_n.reward_model.max_tokens, or lower best_of_n.max_new_tokens" in short
    assert scales.startswith("ConfigError") and "has no normalisation of head 'reward'" in scales
    assert tokens.startswith("CheckpointError") and "holds another tokenizer than the checkpoint was trained with" in tokens
    assert another.startswith("RunError") and "drawn with another scorer" in another
    assert not any((tmp_path / name).exists() for name in ("words", "nothing", "which", "nobody", "layout", "scales", "tokens")), "said before anything was drawn"
