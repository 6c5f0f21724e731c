"""What both sides of the DPO speed benchmark share: model, tokenizer and pairs, made once in a folder.

Model: the 18.9M Llama of ../sft_speed (hidden 384, 8 layers, 6 heads of 64, 2 key/value heads, SwiGLU 1024, vocabulary 8192,
embeddings not tied), random, as a Hugging Face folder that both load. Pairs: those of hh_harmless whose sides, prompt
included, have at most LENGTH tokens each; both sides see the same token ids in the same order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalign.config.schema import Recipe
from megalign.data.dataset import Dataset
from megalign.data.pairs import KeptPairs, build_pairs

LENGTH, PAIRS, VOCABULARY = 256, 8, 8192
MODEL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, intermediate_size=1024,
    tie_word_embeddings=False, max_position_embeddings=1024,
)  # fmt: skip
DATA: dict[str, Any] = dict(validation_rows=0, sequence_length=2 * LENGTH, shuffle=False, max_bad_share=1.0)


def prepare(source: str, folder: Path, rows: int) -> None:
    """Write model, tokenizer and pairs into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = folder / "model"
    data = {**DATA, "train": source, "max_rows": rows, "tokenizer": {"vocab_size": VOCABULARY}}
    train, _ = build_pairs(Recipe.model_validate({"output": str(folder / "run"), "data": data}))
    train.tokenizer.save(model)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**MODEL, "vocab_size": train.tokenizer.vocab_size})).save_pretrained(model)
    assert isinstance(train.kept, KeptPairs)
    with (folder / "pairs.jsonl").open("w") as file:
        for pair, (chosen, rejected) in zip(train.kept.pairs(), train.rows, strict=True):
            if max(len(chosen), len(rejected)) <= LENGTH and len(pair.chosen.messages) == len(pair.rejected.messages) == 1:
                prompt = [{"role": message.role, "content": message.content} for message in pair.prompt]
                file.write(json.dumps({"prompt": prompt, "chosen": pair.chosen.text, "rejected": pair.rejected.text}) + "\n")


def recipe(folder: Path, **sections: Any) -> Recipe:
    """Our side's recipe: DPO at its defaults, 8 pairs a step."""
    base: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"init_from": str(folder / "model")},
        "data": {**DATA, "train": str(folder / "pairs.jsonl")},
        "optimizer": dict(lr=1e-5, adam_beta2=0.95, weight_decay=0.01, lr_decay_style="constant"),
        "train": dict(micro_batch_size=PAIRS, global_batch_size=PAIRS, seed=0),
    }
    return Recipe.model_validate({**base, **sections})


def pairs_of(folder: Path) -> Dataset:
    """The pairs, tokenised."""
    return build_pairs(recipe(folder))[0]


def peak_mib() -> float:
    """Most memory that this process has had (VmHWM; ru_maxrss would begin with that of the process that started it)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
