"""DPO speed of TRL on one CPU process, as one line of JSON; started by run.py.

    python benchmarks/dpo_speed/trl_side.py --folder FOLDER --mode precomputed

TRL 1.16 with transformers 5.23 as a user would set it for speed on this machine: SDPA attention, no gradient checkpointing
(TRL's default is on), its default fused AdamW, no evaluation, saving or reporting, the data loader in the process. Its fused
LM head, always on, projects every position where there is no Triton. The pairs are given as token ids.

- model: TRL's default; a second model scores every step.
- precomputed: precompute_ref_log_probs=True; a pass before the clock starts.
- grouped: the same, with pairs of like length together, which saves padding.
`padding_free` is switched off in TRL 1.16's DPOTrainer.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# (datasets and trl are in the oracle extra)

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from datasets import Dataset
from setting import PAIRS, pairs_of, peak_mib
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

MODES: dict[str, dict[str, Any]] = {
    "model": {"train_sampling_strategy": "sequential"},
    "precomputed": {"train_sampling_strategy": "sequential", "precompute_ref_log_probs": True},
    "grouped": {"train_sampling_strategy": "group_by_length", "precompute_ref_log_probs": True},
}


class Stopwatch(TrainerCallback):
    """Wall time from the end of warm-up step `warmup` to the end of the last step, and the tokens in between."""

    def __init__(self, warmup: int):
        self.warmup, self.tokens, self.cells = warmup, 0, 0
        self.start = self.end = self.cpu_start = self.cpu_end = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.end, self.cpu_end = time.perf_counter(), time.process_time()
        if state.global_step == self.warmup:
            self.start, self.cpu_start, self.tokens, self.cells = self.end, self.cpu_end, 0, 0


class TimedTrainer(DPOTrainer):
    """DPOTrainer on given tokens that shows each batch to the stopwatch."""

    stopwatch: Stopwatch

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stopwatch.tokens += int(inputs["attention_mask"].sum())
        self.stopwatch.cells += inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)


def rows_of(folder: Path, count: int) -> tuple[Dataset, Any]:
    """Pairs as TRL has them after tokenisation, and the tokenizer."""
    rows, pairs = [], pairs_of(folder)
    for chosen, rejected in pairs.rows[:count]:
        starts = [int(np.flatnonzero(side.loss_mask)[0]) for side in (chosen, rejected)]
        ends = [int(np.flatnonzero(side.loss_mask)[-1]) + 1 for side in (chosen, rejected)]
        rows.append(
            {
                "prompt_ids": chosen.input_ids[: starts[0]].tolist(),
                "chosen_ids": chosen.input_ids[starts[0] : ends[0]].tolist(),
                "rejected_ids": rejected.input_ids[starts[1] : ends[1]].tolist(),
                "length": max(ends),
            }
        )
    return Dataset.from_list(rows), pairs.tokenizer.hf


def measure(folder: Path, mode: str, warmup: int, steps: int, threads: int) -> dict:
    """Train `warmup` + `steps` steps, time the latter."""
    torch.set_num_threads(threads)
    rows, tokenizer = rows_of(folder, (warmup + steps) * PAIRS)  # a pass over rows that no step sees would only take time
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa") for _ in range(2))
    stopwatch = Stopwatch(warmup)
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=PAIRS, max_steps=warmup + steps,
            learning_rate=1e-5, adam_beta2=0.95, weight_decay=0.01, lr_scheduler_type="constant", max_length=None, beta=0.1,
            dataloader_num_workers=0, dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            remove_unused_columns=False,
            **MODES[mode],
        )  # fmt: skip
        before = time.perf_counter()
        precompute = "precompute_ref_log_probs" in MODES[mode]
        if precompute:
            del reference
        trainer = TimedTrainer(
            model=policy,
            ref_model=None if precompute else reference,  # pyright: ignore[reportPossiblyUnboundVariable]
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        reference_seconds = time.perf_counter() - before
        trainer.stopwatch = stopwatch
        trainer.remove_callback(PrinterCallback)  # it writes to stdout, where the result goes
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = stopwatch.end - stopwatch.start
    return {
        "parameters": sum(p.numel() for p in policy.parameters()), "pairs": len(rows), "steps": steps, "tokens": stopwatch.tokens,
        "positions": stopwatch.cells, "seconds": seconds, "cpu_seconds": stopwatch.cpu_end - stopwatch.cpu_start,
        "tokens_per_second": stopwatch.tokens / seconds, "losses": [losses[0], losses[-1]], "peak_mib": peak_mib(),
        "reference_pairs_per_second": len(rows) / reference_seconds if precompute else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mode", choices=MODES, default="model")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
