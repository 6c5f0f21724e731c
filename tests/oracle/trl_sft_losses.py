"""What TRL's SFTTrainer loses on given rows, step by step: the outside reference for our SFT trainer.

    python tests/oracle/trl_sft_losses.py job.json > losses.json

`job.json` holds the arguments of `trl_sft_losses`; a row is {"input_ids": [...], "labels": [...]}, its labels
not shifted, -100 where a token is not scored. Result: {"loss": [...], "grad_norm": [...], ...} by step.

Conventions of trl 1.16 with transformers 5.23, which a comparison has to share:

- Loss of a step = sum of -log p(token) over the scored tokens of all its microbatches / their number
  (`num_items_in_batch`): one mean over the step's tokens, not a mean of microbatch means. labels[0] of each
  row is never a target and is not counted. Log-probabilities are in fp32. It is taken before the update.
- Rows are padded on the right to the longest of the microbatch and masked; SDPA attention.
- `grad_norm` is the L2 norm over all parameters before clipping; gradients are scaled by
  min(1, clip_grad / (grad_norm + 1e-6)); clip_grad = 0 leaves them alone.
- torch's AdamW: decay first, w -= lr * weight_decay * w; then w -= lr * m_hat / (sqrt(v_hat) + eps), with bias
  correction, eps outside the root and not scaled.
- Decay applies to every parameter but those named bias, norm, layernorm, rmsnorm or *_norm: embeddings and the output
  layer decay too.
- Learning rate constant from the first step; no dropout, no gradient checkpointing, rows in the order given.
- Mixture of experts: the auxiliary loss is off (transformers takes it over all layers together, Megatron by
  layer), so compare with moe_aux_loss_coeff = 0.
"""

# pyright: reportMissingImports=false
# (datasets and trl are in the oracle extra)

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # local folders only; otherwise the model card asks the Hub


def trl_sft_losses(
    model: str | Path,
    rows: Sequence[dict[str, list[int]]],
    *,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
    steps: int = 8,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
    pad_id: int = 0,
) -> dict[str, Any]:
    """Train the Hugging Face folder `model` in fp32 on the CPU for `steps` steps; see the module docstring.

    A step takes the next batch_size * gradient_accumulation_steps rows, in the order given; `model`
    needs no tokenizer. Returns loss and grad_norm (nats and L2, a number a step), scored_tokens (a count a
    step), no_decay (parameter names). Raises ValueError if there are too few rows.
    """
    rows_per_step = batch_size * gradient_accumulation_steps
    if len(rows) < rows_per_step * steps:
        raise ValueError(
            f"{steps} steps of {batch_size} * {gradient_accumulation_steps} rows need {rows_per_step * steps}, "
            f"but there are {len(rows)}; repeat rows or lower steps"
        )
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

    rows = list(rows[: rows_per_step * steps])
    no_text = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))  # TRL wants one; the rows are ids
    policy = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_steps=steps,
            optim="adamw_torch",
            learning_rate=lr,
            lr_scheduler_type="constant",
            warmup_steps=0,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            adam_epsilon=eps,
            weight_decay=weight_decay,
            max_grad_norm=clip_grad,
            train_sampling_strategy="sequential",
            max_length=None,
            router_aux_loss_coef=0.0 if hasattr(policy.config, "router_aux_loss_coef") else None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = SFTTrainer(
            model=policy,
            args=config,
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=no_text, pad_token="<pad>", eos_token="<pad>"
            ),
            train_dataset=Dataset.from_list(
                [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
            ),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=pad_id),
        )
        trainer.remove_callback(PrinterCallback)  # it writes to stdout, where the result goes
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    decayed = set(trainer.get_decay_parameter_names(policy))
    scored = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    return {
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [entry["grad_norm"] for entry in logs],
        "scored_tokens": [sum(scored[step * rows_per_step :][:rows_per_step]) for step in range(steps)],
        "no_decay": [name for name, _ in policy.named_parameters() if name not in decayed],
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(trl_sft_losses(**job)))
