"""Whatever stands in a recipe, the answer is a recipe or a ConfigError that says what to do; fuzzed with hypothesis."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from megalign.config.advice import warnings
from megalign.config.errors import ConfigError
from megalign.config.layout import effective_batch, layout_of, total_steps, world_size_of
from megalign.config.load import RECIPES, apply_overrides, dump_recipe, list_recipes, load_recipe
from megalign.config.rules import check
from megalign.config.schema import Recipe, Section
from megalign.config.stages import stage_layers
from megalign.config.suggest import known_keys
from megalign.config.yaml12 import write_yaml

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SCALARS = st.none() | st.booleans() | st.integers(-3, 70_000) | st.floats() | st.text(max_size=12) | st.dates()
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
KEYS = st.sampled_from(sorted({part for key in known_keys() for part in (key, key.rpartition(".")[2])})) | st.text(max_size=10)
RECIPE_LIKE = st.dictionaries(KEYS, ANYTHING | st.dictionaries(KEYS, ANYTHING, max_size=4), max_size=5)


def recipe_or_problems(load: typing.Callable[[], Recipe]) -> Recipe | None:
    """The recipe; None after a ConfigError, which must be fit to be read. Any other exception fails the test."""
    try:
        return load()
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.field is not None and problem.rule and problem.fix, problem
            assert str(problem) in str(error) and "pydantic" not in str(error)
        return None


@FUZZ
@given(text=st.text(max_size=120) | st.binary(max_size=60))
@example(text="a: &x [*x]")
@example(text="? [1, 2]\n: 3")
@example(text="model: {1: 2, true: 3}")
@example(text="{" * 2000)
@example(text="- a\n- b")
@example(text="a: !!python/object/apply:os.system ['true']")
@example(text="x: 0x7fffffffffffffffffffffffffffffff")
@example(text="train: {max_steps: " + "9" * 5000 + "}")
def test_any_file_is_a_recipe_or_an_error(tmp_path: Path, text: str | bytes):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    recipe_or_problems(lambda: load_recipe(file))


@FUZZ
@given(tree=RECIPE_LIKE)
def test_any_tree_of_keys_is_a_recipe_or_an_error(tmp_path: Path, tree: dict[str, Any]):
    file = tmp_path / "recipe.yaml"
    file.write_text(write_yaml(tree), encoding="utf-8", errors="surrogatepass")
    recipe = recipe_or_problems(lambda: load_recipe(file))
    if recipe is not None:
        stays(recipe, file)


@FUZZ
@given(key=KEYS, value=st.text(max_size=20) | SCALARS.map(str))
@example(key="train", value="{max_steps: 3}")
@example(key="train.max_steps.x", value="3")
@example(key="..", value="1")
@example(key="name", value="{a: 1}")
def test_any_override_is_a_recipe_or_an_error(key: str, value: str):
    recipe_or_problems(lambda: apply_overrides(Recipe(), [f"{key}={value}"]))


def values_of(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that the schema allows for a field; sizes small, so that layouts often fit."""
    bounds: list[Any] = [limit.ge for limit in field.metadata if isinstance(limit, annotated_types.Ge)]
    least = max([*bounds, 0])
    above: list[Any] = [limit.gt for limit in field.metadata if isinstance(limit, annotated_types.Gt)]
    shortest = max([limit.min_length for limit in field.metadata if isinstance(limit, annotated_types.MinLen)] + [1])
    below: list[Any] = [limit.lt for limit in field.metadata if isinstance(limit, annotated_types.Lt)]
    most: list[Any] = [limit.le for limit in field.metadata if isinstance(limit, annotated_types.Le)]

    def of(kind: Any) -> st.SearchStrategy[Any]:
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            return st.one_of([of(member) for member in typing.get_args(kind)])
        if typing.get_origin(kind) is typing.Literal:
            return st.sampled_from(typing.get_args(kind))
        if typing.get_origin(kind) is list:
            return st.lists(of(typing.get_args(kind)[0]), max_size=2)
        if typing.get_origin(kind) is dict:
            return st.dictionaries(*(of(member) for member in typing.get_args(kind)), max_size=2)
        if typing.get_origin(kind) is tuple:
            return st.tuples(*(of(member) for member in typing.get_args(kind)))
        if isinstance(kind, type) and issubclass(kind, Section):
            return recipes(kind)
        numbers = st.sampled_from([1, 2, 4, 8, 12, 64, 96, 256, 300]).filter(lambda n: n >= least)
        return {
            bool: st.booleans(),
            int: numbers if least <= 300 else st.just(least),
            float: st.floats(
                max(above + [float(least)]), min([*below, *most, 16.0]), exclude_min=bool(above), exclude_max=bool(below), allow_subnormal=False
            ),
            str: st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=shortest, max_size=6),
            type(None): st.none(),
        }[kind]

    return of(field.annotation)


def recipes(section: type[Section] = Recipe) -> st.SearchStrategy[Any]:
    """Sections with any keys given, the others left at their defaults; as plain data."""
    fields = {name: values_of(field) for name, field in section.model_fields.items() if name != "preset"}
    required = {name: fields.pop(name) for name, field in section.model_fields.items() if field.is_required()}
    return st.fixed_dictionaries(required, optional=fields).map(lambda given: {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()})


def stays(recipe: Recipe, file: Path) -> None:
    """Written out and read back it is the same."""
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


@FUZZ
@given(data=recipes())
def test_every_valid_recipe_survives_and_is_judged(tmp_path: Path, data: dict[str, Any]):
    """What passes `check` has a whole layout; what does not is told why; nothing else is raised on the way."""
    try:
        recipe = Recipe.model_validate(data)
    except ValueError as error:
        raise AssertionError("the strategy should only make valid data") from error
    stays(recipe, tmp_path / "recipe.yaml")
    warnings(recipe)
    layout = layout_of(recipe)
    effective_batch(recipe, layout)
    steps = total_steps(recipe, 100)
    assert steps is None or steps >= 0
    try:
        check(recipe)
    except ConfigError as error:
        known = {*known_keys(), "parallel"}
        assert error.problems and all(problem.field in known for problem in error.problems)
        return
    assert layout.tp * layout.pp * layout.cp * layout.dp == layout.world == world_size_of(recipe)
    chunks = stage_layers(recipe, layout)  # stages may be uneven
    assert len(chunks) == layout.pp and sum(map(sum, chunks)) == recipe.model.num_layers and recipe.model.num_attention_heads % layout.tp == 0
    assert layout.microbatches * recipe.train.micro_batch_size * layout.dp == recipe.train.global_batch_size
    assert layout.world % (layout.etp * layout.ep * layout.pp) == 0


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from([key for key in known_keys() if len(key.rpartition(".")[2]) >= 8]), place=st.integers(1, 6), letter=st.sampled_from("abcxyz_"))
def test_a_slip_of_the_finger_is_understood(key: str, place: int, letter: str):
    """One letter too many in a long key: refused, with the key that was meant."""
    section, _, leaf = key.rpartition(".")
    slip = leaf[:place] + letter + leaf[place:]
    if f"{section}.{slip}" in known_keys():
        return
    with pytest.raises(ConfigError) as raised:
        apply_overrides(Recipe(), [f"{section}.{slip}=1" if section else f"{slip}=1"])
    assert key in str(raised.value)


def test_our_own_recipes_are_among_them(tmp_path: Path):
    for name in list_recipes():
        stays(load_recipe(RECIPES / f"{name}.yaml"), tmp_path / "recipe.yaml")
