"""Heads: where they read, how they begin, and what transformers makes of the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import heads_checks
import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from megalign.batch import Batch, collate
from megalign.data.rows import Example
from megalign.models.heads import Head, HeadShape, initial_head


def example(ids: list[int]) -> Example:
    return Example(np.array(ids, np.int32), np.ones(len(ids), bool), values={"row": 0.0})


def test_the_last_real_token_of_each_document():
    """Whatever padding stands behind a document, between two, or before all."""
    batch = collate([[example([5, 6, 7]), example([8, 9])], [example([1])]], sequence_length=12, pad_id=0, document_multiple=4)
    assert batch.tokens[batch.last_tokens].tolist() == [7, 9, 1]
    left = Batch(
        tokens=torch.tensor([0, 0, 5, 6, 7]), labels=torch.zeros(5, dtype=torch.long), loss_mask=torch.zeros(5, dtype=torch.bool),
        padding=torch.tensor([True, True, False, False, False]), position_ids=torch.tensor([0, 1, 0, 1, 2]),
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32), max_seqlen=3,
    )  # fmt: skip
    assert left.tokens[left.last_tokens].tolist() == [7]
    nothing = collate([[]], sequence_length=8, pad_id=0)
    assert not nothing.last_tokens.any() and len(nothing.documents) == 0


def test_a_head_begins_with_rewards_of_order_one():
    """W has standard deviation 1 / sqrt(D + 1), so W h of a normalised h is about 1; b 0; thresholds one apart."""
    weight = initial_head("heads.reward_head.weight", (64, 255), torch.Generator().manual_seed(1))
    assert float(weight.std()) == pytest.approx(1 / 16, rel=0.02) and float(weight.mean()) == pytest.approx(0, abs=0.002)
    assert not initial_head("heads.a_head.bias", (3,), torch.Generator()).any()
    free = initial_head("heads.a_head.constants", (4,), torch.Generator())
    assert free[0] == -1.5 and torch.nn.functional.softplus(free[1:]).tolist() == pytest.approx([1, 1, 1])
    assert initial_head("heads.a_head.constants", (1,), torch.Generator()).tolist() == [0.0]


def test_a_head_is_fp32_whatever_the_model_is():
    head = Head(8, HeadShape(2, bias=True, constants=1), torch.bfloat16)
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    said = head(torch.full((3, 8), 1.0, dtype=torch.bfloat16))
    assert said.dtype == torch.float32 and said.tolist() == [[4.5, 4.5, 0.5]] * 3
    assert head.double()(torch.ones(1, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of transformers: a Llama with a score layer and no language model's head."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(3)
    shape: dict[str, Any] = dict(
        vocab_size=heads_checks.VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, num_labels=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForSequenceClassification(LlamaConfig(**shape))
    torch.nn.init.normal_(model.score.weight, 0, 0.5)
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    return path


def test_rewards_are_those_of_transformers_on_every_layout(folder: Path):
    """Padded left and right, as transformers takes them; here packed."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    documents = heads_checks.documents()
    expected: dict[str, list[float]] = {}
    for side in ("right", "left"):
        longest = max(map(len, documents))
        ids, mask = torch.zeros(len(documents), longest, dtype=torch.long), torch.zeros(len(documents), longest, dtype=torch.long)
        for row, document in enumerate(documents):
            where = slice(0, len(document)) if side == "right" else slice(longest - len(document), longest)
            ids[row, where], mask[row, where] = torch.tensor(document), 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            expected[side] = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0].tolist()
    assert expected["left"] == pytest.approx(expected["right"], abs=1e-5)
    layouts: list[dict[str, Any]] = [{}, dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(pipeline_model_parallel_size=2), dict(context_parallel_size=2)]
    found = run_ranks(heads_checks.rewards, 2, str(folder), layouts)
    for rank in found:
        for layout, said in zip(layouts, rank):
            assert said == pytest.approx(expected["right"], abs=2e-5), layout
    original = load_file(folder / "model.safetensors")
    for number in (0, 1):  # written again, it is the folder that it came from, and transformers reads it
        again = folder.with_name(f"again-{number}")
        weights = load_file(again / "model.safetensors")
        assert weights.keys() == original.keys() and all(torch.equal(weights[name], original[name]) for name in original)
        with torch.no_grad():
            said = LlamaForSequenceClassification.from_pretrained(again, dtype=torch.float32).eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
        assert said.tolist() == expected["left"]
    assert np.std(expected["right"]) > 0.1 and not math.isclose(expected["right"][0], expected["right"][1])
