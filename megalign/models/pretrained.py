"""Hugging Face folders as a starting point and as an end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalign.config.layout import padded_vocab
from megalign.config.schema import ModelConfig, Recipe
from megalign.models.adapters import add_adapters
from megalign.models.base import with_base
from megalign.models.hf.io import read_hf, write_hf
from megalign.models.hf.registry import family_of_model, hf_config_from_model
from megalign.models.hf.table import Dimensions
from megalign.models.resolve import own_checkpoint
from megalign.models.weights import initialise, load_full, stream_full
from megalign.parallel import checkpoint
from megalign.parallel.grid import Grid
from megalign.parallel.lora import merge


def load_pretrained(chunks: Sequence[Any], model: ModelConfig, grid: Grid, vocab_size: int) -> None:
    """Fill the model with the weights of `model.init_from`: a Hugging Face folder, or a checkpoint of ours (collective): those
    that were evaluated, the averaged ones with train.eval_ema.

    Each rank reads only the files its part needs.
    """
    own = own_checkpoint(Path(str(model.init_from)))
    if own is not None:
        _load_own(own, chunks, model, grid, vocab_size)
        return
    weights = read_hf(str(model.init_from))
    dimensions = Dimensions.of(model, vocab_size, padded_vocab(vocab_size, grid.tensor.size))
    conversion = family_of_model(model).conversion(dimensions)
    conversion.check(weights)
    load_full(chunks, grid, lambda name, parameter, place: conversion.load(name, weights))


def _load_own(own: Path, chunks: Sequence[Any], model: ModelConfig, grid: Grid, vocab_size: int) -> None:
    """A checkpoint of ours. Of adapters: its base, and they are merged into it."""
    there = Recipe(**checkpoint.read_meta(own)["recipe"])
    adapters, rates = there.lora.rank is not None, [chunk.config.moe_router_bias_update_rate for chunk in chunks]
    if adapters:
        there = with_base(own, there)
        base = model.model_copy(update={"init_from": there.model.init_from})
        if base.init_from is None:
            initialise(chunks, base, grid, there.train.seed)
        else:
            load_pretrained(chunks, base, grid, vocab_size)
        add_adapters(chunks, base, there.lora, grid, there.train.seed)
    checkpoint.load(own, chunks, None, grid, average=there.train.eval_ema)
    if adapters:
        merge(chunks)
        for chunk, rate in zip(chunks, rates, strict=True):
            chunk.requires_grad_(True)
            chunk.config.moe_router_bias_update_rate = rate


def save_pretrained(
    folder: Path, chunks: Sequence[Any], model: ModelConfig, grid: Grid, vocab_size: int, tokenizer: Path | None, eos: int, dtype: torch.dtype
) -> None:
    """Write the model as a Hugging Face folder (collective; rank 0 writes, one tensor in memory at a time)."""
    stream = stream_full(chunks, grid)
    failure: list[BaseException | None] = [None]
    if grid.rank == 0:
        try:
            dimensions = Dimensions.of(model, vocab_size, padded_vocab(vocab_size, grid.tensor.size))
            named = family_of_model(model).conversion(dimensions).to_hf(stream)
            config = hf_config_from_model(model, vocab_size, str(dtype).removeprefix("torch."), eos_token_id=eos)
            write_hf(folder, named, config, dtype=dtype, tokenizer=tokenizer)
        except Exception as error:
            failure = [error]
    for _ in stream:  # the other ranks' part; and on rank 0, after an error, what they still wait to send
        pass
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
