"""The top of the report: what became of the run, and its numbers in one glance."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megalign.report.curves import values
from megalign.report.format import compact, count, duration, number, percent
from megalign.report.run_folder import RunRecord

LIVE_SECONDS = 180  # a run whose metrics changed so recently is taken for running
LAST_STEPS = 10  # whose mean loss is the headline: one step of a small batch is noise


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    name: str
    value: str
    detail: str = ""


def run_status(run: RunRecord, now: float) -> tuple[str, str]:
    """finished, stopped, running or interrupted, and the reason where one is known."""
    ends = [event for event in run.events if event["event"] in ("resume", "stop")]
    stopped = bool(ends) and ends[-1]["event"] == "stop"  # and not continued afterwards
    reason = str(ends[-1]["message"]) if stopped else ""
    if run.summary.get("status") in ("finished", "stopped"):
        return run.summary["status"], reason
    if stopped:
        return "stopped", reason
    if now - run.updated < LIVE_SECONDS:
        return "running", "The report shows the run as it was when the page was built."
    return "interrupted", "No summary was written: the run was killed, or its machine went away."


def headline(run: RunRecord) -> list[Tile]:
    """The tiles, from the summary or, where a run has none, from the metrics."""
    tiles = [*_quality(run), *_amount(run)]
    parameters, active = run.summary.get("parameters"), run.summary.get("active_parameters")
    if parameters:
        sparse = active is not None and active != parameters
        tiles.append(
            Tile(
                "Parameters", count(parameters), f"{count(active)} active a token" if sparse else "all active"
            )
        )
    return tiles


def describe_model(run: RunRecord) -> str:
    """The model and its layout in one line."""
    model, parallel = run.section("model"), run.section("parallel")
    if not model.get("num_layers"):
        return ""
    parts = [f"{model['num_layers']} layers of width {model.get('hidden_size')}"]
    experts = model.get("num_moe_experts")
    parts.append(f"{experts} experts, {model.get('moe_router_topk')} a token" if experts else "dense")
    parts.append(str(run.section("train").get("precision", "")))
    for key, short in (
        ("tensor_model_parallel_size", "TP"),
        ("pipeline_model_parallel_size", "PP"),
        ("context_parallel_size", "CP"),
        ("expert_model_parallel_size", "EP"),
    ):
        if (parallel.get(key) or 1) > 1:
            parts.append(f"{short} {parallel[key]}")
    world = run.environment.get("world_size")
    parts.append(f"{world} rank{'' if world == 1 else 's'}" if world else "")
    return " · ".join(part for part in parts if part)


def _quality(run: RunRecord) -> list[Tile]:
    tiles = []
    losses = [loss for loss in values(run.train, "loss")[1] if loss is not None]
    if losses:
        last = losses[-LAST_STEPS:]
        detail = f"mean of the last {len(last)} steps, from {number(losses[0])}"
        tiles.append(Tile("Training loss", number(sum(last) / len(last)), detail))
    evals = [row for row in run.evals if isinstance(row.get("eval_loss"), (int, float))]
    if evals:
        best, last_eval = min(evals, key=lambda row: row["eval_loss"]), evals[-1]
        detail = f"step {best['step']:,}"
        if best.get("eval_perplexity") is not None:
            detail += f", perplexity {number(best['eval_perplexity'], 3)}"
        if last_eval is not best:
            detail += f"; at the end {number(last_eval['eval_loss'])}"
        tiles.append(Tile("Best eval loss", number(best["eval_loss"]), detail))
    if run.summary.get("exact_match") is not None:
        tiles.append(Tile("Exact match", percent(run.summary["exact_match"]), "of the validation prompts"))
    return tiles


def _amount(run: RunRecord) -> list[Tile]:
    summary = {key: value for key, value in run.summary.items() if value is not None}
    last = run.train[-1] if run.train else {}
    step, total = summary.get("steps", last.get("step", 0)), run.section("train").get("max_steps")
    of_total = f" of {total:,}" if total and step != total else ""
    epochs = f"{last['epoch']:.2f} epochs" if last.get("epoch") else ""
    seconds = sum(time or 0.0 for time in values(run.train, "step_time")[1])
    tiles = [
        Tile("Steps", f"{step:,}{of_total}", epochs),
        Tile("Tokens", count(summary.get("tokens", last.get("num_tokens"))), "seen in training"),
        Tile(
            "Wall time",
            duration(summary.get("wall_seconds", seconds or None)),
            _what_of_the_time(run, measured="wall_seconds" in summary),
        ),
    ]
    speed, utilisation = _median(run, "tokens_per_second"), _median(run, "mfu")
    if speed is not None:
        mfu = "" if utilisation is None else f", {percent(utilisation)} MFU"
        tiles.append(Tile("Throughput", f"{compact(speed)}/s", f"tokens, median{mfu}"))
    return tiles


def _what_of_the_time(run: RunRecord, *, measured: bool) -> str:
    if not measured:
        return "in steps, so far"
    resumed = [event["step"] for event in run.events if event["event"] == "resume"]
    since = f"since step {resumed[-1]}, where it resumed; " if resumed else ""
    return f"{since}evaluation and checkpoints included"


def _median(run: RunRecord, key: str) -> float | None:
    known = [value for value in values(run.train, key)[1] if value is not None]
    return statistics.median(known) if known else None
