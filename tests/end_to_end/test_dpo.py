"""`dpo` from data to report: references, resumption, errors, and that a loss is the one that was named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import dpo_checks
import numpy as np
import pytest
from dpo_checks import curve, metrics, recipe
from ranks import run_ranks

from megalign.config.preference import OPTIONS, REFERENCE_FREE
from megalign.config.schema import DPOConfig
from megalign.report.format import number as spell

NAMES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
ONE_STEP: dict[str, Any] = {"train": {"max_steps": 1}, "optimizer": {"lr_warmup_steps": 0}}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
AT_FIRST = {  # where policy and reference are equal
    "sigmoid": math.log(2), "ipo": 25.0, "ipo_sum": 25.0, "hinge": 1.0, "nca_pair": 2 * math.log(2), "sppo_hard": 50.0, "apo_zero": 1.0,
    "exo_pair": math.log(0.5) - 0.5 * math.log(0.999) - 0.5 * math.log(0.001), "discopop": 0.5 + 0.5 * math.log(2),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank, all in one launch."""
    base = tmp_path_factory.mktemp("dpo")
    half = {"train": {"stop_at_step": 3}}
    runs = [
        recipe(base / "cached", logging={"report": True}),
        recipe(base / "model", dpo={"reference": "model"}),
        recipe(base / "halves", **half),
        recipe(base / "halves"),
        recipe(base / "model-halves", dpo={"reference": "model"}, **half),
        recipe(base / "model-halves", dpo={"reference": "model"}),
        recipe(base / "second", model={"init_from": str(base / "cached")}, train={"eval_interval": 3}),
        from_runs(base, base / "third"),
        recipe(base / "shared", dpo={"reference_cache": str(base / "cached" / "reference")}),
        *(recipe(base / loss, dpo={"loss": loss}, **ONE_STEP) for loss in (*AT_FIRST, *REFERENCE_FREE) if loss != "sigmoid"),
    ]
    assert run_ranks(dpo_checks.train_all, 1, runs)[0] == [""] * len(runs)
    return base


