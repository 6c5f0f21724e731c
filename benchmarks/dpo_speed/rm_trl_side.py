"""Reward-model training of TRL, and scoring with transformers, on one CPU process, as one line of JSON; started by run_rm.py.

    python benchmarks/dpo_speed/rm_trl_side.py --folder FOLDER --what train|score [--grouped]

TRL 1.16 with transformers 5.23 as a user would set it for speed on this machine: SDPA attention, no gradient checkpointing (TRL's default
is on), no evaluation, saving or reporting. TRL has no scoring of its own: `score` is the model's forward pass on padded batches of
16 answers without gradient. --grouped: pairs, or answers, of like length share a batch, which saves padding.
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
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer


class Stopwatch(TrainerCallback):
    """Wall time from the end of warm-up step `warmup` to the end of the last step, and the tokens in between."""

    def __init__(self, warmup: int):
        self.warmup, self.tokens, self.cells = warmup, 0, 0
        self.start = self.end = self.cpu_start = self.cpu_end = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.end, self.cpu_end = time.perf_counter(), time.process_time()
        if state.global_step == self.warmup:
            self.start, self.cpu_start, self.tokens, self.cells = self.end, self.cpu_end, 0, 0


class TimedTrainer(RewardTrainer):
    """RewardTrainer on given tokens that shows each batch to the stopwatch."""

    stopwatch: Stopwatch

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stopwatch.tokens += int(inputs["attention_mask"].sum())
        self.stopwatch.cells += inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)


def train(model: Any, rows: list[list[list[int]]], tokenizer: Any, grouped: bool, warmup: int, steps: int) -> dict[str, Any]:
    """Steps of RewardTrainer on pairs of token ids."""
    stopwatch = Stopwatch(warmup)
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=PAIRS, max_steps=warmup + steps,
            learning_rate=1e-5, adam_beta2=0.95, weight_decay=0.01, lr_scheduler_type="constant", max_length=None, dataloader_num_workers=0,
            dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0, remove_unused_columns=False,
            train_sampling_strategy="group_by_length" if grouped else "sequential",
        )  # fmt: skip
        columns = [{"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))} for chosen, rejected in rows]
        trainer = TimedTrainer(model=model, args=config, train_dataset=Dataset.from_list(columns), processing_class=tokenizer, callbacks=[stopwatch])
        trainer.stopwatch = stopwatch
        trainer.remove_callback(PrinterCallback)  # it writes to stdout, where the result goes
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [losses[0], losses[-1]], "tokens": stopwatch.tokens, "positions": stopwatch.cells, "scores": [],
        "seconds": stopwatch.end - stopwatch.start, "cpu_seconds": stopwatch.cpu_end - stopwatch.cpu_start,
    }  # fmt: skip


@torch.no_grad()
def score(model: Any, rows: list[list[list[int]]], pad: int, grouped: bool, warmup: int) -> dict[str, Any]:
    """Rewards of all sides in order, 16 at a time; the sides of the first `warmup` batches are not timed."""
    model.eval()

    def rewards(sides: list[list[int]]) -> tuple[np.ndarray, int]:
        order = sorted(range(len(sides)), key=lambda i: len(sides[i])) if grouped else list(range(len(sides)))
        found, cells = np.zeros(len(sides)), 0
        for start in range(0, len(order), 2 * PAIRS):
            some = order[start : start + 2 * PAIRS]
            width = max(len(sides[i]) for i in some)
            ids = torch.tensor([sides[i] + [pad] * (width - len(sides[i])) for i in some])
            mask = torch.tensor([[1] * len(sides[i]) + [0] * (width - len(sides[i])) for i in some])
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            last = torch.tensor([len(sides[i]) - 1 for i in some])
            found[some] = model.score(hidden[torch.arange(len(some)), last])[:, 0].double().numpy()
            cells += ids.numel()
        return found, cells

    sides = [side for pair in rows for side in pair]
    first = 2 * PAIRS * warmup
    rewards(sides[:first])
    start, cpu_start = time.perf_counter(), time.process_time()
    found, cells = rewards(sides[first:])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"losses": [], "tokens": sum(map(len, sides[first:])), "positions": cells, "scores": found.tolist(), "seconds": seconds, "cpu_seconds": cpu_seconds}


def measure(folder: Path, what: str, grouped: bool, warmup: int, steps: int, threads: int) -> dict:
    """Train `warmup` + `steps` steps of 8 pairs, or score as many; the latter are timed."""
    torch.set_num_threads(threads)
    pairs = pairs_of(folder)
    rows = [[side.input_ids.tolist() for side in pairs.rows[i]] for i in range((warmup + steps) * PAIRS)]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32, attn_implementation="sdpa", local_files_only=True)
    tokenizer = pairs.tokenizer.hf
    found = train(model, rows, tokenizer, grouped, warmup, steps) if what == "train" else score(model, rows, int(model.config.pad_token_id), grouped, warmup)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "pairs": len(rows), "steps": steps, **found, "tokens_per_second": found["tokens"] / found["seconds"], "peak_mib": peak_mib(), "reference_pairs_per_second": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--what", choices=("train", "score"), required=True)
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
