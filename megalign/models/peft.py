"""Adapters as a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

PEFT names an adapter by the path of its linear layer in the Hugging Face model: base_model.model.PATH.lora_A.weight [r, in] and
lora_B.weight [out, r]. The paths come from the family's table of weights; ours are per linear layer already.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megalign.config.adapters import alpha
from megalign.config.layout import padded_vocab
from megalign.config.schema import LoraConfig, ModelConfig
from megalign.models.hf.registry import family_of_model
from megalign.models.hf.table import ConversionError, Copy, Dimensions, MergeGateUp, MergeQKV, Row
from megalign.models.weights import stream_full
from megalign.parallel.grid import Grid
from megalign.parallel.lora import is_adapter

SAFETENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(folder: Path, chunks: Sequence[Any], model: ModelConfig, lora: LoraConfig, grid: Grid, vocab_size: int, dtype: torch.dtype) -> None:
    """Write the adapters of a model as a PEFT folder (collective; rank 0 writes).

    Raises ConversionError for a folder with content, for a family whose linear layers are not PEFT's (GPT-2), and where whole
    weights are trained beside the adapters.
    """
    stream = stream_full(chunks, grid, only=is_adapter)
    failure: list[BaseException | None] = [None]
    if grid.rank == 0:
        try:
            if lora.modules_to_save:
                raise ConversionError(f"lora.modules_to_save={lora.modules_to_save}: these weights are no adapters; convert without --adapter, which merges all")
            entries = family_of_model(model).conversion(Dimensions.of(model, vocab_size, padded_vocab(vocab_size, grid.tensor.size))).entries
            tensors = dict(_renamed(stream, entries, dtype))
            _write(folder, tensors, _config(model, lora, sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})))
        except Exception as error:
            failure = [error]
    for _ in stream:
        pass
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _renamed(stream: Iterator[tuple[str, Tensor]], entries: Mapping[str, tuple[Row, list[str]]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, full in stream:
        layer, _, own = name.rpartition(".")
        _, factor, part = own.split("_", 2)
        row, paths = entries[f"{layer}.weight"]
        if not isinstance(row, (Copy, MergeQKV, MergeGateUp)):
            raise ConversionError(f"{paths[0]} holds several linear layers in one, transposed, and PEFT one adapter for it; convert without --adapter, which merges")
        path = (paths[0] if len(paths) == 1 else paths[_ORDER[len(paths)].index(part)]).removesuffix(".weight")
        yield f"base_model.model.{path}.lora_{factor}.weight", full.detach().to("cpu", dtype, copy=True).contiguous()


_ORDER = {2: ["gate_proj", "up_proj"], 3: ["q_proj", "k_proj", "v_proj"]}  # of the parts of a table's row


def _config(model: ModelConfig, lora: LoraConfig, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.init_from,
        "r": lora.rank,
        "lora_alpha": alpha(lora),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} exists and is not an empty folder; choose another or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / SAFETENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
