"""Which files hold data, told by names alone: kinds of file, and the files of a data set's folder.

A folder is one that `datasets` saved (`save_to_disk`), or a data set as the Hugging Face hub stores it: files that
name their split, as in data/train-00000-of-00002.parquet. Of several splits `train` is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from megalign.data.rows import DataError

KINDS = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".arrow")
FOLDER = "folder"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # the words by which the hub knows a split (huggingface.co/docs/hub/datasets-file-names-and-splits)
_FACTS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "license.txt", "licence.txt"}


def kind(path: Path) -> str:
    """One of KINDS, whether or not .gz follows, or FOLDER; DataError for another."""
    if path.is_dir():
        return FOLDER
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if inner.suffix.lower() not in KINDS or (inner != path and inner.suffix.lower() in (".parquet", ".arrow")):
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(KINDS)}, the first four also with .gz, and a folder of a data set")
    return inner.suffix.lower()


def is_data(path: Path) -> bool:
    """Whether there is a file or a folder of a data set that `files.values` reads, by its name alone."""
    if path.is_dir():
        return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() or bool(_files_below(path))
    return is_data_name(path) and path.is_file()


def data_files(path: Path) -> list[Path]:
    """The files of a data set's folder in the order of its rows. DataError where it has none, or more than one answer."""
    splits, state = path / "dataset_dict.json", path / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
            return data_files(path / _chosen(path, names))
        if state.is_file():
            return [path / part["filename"] for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: the folder's JSON is broken ({error!r})") from error
    return _hub_files(path)


def _chosen(path: Path, names: list[str]) -> str:
    if "train" not in names and len(names) != 1:
        raise DataError(f"{path}: holds the splits {', '.join(names)}; name one, e.g. {path / names[0]}")
    return "train" if "train" in names else names[0]


def _hub_files(path: Path) -> list[Path]:
    by_split: dict[str, list[Path]] = {}
    for file in _files_below(path):
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not by_split:
        raise DataError(f"{path}: no file, and no folder of a data set (it has no state.json or dataset_dict.json, and no {', '.join(KINDS)} in it)")
    if "train" not in by_split and len(by_split) > 1:
        raise DataError(f"{path}: holds the splits {', '.join(by_split)}; name the files of one, e.g. {next(iter(by_split.values()))[0]}")
    files = by_split.get("train") or next(iter(by_split.values()))
    folders, kinds = sorted({file.parent for file in files}), sorted({kind(file) for file in files})
    if len(folders) > 1:
        raise DataError(f"{path}: holds several data sets, in {', '.join(str(folder.relative_to(path)) for folder in folders)}; name one, e.g. {folders[0]}")
    if len(kinds) > 1:
        raise DataError(f"{path}: holds files of several kinds ({', '.join(kinds)}); name those that you mean")
    return files


def _files_below(path: Path) -> list[Path]:
    """Data files in the folder and two levels below it, but for hidden ones and those that tell about the data."""
    found = (file for pattern in ("*", "*/*", "*/*/*") for file in path.glob(pattern) if file.is_file() and is_data_name(file))
    return sorted(file for file in found if file.name.lower() not in _FACTS and not any(part.startswith(".") for part in file.relative_to(path).parts))


def _split_of(file: Path) -> str:
    """The split that a file's name, or else the folder it is in, speaks of; train where neither does."""
    for part in reversed(file.parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(name in words for name in names):
                return split
    return "train"


def is_data_name(path: Path) -> bool:
    """Whether a file of this name would be data, be there one or not."""
    try:
        return kind(path) in KINDS
    except DataError:
        return False
