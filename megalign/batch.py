"""A microbatch as Megatron's packed (thd) attention takes it: documents end to end in one flat row.

    tokens        a b c d | e f g | . . .     T tokens: documents, then padding
    labels        b c d . | f g . | . . .     the next token of the same document
    position_ids  0 1 2 3 | 0 1 2 | 0 1 2     from 0 in each document
    cu_seqlens    0, 4, 7, 10                 where segments begin; attention never crosses

`Example.loss_mask` speaks of the token itself, `Batch.loss_mask` of the label: the shift by one is made here,
in `collate`, and nowhere else.

Two answers to one prompt may share its tokens (`collate(..., share=True)`): the second document then begins behind them,
sees them as keys, and counts its positions from there. Its last prompt token stays, for its next token is another one:

    tokens        p q r c d | r e f           prompt p q r, answers c d and e f
    labels        . . c d . | e f .
    position_ids  0 1 2 3 4 | 2 3 4
    prefixes      0           2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch


class Document(Protocol):
    """What `collate` needs of an Example."""

    @property
    def input_ids(self) -> np.ndarray: ...  # [T] integers

    @property
    def loss_mask(self) -> np.ndarray: ...  # [T] bool; token t is scored

    @property
    def values(self) -> Mapping[str, float]: ...  # the same names in every document of a batch

    @property
    def shared(self) -> int: ...  # leading tokens that the document before it has too, and whose labels are not scored here

    def __len__(self) -> int: ...


@dataclass
class Batch:
    """T tokens in n segments: documents, and padding that scores nothing."""

    tokens: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64; pad_id where there is no next token
    loss_mask: torch.Tensor  # [T] bool; labels[t] is scored
    padding: torch.Tensor  # [T] bool; no document's token
    position_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [n + 1] int32; first 0, last T
    max_seqlen: int  # of a segment, what it shares included
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # [documents] float64: the documents' own, in order
    prefixes: list[int] | None = None  # [n] tokens that each segment shares with the front of the one before it; None: none does

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tensors = (self.tokens, self.labels, self.loss_mask, self.padding, self.position_ids, self.cu_seqlens)
        values = {name: value.to(device) for name, value in self.values.items()}
        return Batch(*(tensor.to(device) for tensor in tensors), max_seqlen=self.max_seqlen, values=values, prefixes=self.prefixes)

    @property
    def documents(self) -> torch.Tensor:
        """[documents] indices of the segments that are no padding."""
        return (~self.padding[self.cu_seqlens[:-1].long()]).nonzero().squeeze(-1)

    @property
    def last_tokens(self) -> torch.Tensor:
        """[T] bool: the last real token of each document, wherever its padding stands."""
        ends = self.cu_seqlens[1:].long()[self.documents]
        real = torch.cat([torch.zeros(1, dtype=torch.long, device=self.padding.device), (~self.padding).long().cumsum(0)])
        last = torch.zeros_like(self.padding)
        # The first position up to which as many tokens are real as in the whole segment.
        last[torch.searchsorted(real, real[ends]) - 1] = True
        return last


@dataclass
class Ahead:
    """What a prediction module of depth k reads and must say at each of the T positions of a batch."""

    tokens: torch.Tensor  # [T] int64; token t + k of the same document
    labels: torch.Tensor  # [T] int64; label t + k
    loss_mask: torch.Tensor  # [T] bool; label t + k is scored
    padding: torch.Tensor  # [T] bool; the document has no token t + k


def look_ahead(batch: Batch, depth: int) -> Ahead:
    """Tokens, labels and masks of `batch` shifted left by `depth` within each document: nothing crosses a boundary.

    A position without token t + k keeps its own token, and is marked as padding; causal attention lets no scored
    position see it.
    """
    here = torch.arange(len(batch.tokens), device=batch.tokens.device)
    ends = torch.repeat_interleave(batch.cu_seqlens[1:].long(), batch.cu_seqlens.diff().long())
    there = torch.where(here + depth < ends, here + depth, here)
    missing = (there == here) | batch.padding[there]
    there = torch.where(missing, here, there)
    return Ahead(batch.tokens[there], batch.labels[there], batch.loss_mask[there] & ~missing, missing)


def filled_tokens(packs: Sequence[Sequence[Document]], document_multiple: int = 1, share: bool = False) -> int:
    """Tokens the documents take, each rounded up to `document_multiple`: the least `pad_to` of `collate`."""
    return sum(_round_up(len(document) - share * document.shared, document_multiple) for pack in packs for document in pack)


def collate(
    packs: Sequence[Sequence[Document]],
    *,
    sequence_length: int,
    pad_id: int,
    document_multiple: int = 1,
    pad_to: int | None = None,
    share: bool = False,
) -> Batch:
    """Lay m packs out as one batch of T = m * sequence_length tokens, or of `pad_to`.

    document_multiple: each document's segment is padded to a multiple of it (context parallelism cuts every
    segment in 2 * context_parallel_size equal parts). Without `pad_to` each pack is padded to sequence_length
    on its own; with it, documents follow each other and all padding comes last. A padding segment is at most
    sequence_length long. An empty pack is all padding. share: lay out once what documents have in common (`Document.shared`).
    Raises ValueError where the documents do not fit.
    """
    total = len(packs) * sequence_length if pad_to is None else pad_to
    for name, value in (("sequence_length", sequence_length), ("pad_to", total)):
        if value % document_multiple:
            raise ValueError(f"{name} is {value}, not a multiple of document_multiple({document_multiple})")
    if share and document_multiple > 1:
        raise ValueError(f"share needs documents that are not cut: document_multiple is {document_multiple}, and must be 1")
    tokens = np.full(total, pad_id, dtype=np.int64)
    labels = np.full(total, pad_id, dtype=np.int64)
    loss_mask = np.zeros(total, dtype=bool)
    padding = np.ones(total, dtype=bool)
    bounds, prefixes = [0], []

    for number, pack in enumerate(packs, 1):
        limit = number * sequence_length if pad_to is None else total
        for document in pack:
            prefix = document.shared if share else 0
            start, length = bounds[-1], len(document) - prefix
            prefixes.append(prefix)
            bounds.append(start + _round_up(length, document_multiple))
            if bounds[-1] > limit:
                raise ValueError(
                    f"pack {number - 1}: its documents, each rounded up to a multiple of {document_multiple}, "
                    f"end at token {bounds[-1]}, past {limit}; pack for this document_multiple, or raise pad_to"
                )
            tokens[start : start + length] = document.input_ids[prefix:]
            labels[start : start + length - 1] = document.input_ids[prefix + 1 :]
            loss_mask[start : start + length - 1] = document.loss_mask[prefix + 1 :]
            padding[start : start + length] = False
        if pad_to is None:
            _add_padding(bounds, limit, sequence_length)
            prefixes += [0] * (len(bounds) - 1 - len(prefixes))
    _add_padding(bounds, total, sequence_length)
    prefixes += [0] * (len(bounds) - 1 - len(prefixes))

    lengths = np.diff(bounds)
    documents = [document for pack in packs for document in pack]
    names = documents[0].values if documents else ()
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        padding=torch.from_numpy(padding),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(np.subtract(bounds[:-1], prefixes), lengths)),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int((lengths + prefixes).max()),
        values={name: torch.tensor([document.values[name] for document in documents], dtype=torch.float64) for name in names},
        prefixes=prefixes if any(prefixes) else None,
    )


def _add_padding(bounds: list[int], end: int, longest: int) -> None:
    while bounds[-1] < end:
        bounds.append(min(bounds[-1] + longest, end))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
