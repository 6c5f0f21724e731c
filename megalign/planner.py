"""`megalign plan`: what a model or a recipe needs, and which layouts of given devices carry it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megalign.config.adviser import Advice, Candidate, advise
from megalign.config.communication import traffic_of
from megalign.config.errors import ConfigError, Problem
from megalign.config.hardware import DEVICES, Device
from megalign.config.layout import layout_of, padded_vocab, world_size_of
from megalign.config.load import apply_overrides, load_recipe
from megalign.config.memory import Algorithm, memory_per_rank, models_of
from megalign.config.plan import describe_plan, human_bytes, human_count, plain_table
from megalign.config.predict import step_time
from megalign.config.rules import check
from megalign.config.schema import Recipe
from megalign.config.size import count_parameters
from megalign.config.suggest import closest
from megalign.models.presets import PRESETS

ROWS_A_DEVICE = 4  # of the global batch, where a model is given and no recipe


def plan(
    what: str,
    overrides: list[str],
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    sequence_length: int | None = None,
    algorithm: str = "sft",
    reward_model: bool = False,
    top: int = 10,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print the plan of a recipe, or with `gpus` the layouts that fit, fastest first.

    what: a preset, a Hugging Face folder, or a recipe. gpu: a name of `hardware.DEVICES`, or cpu: measured here.
    Raises ConfigError for an unknown name, and where `gpus` is given without `gpu`.
    """
    if algorithm not in get_args(Algorithm):
        raise ConfigError([Problem("--algorithm", f"is none of {', '.join(get_args(Algorithm))}", "choose one", algorithm)])
    chosen = cast(Algorithm, algorithm)
    recipe = _recipe(what, overrides, gpus, sequence_length)
    if recipe.model.init_from is not None:
        from megalign.models.resolve import resolve_model

        recipe = resolve_model(recipe)
    vocabulary = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    device = _device(gpu, gpus, recipe.train.precision)
    out = console or Console(highlight=False)
    if gpus is None:
        check(recipe, world_size_of(recipe))
        content = _facts(recipe, vocabulary, world_size_of(recipe), device, chosen, reward_model)
        out.print_json(json.dumps(content)) if as_json else out.print(_page(recipe, content, chosen))
        return
    if device is None:
        raise ConfigError([Problem("--gpu", "is needed with --gpus", f"give one of {', '.join([*DEVICES, 'cpu'])}", None)])
    advice = advise(recipe, vocabulary, gpus, device, algorithm=chosen, reward_model=reward_model)
    best = advice.candidates[0] if advice.candidates else None
    content: dict[str, Any] = {
        "device": vars(device),
        "gpus": gpus,
        "tried": advice.tried,
        "refused": advice.refused,
        "too_large": advice.too_large,
        "layouts": [_line(candidate, gpus) for candidate in advice.candidates[:top]],
        "best": best and _facts(best.recipe, vocabulary, gpus, device, chosen, reward_model),
    }
    out.print_json(json.dumps(content)) if as_json else out.print(_advice_page(recipe, advice, content, device, gpus, chosen, top))


def _recipe(what: str, overrides: list[str], gpus: int | None, sequence_length: int | None) -> Recipe:
    if what in PRESETS or (Path(what) / "config.json").is_file():
        source = {"preset": what, **PRESETS[what]} if what in PRESETS else {"init_from": what}
        recipe = Recipe.model_validate({"model": source, "train": {"precision": "bf16"}})
        recipe = apply_overrides(recipe, overrides)
        if not any(override.startswith("train.global_batch_size=") for override in overrides):
            recipe.train.global_batch_size = ROWS_A_DEVICE * recipe.train.micro_batch_size * (gpus or world_size_of(recipe))
    else:
        try:
            recipe = load_recipe(what, overrides)
        except ConfigError as error:
            near = closest(what, list(PRESETS))
            raise ConfigError(f"{error}\n  or a preset: {', '.join(PRESETS)}{near}") if not Path(what).exists() else error from None
    if sequence_length is not None:
        recipe.data.sequence_length = sequence_length
    return recipe


