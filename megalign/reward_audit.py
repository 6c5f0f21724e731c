"""`megalign rm audit CHECKPOINT`: what a reward model rewards by mistake.

Probes: traits given to answers whose content stays (`rewards/probes.py`). Judged pairs: whether the longer answer is preferred
where judges have no preference for it. Labelled answers with facts of their users: whether the users alone would do as well
(`rewards/shortcut.py`). Candidates with gold scores: best of n, and where more optimisation would hurt
(`rewards/overoptimisation.py`). What the current policy says (--policy): whether rewards have moved, and whether chances still
hold (`rewards/shift.py`). Each part speaks where the file has such rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megalign.audit import AuditFailed
from megalign.config.plan import plain_table
from megalign.data.formats import detect, read_records
from megalign.data.judgements import conversations, labels_of
from megalign.data.labels import USER
from megalign.data.rows import Conversation, DataError, PreferencePair, RankedResponses, ScoredResponse
from megalign.parallel.checkpoint import CheckpointError, read_meta
from megalign.parallel.init import World
from megalign.rewards.heads import PAIRED
from megalign.rewards.measures import asked_both_ways, wilson
from megalign.rewards.overoptimisation import agreement, best_of_n, best_of_n_kl, fit_curve
from megalign.rewards.probes import length_preference, probe
from megalign.rewards.shift import calibration_of, shift_of
from megalign.rewards.shortcut import shortcut
from megalign.scoring import RewardScorer, answers_in
from megalign.serving import find_checkpoint

LEAST = 20  # rows below which a part says nothing


def audit_rewards(
    path: Path,
    file: Path | None,
    overrides: Sequence[str],
    world: World,
    *,
    head: str | None = None,
    rows: int = 200,
    output: Path | None = None,
    policy: Path | None = None,
) -> None:
    """Print what was found, write it as JSON (collective). Raises AuditFailed where something is flagged.

    file: pairs, labelled answers, rankings; default: the run's own validation file. rows: answers that are probed.
    policy: what the current policy says, judged or not; without `file` nothing else is looked at.
    """
    scorer = RewardScorer.load(path, overrides, world)
    head = head or next(iter(scorer.heads))
    if head not in scorer.heads:
        raise CheckpointError(f"--head is {head!r}: the model has {', '.join(scorer.heads)}")
    found, flagged = {}, []
    if file is not None or policy is None:
        found, flagged = _parts(scorer, head, list(read_records(file := file or own_file(path), detect(file))), rows)
    if policy is not None:
        found["policy"], moved = _policy(scorer, head, policy)
        flagged += moved
    found = {"checkpoint": str(find_checkpoint(path)), "file": str(file or policy), "head": head, **found, "flagged": flagged}
    if world.rank == 0:
        show(found)
        if output is not None:
            output.write_text(json.dumps(found, indent=1))
    if flagged:
        raise AuditFailed(f"flagged: {', '.join(flagged)}")


def own_file(path: Path) -> Path:
    """The file that the run was validated on, or trained. Raises DataError where it had none."""
    data = read_meta(find_checkpoint(path))["recipe"]["data"]
    for names in (data["validation"], data["train"]):
        name = names[0] if isinstance(names, list) else names
        if name and Path(name).is_file():
            return Path(name)
    raise DataError(f"{path} was trained on {data['train']}, which is no file here; give one: megalign rm audit CHECKPOINT FILE")


def _parts(scorer: RewardScorer, head: str, records: Sequence[Any], count: int) -> tuple[dict[str, Any], list[str]]:
    pairs = [row for row in records if isinstance(row, PreferencePair)]
    labelled = [row for row in records if isinstance(row, ScoredResponse)]
    rankings = [row for row in records if isinstance(row, RankedResponses) and all(response.score is not None for response in row.responses)]
    pairs += [pair for row in records if isinstance(row, RankedResponses) for pair in row.pairs()]
    found: dict[str, Any] = {}
    flagged: list[str] = []

    def rewards(dialogues: Sequence[Conversation]) -> np.ndarray:
        return scorer.score(dialogues)[head]

    answers = [conversations(row)[0] for row in islice([*pairs, *labelled], count)]
    if len(answers) >= LEAST:
        effects = probe(rewards, answers)
        found["probes"] = [{**asdict(effect), "flagged": effect.flagged} for effect in effects]
        flagged += [effect.trait for effect in effects if effect.flagged]
    if len(pairs) >= LEAST and scorer.heads[head].loss == PAIRED:
        sides = [conversations(pair) for pair in pairs]
        said = rewards([side for both in sides for side in both]).reshape(-1, 2)
        margins, longer = said[:, 0] - said[:, 1], np.array([len(a.messages[-1].content) - len(b.messages[-1].content) for a, b in sides])
        right = float(np.nansum((margins > 0) + 0.5 * (margins == 0)))
        known = int((~np.isnan(margins)).sum())
        found["pairs"] = {"pairs": known, "accuracy": right / max(1, known), "accuracy_interval": wilson(right, known)}
        length = length_preference(margins, longer)
        if length.pairs >= LEAST:
            found["length"] = {**asdict(length), "flagged": length.flagged}
            flagged += ["preference for length"] if length.flagged else []
    if (through := _user(scorer, head, labelled)) is not None:
        found["user"] = through
        flagged += ["the user, not the text"] if through["flagged"] else []
    if (curve := _best_of_n(rewards, rankings)) is not None:
        found["best_of_n"] = curve
    if not found:
        raise DataError(f"nothing to audit: {len(pairs)} pairs, {len(labelled)} labelled answers; {LEAST} of a kind are needed")
    return found, flagged


def _user(scorer: RewardScorer, head: str, rows: Sequence[ScoredResponse]) -> dict[str, Any] | None:
    """Of a yes-or-no head whose rows say who the user is."""
    key = scorer.heads[head].label or head
    known = [row for row in rows if key in dict(row.scores) and any(name.startswith(USER) for name, _ in row.scores) and row.user]
    if scorer.heads[head].loss != "binary" or len({row.user for row in known}) < LEAST:
        return None
    names = sorted({name for row in known for name, _ in row.scores if name.startswith(USER)})
    features = np.array([[dict(row.scores).get(name, 0.0) for name in names] for row in known])
    said = scorer.score([conversations(row)[0] for row in known])[head]
    labels = np.array([labels_of(row, head, scorer.heads[head])[0][0] for row in known])
    usable = ~(np.isnan(said) | np.isnan(labels))
    result = shortcut(features[usable], said[usable], labels[usable], [str(row.user) for row, use in zip(known, usable) if use])
    return {"features": [name.removeprefix(USER) for name in names], "rows": int(usable.sum()), **asdict(result), "share": result.share, "flagged": result.flagged}


def _policy(scorer: RewardScorer, head: str, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Have the rewards moved on the policy's samples, and where pairs of them were judged: do the chances still hold?"""
    reference = scorer.normalisation.get(head)
    if reference is None:
        raise CheckpointError(f"the checkpoint has no normalisation of head {head!r}, against which samples are held; give the run folder")
    pairs = [row for row in read_records(file, detect(file)) if isinstance(row, PreferencePair)]
    try:
        shift = shift_of(scorer.score([dialogue for _, dialogue in answers_in(file) if isinstance(dialogue, Conversation)])[head], reference)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    found: dict[str, Any] = {"file": str(file), "shift": {**asdict(shift), "flagged": shift.flagged}}
    flagged = ["rewards of the policy's samples have moved"] if shift.flagged else []
    if len(pairs) >= LEAST and scorer.heads[head].loss == PAIRED:
        said = scorer.score([side for pair in pairs for side in conversations(pair)])[head].reshape(-1, 2)
        margins = (said[:, 0] - said[:, 1])[~np.isnan(said).any(1)]
        calibration = calibration_of(*asked_both_ways(margins))
        found["calibration"] = {**asdict(calibration), "flagged": calibration.flagged}
        flagged += ["calibration on the policy's samples"] if calibration.flagged else []
    return found, flagged


