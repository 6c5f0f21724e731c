"""Two steps of a cell of the layout matrix on every rank, against the same steps of one process.

Each rank compares the gradient of every parameter it holds, replicated or cut, with its part of the oracle's. Under
the distributed optimizer a rank has the reduced gradient of its shard of each bucket alone; the shards are gathered
first. The second step sees what the first did to the weights: an update lost, doubled or not gathered.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from layout_checks import Run
from layout_matrix import Cell

STEPS = 2
# Adam with a large epsilon is smooth: a difference of 1e-9 in a gradient is one of 1e-9 in a weight, and the second
# step can be held to the same tolerance. With the usual 1e-8 it would be lr times a sign.
SMOOTH: dict[str, Any] = {"lr": 1e-2, "adam_eps": 1e-2}


def one_process(cells: list[Cell]) -> list[list[dict[str, Any]]]:
    """The oracle: for each cell its steps, {"loss", "norm", "grads", "biases"}, on a world of one."""
    return [_oracle(cell) for cell in cells]


def _oracle(cell: Cell) -> list[dict[str, Any]]:
    run = _run(cell, layout={}, distributed=False, overlap="none")
    steps = []
    for _ in range(STEPS):
        loss = run.backward()
        grads = {name: parameter.main_grad.clone() for name, parameter, _ in _parameters(run)}
        _, norm, _ = run.optimizer.step()
        steps.append({"loss": loss, "norm": float(norm), "grads": grads, "biases": _biases(run)})
    _forget()
    return steps


def verdicts(cells: Sequence[Cell], timeout: float = 600) -> list[dict[str, Any]]:
    """`worst` of every cell, called outside of ranks: one launch for the oracle, one for each world size."""
    from ranks import run_ranks

    oracles = run_ranks(one_process, 1, list(cells), timeout=timeout)[0]
    found: list[dict[str, Any]] = [{} for _ in cells]
    for world in sorted({cell.world for cell in cells}):
        where = [i for i, cell in enumerate(cells) if cell.world == world]
        pickled = pickle.dumps([oracles[i] for i in where])
        ranks = run_ranks(compare, world, [cells[i] for i in where], pickled, timeout=timeout)
        for at, i in enumerate(where):
            found[i] = worst([rank[at] for rank in ranks])
    return found


def failed(found: dict[str, Any]) -> str:
    """What P13 and P5 forbid in a verdict, or ""."""
    said = [f"{name} off by {found[name]:.1e}" for name in ("loss", "norm") if not found[name] <= 1e-6]
    if not found["gradient"] <= 1:
        said.append(f"gradient of {found['parameter']} on rank {found['rank']}: {found['gradient']:.1f} times the tolerance")
    if found["biases"] != 0:
        said.append(f"expert biases differ by {found['biases']:.1e}")
    if not found["compared"]:
        said.append("nothing was compared")
    return "; ".join(said)


def compare(cells: list[Cell], oracles: bytes) -> list[dict[str, Any]]:
    """On each rank, for each cell: relative error of loss and norm, worst gradient in units of P13's tolerance.

    oracles: pickled, because tensors among the arguments of a process travel as open files.
    """
    return [_compare(cell, oracle) for cell, oracle in zip(cells, pickle.loads(oracles), strict=True)]


def _compare(cell: Cell, oracle: list[dict[str, Any]]) -> dict[str, Any]:
    run = _run(cell, layout=cell.layout(), distributed=cell.distributed, overlap=cell.overlap)
    found: dict[str, Any] = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "parameter": "", "biases": 0.0, "compared": 0}
    for expected in oracle:
        loss = run.backward()
        gather_gradients(run.chunks)
        for name, ratio in gradient_errors(run, expected["grads"]):
            found["compared"] += 1
            if not ratio <= found["gradient"]:
                found |= {"gradient": ratio, "parameter": name}
        _, norm, _ = run.optimizer.step()
        found["loss"] = max(found["loss"], abs(loss / expected["loss"] - 1))
        found["norm"] = max(found["norm"], abs(float(norm) / expected["norm"] - 1))
        for name, bias in _biases(run).items():
            found["biases"] = max(found["biases"], float((bias - expected["biases"][name]).abs().max()))
    _forget()
    return found


def worst(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest error of all ranks; of the gradients, with its rank and parameter."""
    rank = max(range(len(ranks)), key=lambda i: ranks[i]["gradient"])
    largest = {key: max(found[key] for found in ranks) for key in ("loss", "norm", "biases")}
    return {**ranks[rank], **largest, "rank": rank, "compared": sum(found["compared"] for found in ranks)}


