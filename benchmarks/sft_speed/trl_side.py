"""SFT speed of TRL on one CPU process: non-padding tokens a second and peak memory, as one line of JSON.

    python benchmarks/sft_speed/trl_side.py --data roleplay.json --mode padded --precision fp32

Model: Llama, 18.9M parameters (`MODEL`: hidden 384, 8 layers, 6 heads of 64, 2 key/value heads, SwiGLU 1024,
vocabulary 8192, embeddings not tied). Rows: those of --data that fit 256 tokens, tokenised and masked by
megalign's own data code, so that both sides train on the same tokens; ChatML, the assistant scored.

TRL 1.16 with transformers 5.23 as a user would set it for speed on this machine: SDPA attention, no gradient
checkpointing (TRL's default is on), fused AdamW (its default), no evaluation, saving or reporting, the data
loader in the process (a worker would take a core), logs only at the end. Its fused LM head, always on,
projects every position where there is no Triton. Precision bf16 is TRL's own: FP32 weights under autocast.

Modes, all of which run on a CPU and train on the same tokens without crossing rows:
- padded: TRL's default, 8 rows a step, padded to the longest of them.
- grouped: the same with rows of like length together (`train_sampling_strategy="group_by_length"`).
- padding_free: 8 rows joined to one; the help text asks for FlashAttention, but SDPA gets a block-diagonal
  mask from the position ids and the losses are those of `padded`. The mask is dense: attention is over all.
- packed: best-fit packs of up to 256 tokens, 8 a step, then joined to one as in padding_free.
--compile adds torch.compile with its default settings.

Compare with the fastest, which on the CPUs tried is `grouped` (compile gains nothing there), and with the
default. `cpu_seconds` far below threads * seconds means that other processes took the machine: measure again.
"""

# pyright: reportMissingImports=false
# (datasets and trl are in the oracle extra)

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.data.tokenizer import Tokenizer

LENGTH, ROWS, VOCABULARY = 256, 8, 8192
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
    "attn_implementation": "sdpa",
}
MODES: dict[str, dict[str, Any]] = {
    "padded": {"max_length": LENGTH},
    "grouped": {"max_length": LENGTH, "train_sampling_strategy": "group_by_length"},
    "padding_free": {"max_length": None, "padding_free": True},
    "packed": {"max_length": LENGTH, "packing": True},
}


def rows_of(path: str) -> tuple[Dataset, Tokenizer]:
    """Tokenised rows of at most LENGTH tokens; labels are -100 where nothing is scored."""
    data = {"train": path, "validation_rows": 0, "sequence_length": LENGTH, "packing": False}
    recipe = Recipe.model_validate({"data": {**data, "tokenizer": {"vocab_size": VOCABULARY}}})
    train, _ = build_datasets(recipe)
    examples = [example for pack in train.rows for example in pack]
    columns = {
        "input_ids": [example.input_ids.tolist() for example in examples],
        "labels": [[i if s else -100 for i, s in zip(e.input_ids.tolist(), e.loss_mask)] for e in examples],
    }
    return Dataset.from_dict(columns), train.tokenizer


class Stopwatch(TrainerCallback):
    """Wall time from the end of warm-up step `warmup` to the end of the last step, and the tokens in between."""

    def __init__(self, warmup: int):
        self.warmup, self.tokens, self.cells = warmup, 0, 0
        self.start = self.end = self.cpu_start = self.cpu_end = 0.0

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Tokens of one batch; `cells` counts padding too. A padding-free batch has neither mask nor padding."""
        self.cells += inputs["input_ids"].numel()
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def on_step_end(self, args, state, control, **kwargs):
        self.end, self.cpu_end = time.perf_counter(), time.process_time()
        if state.global_step == self.warmup:
            self.start, self.cpu_start, self.tokens, self.cells = self.end, self.cpu_end, 0, 0


class TimedTrainer(SFTTrainer):
    """SFTTrainer that shows each batch to the stopwatch."""

    stopwatch: Stopwatch

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stopwatch.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)


def measure(
    data: str, mode: str, precision: str, warmup: int, steps: int, threads: int, compile: bool
) -> dict:
    """Train `warmup` + `steps` steps, time the latter."""
    torch.set_num_threads(threads)
    rows, tokenizer = rows_of(data)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    stopwatch = Stopwatch(warmup)
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            per_device_train_batch_size=ROWS,
            max_steps=warmup + steps,
            learning_rate=3e-4,
            adam_beta2=0.95,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            torch_compile=compile,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            logging_steps=warmup + steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            **MODES[mode],
        )
        trainer = TimedTrainer(
            model=model, args=config, train_dataset=rows, processing_class=tokenizer.hf, callbacks=[stopwatch]
        )
        trainer.stopwatch = stopwatch
        trainer.remove_callback(PrinterCallback)  # it writes to stdout, where the result goes
        trainer.train()
    seconds = stopwatch.end - stopwatch.start
    return {
        "side": "trl",
        "mode": mode,
        "precision": precision,
        "compile": compile,
        "threads": threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": len(rows),
        "steps": steps,
        "tokens": stopwatch.tokens,
        "seconds": seconds,
        "cpu_seconds": stopwatch.cpu_end - stopwatch.cpu_start,
        "tokens_per_second": stopwatch.tokens / seconds,
        "step_seconds": seconds / steps,
        "padding_share": 1 - stopwatch.tokens / stopwatch.cells,
        "mean_loss": trainer.state.log_history[0]["loss"],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, help="roleplay.json, or any file of rows that megalign reads"
    )
    parser.add_argument("--mode", choices=MODES, default="padded")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=20, help="steps on the clock")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
