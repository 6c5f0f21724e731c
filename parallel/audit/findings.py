"""What the auditor says: one finding a parameter, with its cause and the line that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the copies of a parameter, or with how it is counted.

    cause: one of CAUSES. ranks: those that are off (of two equal camps: the one without the lowest rank). follows: the
    difference may be the consequence of another finding.
    """

    parameter: str
    cause: str
    fix: str
    group: str = ""
    ranks: tuple[int, ...] = ()
    first_step: int = 0
    difference: float = float("nan")
    detail: str = ""
    follows: bool = False

    def text(self) -> str:
        """For people, two lines."""
        where = f" over {self.group}" if self.group else ""
        ranks = f", rank{'s' * (len(self.ranks) != 1)} {_short(self.ranks)}" if self.ranks else ""
        size = f", largest difference {self.difference:.3g}" if self.difference == self.difference else ""
        more = f" ({self.detail})" if self.detail else ""
        follows = " [may follow from the above]" if self.follows else ""
        return f"{self.parameter}{where}{ranks}: {self.cause} since step {self.first_step}{size}{more}{follows}\n    fix: {self.fix}"


INITIALISATION = "divergent initialisation: an init broadcast is missing"
MISSING_SUM = "its gradient differs between copies: a sum is missing"
MISSING_MEAN = "its gradient differs between copies: a mean is missing"
NOT_EQUAL = "its gradient differs between copies although each should be the whole"
MOMENTS = "optimizer moments diverged"
MASTERS = "FP32 master weights diverged"
CHANGED = "weights differ although gradients and moments agree: changed outside the optimizer"
BUFFER = "buffer differs between copies: its update is not reduced"
FROZEN = "frozen on some ranks only"
LATE = "added after DDP and the optimizer were made: never reduced, never updated"
UNLIKE = "copies have different sizes or dtypes"
ABSENT = "missing on some of the ranks that should hold a copy"
LOW_PRECISION = "expert bias is not FP32: a step's change is less than its precision"
COUNTED_TWICE = "counted more than once in the global gradient norm"
NOT_COUNTED = "left out of the global gradient norm"
NORM = "the global gradient norm is not that of the gradients"
TOO_LARGE = "its gradient is too large: a sum where a mean belongs, or reduced twice"
TOO_SMALL = "its gradient is too small: a mean where a sum belongs, or a lost factor"
WRONG = "its gradient lacks parts: reduced over the wrong group, or not at all"
# Differences between values, which a broadcast of the first rank's ends.
REPAIRABLE = {INITIALISATION, MISSING_SUM, MISSING_MEAN, NOT_EQUAL, MOMENTS, MASTERS, CHANGED, BUFFER}


def _short(ranks: Sequence[int]) -> str:
    """0-3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
