"""`megalign data` and `megalign recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Look at training data as the model will see it.", no_args_is_help=True)
recipes_app = typer.Typer(help="The recipes that come with megalign.", no_args_is_help=True)

DataFiles = Annotated[list[Path], typer.Argument(metavar="FILES", help="Data files, or folders of data sets (of `datasets` or the hub).", show_default=False)]
FormatOption = Annotated[str, typer.Option(help="Format of the rows; auto: told by the first of a file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. optimizer.lr=1e-4")]


@data_app.command("preview")
def data_preview(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe, or a data file.", show_default=False)],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    format: FormatOption = "auto",
) -> None:
    """Show rendered rows with the scored tokens coloured."""
    from megalign.config.load import load_recipe
    from megalign.config.schema import Recipe
    from megalign.data.kinds import is_data, is_data_name
    from megalign.data.preview import preview

    given = overrides or []
    if format != "auto":
        given = [f"data.format={format}", *given]
    if is_data(Path(what)) or is_data_name(Path(what)):
        from megalign.config.load import apply_overrides

        recipe = apply_overrides(Recipe(), [f"data.train={what}", "data.validation_rows=0", "data.max_bad_share=1", *given])
    else:
        recipe = load_recipe(what, given)
    preview(recipe, rows)


@data_app.command("stats")
def data_stats(files: DataFiles, format: FormatOption = "auto") -> None:
    """Count the rows of files: what each becomes, and why some are unusable."""
    from megalign.data.statistics import statistics

    for file in files:
        statistics(file, format)


@data_app.command("tokenizer")
def data_tokenizer(
    files: DataFiles,
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(min=260, help="Special tokens included.")] = 4096,
    template: Annotated[str, typer.Option(help="Chat template whose control tokens it gets.")] = "chatml",
    format: FormatOption = "auto",
    special_token: Annotated[list[str] | None, typer.Option(help="A single id, e.g. <think>; may be repeated.")] = None,
) -> None:
    """Train a byte-level BPE tokenizer on files; print the bytes a token stands for in text it has not seen."""
    from megalign.data.statistics import tokenizer_from

    tokenizer_from(files, output, vocab_size, template, format, special_token or [])


@data_app.command("cache")
def data_cache(
    folder: Annotated[Path, typer.Argument(help="data.cache_dir, or the .cache beside run folders.", show_default=False)],
    prune: Annotated[str | None, typer.Option(metavar="SIZE", help="Remove the longest unused entries until at most this is left, e.g. 20GB.")] = None,
    unused_hours: Annotated[float, typer.Option(min=0, help="Keep what was used within so many hours: a run may be using it.")] = 24.0,
) -> None:
    """List the tokenised data of a cache, or remove what has not been used for longest; a run makes again what it misses."""
    from megalign.data.prune import show

    show(folder, prune, unused_hours)


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and first lines."""
    from megalign.config.load import RECIPES, list_recipes

    for name in list_recipes():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")
        print(f"{name:24} {first}")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One that `megalign recipes list` names.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File to write.", show_default=False)],
) -> None:
    """Copy a recipe to change it."""
    from megalign.config.load import find_recipe

    if target.exists():
        raise typer.BadParameter(f"{target} exists; choose another name")
    target.write_text(find_recipe(name).read_text())
