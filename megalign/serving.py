"""A checkpoint outside training: found, loaded on any layout, talked to, or written for others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megalign.chat import run_chat
from megalign.config.layout import world_size_of
from megalign.config.load import apply_overrides
from megalign.config.rules import check
from megalign.config.schema import ParallelConfig, Recipe
from megalign.data.tokenizer import Tokenizer, load_tokenizer
from megalign.models.base import with_base
from megalign.models.heads import HeadShape
from megalign.models.peft import save_adapter
from megalign.models.pretrained import save_pretrained
from megalign.models.resolve import own_checkpoint
from megalign.parallel.checkpoint import CheckpointError, read_meta
from megalign.parallel.init import World
from megalign.parallel.lora import merge
from megalign.rollout.sampler import SamplingParams
from megalign.rollout.talk import COMMANDS
from megalign.trainer.engine import Engine
from megalign.trainer.run import grid_of


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; of a run folder the best checkpoint, else the last.

    Raises CheckpointError where there is none.
    """
    found = own_checkpoint(path)
    if found is None:
        raise CheckpointError(f"{path} holds no complete checkpoint; give a run folder or one of its checkpoints/iter_... folders")
    return found


def recipe_for(checkpoint: Path, overrides: list[str]) -> Recipe:
    """The recipe that trained a checkpoint, on one rank unless `overrides` ask for a layout. Of adapters, with their base."""
    meta = read_meta(checkpoint)
    recipe = Recipe(**meta["recipe"])
    if recipe.lora.rank is not None:
        moved = [text.partition("=")[2] for text in overrides if text.startswith("model.init_from=")]
        recipe = with_base(checkpoint, recipe, moved[-1] if moved else None)
    else:
        recipe.model.init_from = None  # the weights come from the checkpoint,
    recipe.data.tokenizer.path = str(checkpoint / "tokenizer")  # and so do the tokenizer
    recipe.data.template = "tokenizer"  # and its template
    recipe.model.vocab_size = meta["identity"]["vocab_size"]
    recipe.parallel = ParallelConfig()
    recipe.train.micro_batch_size = recipe.train.global_batch_size = 1
    return apply_overrides(recipe, overrides)


def chat_ranks(path: Path, overrides: list[str]) -> int:
    """Ranks that a chat with these overrides needs."""
    recipe = recipe_for(find_checkpoint(path), overrides)
    ranks = world_size_of(recipe)
    recipe.train.global_batch_size = ranks  # a layout's rule, without meaning here
    check(recipe, ranks)
    return ranks


def load_for_inference(path: Path, overrides: list[str], world: World, *, speaks: bool = True) -> tuple[Engine, Path]:
    """The model of a checkpoint on this world's layout, without optimizer (collective).

    speaks: it must say words; else a reward model will do too. Raises CheckpointError.
    """
    checkpoint = find_checkpoint(path)
    shapes = read_meta(checkpoint)["identity"].get("heads") or {}
    if shapes and speaks:
        raise CheckpointError(f"{checkpoint} is a reward model, and says no words; score answers with megalign rm score")
    recipe = recipe_for(checkpoint, overrides)
    heads = {name: HeadShape(**shape) for name, shape in shapes.items()} or None
    engine = Engine(recipe, grid_of(recipe, world), int(recipe.model.vocab_size or 0), train=False, heads=heads)
    engine.load(checkpoint, weights_only=True)
    return engine, checkpoint


def stored_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, with the chat template that it was trained with (D14, V4).

    Raises CheckpointError where the folder's files are no longer those: what is served would not be what was trained.
    """
    tokenizer, identity = load_tokenizer(checkpoint / "tokenizer"), read_meta(checkpoint)["identity"]
    found = {"tokenizer": tokenizer.hash, "template_hash": tokenizer.template.hash}
    for key, name in (("tokenizer", "tokenizer"), ("template_hash", "chat template")):
        if found[key] != identity[key]:
            raise CheckpointError(
                f"{checkpoint / 'tokenizer'} holds another {name} than the checkpoint was trained with "
                f"({found[key][:12]}, trained: {identity[key][:12]}); restore the folder's files"
            )
    return tokenizer


def chat_with(
    path: Path,
    overrides: list[str],
    world: World,
    *,
    prompt: str | None,
    system: str | None,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Talk to a checkpoint on the terminal (collective)."""
    engine, checkpoint = load_for_inference(path, overrides, world)
    tokenizer = stored_tokenizer(checkpoint)
    if world.rank == 0 and prompt is None:
        step = read_meta(checkpoint)["training"]["progress"]["step"]
        how = COMMANDS if sys.stdin.isatty() else "each line is a prompt of its own"
        print(f"{checkpoint} (step {step}). {how}", file=sys.stderr, flush=True)  # line n of stdout answers line n
    run_chat(
        engine.models,
        engine.grid,
        tokenizer,
        system=system,
        sampling=SamplingParams(temperature=temperature, top_p=top_p),
        max_new_tokens=max_new_tokens,
        seed=seed,
        prompt=prompt,
    )


def write_hugging_face(
    path: Path, folder: Path, dtype: str, world: World, ema: bool | None = None, *, adapter: bool = False, base: str | None = None
) -> None:
    """Write a checkpoint as a Hugging Face folder (collective). ema: the averaged weights, or those trained last; None: as evaluated.

    Of a checkpoint of adapters they are merged into their base; adapter: written alone, as a PEFT folder. base: where the base is now.
    """
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"--dtype is {dtype!r}: it must be float32 or bfloat16")
    overrides = [] if ema is None else [f"train.eval_ema={str(ema).lower()}"]
    engine, checkpoint = load_for_inference(path, overrides + ([] if base is None else [f"model.init_from={base}"]), world, speaks=False)
    model, lora = engine.recipe.model, engine.recipe.lora
    if lora.rank is None and (adapter or base is not None):
        raise CheckpointError(f"{checkpoint} holds a whole model and no adapters; leave out --{'adapter' if adapter else 'base'}")
    if adapter and engine.heads:
        raise CheckpointError(f"{checkpoint} is a reward model, whose heads ({', '.join(engine.heads)}) are whole weights and no adapters; leave out --adapter, and all is merged")
    if adapter:
        save_adapter(folder, engine.models, model, lora, engine.grid, int(model.vocab_size or 0), getattr(torch, dtype))
        if world.rank == 0:
            print(f"{folder}: adapters of rank {lora.rank} in {dtype} for PEFT, on {model.init_from}, from {checkpoint}")
        return
    for chunk in engine.models if lora.rank is not None else ():
        chunk.float()  # a product of rank r is below what BF16 weights can take up
    merge(engine.models)
    tokenizer = stored_tokenizer(checkpoint)
    eos, pad = tokenizer.end_of_turn, tokenizer.eod
    save_pretrained(folder, engine.models, model, engine.grid, int(model.vocab_size or 0), checkpoint / "tokenizer", eos, getattr(torch, dtype), pad)
    if world.rank == 0:
        print(f"{folder}: {model.num_layers} layers in {dtype}, from {checkpoint}")


__all__: list[Any] = ["chat_ranks", "chat_with", "find_checkpoint", "load_for_inference", "write_hugging_face"]
