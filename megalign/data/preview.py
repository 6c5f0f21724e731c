"""`megalign data preview`: rows as the model sees them, the scored tokens in colour and between « »."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.text import Text

from megalign.config.schema import Recipe
from megalign.data.dataset import make_tokenizer
from megalign.data.encode import encode
from megalign.data.formats import announcement
from megalign.data.rows import BadRow, Example
from megalign.data.splits import read_splits
from megalign.data.tokenizer import Tokenizer

SCORED, CONTEXT = "bold green", "bright_black"


def preview(recipe: Recipe, count: int, console: Console | None = None) -> None:
    """Print the first `count` usable training rows, decoded from their tokens, and the bad ones before them.

    Raises DataError as `build_datasets` does.
    """
    console = console or Console(highlight=False)
    data = recipe.data
    train, _ = read_splits(recipe)
    tokenizer = make_tokenizer(recipe, train.rows)
    for source, format in train.formats.items():
        console.print(Text(f"{announcement(source, format)}; template {data.template}, loss on {data.loss_on}"))
    console.print(
        Text.assemble("scored: ", ("«like this»", SCORED), "; not scored: ", ("like this", CONTEXT))
    )
    shown = 0
    for number, row in enumerate(train.rows, 1):
        if shown == count:
            break
        place = f"{row.source}:{row.line}" if row.line else f"{row.source}, row {number}"
        options = (data.template, data.loss_on, data.sequence_length, data.truncation)
        example = row if isinstance(row, BadRow) else encode(row, tokenizer, *options)
        if isinstance(example, BadRow):
            console.print(Text(f"\n{place}: not used: {example.reason}", style="red"))
            continue
        shown += 1
        cut = f", {example.messages_cut} trailing messages cut" if example.messages_cut else ""
        size = f"{len(example)} tokens, {int(example.loss_mask.sum())} scored{cut}"
        console.print(Text(f"\n{place}: {size}", style="bold"))
        console.print(coloured(example, tokenizer))


def coloured(example: Example, tokenizer: Tokenizer) -> Text:
    """The decoded example; what is scored is green and between « »."""
    text = Text()
    for scored, run in groupby(zip(example.loss_mask, example.input_ids), key=lambda pair: bool(pair[0])):
        decoded = tokenizer.decode(token for _, token in run)
        decoded = decoded.replace("\x1b", "␛")  # data must not steer the terminal
        text.append(f"«{decoded}»" if scored else decoded, style=SCORED if scored else CONTEXT)
    return text
