"""The plan of a run, printed before anything is loaded: `--dry-run` and `megalign plan`.

Imports neither torch nor megatron, so that it answers in under a second on a login node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megalign.config.adapters import count_adapters
from megalign.config.layout import Layout, effective_batch, layout_of, padded_vocab, scaled_lr, total_steps
from megalign.config.memory import memory_per_rank
from megalign.config.rules import warnings
from megalign.config.schema import Recipe
from megalign.config.size import Counts, count_parameters

__all__ = ["Counts", "count_parameters", "describe_plan", "human_bytes", "human_count", "memory_per_rank", "padded_vocab", "plain_table"]


def describe_plan(
    recipe: Recipe,
    world_size: int | None = None,
    rows: Mapping[str, Any] | None = None,
    first_row: RenderableType | None = None,
) -> RenderableType:
    """Parameters, memory of a rank by part, effective batch, steps and tokens, warnings, the first rendered row.

    world_size: ranks (None: as many as the layout needs). The recipe should have passed `rules.check`.
    rows: what is known of the training data, if it was read: any of `packs` (rows of `sequence_length` an epoch),
        `scored_tokens` and `tokens` of an epoch, `vocab_size` of the tokenizer. None: steps and tokens come
        from `train.max_steps`, or stay open.
    first_row: the first training row as it will be seen, e.g. coloured by its loss mask.
    """
    rows = rows or {}
    layout = layout_of(recipe, world_size)
    vocab = recipe.model.vocab_size or rows.get("vocab_size") or recipe.data.tokenizer.vocab_size
    parts: list[RenderableType] = [
        _model_table(recipe, layout, vocab),
        _memory_table(recipe, layout, vocab),
        _run_table(recipe, layout, rows),
    ]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in warnings(recipe, layout.world)]
    if first_row is not None:
        parts += [Text("first training row", style="bold"), first_row]
    return Group(*parts)


def _model_table(recipe: Recipe, layout: Layout, vocab: int) -> Table:
    rows = padded_vocab(vocab, layout.tp)
    counts = count_parameters(recipe.model, rows)
    table = plain_table("parameters", "part", "parameters")
    for part, count in counts.by_part.items():
        table.add_row(part, human_count(count))
    table.add_row("total", f"{human_count(counts.total)}  ({counts.total:,})", style="bold")
    if recipe.lora.rank is not None:
        trained = count_adapters(recipe.model, recipe.lora)
        table.add_row("adapters", f"{human_count(trained)}  ({trained:,}; {trained / counts.total:.2%} of the model, which is frozen)", style="bold")
    if counts.active != counts.total:
        table.add_row("active", f"{human_count(counts.active)}  ({what_is_active(counts)})")
    if modules := counts.by_part.get("mtp"):
        table.add_row("without mtp", f"{human_count(counts.total - modules)}  (prediction modules share embedding and head with the model)")
    table.add_row("vocabulary", f"{vocab:,} ids in {rows:,} rows (a multiple of 128 and of tp({layout.tp}))")
    return table


def what_is_active(counts: Counts) -> str:
    """The definition, in words."""
    return "all but the experts a token does not choose" + (", and the prediction modules" if "mtp" in counts.by_part else "")


def _memory_table(recipe: Recipe, layout: Layout, vocab: int) -> Table:
    stages = memory_per_rank(recipe, vocab, layout.world)
    table = plain_table(
        f"memory of one rank ({layout.world} ranks, {recipe.train.precision})",
        "part",
        *(f"stage {stage['stage']}" for stage in stages) if len(stages) > 1 else ["each"],
    )
    labels = {
        "weights": "weights",
        "gradients": "gradients (FP32)",
        "masters": "masters (FP32)",
        "moments": "Adam moments (FP32)",
        **({"average": "average of weights (FP32)"} if recipe.train.ema_decay is not None else {}),
        "activations": "activations (estimate)",
        **({"host": "masters and moments on the host"} if recipe.optimizer.optimizer_cpu_offload else {}),
        "total": "total",
    }
    for part, label in labels.items():
        cells = [human_bytes(stage[part]) for stage in stages]
        table.add_row(label, *cells, style="bold" if part == "total" else "")
    return table


def _run_table(recipe: Recipe, layout: Layout, rows: Mapping[str, Any]) -> Table:
    train, length = recipe.train, recipe.data.sequence_length
    table = plain_table("run", "what", "value")
    sizes = f"tp({layout.tp}) * pp({layout.pp}) * cp({layout.cp}) * dp({layout.dp}) = {layout.world} ranks"
    if recipe.model.num_moe_experts is not None:
        sizes += f"; experts: etp({layout.etp}) * ep({layout.ep}) * dp({layout.expert_dp}) * pp({layout.pp})"
    table.add_row("layout", sizes)
    table.add_row("effective batch", effective_batch(recipe, layout))
    table.add_row("learning rate", _learning_rate(recipe, layout))
    if rows:
        known = {name: rows[name] for name in ("packs", "tokens", "scored_tokens") if name in rows}
        table.add_row(
            "epoch", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in known.items())
        )
    steps = total_steps(recipe, rows.get("packs"))
    if steps is None:
        table.add_row("steps", f"{train.epochs:g} epochs; their number is known when the data is read")
        table.add_row("tokens", f"at most {train.global_batch_size * length:,} a step")
    else:
        table.add_row(
            "steps", f"{steps:,}" + (f" (stops at {train.stop_at_step:,})" if train.stop_at_step else "")
        )
        tokens = steps * train.global_batch_size * length
        table.add_row(
            "tokens", f"{tokens:,} = {steps:,} steps * {train.global_batch_size} rows * {length} positions"
        )
    return table


def _learning_rate(recipe: Recipe, layout: Layout) -> str:
    optimizer, peak = recipe.optimizer, scaled_lr(recipe, layout.dp)
    text = f"{peak:g}, {optimizer.lr_decay_style} to {optimizer.min_lr:g}, {optimizer.lr_warmup_steps} warmup steps"
    if optimizer.scale_lr_with_data_parallel != "none":
        text += f" ({optimizer.lr:g} scaled {optimizer.scale_lr_with_data_parallel} by dp({layout.dp}))"
    return text


def plain_table(title: str, first: str, *columns: str) -> Table:
    """A borderless table; the columns after the first stand right, a single one left."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        show_header=len(columns) > 1,
    )
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right" if len(columns) > 1 else "left")
    return table


def human_count(count: int) -> str:
    """30532122624 -> 30.53B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def human_bytes(count: int) -> str:
    """Decimal units, as GPU vendors and checkpoints count: 141107412992 -> 141.1 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
