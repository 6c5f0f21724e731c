"""W&B and MLflow through stubs with the signatures of the real ones: what they are told, resumption, and that they never end a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megalign.trainer.metrics import MetricsLogger
from megalign.trainer.trackers import TrackerError, open_trackers

RECIPE = {"name": "x", "optimizer": {"lr": 0.1}}


class FakeWandbRun:
    def __init__(self, told: list[Any], id: str):
        self.told, self.id = told, id

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.told.append(("define", name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is None, "W&B refuses a step that goes back, as after a resume"
        self.told.append(("log", data))

    def finish(self, exit_code: int | None = None) -> None:
        self.told.append(("finish", exit_code))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What both services heard, in order."""
    told: list[Any] = []

    def init(*, name: str, config: dict, dir: str, id: str | None, resume: str) -> FakeWandbRun:
        told.append(("init", name, config, id, resume))
        return FakeWandbRun(told, id or "w1")

    def start_run(run_id: str | None = None, run_name: str | None = None) -> Any:
        told.append(("start_run", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "m1"))

    mlflow = dict(
        start_run=start_run,
        log_params=lambda params: told.append(("params", params)),
        log_metrics=lambda metrics, step: told.append(("metrics", metrics, step)),
        end_run=lambda status: told.append(("end_run", status)),
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(**mlflow))
    return told


def logger(output: Path, *names: str, resume: int | None = None) -> MetricsLogger:
    trackers = open_trackers(list(names), "x", RECIPE, output / "logs", resume=resume is not None)
    return MetricsLogger(output, total_steps=3, quiet=True, tensorboard=False, resume_step=resume, trackers=trackers)


def test_both_are_told_the_numbers_and_the_recipe(tmp_path: Path, told: list[Any]):
    with logger(tmp_path, "wandb", "mlflow") as log:
        log.train(1, loss=2.0, expert_load=[[0.5, 0.5]], mfu=None)
        log.eval(1, eval_loss=1.5, best=True)
        log.event(1, "checkpoint", "iter_0000001")
    assert told == [
        ("init", "x", RECIPE, None, "allow"),
        ("define", "*", "step"),
        ("start_run", None, "x"),
        ("params", {"name": "x", "optimizer.lr": "0.1"}),
        ("log", {"train/loss": 2.0, "step": 1}),
        ("metrics", {"train/loss": 2.0}, 1),
        ("log", {"eval/loss": 1.5, "step": 1}),
        ("metrics", {"eval/loss": 1.5}, 1),
        ("finish", 0),
        ("end_run", "FINISHED"),
    ]


def test_a_resumed_run_continues_theirs_and_a_failed_one_is_marked(tmp_path: Path, told: list[Any]):
    logger(tmp_path, "wandb", "mlflow").close()
    told.clear()
    with pytest.raises(ValueError), logger(tmp_path, "wandb", "mlflow", resume=5):
        raise ValueError
    assert told == [("init", "x", RECIPE, "w1", "allow"), ("define", "*", "step"), ("start_run", "m1", None), ("finish", 1), ("end_run", "FAILED")]


def test_a_service_that_fails_does_not_end_the_run(tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", refuse)
    monkeypatch.setattr(sys.modules["mlflow"], "end_run", refuse)
    with logger(tmp_path, "mlflow", "wandb") as log:
        log.train(1, loss=2.0)
        log.train(2, loss=1.0)
    assert [data["train/loss"] for kind, data in (entry for entry in told if entry[0] == "log")] == [2.0, 1.0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_absent_or_unwilling_is_an_error_with_a_fix(tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackerError, match="logging.trackers: wandb is not installed.*pip install wandb"):
        logger(tmp_path, "wandb")

    def no_key(**_: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_key))
    with pytest.raises(TrackerError, match="wandb does not start .api_key not configured"):
        logger(tmp_path, "wandb")
    assert not (tmp_path / "logs" / "trackers.json").exists()


def test_none_is_needed(tmp_path: Path):
    with logger(tmp_path) as log:
        log.train(1, loss=1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0 and not (tmp_path / "logs").exists()