def failures(cells: list[Cell], oracles: bytes) -> list[str]:
    """How each cell fails here: "Type: message", or what is wrong with its numbers; "" if it does not."""
    found = []
    for cell, oracle in zip(cells, pickle.loads(oracles), strict=True):
        try:
            found.append(failed({**_compare(cell, oracle), "rank": dist.get_rank()}))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            _forget()
    return found


def failures_without_rules(cells: Sequence[Cell]) -> list[list[str]]:
    """`failures` of every rank for each cell, called outside of ranks; all cells on one number of ranks."""
    from ranks import run_ranks

    oracles = pickle.dumps(run_ranks(one_process, 1, list(cells))[0])
    return [list(said) for said in zip(*run_ranks(failures, cells[0].world, list(cells), oracles), strict=True)]


def structure(cells: list[Cell]) -> list[Any]:
    """What a layout makes of the model here: shapes of the parameters, buckets, hooks that gather parameters."""
    found = []
    for cell in cells:
        run = _run(cell, layout=cell.layout(), distributed=cell.distributed, overlap=cell.overlap)
        shapes = {name: tuple(parameter.shape) for name, parameter, _ in _parameters(run)}
        found.append((shapes, [len(chunk.bucket_groups) for chunk in run.chunks], [chunk.use_forward_hook for chunk in run.chunks]))
        _forget()
    return found


def gradient_errors(run: Run, expected: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
    """(name, largest difference / (1e-5 max|g| + 1e-9)) of every parameter this rank holds; g is the full gradient."""
    from megalign.models.hf.shards import local_from_full

    errors = []
    for name, parameter, place in _parameters(run):
        full = expected[name]
        difference = (parameter.main_grad - local_from_full(name, full, place)).abs().max()
        errors.append((name, float(difference / (1e-5 * full.abs().max() + 1e-9))))
    return errors


def gather_gradients(chunks: list[Any]) -> None:
    """Give every rank the whole of each bucket that the distributed optimizer has reduced to shards."""
    for chunk in chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks, rank = group.intra_distributed_optimizer_instance_size, group.intra_distributed_optimizer_instance_rank
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks)[rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group.intra_distributed_optimizer_instance_group)


def _run(cell: Cell, *, layout: dict[str, Any], distributed: bool, overlap: str) -> Run:
    return Run(
        cell.model_config(),
        layout,
        distributed=distributed,
        overlap="gradients" in overlap,
        overlap_param_gather="parameters" in overlap,
        bucket_size=None if overlap == "none" else 5000,  # several buckets, of which some are ready before others
        rows=cell.microbatches,
        document_multiple=cell.document_multiple,
        **SMOOTH,
    )


def _parameters(run: Run) -> list[tuple[str, Any, Any]]:
    """(name in the whole model, parameter, place); a tied output layer on a stage of its own is the embedding again."""
    from megalign.models.weights import named_parameters

    tied = run.chunks[0].module.share_embeddings_and_output_weights
    rename = {"output_layer.weight": "embedding.word_embeddings.weight"} if tied else {}
    return [(rename.get(name, name), parameter, place) for name, parameter, place in named_parameters(run.chunks, run.grid)]


def _biases(run: Run) -> dict[str, torch.Tensor]:
    from megalign.models.weights import named_weights

    return {name: weight.clone() for name, weight, _ in named_weights(run.chunks, run.grid) if name.endswith("expert_bias")}


def _forget() -> None:
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from megalign.parallel.grid import destroy_grid

    get_moe_layer_wise_logging_tracker().clear()  # it is as long as the last model had layers
    destroy_grid()
