"""`megalign data stats` and `megalign data tokenizer`: what files hold, and a tokenizer for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megalign.data.encode import plain_texts
from megalign.data.formats import announcement, detect, for_training, read_records, read_rows
from megalign.data.kinds import is_data
from megalign.data.rows import BadRow, DataError
from megalign.data.tokenizer import Tokenizer, train_tokenizer

HELD_OUT = 20  # every 20th text measures the tokenizer and does not train it
REASONS_SHOWN = 5


def statistics(file: Path, format: str = "auto", console: Console | None = None) -> None:
    """Print the format of a file, how many rows of each kind it holds, and why some are unusable."""
    console = console or Console(highlight=False)
    format = _format_of(file, format)
    kinds, reasons, first, trained = Counter[str](), Counter[str](), dict[str, int](), 0
    for row in read_records(file, format):
        kinds[type(row).__name__] += 1
        trained += not isinstance(for_training(row), BadRow)
        if isinstance(row, BadRow):
            reasons[row.reason] += 1
            first.setdefault(row.reason, row.line)
    bad = kinds.pop("BadRow", 0)
    console.print(Text(announcement(str(file), format), style="bold"))
    kept = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    console.print(Text(f"  {kinds.total() + bad} rows: {kept or 'none usable'}, {bad} unusable; {trained} for supervised training"))
    for reason, count in reasons.most_common(REASONS_SHOWN):
        console.print(Text(f"  {count} x {reason} (first at {first[reason]})", style="red"))
    if len(reasons) > REASONS_SHOWN:
        console.print(Text(f"  and {len(reasons) - REASONS_SHOWN} reasons more", style="red"))


def tokenizer_from(
    files: Sequence[Path],
    output: Path,
    vocab_size: int,
    template: str = "chatml",
    format: str = "auto",
    special_tokens: Sequence[str] = (),
    console: Console | None = None,
) -> Tokenizer:
    """Train a tokenizer on the rows of files, write it to a new folder, and print its bytes per token on held-out text.

    Raises DataError for a folder that is not empty, and where the files hold no text.
    """
    console = console or Console(highlight=False)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"--output {output} exists and is not empty; choose another folder")
    found = {file: _format_of(file, format) for file in files}
    for file, name in found.items():
        console.print(Text(announcement(str(file), name)))

    def texts(held_out: bool) -> Iterator[str]:
        number = 0
        for file, name in found.items():
            for row in read_rows(file, name):
                for text in plain_texts(row, template):
                    number += 1
                    if (number % HELD_OUT == 0) == held_out:
                        yield text

    tokenizer = train_tokenizer(texts(held_out=False), vocab_size, template, special_tokens)
    trained, unseen = (_bytes_and_tokens(tokenizer, texts(held_out)) for held_out in (False, True))
    if not trained[0]:
        raise DataError(f"{', '.join(map(str, files))}: no usable row, so there is no text to train on")
    tokenizer.save(output)
    console.print(Text(f"{output}: {tokenizer.vocab_size} tokens, template {template}", style="bold"))
    for name, (size, count) in (("trained on", trained), (f"held out (every {HELD_OUT}th text)", unseen)):
        if count:
            console.print(Text(f"  {name}: {size:,} bytes, {count:,} tokens, {size / count:.2f} bytes per token"))
    if not unseen[0]:
        console.print(Text(f"  nothing was held out: the files hold fewer than {HELD_OUT} texts", style="yellow"))
    return tokenizer


def _format_of(file: Path, format: str) -> str:
    if not is_data(file):
        raise DataError(f"{file}: does not exist, or is no data file or folder")
    return detect(file) if format == "auto" else format


def _bytes_and_tokens(tokenizer: Tokenizer, texts: Iterator[str]) -> tuple[int, int]:
    size = count = 0
    for text in texts:
        size += len(text.encode())
        count += len(tokenizer.encode(text))
    return size, count
