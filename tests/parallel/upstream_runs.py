"""A bug's model with and without the defect, against one process; run on ranks, for test_upstream_bugs.py."""

from __future__ import annotations

import pickle
from typing import Any

import torch.distributed as dist
from upstream_bugs import BUGS, Bug
from upstream_modules import Prepare


def gradients_of(bug: Bug, prepare: Prepare | None, layout: dict[str, Any], hooks: bool | None) -> Any:
    """The `Run` of a bug's model with `prepare`, after its backward pass, and its gradient norm (collective)."""
    from layout_checks import Run

    run = Run(
        bug.model,
        layout,
        distributed=bug.distributed and bool(layout),
        document_multiple=bug.document_multiple,
        options=bug.options,
        prepare=prepare,
        hooks=hooks,
    )
    return run, run.backward()


def oracles(names: list[str]) -> dict[str, dict[str, Any]]:
    """One process: {"loss", "norm", "grads"} of every bug's model without the defect."""
    from cell_checks import _forget, _parameters

    found = {}
    for name in names:
        bug = BUGS[name]
        run, loss = gradients_of(bug, bug.right, {}, None)
        grads = {at: parameter.main_grad.clone() for at, parameter, _ in _parameters(run)}
        _, norm, _ = run.optimizer.step()
        found[name] = {"loss": loss, "norm": float(norm), "grads": grads}
        _forget()
    return found


def refusals(names: list[str]) -> dict[str, str]:
    """What placing the parameters says of each defect on this rank, or "" where nothing is wrong with the flags alone."""
    from cell_checks import _forget

    from megalign.parallel.placement import PlacementError

    found = {}
    for name in names:
        bug, found[name] = BUGS[name], ""
        try:
            gradients_of(bug, bug.wrong, bug.layout, True)
        except PlacementError as error:
            found[name] = str(error)
        _forget()
    return found


def study(names: list[str], pickled: bytes) -> dict[str, dict[str, dict[str, Any]]]:
    """On each rank, for each bug: what is wrong {"errors": parameter -> times the tolerance, "norm", "loss"} in both runs."""
    from cell_checks import _forget, gather_gradients, gradient_errors

    expected = pickle.loads(pickled)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        bug = BUGS[name]
        for way, prepare, hooks in (("wrong", bug.wrong, None), ("right", bug.right, True)):
            run, loss = gradients_of(bug, prepare, bug.layout, hooks)
            gather_gradients(run.chunks)
            errors = dict(gradient_errors(run, expected[name]["grads"]))
            _, norm, _ = run.optimizer.step()
            found.setdefault(name, {})[way] = {
                "errors": {at: ratio for at, ratio in errors.items() if not ratio <= 1},
                "norm": float(norm) / expected[name]["norm"],
                "loss": abs(loss / expected[name]["loss"] - 1),
                "compared": len(errors),
            }
            _forget()
    dist.barrier()
    return found
