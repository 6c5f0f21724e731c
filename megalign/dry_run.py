"""`--dry-run`: everything that is known of a run before a weight is made."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from megalign.config.layout import world_size_of
from megalign.config.plan import describe_plan
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.data.answers import build_answers
from megalign.data.dataset import build_datasets
from megalign.data.judgements import build_judgements
from megalign.data.pairs import build_pairs
from megalign.data.preview import coloured
from megalign.models.resolve import resolve_model

BUILD = {"dpo": build_pairs, "kto": build_answers, "rm": build_judgements}  # what the other commands build: conversations


def dry_run(recipe: Recipe, console: Console | None = None, *, command: str = "sft") -> None:
    """Check the recipe, read the data, print the plan and the first row (of judgements all answers). Imports no model code."""
    recipe = resolve_model(recipe)
    ranks = world_size_of(recipe)
    check(recipe, ranks)
    if command == "dpo" and recipe.rounds.count is not None:
        command = "rounds"  # its pairs are not drawn yet; what it asks is conversations
    train, _ = BUILD.get(command, build_datasets)(recipe)
    facts = {**train.statistics, "vocab_size": train.tokenizer.vocab_size}
    shown = train.rows[0][: 2 if command in ("dpo", "rm") else 1] if len(train) else []
    first = Text("\n").join(coloured(example, train.tokenizer) for example in shown) if shown else Text("(no rows)")
    (console or Console(highlight=False)).print(describe_plan(recipe, ranks, facts, first))
