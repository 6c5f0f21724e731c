"""A batch: the shift of labels and mask by one, document bounds, positions, padding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.batch import Batch, collate, filled_tokens

PAD = 99


@dataclass
class Doc:
    input_ids: np.ndarray
    loss_mask: np.ndarray
    values: dict[str, float] = field(default_factory=dict)
    shared: int = 0

    def __len__(self):
        return len(self.input_ids)


def doc(*ids, scored=()):
    return Doc(np.array(ids, dtype=np.int32), np.array([i in scored for i in ids]))


A, B, C = doc(1, 2, 3, 4, scored=(3, 4)), doc(5, 6, 7, scored=(7,)), doc(8, 9, scored=(9,))


def test_by_hand():
    batch = collate([[A, B], [C]], sequence_length=8, pad_id=PAD)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, PAD, 8, 9] + [PAD] * 6
    assert batch.labels.tolist() == [2, 3, 4, PAD, 6, 7, PAD, PAD, 9] + [PAD] * 7
    assert batch.labels[batch.loss_mask].tolist() == [3, 4, 7, 9]
    assert batch.loss_mask.nonzero().flatten().tolist() == [1, 2, 5, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 0, 1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8, 10, 16]
    assert batch.max_seqlen == 6
    dtypes = [
        t.dtype for t in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens)
    ]
    assert dtypes == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int32]


def test_document_multiple_pads_inside_the_segment():
    batch = collate([[A, B]], sequence_length=8, pad_id=PAD, document_multiple=4)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, PAD]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.labels[batch.loss_mask].tolist() == [3, 4, 7]
    assert filled_tokens([[A, B], [C]], 4) == 12 and filled_tokens([[A, B], [C]]) == 9


def test_pad_to_puts_the_padding_last():
    batch = collate([[A, B], [C]], sequence_length=8, pad_id=PAD, pad_to=12)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, PAD, PAD, PAD]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9, 12]
    longer = collate([[C]], sequence_length=4, pad_id=PAD, pad_to=12)
    assert longer.cu_seqlens.tolist() == [0, 2, 6, 10, 12] and longer.max_seqlen == 4


@pytest.mark.parametrize("pad_to", [None, 16])
def test_empty_packs_are_padding(pad_to):
    batch = collate([[], []], sequence_length=8, pad_id=PAD, pad_to=pad_to)
    assert batch.tokens.tolist() == [PAD] * 16 and not batch.loss_mask.any()
    assert batch.cu_seqlens.tolist() == [0, 8, 16] and batch.max_seqlen == 8


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="pack 1: .* end at token 18, past 16"):
        collate([[A], [A, B, B]], sequence_length=8, pad_id=PAD)
    with pytest.raises(ValueError, match="multiple of 4, end at token 12, past 8"):
        collate([[A, B, C]], sequence_length=8, pad_id=PAD, document_multiple=4)
    with pytest.raises(ValueError, match="past 6"):
        collate([[A], [B]], sequence_length=8, pad_id=PAD, pad_to=6)
    with pytest.raises(ValueError, match=r"sequence_length is 6, not a multiple of document_multiple\(4\)"):
        collate([[A]], sequence_length=6, pad_id=PAD, document_multiple=4)


DOCUMENT = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, 50), min_size=n, max_size=n), st.integers(0, 2**n))
)


@settings(deadline=None, max_examples=50)
@given(
    packs=st.lists(st.lists(DOCUMENT, max_size=3), min_size=1, max_size=3),
    multiple=st.sampled_from([1, 2, 4]),
    trim=st.booleans(),
)
def test_documents_can_be_read_back(packs, multiple, trim):
    docs = [
        [
            Doc(np.array(ids), np.array([n > 0 and bool(bits >> n & 1) for n in range(len(ids))]))
            for ids, bits in p
        ]
        for p in packs
    ]
    pad_to = filled_tokens(docs, multiple) or multiple if trim else None
    batch = collate(docs, sequence_length=36, pad_id=PAD, document_multiple=multiple, pad_to=pad_to)
    assert len(batch.tokens) == (pad_to if trim else 36 * len(packs))
    bounds = batch.cu_seqlens.tolist()
    assert (
        bounds[0] == 0 and bounds[-1] == len(batch.tokens) and batch.max_seqlen == max(np.diff(bounds)) <= 36
    )
    segments = [slice(a, b) for a, b in pairwise(bounds)]
    assert all(s.stop > s.start and (s.stop - s.start) % multiple == 0 for s in segments)
    assert all(batch.position_ids[s].tolist() == list(range(s.stop - s.start)) for s in segments)
    filled = [s for s in segments if batch.tokens[s.start] != PAD]
    flat = [d for pack in docs for d in pack]
    assert len(filled) == len(flat)
    for s, d in zip(filled, flat):
        n = len(d)
        assert batch.tokens[s].tolist() == [*d.input_ids, *[PAD] * (s.stop - s.start - n)]
        targets = {
            s.start + t - 1: d.input_ids[t] for t in range(1, n) if d.loss_mask[t]
        }  # position that predicts -> label
        assert [s.start + t for t in batch.loss_mask[s].nonzero().flatten().tolist()] == list(targets)
        assert [batch.labels[t] for t in targets] == list(targets.values())
    assert batch.loss_mask.sum() == sum(d.loss_mask.sum() for d in flat)


def test_to_keeps_everything():
    batch = collate([[A]], sequence_length=8, pad_id=PAD)
    moved = batch.to("meta")
    assert (
        isinstance(moved, Batch)
        and moved.tokens.is_meta
        and moved.cu_seqlens.is_meta
        and moved.max_seqlen == 4
    )


def test_values_of_documents_and_where_they_stand():
    a, b, c = (replace(document, values={"weight": weight, "row": row}) for document, weight, row in ((A, 0.5, 2**40), (B, 1.0, 1), (C, 2.0, 2)))
    batch = collate([[a, b], [c]], sequence_length=8, pad_id=PAD)
    assert batch.documents.tolist() == [0, 1, 3], "of the segments; 2 and 4 are padding"
    assert batch.values["weight"].tolist() == [0.5, 1.0, 2.0] and batch.values["row"].tolist() == [2**40, 1, 2]
    assert collate([[], []], sequence_length=8, pad_id=PAD).values == {} and len(collate([[]], sequence_length=8, pad_id=PAD).documents) == 0
    assert batch.to("meta").values["row"].is_meta


def test_two_answers_share_their_prompt():
    """Prompt 1 2 3, answers 4 5 and 6 7 8: the second keeps the prompt's last token, whose next token is its own."""
    chosen, rejected = doc(1, 2, 3, 4, 5, scored=(4, 5)), replace(doc(1, 2, 3, 6, 7, 8, scored=(6, 7, 8)), shared=2)
    batch = collate([[chosen, rejected], [A]], sequence_length=12, pad_id=PAD, pad_to=14, share=True)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 3, 6, 7, 8, 1, 2, 3, 4, PAD]
    assert batch.labels.tolist() == [2, 3, 4, 5, PAD, 6, 7, 8, PAD, 2, 3, 4, PAD, PAD]
    assert batch.labels[batch.loss_mask].tolist() == [4, 5, 6, 7, 8, 3, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 13, 14] and batch.prefixes == [0, 2, 0, 0]
    assert batch.max_seqlen == 6 and filled_tokens([[chosen, rejected], [A]], share=True) == 13
    assert batch.to("cpu").prefixes == batch.prefixes and batch.documents.tolist() == [0, 1, 2]
    padded = collate([[chosen, rejected], [A]], sequence_length=12, pad_id=PAD, share=True)
    assert padded.prefixes == [0, 2, 0, 0, 0] and padded.cu_seqlens.tolist() == [0, 5, 9, 12, 16, 24]
    apart = collate([[chosen, rejected], [A]], sequence_length=12, pad_id=PAD)
    assert apart.prefixes is None and apart.labels[apart.loss_mask].tolist() == batch.labels[batch.loss_mask].tolist()
    with pytest.raises(ValueError, match="document_multiple is 4"):
        collate([[chosen, rejected]], sequence_length=16, pad_id=PAD, document_multiple=4, share=True)
