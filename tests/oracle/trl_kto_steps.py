"""What TRL's KTOTrainer logs on given labelled answers, step by step: the outside reference for our KTO.

    python tests/oracle/trl_kto_steps.py job.json > steps.json

`job.json` holds a list of arguments of `trl_kto_steps`. Conventions of trl 1.16, beside those of trl_dpo_steps.py:

- One microbatch a step, so that TRL's batch of one device is the global batch.
- Rows are token ids with the mismatched completion of TRL's own rule (kto_trainer.py:1150: rotated by one in each batch).
- A step's loss is the mean over its answers, of both kinds together; `kl` is z.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

NAMES = ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def trl_kto_steps(
    model: str,
    rows: list[dict[str, Any]],
    *,
    batch_size: int,
    steps: int,
    loss: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    lr: float = 3e-4,
) -> list[dict[str, float]]:
    """Train the Hugging Face folder `model` on `rows` ({"prompt_ids", "completion_ids", "label"}) in order; NAMES of each step."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    class GivenTokens(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            def rotate(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
                return {**batch, "KL_completion_ids": [batch["completion_ids"][-1]] + batch["completion_ids"][:-1]}

            return dataset.map(rotate, batched=True, batch_size=batch_size) if loss == "kto" else dataset

    if len(rows) < batch_size * steps:
        raise ValueError(f"{steps} steps of {batch_size} rows need {steps * batch_size}, but there are {len(rows)}")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True) for _ in range(2)
    )
    no_text = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as scratch:
        config = KTOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=batch_size, max_steps=steps,
            optim="adamw_torch", learning_rate=lr, lr_scheduler_type="constant", warmup_steps=0, adam_beta1=0.9, adam_beta2=0.95,
            adam_epsilon=1e-8, weight_decay=0.01, max_grad_norm=1.0, train_sampling_strategy="sequential", max_length=None, loss_type=loss,
            beta=0.1, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = GivenTokens(
            model=policy,
            ref_model=reference,
            args=config,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=no_text, pad_token="<pad>", eos_token="<pad>"),
            train_dataset=Dataset.from_list(rows[: batch_size * steps]),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [{name: entry[name] for name in NAMES if name in entry} for entry in logs]


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([trl_kto_steps(**job) for job in jobs]))
