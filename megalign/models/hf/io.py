"""Hugging Face folders: read lazily, written as a stream.

Reading opens safetensors files and loads a tensor when it is asked for. Writing holds one shard in memory,
works in a temporary folder beside the target and renames it at the end: a folder with the final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalign.models.hf.fused import locate
from megalign.models.hf.registry import FAMILIES
from megalign.models.hf.table import ConversionError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class HFWeights(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read from disk when it is asked for; `config` is its config.json."""

    def __init__(self, folder: Path, config: dict[str, Any], file_of: Mapping[str, str]) -> None:
        self.folder, self.config = folder, config
        self._file_of = file_of
        self._files = {file: safe_open(folder / file, framework="pt") for file in sorted(set(file_of.values()))}
        shapes = {name: tuple(self._files[file].get_slice(name).get_shape()) for name, file in file_of.items()}
        family = FAMILIES.get(config.get("model_type", ""))
        self._locations = locate(shapes, family.fused if family else None)
        if family and not any(name.startswith(family.prefix) for name in shapes):
            self._locations = {family.prefix + name: location for name, location in self._locations.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored, index = self._locations[name]
        file = self._files[self._file_of[stored]]
        return file.get_tensor(stored) if index is None else file.get_slice(stored)[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)


def read_hf(folder: str | Path) -> HFWeights:
    """The weights of a Hugging Face folder, in one safetensors file or in several with an index.

    Raises ConversionError when config.json or the weights are missing, and when index and files disagree:
    a tensor that the index promises and no file has, one that only a file has, a shard outside the index.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    shards = {path.name for pattern in (SINGLE, "model-*-of-*.safetensors") for path in folder.glob(pattern)}
    if (folder / INDEX).exists():
        file_of: dict[str, str] = _read_json(folder / INDEX)["weight_map"]
        promised = set(file_of.values())
    elif (folder / SINGLE).exists():
        promised = {SINGLE}
        file_of = dict.fromkeys(_names_in(folder / SINGLE), SINGLE)
    else:
        others = sorted(path.name for path in folder.iterdir())
        raise ConversionError(f"{folder} has neither {SINGLE} nor {INDEX}, only {others}; save it with safetensors")
    if promised != shards:
        raise ConversionError(
            f"{folder}: missing files {sorted(promised - shards)}, files outside the index {sorted(shards - promised)}; "
            "copy the checkpoint again, whole"
        )
    held = {(name, file) for file in promised for name in _names_in(folder / file)}
    if problems := held ^ set(file_of.items()):
        absent = sorted(name for name, _ in set(file_of.items()) - held)
        unlisted = sorted(f"{name} in {file}" for name, file in held - set(file_of.items()))
        raise ConversionError(f"{folder}: {len(problems)} disagreements between {INDEX} and files: absent {absent}, not listed {unlisted}")
    return HFWeights(folder, config, file_of)


KEPT_IN_FP32 = ("e_score_correction_bias",)  # smaller steps than BF16 has; transformers keeps them too


def write_hf(
    folder: str | Path,
    named_tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    max_shard_bytes: int = 4 * 2**30,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a stream of Hugging Face weights, cast to `dtype`, with config.json and the tokenizer's files.

    generation_config.json gets config's eos and pad ids. Raises ConversionError when `folder` has content, when
    config.json would name another dtype, on a name that comes twice, and when `tokenizer` has no tokenizer.json
    or tokenizer.model; whatever the stream raises leaves nothing behind.
    """
    folder = Path(folder)
    named_dtype = str(dtype).removeprefix("torch.")
    if config.get("dtype") != named_dtype:
        raise ConversionError(f"config's dtype is {config.get('dtype')!r}, but the weights are written as {named_dtype!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} exists and is not an empty folder; choose another or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", config)
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
        _write_json(partial / "generation_config.json", tokens)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        _write_shards(partial, named_tensors, dtype, max_shard_bytes)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copy a tokenizer's files, and nothing else of its folder."""
    present = [name for name in TOKENIZER_FILES if (Path(source) / name).exists()]
    if not {"tokenizer.json", "tokenizer.model"} & set(present):
        raise ConversionError(f"{source} has neither tokenizer.json nor tokenizer.model; give a tokenizer's folder")
    for name in present:
        shutil.copyfile(Path(source) / name, target / name)


def _write_shards(folder: Path, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_bytes: int) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _fill_shards(named_tensors, dtype, max_bytes):
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _fill_shards(named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Shards of at most `max_bytes` (a larger tensor is a shard of its own), as copies: the source may be reused."""
    shard: dict[str, Tensor] = {}
    shard_bytes = 0
    seen: set[str] = set()
    for name, tensor in named_tensors:
        if name in seen:
            raise ConversionError(f"{name} came twice in the stream of weights")
        seen.add(name)
        kept = torch.float32 if name.endswith(KEPT_IN_FP32) else dtype
        written = tensor.detach().to("cpu", kept, copy=True).contiguous()
        if shard and shard_bytes + written.nbytes > max_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = written
        shard_bytes += written.nbytes
    if not shard:
        raise ConversionError("the stream of weights is empty")
    yield shard


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConversionError(f"{path} does not exist; give a Hugging Face folder")
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