def _device(name: str | None, ranks: int | None, precision: str) -> Device | None:
    if name is None:
        return None
    if name == "cpu":
        from megalign.trainer.peaks import measured_cpu

        return measured_cpu(ranks or 1, precision)
    if name not in DEVICES:
        raise ConfigError([Problem("--gpu", f"is none of {', '.join([*DEVICES, 'cpu'])}", f"choose one{closest(name, list(DEVICES))}", name)])
    return DEVICES[name]


def _facts(recipe: Recipe, vocabulary: int, world: int, device: Device | None, algorithm: Algorithm, reward_model: bool) -> dict[str, Any]:
    """Everything about one layout, as numbers."""
    layout = layout_of(recipe, world)
    rows = padded_vocab(vocabulary, layout.tp)
    counts = count_parameters(recipe.model, rows)
    kind = device.kind if device else "cuda"
    facts: dict[str, Any] = {
        "models": models_of(algorithm, reward_model, recipe),
        "parameters": {"total": counts.total, "active": counts.active, "by_part": counts.by_part},
        "layout": vars(layout),
        "memory_per_rank": memory_per_rank(recipe, vocabulary, world, algorithm=algorithm, reward_model=reward_model, device=kind),
        "communication": [
            {"stage": stage, **vars(traffic), "sent": traffic.sent} for stage in range(layout.pp) for traffic in traffic_of(recipe, layout, rows, stage)
        ],
    }
    if device is not None:
        facts["step_time"] = step_time(recipe, layout, rows, device, algorithm=algorithm).as_dict()
        facts["device"] = vars(device)
    return facts


def _line(candidate: Candidate, gpus: int) -> dict[str, Any]:
    return {
        "overrides": candidate.overrides(),
        "seconds_a_step": candidate.time.total,
        "tokens_per_second_per_device": candidate.tokens_per_second / gpus,
        "memory_per_rank": candidate.memory,
    }


def _page(recipe: Recipe, facts: dict[str, Any], algorithm: Algorithm) -> RenderableType:
    parts: list[RenderableType] = [describe_plan(recipe, facts["layout"]["world"])]
    if len(facts["models"]) > 1:
        parts.append(_memory_table(facts, algorithm))
    parts.append(_communication_table(facts))
    if "step_time" in facts:
        parts.append(_time_table(facts))
    return Group(*parts)


def _advice_page(
    recipe: Recipe, advice: Advice, content: dict[str, Any], device: Device, gpus: int, algorithm: Algorithm, top: int
) -> RenderableType:
    room = device.memory * device.usable
    head = (
        f"{gpus} {device.name} ({device.source}), {recipe.data.sequence_length} tokens a row, {recipe.train.global_batch_size} rows a step, "
        f"{recipe.train.precision}, {algorithm}: {', '.join(models_of(algorithm, recipe=recipe))}\n"
        f"{advice.tried} layouts tried, {advice.refused} refused by the validator, {advice.too_large} over "
        f"{device.usable:.0%} of {human_bytes(int(device.memory))}, {len(advice.candidates)} fit"
    )
    if not advice.candidates:
        nearest = advice.smallest
        need = f"\nthe nearest needs {human_bytes(nearest.memory)} of {human_bytes(int(room))}: {' '.join(nearest.overrides())}" if nearest else ""
        return Text(f"{head}{need}\ngive more devices, a shorter row, or a smaller global batch")
    table = plain_table("layouts, fastest first", "step", "tokens/s a device", "memory", "overrides")
    for candidate in advice.candidates[:top]:
        speed = f"{candidate.tokens_per_second / gpus:,.0f}"
        overrides = Text(" ".join(candidate.overrides()) or "(every device a replica)")  # Text: brackets are not markup
        table.add_row(_duration(candidate.time.total), speed, human_bytes(candidate.memory), overrides)
    table.columns[-1].justify = "left"
    best = content["best"]
    return Group(Text(head), table, Text("the first, with its arithmetic", style="bold"), _count_line(best), _memory_table(best, algorithm), _communication_table(best), _time_table(best))


