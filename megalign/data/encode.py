"""Rows to examples: token ids, and which of them are scored.

Each segment of the rendered string is tokenised alone, so a mask boundary is a token boundary, always. For a
template and a tokenizer where that would differ from tokenising the whole string (which is what a server
does), `check_template` stops the run before it starts.

`template` is what data.template says (see `templates.get_template`); "tokenizer", the default, is the one that
the tokenizer carries, as every tokenizer that was trained or loaded for a template does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from megalign.data.rendering import NotPrefixStable, Segment, render
from megalign.data.rows import (
    BadRow,
    Conversation,
    DataError,
    Example,
    Message,
    Row,
    TextRow,
    TooLong,
    Unusable,
)
from megalign.data.templates import Template, get_template
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

Piece = tuple[str, bool]  # a text, and whether it continues a string rather than begins one
Ids = Callable[[list[Segment]], Iterator[list[int]]]


def encode(
    row: Conversation | TextRow,
    tokenizer: Tokenizer,
    template: str = "tokenizer",
    loss_on: str = "assistant",
    max_length: int | None = None,
    truncation: str = "turn",
) -> Example | BadRow:
    """One row as an example of at most `max_length` tokens; see `encode_rows`."""
    return next(encode_rows([row], tokenizer, template, loss_on, max_length, truncation))


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    template: str = "tokenizer",
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
    chosen = None
    while block := list(islice(rows, BLOCK)):
        if chosen is None and any(isinstance(row, Conversation) for row in block):
            chosen = get_template(template, tokenizer.hf)
        rendered = [_rendered(row, tokenizer, chosen, loss_on) for row in block]
        ids_of = _tokenise([segments for segments in rendered if isinstance(segments, list)], tokenizer)
        for row, segments in zip(block, rendered):
            if isinstance(segments, BadRow):
                yield segments
            elif isinstance(row, TextRow):
                ids = [*next(ids_of(segments)), tokenizer.eod]
                yield _example(ids, [True] * len(ids))
            else:
                assert isinstance(row, Conversation) and chosen is not None
                yield _fit(row, segments, tokenizer, ids_of, chosen, loss_on, max_length, truncation)


def encode_prompt(conversation: Conversation, tokenizer: Tokenizer, template: str = "tokenizer") -> list[int]:
    """Ids of a conversation with an assistant turn opened at its end: what generation continues.

    Raises DataError with what the template says against the conversation.
    """
    chosen = get_template(template, tokenizer.hf)
    try:
        segments = render(conversation, chosen, add_generation_prompt=True, control_tokens=tokenizer.control_tokens)
    except Unusable as error:
        raise DataError(f"the conversation cannot be rendered: {error}") from None
    return [i for ids in _tokenise([segments], tokenizer)(segments) for i in ids]


def split_document(example: Example, length: int) -> list[Example]:
    """Cut a document in chunks of at most `length` (>= 2) tokens.

    Neighbours share one token, unscored where it comes first: so each token of the document but the first is
    scored exactly once.
    """
    starts = range(0, max(len(example) - 1, 1), length - 1)
    return [_example(example.input_ids[s : s + length], example.loss_mask[s : s + length]) for s in starts]


def plain_texts(row: Row, template: str = "chatml") -> list[str]:
    """What is tokenised of a row, control tokens apart: none of a row that cannot be used."""
    if isinstance(row, Conversation):
        try:
            return [segment.text for segment in render(row, get_template(template), loss_on="all") if not segment.control]
        except Unusable:
            return []
    return [row.text] if isinstance(row, TextRow) else []


def check_template(tokenizer: Tokenizer, template: str = "tokenizer", loss_on: str = "assistant") -> None:
    """Raise DataError if the tokenizer and the template would not train what a server later renders.

    Three rules: text cannot forge a control token, segments tokenise apart as they do together, and a turn is
    rendered alike whatever follows it.
    """
    chosen = get_template(template, tokenizer.hf)
    control = {tokenizer.token_id(token): token for token in chosen.control_tokens}
    for token in control.values():
        if not control.keys().isdisjoint(tokenizer.encode(token)):
            raise DataError(
                f"data.tokenizer: {token!r} in plain text becomes a control token; mark it special"
            )
    segments = _probe(tokenizer, chosen, loss_on)
    apart = [i for ids in _tokenise([segments], tokenizer)(segments) for i in ids]
    together = tokenizer.hf("".join(s.text for s in segments), add_special_tokens=False)["input_ids"]
    if apart != together:
        same = next((n for n, (a, b) in enumerate(zip(apart, together)) if a != b), len(apart))
        raise DataError(
            f"data.tokenizer does not fit data.template {chosen.name!r}: a server would tokenise a "
            f"conversation otherwise than training, first after {tokenizer.decode(apart[:same])[-40:]!r}; "
            "use a byte-level tokenizer without prefix space"
        )


def _probe(tokenizer: Tokenizer, template: Template, loss_on: str) -> list[Segment]:
    """The longest part of PROBE that the template takes: some know no system message, some a single exchange."""
    refused = ""
    for messages in (PROBE.messages, PROBE.messages[1:], PROBE.messages[:3], PROBE.messages[1:3]):
        try:
            return render(Conversation(messages), template, loss_on=loss_on, control_tokens=tokenizer.control_tokens)
        except NotPrefixStable as error:
            raise DataError(f"data.template {template.name!r} is not prefix-stable: {error}") from None
        except Unusable as error:
            refused = str(error)
    raise DataError(f"data.template {template.name!r} renders not even a single exchange: {refused}")


def _rendered(row: Row, tokenizer: Tokenizer, template: Template | None, loss_on: str) -> list[Segment] | BadRow:
    if isinstance(row, BadRow):
        return row
    if isinstance(row, TextRow) or template is None:
        return [Segment(row.text)] if isinstance(row, TextRow) else []
    try:
        return render(row, template, loss_on=loss_on, control_tokens=tokenizer.control_tokens)
    except Unusable as error:
        return BadRow(row.source, row.line, str(error))


def _fit(
    row: Conversation,
    whole: list[Segment],
    tokenizer: Tokenizer,
    ids_of: Ids,
    template: Template,
    loss_on: str,
    max_length: int | None,
    truncation: str,
) -> Example | BadRow:
    """The row, or the longest beginning of it that ends with an assistant turn and fits."""
    messages, length = row.messages, 0
    shorter = [end for end in range(len(messages) - 1, 0, -1) if messages[end - 1].role == "assistant"]
    for end in [len(messages), *(shorter if truncation == "turn" else [])]:
        segments: list[Segment] | BadRow = whole
        if end < len(messages):
            segments = _rendered(replace(row, messages=messages[:end]), tokenizer, template, loss_on)
            if isinstance(segments, BadRow):  # where a template forbids to end there, it may end earlier
                continue
        ids: list[int] = []
        scored: list[bool] = []
        for segment, part in zip(segments, ids_of(segments)):
            ids += part
            scored += [segment.scored or loss_on == "all"] * len(part)
        length = length or len(ids)
        if (max_length is None or len(ids) <= max_length) and (end == len(messages) or True in scored[1:]):
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


def _pieces(segments: list[Segment], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The texts to tokenise; what is not at the beginning of a string must get no prefix space of its own."""
    for number, segment in enumerate(segments):
        after_control = number > 0 and segments[number - 1].control
        yield segment.text, number > 0 and not (after_control and tokenizer.prefix_after_control)


def _tokenise(rendered: list[list[Segment]], tokenizer: Tokenizer) -> Ids:
    """All distinct texts of the rows in two calls; the answer looks the segments of a row up."""
    known: dict[Piece, list[int]] = {}
    texts = [
        piece
        for segments in rendered
        for segment, piece in zip(segments, _pieces(segments, tokenizer))
        if not segment.control
    ]
    for continued in (False, True):
        distinct = list(dict.fromkeys(text for text, kind in texts if kind is continued))
        ids = tokenizer.encode_batch(distinct, continued=continued)
        known |= {(text, continued): found for text, found in zip(distinct, ids)}

    def ids_of(segments: list[Segment]) -> Iterator[list[int]]:
        for segment, piece in zip(segments, _pieces(segments, tokenizer)):
            if segment.control:
                yield [tokenizer.token_id(segment.text)]
            elif piece in known:
                yield known[piece]
            else:  # a row that was cut may be rendered otherwise than whole
                yield tokenizer.encode(*piece)

    return ids_of
