"""Which layers stand on which pipeline stage: evenly, with a short first or last stage, or as a layout string says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megalign.config.errors import Problem, not_a_multiple
from megalign.config.layout import Layout
from megalign.config.schema import Recipe

LAYOUT = "parallel.pipeline_model_parallel_layout"
FIRST, LAST = (f"parallel.num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
LETTERS = {"E": "the embedding", "t": "a transformer layer", "m": "a multi-token-prediction layer", "L": "the output and loss"}


def stage_layers(recipe: Recipe, layout: Layout) -> list[list[int]]:
    """Transformer layers of every chunk: `[stage][chunk]`, pp rows of vpp numbers.

    Chunk c of stage s is number c * pp + s in the order of the model. Not checked (`rules.check` does that): of an
    impossible recipe quotients are rounded down.
    """
    parallel, pp, vpp = recipe.parallel, layout.pp, layout.vpp
    if parallel.pipeline_model_parallel_layout is not None:
        chunks = [chunk.count("t") for chunk in unrolled(parallel.pipeline_model_parallel_layout)]
        chunks += [0] * (pp * vpp - len(chunks))
        return [[chunks[chunk * pp + stage] for chunk in range(vpp)] for stage in range(pp)]
    given: dict[int, int] = {}
    if parallel.num_layers_in_first_pipeline_stage is not None:
        given[0] = parallel.num_layers_in_first_pipeline_stage
    if parallel.num_layers_in_last_pipeline_stage is not None:
        given[pp - 1] = parallel.num_layers_in_last_pipeline_stage
    left = max(0, recipe.model.num_layers - sum(given.values()))
    middle = left // max(1, pp - len(given))
    return [[given.get(stage, middle) // vpp] * vpp for stage in range(pp)]


def unrolled(layout: str) -> list[str]:
    """The chunks of Megatron's layout string, in the order of the model.

    `Ett|(tt|)*2tL` is `Ett|tt|tt|tL`: bars divide chunks, `(...)*n` and `x*n` repeat, commas are decoration
    (megatron-core's pipeline_parallel_layer_layout.py:267).
    """
    layout = layout.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(pattern, lambda found: found[1] * int(found[2]), layout)
    return layout.split("|")


def pipeline(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Stages, and the chunks of a stage, hold equally many layers (transformer_block.py:157, 175), except as the
    first and the last stage, or a layout string, say."""
    parallel = recipe.parallel
    if layout.vpp > 1 and layout.pp == 1:  # parallel_state.py:746
        field = "parallel.virtual_pipeline_model_parallel_size"
        rule = "interleaving needs a pipeline, but pipeline_model_parallel_size is 1"
        fix = "set it to null, or raise parallel.pipeline_model_parallel_size"
        yield Problem(field, rule, fix, layout.vpp)
        return
    ends = {FIRST: parallel.num_layers_in_first_pipeline_stage, LAST: parallel.num_layers_in_last_pipeline_stage}
    ends = {field: count for field, count in ends.items() if count is not None}
    if parallel.pipeline_model_parallel_layout is not None:
        for field, count in ends.items():  # transformer_config.py:1317
            yield Problem(field, "pipeline_model_parallel_layout says it too", "set one of the two to null", count)
        yield from _layout_string(recipe, layout, parallel.pipeline_model_parallel_layout)
    elif ends:
        yield from _uneven_ends(recipe, layout, ends)
    elif (layers := recipe.model.num_layers) % (chunks := layout.pp * layout.vpp):
        sizes = f"pp({layout.pp})" + (f" * vpp({layout.vpp}) = {chunks}" if layout.vpp > 1 else "")
        fix = "choose a pipeline size that divides it, or give parallel.num_layers_in_first_pipeline_stage"
        yield not_a_multiple("model.num_layers", layers, chunks, sizes, fix)


def _uneven_ends(recipe: Recipe, layout: Layout, ends: dict[str, int]) -> Iterator[Problem]:
    """What is left is shared evenly by the other stages (transformer_config.py:1405), at least a layer each."""
    layers, pp, vpp = recipe.model.num_layers, layout.pp, layout.vpp
    left, others = layers - sum(ends.values()), pp - len(ends)
    field, count = next(iter(ends.items()))
    said = " + ".join(f"{name.split('_')[3]}({number})" for name, number in ends.items())
    if pp == 1:
        yield Problem(field, "there is one stage, pipeline_model_parallel_size is 1", "set it to null", count)
    elif left < others or bool(left) != bool(others):
        rule = f"{said} of num_layers({layers}) leave {left} for {others} other stages"
        fix = "choose numbers that leave each other stage at least one, and none over"
        yield Problem(field, rule, fix, count)
    elif others and left % others:
        rule = f"{said} of num_layers({layers}) leave {left} = {left // others} * {others} + {left % others} for {others} stages"
        yield Problem(field, rule, f"set it to {count + left % others}, so that the others share evenly", count)
    elif vpp > 1 and pp == 2 and len(ends) == 2:
        rule = "virtual stages of two uneven ends without a middle: megatron-core divides by their number (transformer_layer.py:137)"
        yield Problem(LAST, rule, "set it to null; the last stage gets what the first leaves", ends[LAST])
    elif vpp > 1:
        counts = {**ends, **({"model.num_layers": left // others} if others else {})}
        for name, number in counts.items():
            if number % vpp:
                rule = f"a stage of {number} layers has no {vpp} equal virtual stages"
                yield Problem(name, rule, f"choose multiples of virtual_pipeline_model_parallel_size({vpp})", layers if name.startswith("model") else number)


def _layout_string(recipe: Recipe, layout: Layout, text: str) -> Iterator[Problem]:
    """E first, L last, t as often as the model has layers, m as often as it has MTP layers, in pp * vpp chunks
    (pipeline_parallel_layer_layout.py:83)."""
    chunks, pp, vpp = unrolled(text), layout.pp, layout.vpp
    joined = "".join(chunks)

    def refuse(rule: str, fix: str) -> Problem:
        return Problem(LAYOUT, rule, fix, text)

    if strangers := sorted(set(joined) - set(LETTERS)):
        known = ", ".join(f"{letter} {meaning}" for letter, meaning in LETTERS.items())
        yield refuse(f"means nothing in {', '.join(strangers)}", f"write {known}, | between stages, (...)*n to repeat")
        return
    if len(chunks) != pp * vpp:
        need = f"pp({pp})" + (f" * vpp({vpp}) = {pp * vpp}" if vpp > 1 else "")
        whole = len(chunks) % pp == 0 and pp > 1
        fix = f"set parallel.virtual_pipeline_model_parallel_size to {len(chunks) // pp if len(chunks) > pp else 'null'}" if whole else "write as many"
        yield refuse(f"has {len(chunks)} stages, and the layout needs {need}", fix)
    if not (chunks[0].startswith("E") and chunks[-1].endswith("L")):
        yield refuse("the first stage must begin with E and the last end with L", "put E in front and L at the end")
    heads = recipe.model.mtp_num_layers or 0
    for letter, wanted, name in (("E", 1, ""), ("L", 1, ""), ("t", recipe.model.num_layers, "num_layers"), ("m", heads, "mtp_num_layers")):
        if (found := joined.count(letter)) != wanted:
            need = f"{name}({wanted})" if name else str(wanted)
            yield refuse(f"has {found} {letter} where {need} must stand", f"write {letter} {wanted} times")
    if heads and ("m" in joined[: joined.rfind("t")] or any("m" in chunk for chunk in chunks[:-1])):
        yield refuse("m must follow every t, on the last stage", "move it in front of L")
