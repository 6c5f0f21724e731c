"""Even microbatches, a stream and a mixture in whole runs of two data-parallel ranks: the same gradients, exact resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sft_checks
from ranks import run_ranks
from sft_checks import curve, metrics, recipe

from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.data.deal import sampler_of

EXACT = ("loss", "grad_norm", "num_tokens", "epoch")


def files(tmp_path: Path) -> dict[str, str]:
    """40 dialogues of very different lengths, another 20, and a tokenizer."""
    paths = {}
    for name, count in (("own", 40), ("old", 20)):
        lines = [
            {"messages": [{"role": "user", "content": f"{name} {n}?"}, {"role": "assistant", "content": f"{name} is {n}. " * (1 + n * 7 % 11)}]}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        paths[name] = str(tmp_path / f"{name}.jsonl")
    data = {"train": paths["own"], "validation_rows": 0, "tokenizer": {"vocab_size": 300}, "cache_dir": str(tmp_path / "c")}
    build_datasets(Recipe.model_validate({"data": data}))[0].tokenizer.save(tmp_path / "tokenizer")
    return {**paths, "tokenizer": str(tmp_path / "tokenizer")}


def widest_idle_share(recipe: Recipe) -> float:
    """What two ranks can wait at most, by the lengths of an epoch's batches alone.

    Rows go out in pairs, longest first, the longer of a pair to the rank that has less: the difference D of the ranks
    becomes |D - gap of the pair|, at most the larger of the two, so it ends at most at the widest gap G. A step lasts as
    long as its longer rank, half of filled + D tokens: sum D / sum (filled + D) of the time is waiting, which grows with D.
    """
    train, _ = build_datasets(recipe)
    sampler = sampler_of(train, recipe, data_parallel_size=2, balance=False)
    filled = widest = 0
    for _ in range(sampler.steps_per_epoch):
        lengths = sorted(sampler.tokens_of(sampler.next_global_step()).ravel().tolist(), reverse=True)
        filled += sum(lengths)
        widest += max(longer - shorter for longer, shorter in zip(lengths[::2], lengths[1::2]))
    return widest / (filled + widest)


def test_runs_of_two_ranks(tmp_path: Path):
    found = files(tmp_path)
    dense = {"num_moe_experts": None, "moe_ffn_hidden_size": None, "moe_aux_loss_coeff": 0.0}
    tokenizer = {"path": found["tokenizer"]}
    ways: dict[str, dict[str, Any]] = {
        "even": dict(train=found["own"], packing=False, balance=True),
        "in-order": dict(train=found["own"], packing=False, balance=False),
        "stream": dict(train=found["own"], packing=False, streaming=True, shuffle_window=7),
        "mixture": dict(
            mixture=[dict(name="own", path=found["own"], weight=4), dict(name="old", path=found["old"], weight=1, kind="replay")],
            curriculum=[dict(from_step=3, weights=dict(own=1, old=1))],
        ),
    }

    def of(way: str, folder: str, **train: Any) -> dict[str, Any]:
        base = recipe(tmp_path / folder, model=dense, parallel={"data_parallel_size": 2}, train={"max_steps": 12, "global_batch_size": 8, "sample_prompts": 0, **train})
        base["data"] = {"validation_rows": 0, "sequence_length": 256, "tokenizer": tokenizer, **ways[way]}
        return base

    first = [of(way, way) for way in ways] + [of(way, f"{way}-halves", stop_at_step=5) for way in ("stream", "mixture")]
    assert run_ranks(sft_checks.train_all, 2, first) == [[""] * 6] * 2
    assert run_ranks(sft_checks.train_all, 2, [of(way, f"{way}-halves") for way in ("stream", "mixture")]) == [[""] * 2] * 2

    for way in ("stream", "mixture"):
        whole = curve(tmp_path / way, *EXACT)
        assert len(whole) == 12 and curve(tmp_path / f"{way}-halves", *EXACT) == whole
    for (step, loss, norm, tokens, _), (_, other_loss, other_norm, other_tokens, _) in zip(
        curve(tmp_path / "even", *EXACT), curve(tmp_path / "in-order", *EXACT), strict=True
    ):
        assert tokens == other_tokens
        if step <= 3:  # Adam amplifies the rounding of another order of summation from then on
            assert loss == pytest.approx(other_loss, rel=1e-5) and norm == pytest.approx(other_norm, rel=1e-4)

    told = {way: json.loads((tmp_path / way / "data.json").read_text())["train"] for way in ways}
    spread = told["even"]["distribution"]
    bound = widest_idle_share(Recipe.model_validate(of("in-order", "x")))
    assert spread["dealt"]["idle_share"] <= bound < spread["in_order"]["idle_share"] and spread["balanced"]
    assert told["in-order"]["distribution"]["dealt"] == spread["in_order"]
    assert told["mixture"]["mixture"]["old"]["weight"] == pytest.approx(0.2)
    assert told["stream"]["streaming"]["shuffle_window"] == 7
    lines = metrics(tmp_path / "even", "event")
    assert any("wait" in str(line) and "before rows were dealt by length" in str(line) for line in lines)
    assert any("of the tokens (weight 50.00%)" in str(line) for line in metrics(tmp_path / "mixture", "event"))
