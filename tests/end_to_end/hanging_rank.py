"""The command line of a rank; rank 1 falls asleep for ever in the forward of its third step."""

from __future__ import annotations

import os
import time
from typing import Any

from megalign import sft
from megalign.cli import main

calls = 0
loss = sft.token_loss


def token_loss(output: Any, batch: Any) -> Any:
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3 * 4:
        time.sleep(3600)
    return loss(output, batch)


if __name__ == "__main__":
    sft.token_loss = token_loss
    main()
