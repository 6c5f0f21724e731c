"""From differing fingerprints to causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megalign.parallel.audit import findings as f
from megalign.parallel.audit.compare import Comparison, Mismatch, Row
from megalign.parallel.audit.findings import Finding
from megalign.parallel.audit.held import IN_BUFFER, REQUIRES_GRAD
from megalign.parallel.placement import Placement


def structure(rows: Sequence[Row], comparison: Comparison, *, trained: bool) -> list[Finding]:
    """Parameters that not all copies agree to have, to train, or to reduce. trained: there is an optimizer."""
    found = []
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind in ("weight", "buffer"):
            by_key.setdefault(row.key, []).append(row)
    for key, held in by_key.items():
        ranks = [row.rank for row in held]
        absent = _should_hold(key, ranks, comparison) - set(ranks)
        if absent:
            fix = "register it on every rank of the group, before DDP and the optimizer are made"
            found.append(_finding(key, f.ABSENT, fix, sorted(absent), comparison, ranks))
        kinds = {(row.elements, _dtype(row)) for row in held}
        if len(kinds) > 1 and not key.endswith(".expert_bias"):
            unlike = [row.rank for row in held if (row.elements, _dtype(row)) != (held[0].elements, _dtype(held[0]))]
            detail = ", ".join(f"{elements} x {dtype}" for elements, dtype in sorted(kinds))
            fix = "build it with the same size and dtype on every rank of the group: such copies cannot even be compared"
            found.append(_finding(key, f.UNLIKE, fix, unlike, comparison, ranks, detail))
        if held[0].kind == "buffer":
            if key.endswith(".expert_bias") and any("|float32" not in row.label for row in held):
                low = [row.rank for row in held if "|float32" not in row.label]
                found.append(_finding(key, f.LOW_PRECISION, "keep the buffer out of .bfloat16(): module.expert_bias.data = module.expert_bias.data.float()", low, comparison, ranks))
            continue
        trains = {row.rank for row in held if row.flags & REQUIRES_GRAD}
        frozen = sorted(set(ranks) - trains)
        if trains and frozen:
            found.append(_finding(key, f.FROZEN, "freeze it on every rank that holds it (train.freeze), or on none", frozen, comparison, ranks))
        late = [row.rank for row in held if row.flags & REQUIRES_GRAD and not row.flags & IN_BUFFER]
        if trained and late:
            found.append(_finding(key, f.LATE, "add it where the model is built, before wrap_data_parallel and create_optimizer", late, comparison, ranks))
    return found


def differences(
    mismatches: Sequence[Mismatch], rows: Sequence[Row], comparison: Comparison, placements: Mapping[str, Placement], *, step: int, initial: set[str]
) -> list[Finding]:
    """One finding for each parameter whose copies differ, the likely roots first. initial: keys that differed at step 0."""
    by_key: dict[str, dict[str, Mismatch]] = {}
    for mismatch in mismatches:
        kinds = by_key.setdefault(mismatch.key, {})
        if mismatch.kind not in kinds or mismatch.difference > kinds[mismatch.kind].difference:
            kinds[mismatch.kind] = mismatch
    roots, others = [], []
    for key, kinds in by_key.items():
        cause, kind, fix = _cause(key, kinds, placements.get(key.split("|")[0]), comparison, step=step, initial=key in initial)
        mismatch = kinds[kind]
        off = sorted(rank for ranks in mismatch.classes[1:] for rank in ranks)
        if len(mismatch.classes) == 2 and len(mismatch.classes[0]) < len(mismatch.classes[1]):
            off = list(mismatch.classes[0])  # the odd one out is the lowest rank
        detail = f"largest value {mismatch.scale:.3g}; differ: {', '.join(sorted(kinds))}"
        holders = [rank for ranks in mismatch.classes for rank in ranks]
        group = _group(mismatch.classes, holders, comparison)
        finding = Finding(key, cause, fix, group, tuple(off), step, mismatch.difference, detail)
        (others if cause == f.NOT_EQUAL else roots).append(finding)
    rank_of = {f.INITIALISATION: 0, f.CHANGED: 1, f.MOMENTS: 2, f.MASTERS: 2, f.MISSING_SUM: 3, f.MISSING_MEAN: 3, f.BUFFER: 4}
    roots.sort(key=lambda finding: (rank_of.get(finding.cause, 5), -finding.difference if finding.difference == finding.difference else 0.0))
    # A gradient that each copy computes for itself differs as soon as any weight before it does.
    return roots + [Finding(**{**vars(finding), "follows": bool(roots)}) for finding in others]


def _cause(
    key: str, kinds: dict[str, Mismatch], placement: Placement | None, comparison: Comparison, *, step: int, initial: bool
) -> tuple[str, str, str]:
    """(cause, the kind whose difference tells it, fix)."""
    name = key.split("|")[0]
    if "buffer" in kinds:
        fix = "all-reduce what it is computed from over tensor, data and context ranks (megatron: finalize_model_grads), and keep it FP32"
        return f.BUFFER, "buffer", fix
    if "weight" in kinds and (step == 0 or initial):
        fix = "draw it from a generator seeded by its name (megalign.models.weights.initialise), or broadcast it in the group; audit.on_failure=repair does"
        return f.INITIALISATION, "weight", fix
    if "gradient" in kinds:
        axis = _axis_of(kinds["gradient"], placement, comparison)
        said = placement.gradients.get(axis) if placement else None
        if axis in ("data_context", "expert_data"):
            fix = f"let DDP reduce {name} over {axis} ranks: `allreduce = {axis == 'data_context'}`, before wrap_data_parallel"
            return f.MISSING_SUM, "gradient", fix
        if said == "full":
            fix = f'if each rank has only a part of it: declare({_short(name)}, {axis}="partial"); else make its layer deterministic'
            return f.NOT_EQUAL, "gradient", fix
        if said == "duplicated":
            return f.MISSING_MEAN, "gradient", f'declare({_short(name)}, {axis}="duplicated") before place() and attach()'
        return f.MISSING_SUM, "gradient", f'declare({_short(name)}, {axis}="partial") before place() and attach()'
    moments = [kind for kind in ("exp_avg", "exp_avg_sq") if kind in kinds]
    repair = "load the same optimizer state on every rank of the group; audit.on_failure=repair broadcasts the first rank's"
    if moments:
        return f.MOMENTS, moments[0], repair
    if "master" in kinds:
        return f.MASTERS, "master", repair
    return f.CHANGED, "weight", "find what writes to it outside optimizer.step(), and write the same on every rank; audit.on_failure=repair broadcasts the first rank's"


def _axis_of(mismatch: Mismatch, placement: Placement | None, comparison: Comparison) -> str:
    """The axis whose reduction is missing, in the words of a placement."""
    explained = comparison.axes_that_explain(mismatch.classes)
    expert = placement.is_expert if placement else ".experts." in mismatch.key
    inner, outer = ("expert_tensor", "expert_data") if expert else ("tensor", "data_context")
    holders = [rank for ranks in mismatch.classes for rank in ranks]
    varies = explained or comparison.axes_that_vary(holders)
    if inner in varies:
        return inner
    if "pipeline" in varies and not {"data", "context", "expert_data"} & set(varies):
        return "pipeline"
    return outer


def _should_hold(key: str, ranks: Sequence[int], comparison: Comparison) -> set[int]:
    """Ranks that stand where a holder stands, on the axes that tell copies from parts."""
    fixed = ["pipeline"]
    if "|tp" in key:
        fixed.append("tensor")
    if "local_experts." in key or ".experts." in key:
        fixed += ["expert", *(["expert_tensor"] if "|etp" in key else [])]
    places = {tuple(comparison.coordinates[rank][axis] for axis in fixed) for rank in ranks}
    return {rank for rank, at in enumerate(comparison.coordinates) if tuple(at[axis] for axis in fixed) in places}


def _group(classes: Sequence[Sequence[int]], holders: Sequence[int], comparison: Comparison) -> str:
    axes = comparison.axes_that_explain(classes) or comparison.axes_that_vary(holders)
    return "/".join(axes) or "one rank"


def _finding(key: str, cause: str, fix: str, off: list[int], comparison: Comparison, holders: Sequence[int], detail: str = "") -> Finding:
    others = [rank for rank in range(len(comparison.coordinates)) if rank not in off and rank in holders]
    return Finding(key, cause, fix, _group([off, others], holders, comparison), tuple(off), detail=detail)


def _dtype(row: Row) -> str:
    return row.label.split("|")[len(row.key.split("|")) + 1]


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])