def _best_of_n(rewards: Any, rankings: Sequence[RankedResponses]) -> dict[str, Any] | None:
    """Of prompts with as many candidates each (the commonest number), scored by gold."""
    by_size: dict[int, list[RankedResponses]] = defaultdict(list)
    for row in rankings:
        by_size[len(row.responses)].append(row)
    size, rows = max(by_size.items(), key=lambda item: len(item[1]) * (item[0] >= 4), default=(0, []))
    if size < 4 or len(rows) < LEAST:
        return None
    gold = np.array([[float(response.score or 0.0) for response in row.responses] for row in rows])
    proxy = rewards([Conversation((*row.prompt, *response.messages), row.source, row.line) for row in rows for response in row.responses]).reshape(gold.shape)
    keep = ~np.isnan(proxy).any(1)
    gold, proxy = gold[keep], proxy[keep]
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= size]
    means = [best_of_n(proxy, gold, n) for n in ns]
    curve = fit_curve([best_of_n_kl(n) for n in ns], means)
    same = {n: agreement(proxy, gold, n) for n in ns[1:]}
    return {"n": ns, "kl": [best_of_n_kl(n) for n in ns], "gold": means, "agreement": same, "alpha": curve.alpha, "beta": curve.beta, "turning_point": curve.turning_point}


