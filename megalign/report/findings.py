"""What the numbers of a run suggest doing next: short rules, each with its evidence."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from megalign.report.curves import values
from megalign.report.format import number, percent
from megalign.report.run_folder import Row, RunRecord

RISEN = 1.02  # the last eval loss, over the best
STILL_FALLING = 0.02  # of the loss, over the last tenth of the run
CLIPPED = 0.95
WAITING = 0.05  # share of the ranks' time
CROWDED, SPARSE = 0.05, 0.7  # share of rows cut; share of a pack that holds tokens


def findings(run: RunRecord) -> list[str]:
    """Sentences, the most urgent first; none is a good sign."""
    return [*_losses(run), *_gradients(run), *_ranks(run), *_data(run)]


def commands(run: RunRecord, status: str) -> list[tuple[str, str]]:
    """(what for, command line) pairs to copy."""
    folder = shlex.quote(str(run.path))
    again = command_line(run.environment)
    steps = []
    if status != "finished" and again:
        steps.append(("Continue from the last complete checkpoint", again))
    if run.checkpoints:
        steps += [
            ("Talk to the model", f"megalign chat {folder}"),
            ("Export it as a Hugging Face folder", f"megalign convert {folder} {folder}/hf"),
        ]
    if (run.path / "tensorboard").is_dir():
        steps.append(("See every scalar in TensorBoard", f"tensorboard --logdir {folder}/tensorboard"))
    if status != "finished":
        steps.append(("Build this report again", f"megalign report {folder}"))
    return steps


def command_line(environment: Row) -> str:
    """What started the run, as typed: argv without the path of the program; empty if unknown."""
    command = environment.get("command")
    return shlex.join(["megalign", *map(str, command[1:])]) if isinstance(command, list) and command else ""


def _losses(run: RunRecord) -> Iterator[str]:
    steps, losses = values(run.train, "loss")
    lost = [step for step, loss in zip(steps, losses) if loss is None]
    if lost:
        yield f"The loss was not finite in {len(lost)} step(s), first at step {lost[0]:,}: lower optimizer.lr."
    eval_steps, eval_losses = values(run.evals, "eval_loss")
    evals = [(loss, step) for step, loss in zip(eval_steps, eval_losses) if loss is not None]
    overfitted = bool(evals) and evals[-1][0] > RISEN * min(evals)[0] > 0
    if overfitted:
        (best, step), (last, _) = min(evals), evals[-1]
        yield (
            f"The eval loss was lowest at step {step:,} ({number(best)}) and has risen to {number(last)}: the model "
            "memorises. Use that checkpoint; train shorter, or set train.early_stop_patience."
        )
    known = [loss for loss in losses if loss is not None]
    span = len(known) // 20
    if span >= 5 and not overfitted:
        # The last twentieth of the run against the one a tenth earlier.
        before, after = sum(known[-3 * span : -2 * span]) / span, sum(known[-span:]) / span
        if before > 0 and (before - after) / before > STILL_FALLING:
            yield (
                f"The loss still fell by {percent((before - after) / before)} over the last tenth of the run: "
                "a longer one should do better."
            )


def _gradients(run: RunRecord) -> Iterator[str]:
    clip = run.section("optimizer").get("clip_grad")
    norms = [norm for norm in values(run.train, "grad_norm")[1][-100:] if norm is not None]
    clipped = sum(norm > clip for norm in norms) / len(norms) if clip and norms else 0.0
    if len(norms) == 100 and clipped > CLIPPED:
        yield (
            f"{percent(clipped, 0)} of the last 100 gradients were clipped (optimizer.clip_grad = {clip:g}): the clip, "
            "not optimizer.lr, sets the step. Lower the learning rate or raise the clip."
        )


def _ranks(run: RunRecord) -> Iterator[str]:
    stragglers = [str(event["message"]) for event in run.events if event["event"] == "straggler"]
    if stragglers:
        yield f"All ranks wait for one: {stragglers[-1]}. Look at its host (other jobs, clocks), or at what the layout gives it."


def _data(run: RunRecord) -> Iterator[str]:
    train = run.data.get("train")
    train = train if isinstance(train, dict) else {}
    kept, cut = (
        train.get("rows_kept") or 0,
        (train.get("truncated") or 0) + (train.get("truncated_away") or 0),
    )
    if kept and cut > CROWDED * kept:
        yield f"{cut:,} of {kept:,} training rows are longer than a row holds: raise data.sequence_length."
    fill = train.get("fill_share")
    if fill is not None and 0 < fill < SPARSE and run.section("data").get("packing") is False:
        yield f"Rows are {percent(fill, 0)} full: data.packing=true would save most of the rest of the compute."
    spread = train.get("distribution")
    spread = spread if isinstance(spread, dict) else {}
    idle = (spread.get("dealt") or {}).get("idle_share") or 0.0
    if idle > WAITING and not spread.get("balanced"):
        yield (
            f"Data-parallel ranks wait {percent(idle, 0)} of their time for the one with the most tokens: "
            "data.balance=true deals rows by length."
        )