def _count_line(facts: dict[str, Any]) -> Text:
    parameters = facts["parameters"]
    modules = ", and the prediction modules" if "mtp" in parameters["by_part"] else ""
    active = f", {human_count(parameters['active'])} active (all but the experts a token does not choose{modules})" if parameters["active"] != parameters["total"] else ""
    return Text(f"{human_count(parameters['total'])} parameters{active}")


def _memory_table(facts: dict[str, Any], algorithm: Algorithm) -> RenderableType:
    stages = facts["memory_per_rank"]
    fullest = max(stages[1:-1] or stages, key=lambda stage: stage["total"])
    shown = [stages[0], fullest, stages[-1]] if len(stages) > 4 else stages
    title = f"memory of one rank, {algorithm}: {', '.join(facts['models'])}"
    table = plain_table("", "part", *(f"stage {stage['stage']}" for stage in shown))
    for part in (name for name in stages[0] if name != "stage"):
        spell = human_count if part in ("parameters", "adapters") else human_bytes
        table.add_row(part, *(spell(stage[part]) for stage in shown), style="bold" if part == "total" else "")
    return _titled(title, table)


def _communication_table(facts: dict[str, Any]) -> RenderableType:
    busiest = max(range(facts["layout"]["pp"]), key=lambda stage: sum(line["sent"] for line in facts["communication"] if line["stage"] == stage))
    table = plain_table(f"communication of a step (a rank of stage {busiest})", "axis", "collective", "tensors", "sent", "for")
    for line in (line for line in facts["communication"] if line["stage"] == busiest):
        table.add_row(f"{line['axis']} ({line['ranks']})", line["operation"], human_bytes(int(line["payload"])), human_bytes(int(line["sent"])), line["why"])
    table.columns[-1].justify = "left"
    return table if table.row_count else Text("communication: none, one rank")


def _time_table(facts: dict[str, Any]) -> RenderableType:
    time, device = facts["step_time"], facts["device"]
    peak = device["fp32" if facts["memory_per_rank"][0]["weights"] == 4 * facts["memory_per_rank"][0]["parameters"] else "bf16"]
    table = plain_table("", "part", "seconds", "arithmetic")
    table.add_row("matmuls of a microbatch", _duration(time["matmul"]), f"{time['flops']:.3g} FLOPs / ({peak:.3g} * {device['matmul_share']:g})")
    table.add_row("memory of a microbatch", _duration(time["memory"]), f"{time['memory'] * device['memory_bandwidth']:.3g} bytes / {device['memory_bandwidth']:.3g}")
    table.add_row("collectives of a microbatch", _duration(time["communication"]), f"link {device['link']:.3g}, network {device['network']:.3g} bytes/s")
    if device["launch"]:
        table.add_row("operations of a microbatch", _duration(time["launches"]), f"{time['launches'] / device['launch']:,.0f} * {device['launch'] * 1e6:.1f} us")
    table.add_row("microbatches and bubble", "", f"{time['microbatches']} + {time['bubble']:g}")
    table.add_row("gradients and weights of replicas", _duration(time["replicas"]), "")
    table.add_row("optimizer", _duration(time["optimizer"]), "")
    micro = time["matmul"] + time["memory"] + time["communication"] + time["launches"]
    sums = f"({time['microbatches']} + {time['bubble']:g}) * {_duration(micro)} + {_duration(time['replicas'])} + {_duration(time['optimizer'])}"
    table.add_row("step", _duration(time["total"]), sums, style="bold")
    table.columns[-1].justify = "left"
    return _titled(f"predicted step on {device['name']} ({device['source']})", table)


def _titled(title: str, table: Table) -> RenderableType:
    """A title as long as the page, not as the table."""
    table.title = None
    return Group(Text(title, style="bold"), table)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
