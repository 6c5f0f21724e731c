"""What a run starts from, so that what was built on it can say so: hashes of weights, and the base that adapters need."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megalign.config.schema import Recipe
from megalign.data.cache import cache_folder
from megalign.data.source import file_digest
from megalign.models.resolve import own_checkpoint
from megalign.parallel.checkpoint import CheckpointError, read_meta


def model_hash(recipe: Recipe) -> str:
    """SHA-256 of the weights that a run of this recipe starts from: the files of model.init_from, or shape and seed."""
    model = recipe.model
    if model.init_from is None:
        return hashlib.sha256(json.dumps([model.model_dump(mode="json"), recipe.train.seed], sort_keys=True).encode()).hexdigest()
    if (own := own_checkpoint(Path(model.init_from))) is not None:  # its manifest has the SHA-256 of every file
        return hashlib.sha256((own / "manifest.json").read_bytes()).hexdigest()
    folder = cache_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in sorted(Path(model.init_from).iterdir()) if file.name == "config.json" or file.suffix == ".safetensors"]
    return hashlib.sha256("\n".join(f"{file.name} {file_digest(file, folder)}" for file in files).encode()).hexdigest()


def adapter_identity(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint of adapters must be continued with: the same adapters on the same base. Empty without adapters."""
    if recipe.lora.rank is None:
        return {}
    base = recipe.model.init_from
    base = None if base is None else str((own_checkpoint(Path(base)) or Path(base)).resolve())
    return {"lora": recipe.lora.model_dump(exclude={"dropout"}), "base": {"init_from": base, "sha256": model_hash(recipe)}}


def with_base(checkpoint: Path, recipe: Recipe, base: str | None = None) -> Recipe:
    """The recipe of a checkpoint of adapters with the folder of its base: `base`, or the one it was trained on, which must be as it was.

    Raises CheckpointError where that is gone, or holds other weights.
    """
    known = read_meta(checkpoint)["identity"]["base"]
    recipe = recipe.model_copy(deep=True)
    if known["init_from"] is not None:
        recipe.model.init_from = folder = base or known["init_from"]
        if not (Path(folder) / "config.json").is_file() and own_checkpoint(Path(folder)) is None:
            raise CheckpointError(f"{checkpoint} holds adapters alone, and their base {folder} is not there; name where it is now: model.init_from=FOLDER (convert: --base FOLDER)")
    if (found := model_hash(recipe)) != known["sha256"]:
        raise CheckpointError(f"{checkpoint} holds adapters of another base: {recipe.model.init_from or 'the random weights of its recipe'} has SHA-256 {found[:12]}, trained on {known['sha256'][:12]}; restore its files, or name the right folder")
    return recipe
