"""Hugging Face folders as a starting point and as an end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.config.layout import padded_vocab
from megalign.config.schema import ModelConfig, Recipe
from megalign.models.adapters import add_adapters
from megalign.models.base import with_base
from megalign.models.heads import HF_HEAD, HeadShape, RewardModel, initial_head, is_head
from megalign.models.hf.conversion import Conversion
from megalign.models.hf.io import read_hf, write_hf
from megalign.models.hf.registry import family_of_model, hf_config_from_model
from megalign.models.hf.shards import Place
from megalign.models.hf.table import OUTPUT, ConversionError, Dimensions
from megalign.models.resolve import own_checkpoint
from megalign.models.weights import (
    full_shape,
    generator_of,
    initialise,
    load_full,
    named_parameters,
    stream_full,
)
from megalign.parallel import checkpoint
from megalign.parallel.grid import Grid
from megalign.parallel.lora import merge


def load_pretrained(chunks: Sequence[Any], model: ModelConfig, grid: Grid, vocab_size: int, seed: int = 0) -> None:
    """Fill the model with the weights of `model.init_from`: a Hugging Face folder, or a checkpoint of ours (collective): those
    that were evaluated, the averaged ones with train.eval_ema.

    Each rank reads only the files its part needs. A reward model takes its head from a folder with `score.weight`, if the
    shapes agree, or from a checkpoint with a head of the same name and shape; else it is drawn from `seed`.
    """
    speaks = not any(isinstance(chunk, RewardModel) for chunk in chunks)

    def draw(name: str, parameter: Tensor, place: Place) -> Tensor:
        return initial_head(name, full_shape(name, parameter.shape, place), generator_of(seed, name))

    own = own_checkpoint(Path(str(model.init_from)))
    if own is not None:
        for name, parameter, place in named_parameters(chunks, grid):
            if is_head(name):
                parameter.data.copy_(draw(name, parameter, place))
        _load_own(own, chunks, model, grid, vocab_size, seed)
        return
    weights = read_hf(str(model.init_from))
    dimensions = Dimensions.of(model, vocab_size, padded_vocab(vocab_size, grid.tensor.size))
    conversion = family_of_model(model).conversion(dimensions)
    if speaks:
        conversion.check(weights)
    else:
        output = conversion.entries.pop(OUTPUT, None)
        conversion.check(_Without(weights, {HF_HEAD, *(output[1] if output else ())}))

    def source(name: str, parameter: Tensor, place: Place) -> Tensor:
        if not is_head(name):
            return conversion.load(name, weights)
        if name.endswith(".weight") and HF_HEAD in weights and weights[HF_HEAD].shape == parameter.shape:
            return weights[HF_HEAD]
        return draw(name, parameter, place)

    load_full(chunks, grid, source)


def _head_last(conversion: Conversion, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The transformer's weights under Hugging Face's names, and the head after them."""
    heads: list[Tensor] = []

    def body() -> Iterator[tuple[str, Tensor]]:
        for name, full in stream:
            if is_head(name):
                heads.append(full.clone())
            else:
                yield name, full

    yield from conversion.to_hf(body())
    yield HF_HEAD, heads[0]


class _Without(Mapping[str, Tensor]):
    """Weights, some of them hidden."""

    def __init__(self, weights: Mapping[str, Tensor], hidden: set[str]):
        self._weights, self._names = weights, [name for name in weights if name not in hidden]

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _load_own(own: Path, chunks: Sequence[Any], model: ModelConfig, grid: Grid, vocab_size: int, seed: int) -> None:
    """A checkpoint of ours. Of adapters: its base, and they are merged into it."""
    there = Recipe(**checkpoint.read_meta(own)["recipe"])
    adapters, rates = there.lora.rank is not None, [chunk.config.moe_router_bias_update_rate for chunk in chunks]
    if adapters:
        there = with_base(own, there)
        base = model.model_copy(update={"init_from": there.model.init_from})
        if base.init_from is None:
            initialise(chunks, base, grid, there.train.seed)
        else:
            load_pretrained(chunks, base, grid, vocab_size, seed)
        add_adapters(chunks, base, there.lora, grid, there.train.seed)
    if any(isinstance(chunk, RewardModel) for chunk in chunks):  # which may have heads that the checkpoint lacks, and no output layer
        checkpoint.load_model(own, chunks, grid, may_lack=is_head, average=there.train.eval_ema)
    else:
        checkpoint.load(own, chunks, None, grid, average=there.train.eval_ema)
    if adapters:
        merge(chunks)
        for chunk, rate in zip(chunks, rates, strict=True):
            chunk.requires_grad_(True)
            chunk.config.moe_router_bias_update_rate = rate


def save_pretrained(
    folder: Path, chunks: Sequence[Any], model: ModelConfig, grid: Grid, vocab_size: int, tokenizer: Path | None, eos: int, dtype: torch.dtype, pad: int | None = None
) -> None:
    """Write the model as a Hugging Face folder (collective; rank 0 writes, one tensor in memory at a time).

    A reward model with one bradley_terry head becomes a ...ForSequenceClassification; pad: what it is padded with there, a token
    that ends no dialogue. Raises ConversionError for other heads, which transformers has no place for.
    """
    shapes = next((chunk.shapes for chunk in chunks if isinstance(chunk, RewardModel)), None)
    if shapes is not None and [*shapes.values()] != [HeadShape(1, bias=False)]:
        raise ConversionError(f"a Hugging Face folder holds one head without bias (bradley_terry), and this model has {', '.join(shapes)}; keep the checkpoint, or train that head alone")
    stream = stream_full(chunks, grid)
    failure: list[BaseException | None] = [None]
    if grid.rank == 0:
        try:
            dimensions = Dimensions.of(model, vocab_size, padded_vocab(vocab_size, grid.tensor.size))
            conversion = family_of_model(model).conversion(dimensions)
            config = hf_config_from_model(model, vocab_size, str(dtype).removeprefix("torch."), eos_token_id=eos)
            if shapes is None:
                named = conversion.to_hf(stream)
            else:
                conversion.entries.pop(OUTPUT, None)
                named = _head_last(conversion, stream)
                kind = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification").replace("LMHeadModel", "ForSequenceClassification")
                config |= {"architectures": [kind], "id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": pad}
            write_hf(folder, named, config, dtype=dtype, tokenizer=tokenizer)
        except Exception as error:
            failure = [error]
    for _ in stream:  # the other ranks' part; and on rank 0, after an error, what they still wait to send
        pass
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
