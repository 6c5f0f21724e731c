"""Experts stored as one stacked tensor, shown under the names of single experts.

transformers 5 keeps a layer's experts as `gate_up_proj` [E, 2I, D] (all gate rows, then all up rows) and
`down_proj` [E, D, I]. `save_pretrained` splits them into the names that 4.57 knew, unless it is told
`save_original_format=False`. A family's `fused` says, for each single name, where it lies in that layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Where a single expert's weight lies: name of the stored tensor, and index into it (None: all of it).
Location = tuple[str, tuple[int | slice, ...] | None]


def locate(stored: Mapping[str, tuple[int, ...]], fused: Mapping[str, tuple[str, str]] | None) -> dict[str, Location]:
    """Where each weight lies, by the names of the unstacked layout. `stored`: shape of each tensor on disk."""
    found: dict[str, Location] = {}
    unstacked = fused if fused is not None and any(name.endswith(".experts.gate_up_proj") for name in stored) else {}
    for name, shape in stored.items():
        locations = {
            single: location
            for template, (stacked, part) in unstacked.items()
            for single, location in _singles(name, shape, template, stacked, part)
        }
        found |= locations or {name: (name, None)}
    return found


def _singles(name: str, shape: tuple[int, ...], template: str, stacked: str, part: str) -> list[tuple[str, Location]]:
    match = re.fullmatch(re.escape(stacked).replace(r"\{layer\}", r"(?P<layer>\d+)"), name)
    if match is None:
        return []
    layer = match["layer"]
    if part == "whole":
        return [(template.format(layer=layer), (name, None))]
    rows = {"gate": slice(0, shape[1] // 2), "up": slice(shape[1] // 2, shape[1]), "expert": slice(None)}[part]
    return [(template.format(layer=layer, expert=expert), (name, (expert, rows))) for expert in range(shape[0])]
