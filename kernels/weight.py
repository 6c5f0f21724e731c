"""The FP8 copy of a layer's weight: W and W^T in 128 x 128 blocks, quantised once for each value of the weight.

The parameter stays BF16 (or FP32): it is what checkpoints, data parallelism and other optimizers see. Its FP8 copy hangs on
it as `parameter.fp8_weight`. MixedPrecisionAdamW writes the copy in the pass that steps the parameter; anything else that
changes the parameter in place (a load, another optimizer) raises its version, and the next use quantises again. The bytes
are always those of quantise_blocks(parameter), so a reloaded parameter gives the bytes that training used (F13).

What no version counter sees: writes through `parameter.data`, megatron's among them. Call `weights_changed(model)` after those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalign.kernels.backends import quantise_blocks_both
from megalign.kernels.tiles import Fp8Tensor

Pair = tuple[Fp8Tensor, Fp8Tensor]


class Fp8Weight:
    """Holds (W, W^T) of one parameter and the version of the parameter that they were made from."""

    def __init__(self) -> None:
        self.pair: Pair | None = None
        self.made_from: tuple[int | None, int, torch.device] | None = None

    def __reduce__(self) -> tuple[type[Fp8Weight], tuple[()]]:
        return Fp8Weight, ()  # pickled and copied empty: the copy quantises the weight that it finds itself on

    @staticmethod
    def of(parameter: Tensor) -> Fp8Weight:
        """The copy that hangs on `parameter`, made if there is none: copies of modules and `Parameter(...)` lose it."""
        holder = getattr(parameter, "fp8_weight", None)
        if holder is None:
            holder = parameter.fp8_weight = Fp8Weight()  # pyright: ignore[reportAttributeAccessIssue]
        return holder

    def current(self, parameter: Tensor) -> Pair:
        """(W, W^T) of the parameter as it is now; quantises only if it has changed since (made in inference mode it counts no changes: always)."""
        if self.pair is None or parameter.is_inference() or self.made_from != _version(parameter):
            self.replace(parameter, quantise_blocks_both(parameter.detach()))
        assert self.pair is not None
        return self.pair

    def to_overwrite(self, parameter: Tensor) -> Pair:
        """Memory of the right shapes for a kernel that writes both; call `written` afterwards."""
        if self.pair is None or self.pair[0].shape != tuple(parameter.shape) or self.pair[0].device != parameter.device:
            *groups, rows, columns = parameter.shape
            count = groups[0] if groups else None
            self.pair = (
                Fp8Tensor.empty(rows, columns, "blocks", parameter.device, count),
                Fp8Tensor.empty(columns, rows, "blocks", parameter.device, count),
            )
        return self.pair

    def written(self, parameter: Tensor) -> None:
        self.made_from = _version(parameter)

    def replace(self, parameter: Tensor, pair: Pair) -> None:
        self.pair = pair
        self.written(parameter)

    def changed(self) -> None:
        """Forget the version: the next use quantises."""
        self.made_from = None


def weights_changed(model: torch.nn.Module) -> None:
    """The parameters of `model` were written behind torch's back (through .data): quantise them at the next use."""
    for parameter in model.parameters():
        if hasattr(parameter, "fp8_weight"):
            parameter.fp8_weight.changed()  # pyright: ignore[reportAttributeAccessIssue]


def _version(parameter: Tensor) -> tuple[int | None, int, torch.device]:
    return None if parameter.is_inference() else parameter._version, parameter.data_ptr(), parameter.device
