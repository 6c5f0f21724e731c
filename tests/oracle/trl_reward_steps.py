"""What TRL's RewardTrainer logs on given pairs, step by step: the outside reference for our reward models.

    python tests/oracle/trl_reward_steps.py job.json > steps.json

`job.json` holds the arguments of `trl_reward_steps`. Conventions of trl 1.16, beside those of trl_sft_losses.py:

- The loss is the mean over a step's pairs, one microbatch a step here; center_rewards_coefficient is our `centering`, a `margin`
  column our margin at coefficient 1.
- The reward is `score` (no bias) at the last token that is not the padding id; `mean_reward` is over all answers.
- Dropout is off. Pairs are token ids: TRL's own tokenisation is left out, so that both sides train on the same tokens.
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

NAMES = ("loss", "grad_norm", "accuracy", "margin", "mean_reward")


def trl_reward_steps(
    model: str,
    pairs: list[dict[str, Any]],
    *,
    batch_size: int,
    steps: int,
    centering: float | None = None,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
) -> dict[str, list[float]]:
    """Train the Hugging Face folder `model` on `pairs` ({"chosen_ids", "rejected_ids"}, perhaps "margin") in order; NAMES by step."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    class GivenTokens(RewardTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    if len(pairs) < batch_size * steps:
        raise ValueError(f"{steps} steps of {batch_size} pairs need {steps * batch_size}, but there are {len(pairs)}")
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True)
    no_text = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=batch_size, max_steps=steps,
            optim="adamw_torch", learning_rate=lr, lr_scheduler_type="constant", warmup_steps=0, adam_beta1=betas[0], adam_beta2=betas[1],
            adam_epsilon=eps, weight_decay=weight_decay, max_grad_norm=clip_grad, train_sampling_strategy="sequential", max_length=None,
            center_rewards_coefficient=centering, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = GivenTokens(
            model=loaded,
            args=config,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=no_text, pad_token="<pad>", eos_token="<pad>"),
            train_dataset=Dataset.from_list(pairs[: batch_size * steps]),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: [entry[name] for entry in logs] for name in NAMES}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([trl_reward_steps(**job) for job in jobs]))
