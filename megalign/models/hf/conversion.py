"""A family's table written out for one model: full weights from one side's names to the other's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from megalign.models.hf.table import EMBEDDING, OUTPUT, ConversionError, Dimensions, Row


class Conversion:
    """Every Megatron name of a model with the row it came from and its Hugging Face names."""

    def __init__(self, rows: Iterable[Row], dims: Dimensions, mtp_copies: Mapping[str, str] | None = None) -> None:
        """mtp_copies: names under `model.layers.{layer}.` of a prediction module's own copy of a shared weight, and the
        Megatron weight. A family that has them keeps its modules behind the last layer; those that the model does not
        have are left out when it is loaded (as transformers does)."""
        self.dims, self.has_mtp = dims, mtp_copies is not None
        self.entries: dict[str, tuple[Row, list[str]]] = {}
        for row in rows:
            if dims.tied and row.megatron == OUTPUT or any(0 in shape for shape in row.part_shapes(dims)):
                continue
            for layer in dims.layers(row.layers) if "{layer}" in row.megatron or row.layers == "mtp" else (0,):
                for expert in range(dims.num_experts if "{expert}" in row.megatron else 1):
                    numbers = {"layer": layer, "expert": expert, "depth": layer - dims.num_layers}
                    names = [name.format(**numbers) for name in row.hf]
                    self.entries[row.megatron.format(**numbers)] = (row, names)
        self.copies: dict[str, str] = {}  # Hugging Face names: a second copy of a weight, and the weight
        for name, shared in (mtp_copies or {}).items():
            source = self.entries[EMBEDDING if dims.tied else shared][1][0]
            self.copies |= {name.format(layer=layer): source for layer in dims.layers("mtp")}

    @property
    def megatron_names(self) -> list[str]:
        return list(self.entries)

    @property
    def hf_names(self) -> list[str]:
        return [name for _, names in self.entries.values() for name in names]

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raises ConversionError when `weights` lacks a name of the family or has one it does not know."""
        missing = set(self.hf_names) - set(weights)
        extra = {name for name in set(weights) - set(self.hf_names) if not self._is_derived(name, weights)}
        if missing or extra:
            raise ConversionError(
                "the checkpoint's weights are not those that its config.json describes: "
                f"{_count(missing, 'missing')}, {_count(extra, 'unknown')}; the config or the files are of another model"
            )

    def _is_derived(self, name: str, weights: Mapping[str, Tensor]) -> bool:
        """Rotary frequencies and causal masks that old files hold, unused prediction modules, a shared weight saved again."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if self.has_mtp and layer and int(layer[1]) >= self.dims.num_layers + self.dims.mtp_layers:
            return True
        if name in self.copies:
            source = self.copies[name]
            if source in weights and not torch.equal(weights[name], weights[source]):
                raise ConversionError(
                    f"{name} differs from {source}, which the prediction module shares here: "
                    "leave model.mtp_num_layers out to load the model without it"
                )
            return True
        if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            return True
        if name != "lm_head.weight" or not self.dims.tied:
            return False
        embedding = self.entries[EMBEDDING][1][0]
        if embedding in weights and not torch.equal(weights[name], weights[embedding]):
            raise ConversionError(
                f"config.json has tie_word_embeddings true, yet {name} differs from {embedding}: "
                "set tie_word_embeddings to false if the model was trained untied"
            )
        return True

    def load(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The full Megatron weight `name`, from just the Hugging Face weights it is made of.

        For a tied model the last pipeline stage's `output_layer.weight` is the embedding. Raises
        ConversionError for a name outside the table and for a tensor of another shape than the config's.
        """
        row, names = self._entry(EMBEDDING if self.dims.tied and name == OUTPUT else name)
        parts = [weights[part] for part in names]
        for part_name, part, shape in zip(names, parts, row.part_shapes(self.dims)):
            _check_shape(part_name, part, shape)
        return row.merge(parts, self.dims)

    def from_hf(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every Megatron weight in turn, after `check`."""
        self.check(weights)
        for name in self.entries:
            yield name, self.load(name, weights)

    def to_hf(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face weights of a stream of full Megatron weights, one tensor in memory at a time.

        Raises ConversionError for an unknown or repeated name, a wrong shape and, at the end, whatever the
        stream did not hold: a partial model is never passed on as a whole one. (A tied model's
        `output_layer.weight` is the embedding again and is left out.)
        """
        seen = set()
        for name, whole in named:
            if self.dims.tied and name == OUTPUT:
                continue
            row, names = self._entry(name)
            if name in seen:
                raise ConversionError(f"{name} came twice; gather each weight from one rank only")
            seen.add(name)
            _check_shape(name, whole, row.whole_shape(self.dims))
            for part_name, part in zip(names, row.split(whole, self.dims)):
                yield part_name, part
                for copy in (copy for copy, source in self.copies.items() if source == part_name):
                    yield copy, part
        if missing := set(self.entries) - seen:
            raise ConversionError(f"the model is incomplete: {_count(missing, 'missing')}; stream the weights of every rank")

    def _entry(self, name: str) -> tuple[Row, list[str]]:
        if name not in self.entries:
            raise ConversionError(f"the family's table has no row for {name!r}; add one to its file in megalign/models/hf")
        return self.entries[name]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConversionError(f"{name} has shape {tuple(tensor.shape)}, but the model's configuration says {shape}")


def _count(names: Iterable[str], what: str, show: int = 6) -> str:
    names = sorted(names)
    listed = ", ".join(names[:show]) + (", ..." if len(names) > show else "")
    return f"{len(names)} {what}" + (f" ({listed})" if names else "")
