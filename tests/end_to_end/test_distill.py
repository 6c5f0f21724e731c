"""`distill` from a teacher to a student: equal models lose 0, layouts agree, a kept teacher is the one in memory, replay holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import best_of_n_checks
import pytest
from best_of_n_checks import curve, metrics, recipe, start
from ranks import run_ranks

from megalign.data import grammar
from megalign.trainer.drawn import as_messages

SMALL = dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("distill")
    teacher = base / "teacher"

    def run(name: str, model: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        made = recipe(base / name, teacher, parallel=parallel, train={"max_steps": 8, "eval_interval": 4, **(train or {})}, optimizer={"lr": 4e-3})
        made["distill"] = {"teacher": str(teacher), **settings}
        return {**made, "model": model or SMALL}

    own = {"init_from": str(teacher)}
    old, new = base / "old.jsonl", base / "new.jsonl"
    old.write_text("\n".join(json.dumps({"messages": as_messages(row.messages)}) for row in grammar.generate(48, 7)))
    new.write_text("\n".join(json.dumps({"messages": turns(number)}) for number in range(60)))
    watched = {"max_steps": 40, "eval_interval": 5, "forgetting_data": str(old), "forgetting_limit": 0.25, "sample_prompts": 0}
    only_new = recipe(base / "forgets", teacher, data=dict(train=str(new), max_rows=None), train=watched)
    mixture = [dict(name="new", path=str(new), weight=0.8), dict(name="old", path=str(old), weight=0.2, kind="replay")]
    one_step = {"max_steps": 1, "eval_interval": None}
    jobs = [
        ("sft", start(teacher, train=dict(micro_batch_size=4, global_batch_size=8, max_steps=60, sample_prompts=0))),
        *(("distill", {**run(f"same-{loss}", own, train=one_step, loss=loss, temperature=1.7), "optimizer": {"lr": 4e-3}}) for loss in ("forward_kl", "reverse_kl", "jensen_shannon")),
        ("distill", {**run("same-cached", own, train=one_step, mode="cached", teacher_top_k=8), "optimizer": {"lr": 4e-3}}),
        ("distill", run("model", train={"max_steps": 24})),
        ("distill", run("short")),
        ("distill", run("halves", train={"stop_at_step": 3})),
        ("distill", run("halves")),
        ("distill", run("ce", ce_weight=0.5)),
        ("distill", run("cached", mode="cached", teacher_top_k=300, temperature=1.5)),
        ("distill", run("warm", temperature=1.5)),
        ("sft", only_new),
        ("sft", {**only_new, "output": str(base / "forgets-halves"), "train": {**only_new["train"], "stop_at_step": 5}}),
        ("sft", {**only_new, "output": str(base / "forgets-halves")}),
        ("sft", {**only_new, "output": str(base / "replays"), "data": {"mixture": mixture, "validation_rows": 12, "sequence_length": 192}, "train": {**only_new["train"], "forgetting_limit": 9}}),
        ("distill", {**run("replay", replay=str(old), replay_share=0.2), "data": dict(train=str(new), validation_rows=4, sequence_length=192)}),
        ("distill", run("sequence", mode="sequence", samples=dict(max_new_tokens=64, temperature=0.7))),
    ]
    assert run_ranks(best_of_n_checks.work, 1, jobs)[0] == [""] * len(jobs)
    jobs = [
        ("distill", run("tp2", parallel=TP2)),
        ("distill", run("pp2", parallel=PP2)),
        ("distill", run("cached-pp2", parallel=PP2, mode="cached", teacher_top_k=300, temperature=1.5, teacher_parallel=TP2)),
        ("distill", run("cached-cp2", parallel={"context_parallel_size": 2}, mode="cached", teacher_top_k=300, temperature=1.5)),
    ]
    assert run_ranks(best_of_n_checks.work, 2, jobs)[0] == [""] * len(jobs)
    return base


@pytest.mark.parametrize("name", ["same-forward_kl", "same-reverse_kl", "same-jensen_shannon", "same-cached"])
def test_a_teacher_has_nothing_to_teach_itself(folder: Path, name: str):
    """S10. The cached one was computed in other batches: 0 up to the rounding of log-probabilities in FP32."""
    (line,) = metrics(folder / name)
    assert abs(line["loss"]) < (1e-5 if name == "same-cached" else 1e-6) and line["grad_norm"] < 1e-4


def test_the_student_comes_nearer(folder: Path):
    lines = metrics(folder / "model")
    assert lines[0]["divergence"] > 1 and lines[-1]["divergence"] < 0.75 * lines[0]["divergence"]
    assert lines[0]["loss"] == lines[0]["divergence"] and "eval_perplexity" not in metrics(folder / "model", "eval")[-1]
    both = metrics(folder / "ce")[0]
    assert both["loss"] == pytest.approx(both["divergence"] + 0.5 * both["cross_entropy"], rel=1e-5)
    assert both["divergence"] == pytest.approx(lines[0]["divergence"], rel=1e-5)


def test_resumption_is_exact(folder: Path):
    assert curve(folder / "halves", "loss", "grad_norm") == curve(folder / "short", "loss", "grad_norm")


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_layouts_equal_one_process(folder: Path, layout: str):
    for ours, alone in zip(curve(folder / layout, "loss", "grad_norm"), curve(folder / "short", "loss", "grad_norm"), strict=True):
        assert ours == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("name", ["cached", "cached-pp2", "cached-cp2"])
def test_a_kept_teacher_is_the_one_in_memory(folder: Path, name: str):
    """With all but a few of 320 tokens kept, the rest in one bin; the teacher on TP2, the student on PP2, or both on CP2."""
    for ours, alone in zip(curve(folder / name, "loss", "grad_norm"), curve(folder / "warm", "loss", "grad_norm"), strict=True):
        assert ours == pytest.approx(alone, rel=1e-3)
    assert curve(folder / "warm", "loss")[0] != curve(folder / "short", "loss")[0], "the temperature is in it"
    shapes = json.loads((folder / name / "teacher" / "made_from.json").read_text())
    assert shapes["teacher_top_k"] == 300 and shapes["temperature"] == 1.5


def test_the_student_imitates_the_teachers_answers(folder: Path):
    answers = [json.loads(line) for line in (folder / "sequence" / "teacher" / "answers.jsonl").read_text().splitlines()]
    assert 12 <= len(answers) <= 60 and all(line["messages"][-1]["role"] == "assistant" for line in answers)
    lines = metrics(folder / "sequence")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3 and json.loads((folder / "sequence" / "data.json").read_text())["train"]["rows_read"] == len(answers)


def test_a_run_that_forgets_stops(folder: Path):
    """S11, two domains: trained on new dialogues alone the loss on the old ones rises past the limit; a fifth of old ones holds it."""
    forgot, replayed = ([(line["step"], line["eval_old_loss"]) for line in metrics(folder / name, "eval")] for name in ("forgets", "replays"))
    assert forgot[0][0] == 0 and forgot[-1][0] < 40 and replayed[-1][0] == 40
    assert forgot[-1][1] > forgot[0][1] + 0.25 and all(loss <= forgot[0][1] + 0.25 for _, loss in forgot[:-1])
    at_same_step = dict(replayed)[forgot[-1][0]]
    assert at_same_step < forgot[-1][1] - 0.1
    (stop,) = [line["message"] for line in metrics(folder / "forgets", "event") if line["event"] == "stop"]
    assert "eval_old_loss has risen by" in stop and "train.forgetting_limit(0.25)" in stop
    assert [(line["step"], line["eval_old_loss"]) for line in metrics(folder / "forgets-halves", "eval")] == forgot, "also when it was resumed"


def test_replay_has_its_share(folder: Path):
    weights = {name: part["weight"] for name, part in json.loads((folder / "replay" / "data.json").read_text())["train"]["mixture"].items()}
    assert weights == {"new": pytest.approx(0.8), "replay": pytest.approx(0.2)}
    (shares,) = [line["message"] for line in metrics(folder / "replay", "event") if line["event"] == "mixture"]
    (share,) = re.findall(r"replay ([\d.]+)% of the tokens", shares)
    assert float(share) == pytest.approx(20, abs=3), "a row of 192 tokens is 1.6 % of all"


def turns(number: int) -> list[dict[str, str]]:
    """The other domain: counting."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    return [{"role": "user", "content": f"Count from {number % 5} on!"}, {"role": "assistant", "content": ", ".join(words[number % 5 :]) + " and so on"}]


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path):
    teacher = folder / "teacher"
    base = {**recipe(tmp_path / "a", teacher, train={"max_steps": 3}), "model": SMALL}
    cached = {"teacher": str(teacher), "mode": "cached", "teacher_cache": str(folder / "cached" / "teacher"), "teacher_top_k": 300, "temperature": 1.5}
    jobs = [
        ("distill", base),
        ("distill", {**base, "distill": {"teacher": str(tmp_path / "nowhere")}}),
        ("distill", {**base, "output": str(tmp_path / "b"), "distill": {**cached, "temperature": 1.0}}),
        ("distill", {**base, "output": str(tmp_path / "c"), "distill": cached, "data": {**base["data"], "max_rows": 50}}),
        ("distill", {**base, "output": str(tmp_path / "d"), "distill": {"teacher": str(teacher)}, "data": {**base["data"], "tokenizer": {"path": str(other_tokenizer(tmp_path))}}}),
        ("distill", {**base, "output": str(tmp_path / "e"), "distill": {**cached, "teacher_cache": None, "teacher_top_k": 999}}),
        ("distill", {**base, "output": str(folder / "short"), "distill": {"teacher": str(folder / "model")}, "train": {**base["train"], "max_steps": 9, "eval_interval": 4}}),
    ]
    nobody, nowhere, temperature, data, tokenizer, too_many, another = run_ranks(best_of_n_checks.work, 1, jobs)[0]
    assert nobody.startswith("ConfigError") and "distill.teacher" in nobody
    assert nowhere.startswith("ConfigError") and f"distill.teacher={tmp_path}/nowhere: " in nowhere
    assert temperature.startswith("RunError: stale teacher") and "another temperature;" in temperature
    assert data.startswith("RunError: stale teacher") and "another train rows;" in data
    assert tokenizer.startswith("ConfigError") and "probabilities of other tokens" in tokenizer
    assert too_many.startswith("ConfigError") and "distill.teacher_top_k=999: the teacher knows 320 tokens; lower it, e.g. to 64" in too_many
    assert another.startswith("RunError") and "another teacher" in another


def other_tokenizer(folder: Path) -> Path:
    from megalign.data.tokenizer import train_tokenizer

    train_tokenizer(["quite other words than those of the grammar"] * 20, 300).save(folder / "other")
    return folder / "other"


