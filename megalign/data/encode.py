"""Rows to examples: token ids, and which of them are scored.

Each segment of the rendered string is tokenised alone, so a mask boundary is a token boundary, always. For a
template and a tokenizer where that would differ from tokenising the whole string (which is what a server
does), `check_template` stops the run before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from megalign.data.rows import BadRow, Conversation, DataError, Example, Message, Row, TextRow, TooLong
from megalign.data.templates import Segment, get_template, render
from megalign.data.tokenizer import Tokenizer

BLOCK = 4096  # rows tokenised in one call: enough to keep every core busy, little enough to hold in memory

PROBE = Conversation(
    (
        Message("system", "You are kind."),
        Message("user", "Hi, who are you?"),
        Message("assistant", "A model."),
        Message("user", "Bye 1"),
        Message("assistant", "2 Ok"),
    )
)

Ids = Callable[[Segment], list[int]]


def encode(
    row: Conversation | TextRow,
    tokenizer: Tokenizer,
    template: str = "chatml",
    loss_on: str = "assistant",
    max_length: int | None = None,
    truncation: str = "turn",
) -> Example | BadRow:
    """One row as an example of at most `max_length` tokens; see `encode_rows`."""
    return next(encode_rows([row], tokenizer, template, loss_on, max_length, truncation))


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    template: str = "chatml",
    loss_on: str = "assistant",
    max_length: int | None = None,
    truncation: str = "turn",
) -> Iterator[Example | BadRow]:
    """One example, or the reason why there is none, for each row in order. A BadRow passes through.

    loss_on: "assistant", every assistant turn with its end-of-turn token; "completion", the last of them;
    "all", every token. A TextRow is scored whole, ends with the end-of-document token, and is not shortened:
    `split_document` cuts it. The first token of a row is never scored: nothing predicts it.
    truncation, for a conversation longer than `max_length`: "turn" leaves out trailing messages until it ends
    with an assistant turn and fits, or yields TooLong where not even the first exchange does; "drop" yields
    TooLong; "error" raises DataError.
    """
    rows = iter(rows)
    while block := list(islice(rows, BLOCK)):
        ids_of = _tokenise(block, tokenizer, template)
        for row in block:
            if isinstance(row, BadRow):
                yield row
            elif isinstance(row, TextRow):
                ids = [*ids_of(Segment(row.text)), tokenizer.eod]
                yield _example(ids, [True] * len(ids))
            else:
                yield _fit(row, ids_of, template, loss_on, max_length, truncation)


def encode_prompt(conversation: Conversation, tokenizer: Tokenizer, template: str = "chatml") -> list[int]:
    """Ids of a conversation with an assistant turn opened at its end: what generation continues."""
    segments = render(conversation, template, add_generation_prompt=True)
    return [i for segment in segments for i in _segment_ids(segment, tokenizer)]


def split_document(example: Example, length: int) -> list[Example]:
    """Cut a document in chunks of at most `length` (>= 2) tokens.

    Neighbours share one token, unscored where it comes first: so each token of the document but the first is
    scored exactly once.
    """
    starts = range(0, max(len(example) - 1, 1), length - 1)
    return [_example(example.input_ids[s : s + length], example.loss_mask[s : s + length]) for s in starts]


def plain_texts(row: Row, template: str = "chatml") -> list[str]:
    """What is tokenised of a row, control tokens apart: none of a BadRow."""
    if isinstance(row, Conversation):
        return [segment.text for segment in render(row, template) if not segment.control]
    return [row.text] if isinstance(row, TextRow) else []


def check_template(tokenizer: Tokenizer, template: str) -> None:
    """Raise DataError if the tokenizer and the template would not train what a server later renders.

    Two rules: text cannot forge a control token, and segments tokenise apart as they do together.
    """
    control = {tokenizer.token_id(token): token for token in get_template(template).control_tokens}
    for token in control.values():
        if not control.keys().isdisjoint(tokenizer.encode(token)):
            raise DataError(
                f"data.tokenizer: {token!r} in plain text becomes a control token; mark it special"
            )
    segments = render(PROBE, template)
    apart = [i for segment in segments for i in _segment_ids(segment, tokenizer)]
    together = tokenizer.hf("".join(s.text for s in segments), add_special_tokens=False)["input_ids"]
    if apart != together:
        same = next((n for n, (a, b) in enumerate(zip(apart, together)) if a != b), len(apart))
        raise DataError(
            f"data.tokenizer does not fit data.template {template!r}: a server would tokenise a "
            f"conversation otherwise than training, first after {tokenizer.decode(apart[:same])[-40:]!r}; "
            "use a byte-level tokenizer without prefix space"
        )


def _fit(
    row: Conversation, ids_of: Ids, template: str, loss_on: str, max_length: int | None, truncation: str
) -> Example | BadRow:
    messages, length = row.messages, 0
    shorter = [end for end in range(len(messages) - 1, 0, -1) if messages[end - 1].role == "assistant"]
    for end in [len(messages), *(shorter if truncation == "turn" else [])]:
        ids: list[int] = []
        scored: list[bool] = []
        for segment in render(Conversation(messages[:end]), template):
            part = ids_of(segment)
            ids += part
            scored += [segment.scored or loss_on == "all"] * len(part)
        length = length or len(ids)
        if max_length is None or len(ids) <= max_length:
            return _example(
                ids, _last_run(scored) if loss_on == "completion" else scored, len(messages) - end
            )
    if truncation == "error":
        raise DataError(
            f"{row.source}:{row.line}: {length} tokens, but data.sequence_length is {max_length}; "
            "raise it, or set data.truncation to turn or drop"
        )
    rule = "its first exchange alone does not fit" if truncation == "turn" else "data.truncation is drop"
    return TooLong(row.source, row.line, f"{length} tokens, at most {max_length} fit; {rule}")


def _last_run(scored: list[bool]) -> list[bool]:
    """Only the last run of true values."""
    end = len(scored)
    while end and not scored[end - 1]:
        end -= 1
    start = end
    while start and scored[start - 1]:
        start -= 1
    return [start <= t < end for t in range(len(scored))]


def _example(ids: list[int] | np.ndarray, scored: list[bool] | np.ndarray, cut: int = 0) -> Example:
    loss_mask = np.array(scored, dtype=bool)
    loss_mask[:1] = False
    return Example(np.array(ids, dtype=np.int32), loss_mask, messages_cut=cut)


def _segment_ids(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.token_id(segment.text)] if segment.control else tokenizer.encode(segment.text)


def _tokenise(rows: list[Row], tokenizer: Tokenizer, template: str) -> Ids:
    """All distinct texts of the rows in one call; the answer looks a segment up."""
    texts = dict.fromkeys(text for row in rows for text in plain_texts(row, template))
    known = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    return lambda segment: [tokenizer.token_id(segment.text)] if segment.control else known[segment.text]