def show(found: dict[str, Any]) -> None:
    """As tables."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{found['checkpoint']}, head {found['head']}, on {found['file']}\n", markup=False)
    if "probes" in found:
        table = plain_table("reward for a trait, in standard deviations over answers", "trait", "effect", "95 %", "threshold", "")
        for row in found["probes"]:
            low, high = row["interval"]
            table.add_row(row["trait"], f"{row['effect']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{row['threshold']:.2f}", "FLAGGED" if row["flagged"] else "")
        console.print(table)
    if "pairs" in found:
        low, high = found["pairs"]["accuracy_interval"]
        console.print(f"\n{found['pairs']['pairs']} pairs: {found['pairs']['accuracy']:.1%} ranked as judged ({low:.1%} to {high:.1%})")
    if "length" in found:
        part = found["length"]
        console.print(
            f"the longer answer: judges prefer it in {part['judged_share']:.1%} of the pairs; on {part['pairs']} pairs where they prefer it in half, the model does in "
            f"{part['share']:.1%} ({part['interval'][0]:.1%} to {part['interval'][1]:.1%}){'  FLAGGED' if part['flagged'] else ''}"
        )
    if "user" in found:
        part = found["user"]
        console.print(
            f"\nuser alone ({', '.join(part['features'])}): AUC {part['user']:.3f}; with the model's score of the text {part['both']:.3f}, "
            f"gain {part['gain']:+.3f} ({part['gain_interval'][0]:+.3f} to {part['gain_interval'][1]:+.3f}){'  FLAGGED' if part['flagged'] else ''}"
        )
    if "policy" in found:
        part = found["policy"]["shift"]
        console.print(
            f"\n{part['samples']} samples of the policy: rewards moved by {part['shift']:+.2f} standard deviations ({part['interval'][0]:+.2f} to {part['interval'][1]:+.2f}), "
            f"spread {part['spread']:.2f} times the reference's{'  FLAGGED' if part['flagged'] else ''}"
        )
        if (part := found["policy"].get("calibration")) is not None:
            console.print(
                f"calibration error on {part['samples']} judged pairs of it: {part['error']:.3f}; a calibrated model's would be {part['expected']:.3f}, "
                f"at most {part['limit']:.3f} in 99 %{'  FLAGGED' if part['flagged'] else ''}"
            )
    if "best_of_n" in found:
        part = found["best_of_n"]
        told = ", ".join(f"{n}: {value:.3f}" for n, value in zip(part["n"], part["gold"]))
        turn = f"turns at sqrt(KL) = {part['turning_point']:.2f}" if part["turning_point"] is not None else "does not turn"
        console.print(f"\nbest of n by the model, gold reward: {told}; the fitted curve {turn}")
        console.print("same choice as gold: " + ", ".join(f"{n}: {value:.1%}" for n, value in part["agreement"].items()))
