"""What PEFT makes of an adapter folder that we wrote: logits, and AdamW steps on given rows, loss and gradient norm of each.

    python tests/oracle/peft_steps.py job.json > steps.json

Conventions: peft 0.21 with transformers 5.23, FP32, dropout 0; a step's loss is the mean over its scored tokens; the norm is
that of all gradients before clipping at 1; torch's AdamW with the job's settings.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def peft_steps(base: str, adapter: str, rows: list[list[list[int]]], batch_size: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    """rows: (token ids, 1 where scored). Returns the steps, the names trained, how many elements, and the largest change of a B."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adam = torch.optim.AdamW(
        trained.values(), lr=optimizer["lr"], betas=(optimizer["adam_beta1"], optimizer["adam_beta2"]), eps=optimizer["adam_eps"], weight_decay=optimizer["weight_decay"]
    )
    steps = []
    for first in range(0, len(rows), batch_size):
        total, count = torch.zeros(()), 0
        for ids, mask in rows[first : first + batch_size]:
            tokens, scored = torch.tensor(ids)[None], torch.tensor(mask[1:], dtype=torch.bool)
            logits = model(tokens).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits[scored], tokens[0, 1:][scored], reduction="sum")
            count += int(scored.sum())
        adam.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adam.step()
        steps.append((float(total / count), float(norm)))
    return {
        "steps": steps,
        "names": sorted(name.replace(".default", "") for name in trained),
        "elements": sum(parameter.numel() for parameter in trained.values()),
        "trained": {name.replace(".default", "").removeprefix("base_model.model."): parameter.tolist() for name, parameter in trained.items()},
    }


if __name__ == "__main__":
    print(json.dumps([peft_steps(**job) for job in json.load(open(sys.argv[1]))]))
