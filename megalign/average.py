"""Averaging the weights of a run's last checkpoints: LAWA (arXiv:2209.14981), model soups (arXiv:2203.05482).

    w = (w_1 + ... + w_k) / k

One more point on the loss surface for free: with a learning rate that has not yet decayed it is often lower than
each of its parts; evaluate it before you believe that.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megalign.parallel import checkpoint as files
from megalign.parallel.init import World
from megalign.parallel.saving import Save
from megalign.serving import load_for_inference


@torch.no_grad()
def average(run: Path, output: Path, last: int, world: World, overrides: list[str] | None = None) -> Path:
    """Write the mean of the `last` newest checkpoints of `run` into `output`; return the new checkpoint (collective).

    The sum is FP32. The result has weights and tokenizer, no optimizer: `megalign chat` and `convert` take it. Raises
    CheckpointError where there are fewer checkpoints, or one is damaged; FileExistsError for an output that exists.
    """
    found = files.list_checkpoints(run / "checkpoints") or files.list_checkpoints(run)
    if not 2 <= last <= len(found):
        names = ", ".join(path.name for path in found) or "none"
        raise files.CheckpointError(f"--last is {last}: {run} has {len(found)} checkpoints ({names}), and an average needs 2 or more; raise train.keep_last")
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another folder for the average")
    chosen = found[-last:]
    engine, newest = load_for_inference(chosen[-1], [*(overrides or []), "train.eval_ema=false"], world)
    parameters = [parameter for model in engine.models for parameter in model.parameters()]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for path in chosen:
        engine.load(path, weights_only=True)
        for total, parameter in zip(sums, parameters, strict=True):
            total += parameter
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.copy_(total / last)

    def copy_tokenizer(folder: Path) -> None:
        shutil.copytree(newest / "tokenizer", folder / "tokenizer")

    meta = files.read_meta(newest)
    meta["recipe"]["train"]["eval_ema"] = False  # this average has no other beside it
    meta["averaged"] = [path.name for path in chosen]
    step = int(newest.name.split("_")[1])
    if engine.grid.is_logger:
        output.mkdir(parents=True)
    return Save(output, step, engine.models, None, meta, engine.grid, copy_tokenizer).finish()
