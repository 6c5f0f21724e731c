"""DPO in rounds: own answers alone, a new anchor each time, and going on where it was (O12)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rounds_checks
from dpo_checks import curve, metrics
from ranks import run_ranks
from rounds_checks import rounds

NAMES, STOP = ("loss", "grad_norm", "rewards/margins", "logps/chosen"), 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that is started from; two rounds in one go; the same stopped in the middle of each; with adapters; and what is refused."""
    base = tmp_path_factory.mktemp("rounds")

    def halted(count: int) -> dict[str, Any]:
        recipe = rounds(base, base / "goes", count)
        return {**recipe, "train": {**recipe["train"], "stop_at_step": STOP}}

    recipes = [
        rounds_checks.start(base),
        rounds(base, base / "whole", 2),
        halted(2),
        rounds(base, base / "goes", 1),
        halted(2),
        rounds(base, base / "goes", 2),
        {**rounds(base, base / "lora", 2), "lora": dict(rank=4), "dpo": dict(reference="base"), "optimizer": dict(lr=4e-3, weight_decay=0.0)},
        rounds(base, base / "goes", 2, n=5),
        {**rounds(base, base / "anchored", 2), "dpo": dict(reference_from=str(base / "start"))},
    ]
    stopped = {2: base / "goes" / "round_1" / "run", 4: base / "goes" / "round_2" / "run"}
    said = run_ranks(rounds_checks.train_all, 1, recipes, stopped, timeout=400)[0]
    assert said[:7] == ["", "", f"at step {STOP}", "", f"at step {STOP}", "", ""], said
    assert said[7].startswith("RunError") and "was drawn with another sampling" in said[7]
    assert said[8].startswith("ConfigError") and "anchored to the policy that it starts from" in said[8]
    cut = {**rounds(base, base / "tp2", 1), "parallel": dict(tensor_model_parallel_size=2, sequence_parallel=True)}
    assert run_ranks(rounds_checks.train_all, 2, [cut], {}, timeout=400)[0] == [""]
    return base


def drawn(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the answers were drawn with, the answers to each prompt)."""
    key, *lines = (json.loads(line) for line in (folder / "drawn.jsonl").read_text().splitlines())
    return key, lines


def test_pairs_are_the_policys_own_answers_best_against_worst(folder: Path):
    models = set()
    for number in (1, 2):
        here = folder / "whole" / f"round_{number}"
        key, lines = drawn(here)
        models.add(key["model"])
        pairs = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines()]
        expected = []
        for line in lines:
            said = [answer["text"] for answer in line["answers"] if answer["finished"] and answer["text"]]
            words = [len(text.split()) for text in said]
            if said and min(words) < max(words):  # the first of the best, and of the worst
                expected.append((line["prompt"], said[words.index(min(words))], said[words.index(max(words))]))
        assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == expected and len(expected) > 4
    assert len(models) == 2, "the second round's answers are those of another model than the first one's"


def test_every_round_is_anchored_anew(folder: Path):
    for name, numbers in (("whole", (1, 2)), ("lora", (1, 2)), ("tp2", (1,))):
        for number in numbers:
            run = folder / name / f"round_{number}" / "run"
            margins = curve(run, "rewards/margins")
            assert margins[0][1] == pytest.approx(0, abs=1e-5) and abs(margins[-1][1]) > 0.01, (name, number)
            said = [line["message"] for line in metrics(run, "event") if line["event"] == "reference"]
            assert said[-1].startswith("policy = reference at step 0"), (name, number)


def test_the_score_rises(folder: Path):
    for name in ("whole", "lora"):
        scores = [line["score/mean"] for line in metrics(folder / name) if "score/mean" in line]
        assert len(scores) == 2 and scores[1] > scores[0] + 0.2, name


def test_it_goes_on_in_the_middle_of_a_round(folder: Path):
    """Stopped at step 5 of 12 in either round, and repeated: bitwise the pairs, the reference and the curves of one go."""
    for number in (1, 2):
        whole, goes = (folder / name / f"round_{number}" for name in ("whole", "goes"))
        assert (whole / "pairs.jsonl").read_bytes() == (goes / "pairs.jsonl").read_bytes()
        assert (whole / "run" / "reference" / "train.npy").read_bytes() == (goes / "run" / "reference" / "train.npy").read_bytes()
        assert len(curve(whole / "run", *NAMES)) == 12 and curve(whole / "run", *NAMES) == curve(goes / "run", *NAMES)
    assert (folder / "whole" / "samples.jsonl").read_bytes() == (folder / "goes" / "samples.jsonl").read_bytes()


def test_another_layout_draws_the_same_pairs_and_learns_the_same(folder: Path):
    alone, cut = ((folder / name / "round_1") for name in ("whole", "tp2"))
    assert (alone / "pairs.jsonl").read_text() == (cut / "pairs.jsonl").read_text()
    one, two = (curve(here / "run", "loss", "logps/chosen") for here in (alone, cut))
    for (step, loss, logps), other in zip(one, two, strict=True):
        assert other == pytest.approx((step, loss, logps), rel=2e-4)
