"""SFT from recipe to checkpoint: resumption, accumulation, resharding, guards, and what a full disk leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sft_checks
from ranks import run_ranks
from sft_checks import MOE_4, curve, metrics, recipe

from megalign.parallel.checkpoint import CheckpointError, list_checkpoints, previous_good, verify

EXACT = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "load_balancing_loss")


def run(world: int, check: Any, *args: Any) -> Any:
    """Results of all ranks; every rank must say the same."""
    results = run_ranks(check, world, *args)
    assert all(result == results[0] for result in results)
    return results[0]


DP2 = {"data_parallel_size": 2}
RESUMED = {
    "tp2-pp2-ep2-sp": (4, MOE_4, "fp32", 5),
    "one-bf16-at-the-end-of-an-epoch": (1, {}, "bf16", 4),
    "dp2": (2, DP2, "fp32", 5),
    "dp2-unsharded-bf16": (2, {**DP2, "use_distributed_optimizer": False}, "bf16", 5),
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path, case: str):
    """S7, bitwise, with 4 microbatches a step, an epoch that ends at step 4 and another at 8."""
    world, parallel, precision, cut = RESUMED[case]
    whole = recipe(tmp_path / "whole", parallel=parallel, train={"precision": precision})
    half = recipe(tmp_path / "halves", parallel=parallel, train={"precision": precision, "stop_at_step": cut})
    rest = recipe(tmp_path / "halves", parallel=parallel, train={"precision": precision})
    assert run(world, sft_checks.train_twice, whole, half) == ["", ""]
    before = curve(tmp_path / "halves", *EXACT)
    assert [step for step, *_ in before] == list(range(1, cut + 1))
    assert run(world, sft_checks.train, rest) == ""
    expected = curve(tmp_path / "whole", *EXACT)
    assert [line["epoch"] for line in metrics(tmp_path / "whole")][3] == 1 and len(expected) == 10
    assert curve(tmp_path / "halves", *EXACT) == expected
    assert before == expected[:cut]


def test_a_checkpoint_continues_on_another_layout(tmp_path: Path):
    """P18: saved on TP2 PP2 EP2, continued on one rank and on two data-parallel ones, with the losses of no change."""
    whole = recipe(tmp_path / "whole", parallel=MOE_4)
    half = recipe(tmp_path / "moved", parallel=MOE_4, train={"stop_at_step": 5})
    assert run(4, sft_checks.train_twice, whole, half) == ["", ""]
    moved = tmp_path / "moved"
    assert run(1, sft_checks.train, recipe(moved, train={"stop_at_step": 8})) == ""
    assert run(2, sft_checks.train, recipe(moved, parallel={"data_parallel_size": 2})) == ""
    losses, expected = (dict(curve(output, "loss")) for output in (moved, tmp_path / "whole"))
    assert losses[6] == pytest.approx(expected[6], rel=2e-6)
    assert losses == pytest.approx(expected, rel=2e-3)  # Adam amplifies rounding from then on (numerics of megatron.md)


def test_the_same_checkpoint_opens_on_two_ranks_of_any_kind(tmp_path: Path):
    """P18: what TP2 PP2 EP2 saved gives the same next loss on tensor, pipeline and expert-parallel ranks alone."""
    saved = recipe(tmp_path / "saved", parallel=MOE_4, train={"stop_at_step": 5})
    whole = recipe(tmp_path / "whole", parallel=MOE_4, train={"stop_at_step": 6})
    assert run(4, sft_checks.train_all, [saved, whole]) == ["", ""]
    layouts = {
        "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pp2": {"pipeline_model_parallel_size": 2},
        "ep2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    }
    for name in layouts:
        shutil.copytree(tmp_path / "saved", tmp_path / name)
    assert run(2, sft_checks.train_all, [recipe(tmp_path / name, parallel=layout, train={"stop_at_step": 6}) for name, layout in layouts.items()]) == [""] * 3
    (*_, expected), (*_, before) = curve(tmp_path / "whole", "loss"), curve(tmp_path / "saved", "loss")
    assert abs(expected[1] - before[1]) > 1e-3  # or an old loss would pass for the next one
    for name in layouts:
        assert curve(tmp_path / name, "loss")[5:] == [(6, pytest.approx(expected[1], rel=2e-6))], name


def test_accumulation_equals_the_full_batch(tmp_path: Path):
    """P15: one microbatch of 4 rows of different lengths, or four of one; normalised by the global count of tokens."""
    dense = {"model": {"num_moe_experts": None, "moe_ffn_hidden_size": None, "moe_aux_loss_coeff": 0.0}, "data": {"packing": False}}
    runs = [recipe(tmp_path / str(size), train={"micro_batch_size": size, "max_steps": 6}, **dense) for size in (1, 4)]
    assert run(1, sft_checks.train_twice, *runs) == ["", ""]
    one, four = (curve(tmp_path / str(size), "loss", "grad_norm") for size in (1, 4))
    for (step, loss, norm), (_, other_loss, other_norm) in zip(one, four, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5), step
        assert norm == pytest.approx(other_norm, rel=1e-4), step


def test_it_learns_and_keeps_the_best(tmp_path: Path):
    """S6 and stop by evaluation: a learning rate that ruins the model after a good start leaves the good checkpoint."""
    train = {"max_steps": 60, "eval_interval": 5, "early_stop_patience": 2, "keep_last": 1, "keep_best": 1}
    bad_tail = {"lr": 0.3, "lr_warmup_steps": 59, "clip_grad": 0.0}  # good for a while on the way up
    assert run(1, sft_checks.train, recipe(tmp_path, train=train, optimizer=bad_tail)) == ""
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(tmp_path, "eval")}
    best = min(evaluations, key=lambda step: evaluations[step])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < best < summary["steps"] < 60 and summary["best_step"] == best
    assert evaluations[best] < evaluations[0] - 0.3
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == [f"iter_{best:07d}", f"iter_{summary['steps']:07d}"]
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])["step"] == best


@pytest.mark.parametrize("world, parallel", [(1, {}), (4, MOE_4)], ids=["one", "tp2-pp2-ep2-sp"])
def test_nan_stops_with_its_cause_and_leaves_the_checkpoint(tmp_path: Path, world: int, parallel: dict[str, Any]):
    """F11."""
    broken = recipe(tmp_path, parallel=parallel, train={"save_interval": 2})
    message = run(world, sft_checks.train_with_nan, broken, 4, 2)
    assert message.startswith("TrainingStopped: training stopped at step 4, microbatch 2, parameter ")
    assert "the loss is not finite" in message
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["iter_0000002"]
    assert run(world, sft_checks.train, broken) == ""  # and it is good: the run continues from it
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, 11))


def test_frozen_parameters_stay_on_every_layout(tmp_path: Path):
    """The router of layer 1 and the (tied) embedding, by names that mean the same under TP2 PP2 EP2; the norm counts none of them."""
    freeze = ["embedding", "decoder.layers.1.mlp.router.*"]
    options: dict[str, Any] = {"train": {"freeze": freeze, "max_steps": 3, "eval_interval": 1, "eval_prompts": 2}, "model": {"share_embeddings_and_output_weights": True}}
    still = {"embedding.word_embeddings.weight", "decoder.layers.1.mlp.router.weight"}
    for name, world, parallel in (("one", 1, {}), ("four", 4, MOE_4)):
        error, moved, kept = run_ranks(sft_checks.train_and_compare, world, recipe(tmp_path / name, parallel=parallel, **options))[0]
        assert error == "" and set(kept) == still and "decoder.layers.0.mlp.router.weight" in moved
        evaluations = metrics(tmp_path / name, "eval")
        assert [line["step"] for line in evaluations] == [0, 1, 2, 3]
        assert all(0 <= line["eval_exact_match"] <= 1 and line["eval_response_characters"] >= 0 for line in evaluations)
    one, four = (curve(tmp_path / name, "loss", "grad_norm") for name in ("one", "four"))
    for (_, loss, norm), (_, other_loss, other_norm) in zip(one[:2], four[:2], strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5) and norm == pytest.approx(other_norm, rel=1e-4)
    whole = recipe(tmp_path / "whole", model=options["model"], train={"max_steps": 1}, optimizer={"lr_warmup_steps": 0})
    assert run(1, sft_checks.train, whole) == ""
    assert curve(tmp_path / "whole", "grad_norm")[0][1] > one[0][2] * 1.01
    message = run(1, sft_checks.train, recipe(tmp_path / "typo", train={"freeze": ["rooter"]}))
    assert "train.freeze=" in message and "rooter" in message and "no parameter has such a name" in message


@pytest.mark.parametrize("world, parallel", [(1, {}), (4, MOE_4)], ids=["one", "tp2-pp2-ep2-sp"])
def test_the_average_of_checkpoints_is_their_mean(tmp_path: Path, world: int, parallel: dict[str, Any]):
    two = recipe(tmp_path / "run", parallel=parallel, train={"max_steps": 4, "save_interval": 2, "keep_best": 0})
    found = run_ranks(sft_checks.train_and_average, world, two, str(tmp_path / "average"))[0]
    assert found["off"] < 1e-7 < 1e-3 < found["apart"]


def test_no_space_left_keeps_the_previous_checkpoint(tmp_path: Path):
    good = recipe(tmp_path, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}, train={"stop_at_step": 2})
    assert run(2, sft_checks.train, good) == ""
    more = {**good, "train": {**good["train"], "stop_at_step": 4}}
    message = run(2, sft_checks.train_with_full_disk, more, 60_000)
    assert message.startswith("CheckpointError: checkpoint of step 4 was not written")
    assert "File too large" in message and "Earlier checkpoints are intact" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000002"]
    assert run(2, sft_checks.train, more) == ""


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(tmp_path: Path):
    first = recipe(tmp_path, train={"max_steps": 4, "save_interval": 2, "keep_best": 0})
    assert run(1, sft_checks.train, first) == ""
    _, last = list_checkpoints(tmp_path / "checkpoints")
    shard = max((last / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    message = run(1, sft_checks.train, {**first, "train": {**first["train"], "max_steps": 6}})
    assert message.startswith("CheckpointError") and str(shard) in message and "corrupted" in message
    assert "the last good checkpoint before it is" in message and "iter_0000002" in message
    content[len(content) // 2] ^= 1
    manifest, other = last / "manifest.json", list_checkpoints(tmp_path / "checkpoints")[0] / "state" / shard.name
    damages: dict[str, Callable[[], Any]] = {
        f"{shard.name} has {len(content) - 1} bytes, its manifest says {len(content)}: truncated": lambda: shard.write_bytes(content[:-1]),
        f"{shard.name} (has|does not have) .*(truncated|corrupted)": lambda: shard.write_bytes(other.read_bytes()),  # of another checkpoint
        f"{shard.name} is missing": shard.unlink,
        "manifest.json cannot be read: its format is 'another'": lambda: manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "another"})),
        "manifest.json does not exist: .* is no megalign checkpoint": manifest.unlink,
    }
    shard.write_bytes(content)
    verify(last)
    for said, damage in damages.items():
        damage()
        with pytest.raises(CheckpointError, match=said):
            verify(last)
        good = previous_good(last)
        assert good is not None and good.name == "iter_0000002"


def test_another_model_or_other_data_or_a_strange_folder_is_refused(tmp_path: Path):
    first = recipe(tmp_path / "a", train={"max_steps": 3})
    assert run(1, sft_checks.train, first) == ""
    fewer = recipe(tmp_path / "a", train={"max_steps": 4}, data={"max_rows": 20})
    assert "was trained on other rows" in run(1, sft_checks.train, fewer)
    wider = recipe(tmp_path / "a", model={"hidden_size": 64}, train={"max_steps": 3})
    assert "model.hidden_size: 32 there, 64 here" in run(1, sft_checks.train, wider)
    assert "set resume=true" in run(1, sft_checks.train, {**first, "resume": False})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("dear")
    assert "thesis.tex" in run(1, sft_checks.train, recipe(tmp_path / "b"))


def test_prediction_modules_train_resume_and_move(tmp_path: Path):
    """Their loss is logged, falls, resumes bitwise on TP2 PP2 EP2, and goes on alike on one rank; evaluation and answers leave them out."""
    ahead = {"model": {"mtp_num_layers": 1, "moe_layer_freq": [0, 1]}}  # the first stage has no experts
    whole, half = (
        recipe(tmp_path / name, parallel=MOE_4, train={"eval_interval": 5, "stop_at_step": stop}, **ahead) for name, stop in (("whole", None), ("halves", 5))
    )
    rest = recipe(tmp_path / "halves", parallel=MOE_4, train={"eval_interval": 5}, **ahead)
    assert run(4, sft_checks.train_all, [whole, half, rest]) == ["", "", ""]
    names = (*EXACT, "mtp_1_loss", "mtp_1_accuracy")
    expected = curve(tmp_path / "whole", *names)
    assert curve(tmp_path / "halves", *names) == expected
    losses = [line["mtp_1_loss"] for line in metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 0.1 and all(3 < loss < 7 for loss in losses)
    assert not any("mtp_1_loss" in line for line in metrics(tmp_path / "whole", "eval"))
    routed = next(line for line in metrics(tmp_path / "whole") if "expert_load" in line)
    assert routed["expert_layers"] == [1, 2]  # 2 is the module's
    assert all(sum(layer) == pytest.approx(1, abs=1e-4) for layer in routed["expert_load"])
    alone = recipe(tmp_path / "alone", train={"max_steps": 3}, **ahead)
    assert run(1, sft_checks.train, alone) == ""
    (_, loss, ahead_loss), *_ = curve(tmp_path / "alone", "loss", "mtp_1_loss")
    assert (loss, ahead_loss) == pytest.approx((expected[0][1], expected[0][-2]), rel=2e-6)