def from_runs(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """One step from where "second" ended, against where "cached" ended."""
    start, reference = (str(base / name / "checkpoints" / "iter_0000006") for name in ("second", "cached"))
    return recipe(output, model={"init_from": start}, dpo={"reference_from": reference}, train={"max_steps": 1, "eval_interval": 1}, optimizer={"lr_warmup_steps": 0}, **changes)


def assert_goes_on(base: Path, other: Path):
    """What "second" measured at its end, of its weights against its reference's, is what `other` measures before its first step."""
    last, first = metrics(base / "second", "eval")[-1], metrics(other, "eval")[0]
    assert (last["step"], first["step"]) == (6, 0) and abs(last["eval_rewards/margins"]) > 1e-3
    for name in NAMES:
        if name != "grad_norm":
            # Rewards are beta times differences of sums of some hundred nats, of which FP32 has 1e-5 or two.
            assert first[f"eval_{name}"] == pytest.approx(last[f"eval_{name}"], rel=1e-5, abs=1e-5), name


def test_a_run_of_ours_is_a_start_and_a_reference(folder: Path):
    assert_goes_on(folder, folder / "third")
    events = [line["message"] for line in metrics(folder / "second", "event") if line["event"] == "reference"]
    assert events[1].startswith("policy = reference at step 0"), "without reference_from it is the run that it starts from"
    assert curve(folder / "second", *NAMES)[0] != curve(folder / "cached", *NAMES)[0]


@pytest.mark.parametrize("world, layout", [(1, []), (2, ["parallel.pipeline_model_parallel_size=2"])])
def test_the_implicit_reward_ranks_as_the_run_did(folder: Path, world: int, layout: list[str]):
    """R25: beta * log-ratio, of the best checkpoint, from two models loaded anew; the run's own evaluation says the same."""
    last = min((line for line in metrics(folder / "second", "eval") if line["step"]), key=lambda line: line["eval_loss"])  # the best checkpoint is the one that is used
    for found in run_ranks(dpo_checks.implicit, world, str(folder / "second"), layout):
        for side, rewards in found.items():
            assert np.mean(rewards) == pytest.approx(last[f"eval_rewards/{side}"], rel=1e-4, abs=1e-5)
        ranked = np.mean(np.array(found["chosen"]) > np.array(found["rejected"]))
        assert ranked == last["eval_rewards/accuracies"] and len(found["chosen"]) == 4


def test_a_second_model_is_the_cached_pass(folder: Path):
    cached, model = curve(folder / "cached", *NAMES), curve(folder / "model", *NAMES)
    assert [step for step, *_ in cached] == list(range(1, 7))
    assert cached[0][1] == pytest.approx(math.log(2), abs=1e-6) and min(row[1] for row in cached) < math.log(2) - 0.02
    for ours, theirs in zip(cached, model, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert not (folder / "model" / "reference").exists()
    events = [line["message"] for line in metrics(folder / "cached", "event") if line["event"] == "reference"]
    assert "computed, kept in" in events[0] and events[1].startswith("policy = reference at step 0")


def test_resumption_is_exact_and_the_reference_is_the_first_one(folder: Path):
    """Bitwise, rewards included: against a reference taken anew from the checkpoint they would start from 0 again."""
    whole, halves = curve(folder / "cached", *NAMES), curve(folder / "halves", *NAMES)
    assert whole == halves
    assert curve(folder / "model", *NAMES) == curve(folder / "model-halves", *NAMES)
    assert abs(whole[3][5]) > 1e-3, "margins that a new anchor would not have"
    evaluations = [[line["eval_loss"] for line in metrics(folder / name, "eval")] for name in ("cached", "halves")]
    assert evaluations[0][-1] == evaluations[1][-1]


def test_runs_share_a_cache(folder: Path):
    assert curve(folder / "shared", *NAMES) == curve(folder / "cached", *NAMES)
    assert not (folder / "shared" / "reference").exists()


@pytest.mark.parametrize("loss", sorted(set(AT_FIRST) - {"sigmoid"}))
def test_the_loss_is_the_one_that_was_named(folder: Path, loss: str):
    ((_, value),) = curve(folder / loss, "loss")
    assert value == pytest.approx(AT_FIRST[loss], rel=1e-5)


@pytest.mark.parametrize("loss", REFERENCE_FREE)
def test_no_reference_is_made_where_none_is_needed(folder: Path, loss: str):
    assert not (folder / loss / "reference").exists()
    (line,) = metrics(folder / loss)
    assert not [event for event in metrics(folder / loss, "event") if event["event"] == "reference"]
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-4)


def test_stale_and_wrong_references_are_errors(folder: Path, tmp_path: Path):
    """Another model, other data, numbers that are not the policy's: each has its message. A cache is never rewritten."""
    cache = {"dpo": {"reference_cache": str(folder / "cached" / "reference")}}
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (folder / "cached" / "reference").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    array = np.load(damaged / "train.npy")
    np.save(damaged / "train.npy", array + np.where(np.arange(array.size).reshape(array.shape) % 2, 0.0, 0.01).astype(np.float32))
    halves = recipe(folder / "halves", train={"max_steps": 8, "seed": 5})
    runs = [
        recipe(tmp_path / "a", **cache, model={"hidden_size": 64}, **ONE_STEP),
        recipe(tmp_path / "b", **cache, data={"max_rows": 20}, **ONE_STEP),
        recipe(tmp_path / "c", dpo={"reference_cache": str(damaged)}, **ONE_STEP),
        halves,
        recipe(tmp_path / "d", **cache, data={"template": "llama3"}, **ONE_STEP),
    ]
    model, data, step_zero, seed, template = run_ranks(dpo_checks.train_all, 1, runs)[0]
    assert model.startswith("RunError: stale reference log-probs") and "another model;" in model and "remove the folder" in model
    assert data.startswith("RunError: stale reference log-probs") and "train rows" in data
    assert step_zero.startswith("TrainingStopped: training stopped at step 0: policy and reference log-probs differ before the first update (pair ")
    assert "chosen: -" in step_zero and "dpo.reference_from" in step_zero
    assert seed.startswith("RunError") and "trained against another reference" in seed
    assert template.startswith("RunError: stale reference log-probs") and "template_hash" in template


def test_layouts_of_a_whole_run(folder: Path, tmp_path: Path):
    """TP2 with the reference cached, stopped and resumed; PP2 with it in memory: the curve of one process."""
    runs = [
        recipe(tmp_path / "tp2", parallel=TP2),
        recipe(tmp_path / "tp2-halves", parallel=TP2, train={"stop_at_step": 3}),
        recipe(tmp_path / "tp2-halves", parallel=TP2),
        recipe(tmp_path / "pp2", parallel={"pipeline_model_parallel_size": 2}, dpo={"reference": "model"}),
        recipe(tmp_path / "dp2", train={"micro_batch_size": 2}),
        from_runs(folder, tmp_path / "tp2-from-runs", parallel=TP2),
    ]
    assert run_ranks(dpo_checks.train_all, 2, runs)[0] == [""] * len(runs)
    alone = curve(folder / "cached", *NAMES)
    assert curve(tmp_path / "tp2-halves", *NAMES) == curve(tmp_path / "tp2", *NAMES)
    for name in ("tp2", "pp2", "dp2"):
        for ours, theirs in zip(curve(tmp_path / name, *NAMES), alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4), name
    assert_goes_on(folder, tmp_path / "tp2-from-runs")


def test_a_run_whose_chosen_answers_become_less_likely_says_why(tmp_path: Path):
    """O9, O10: apo_down lowers both answers; the run warns once, with the reason, or stops if asked; it logs what margins have to do with length."""
    sinking: dict[str, Any] = {"train": {"max_steps": 44}, "optimizer": {"lr": 5e-3}}
    runs = [recipe(tmp_path / how, dpo={"loss": "apo_down", "on_collapse": how}, **sinking) for how in ("warn", "stop")]
    warned, stopped = run_ranks(dpo_checks.train_all, 1, runs)[0]
    (said,) = [line["message"] for line in metrics(tmp_path / "warn", "event") if "chosen answers become less likely" in line["message"]]
    assert warned == "" and "the loss sees only the difference of the two answers" in said and "dpo.loss=rpo" in said
    assert stopped.startswith("TrainingStopped") and "chosen answers become less likely" in stopped and len(curve(tmp_path / "stop", "loss")) < 44
    first, last = metrics(tmp_path / "warn")[0], metrics(tmp_path / "warn")[-1]
    assert last["loss"] < first["loss"] and last["rewards/chosen"] < -0.2 and -1 <= last["rewards/length_correlation"] <= 1


def test_the_report_shows_rewards_and_pairs(folder: Path):
    page = (folder / "cached" / "report.html").read_text()
    answer, pair = (json.loads(line) for line in (folder / "cached" / "samples.jsonl").read_text().splitlines())
    assert answer["response"] is not None and pair["prompt"] == answer["prompt"] and pair["chosen"]["text"] == answer["reference"]
    assert all(text in page for text in (">Rewards<", "Pairs ranked as judged", f"chosen, reward {spell(pair['chosen']['reward'])}"))
    assert pair["rejected"]["text"] != pair["chosen"]["text"] and pair["rejected"]["reward"] != 0


def test_options_of_the_losses_are_those_of_the_functions():
    import inspect

    from megalign.dpo import LOSSES

    assert LOSSES.keys() == OPTIONS.keys() == set(DPOConfig.model_fields["loss"].annotation.__args__)  # pyright: ignore
    assert len(set(LOSSES.values())) == len(LOSSES)
    for name, function in LOSSES.items():
        keywords = {key: p.default for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert keywords == OPTIONS[name], name
