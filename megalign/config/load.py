"""One YAML file plus `section.key=value` overrides -> a validated `Recipe`, or every error at once.

Order of precedence: override, file, preset, default.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megalign.config.errors import ConfigError, Problem, shown
from megalign.config.schema import Recipe, Section
from megalign.config.suggest import closest, known_keys, suggest
from megalign.config.yaml12 import read_yaml, write_yaml
from megalign.models.presets import PRESETS

RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    path: a YAML file, or the bare name of a recipe that travels in the package (`quickstart`).
    overrides: `section.key=value`, the value in YAML (`optimizer.lr=1e-4`, `data.train=[a.jsonl, b.jsonl]`).
    Raises ConfigError with every unknown key, wrong type and bad value, each with its fix.
    """
    return _recipe(_read(find_recipe(path)), overrides or [], str(path))


def apply_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """A copy of `recipe` with `section.key=value` overrides, as of `load_recipe`. Raises ConfigError.

    Every field of a recipe in hand is explicit, so that a preset named here changes nothing else.
    """
    return _recipe(recipe.model_dump(mode="json"), overrides, "the overrides")


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults and preset included, as YAML that `load_recipe` reads back equal."""
    return write_yaml(recipe.model_dump(mode="json"))


def list_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def find_recipe(path: str | Path) -> Path:
    """The file itself, or the package's recipe of that name. Raises ConfigError naming those that exist."""
    file, name = Path(path), Path(path).name.removesuffix(".yaml")
    if file.is_file():
        return file
    if str(path) in (name, f"{name}.yaml") and name in list_recipes():
        return RECIPES / f"{name}.yaml"
    what = "is a folder, not a recipe file" if file.is_dir() else "no such file"
    fix = f"give a YAML file, or one of these recipes: {', '.join(list_recipes()) or '(none)'}"
    raise ConfigError([Problem(str(path), f"{path}: {what}", fix + closest(name, list_recipes()))])


def _recipe(data: dict[str, Any], overrides: list[str], source: str) -> Recipe:
    problems: list[Problem] = []
    for override in overrides:
        _apply(data, override, problems)
    data = _open_sections(data)
    _fill_preset(data, problems)
    problems += _no_bool_or_infinite_numbers(data)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # A union reports each of its members, and some values were refused above: one line a field is enough.
        by_field = {problem.field: problem for problem in [*map(_translate, error.errors()), *problems]}
        problems = list(by_field.values())
    else:
        if not problems:
            return recipe
    raise ConfigError(problems, source)


def _read(file: Path) -> dict[str, Any]:
    def refuse(rule: str, fix: str) -> ConfigError:
        return ConfigError([Problem(str(file), rule, fix)], str(file))

    try:
        data = read_yaml(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(file)
        raise refuse(f"{where}: {error.problem or error.context}", "correct the YAML there") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refuse(f"{file}: not UTF-8 text in YAML ({error})", "save it as UTF-8") from None
    if data is None:
        raise refuse(f"{file}: holds no key; all defaults are written {{}}", "start from one: megalign recipes copy quickstart FILE")
    if not isinstance(data, dict):
        rule = f"{file}: holds a {type(data).__name__}, not keys"
        raise refuse(rule, "write `section:` and `key: value` below")
    return data


def _apply(data: dict[str, Any], override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        rule = f"override {override!r} is not section.key=value"
        problems.append(Problem(override, rule, "write e.g. optimizer.lr=1e-4"))
        return
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        rule = f"override {override!r}: the value is not YAML"
        problems.append(Problem(override, rule, "quote it: key='\"value\"'"))
        return
    *sections, leaf = key.strip().split(".")
    for section in sections:
        inner = data.get(section)
        data[section] = dict(inner) if isinstance(inner, dict) else {}
        data = data[section]
    old = data.get(leaf)
    data[leaf] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value


def _open_sections(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A section whose keys are all commented out reads as null: make it empty."""
    opened = {}
    for key, value in data.items():
        is_section = _is_section(f"{prefix}{key}")
        value = {} if value is None and is_section else value
        opened[key] = (
            _open_sections(value, f"{prefix}{key}.") if is_section and isinstance(value, dict) else value
        )
    return opened


def _fill_preset(data: dict[str, Any], problems: list[Problem]) -> None:
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(name := model.get("preset"), str):
        return
    if name in PRESETS:
        data["model"] = {**PRESETS[name], **model}
    else:
        fix = f"choose one of {', '.join(PRESETS)}{closest(name, list(PRESETS))}"
        problems.append(Problem("model.preset", "no such preset", fix, name))


def _no_bool_or_infinite_numbers(data: dict[str, Any], prefix: str = "") -> Iterator[Problem]:
    """What pydantic lets through: `true` as the number 1, and infinities."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        field = known_keys().get(dotted)
        if isinstance(value, dict):
            yield from _no_bool_or_infinite_numbers(value, f"{dotted}.")
        elif field and isinstance(value, bool) and bool not in (field.annotation, *typing.get_args(field.annotation)):
            yield Problem(dotted, "takes no true or false", _fix(dotted, value), value)
        elif field and isinstance(value, float) and not math.isfinite(value):
            yield Problem(dotted, "must be a finite number", _fix(dotted, value), value)


def _translate(error: Any) -> Problem:
    """A line of pydantic's ValidationError as a Problem."""
    dotted = ".".join(str(part) for part in error["loc"])
    section = _section_in_a_dict(error["loc"])
    if section is not None and (leaf := str(error["loc"][-1])) not in section.model_fields:
        return Problem(dotted, f"unknown key {dotted}", f"keys here are {', '.join(section.model_fields)}{closest(leaf, list(section.model_fields))}")
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown(dotted, str(error["loc"][-1]))
    if section is not None:
        choices = error["ctx"].get("expected") if "ctx" in error else None
        return Problem(dotted, error["msg"].removeprefix("Input "), _fix_of(section.model_fields[leaf], error["input"], choices), error["input"])
    while dotted not in known_keys():  # a list index or a union's tag behind the field
        dotted = dotted.rpartition(".")[0]
    rule = "is a section, not a value" if _is_section(dotted) else error["msg"].removeprefix("Input ")
    choices = error["ctx"].get("expected") if "ctx" in error else None
    return Problem(dotted, rule, _fix(dotted, error["input"], choices), error["input"])


def _unknown(dotted: str, leaf: str) -> Problem:
    if "." in leaf:
        fix = "dots are for overrides; in a file write the key below its section"
    elif near := suggest(dotted):
        fix = f"did you mean {' or '.join(near)}?"
    else:
        fix = f"keys here are {', '.join(_keys_of(dotted.rpartition('.')[0]))}"
    return Problem(dotted, f"unknown key {dotted}", fix)


def _section_in_a_dict(where: tuple[Any, ...]) -> type[Section] | None:
    """The section of which a key is wrong, where a recipe names sections itself (rm.heads.NAME.loss)."""
    for depth in range(1, len(where) - 1):
        info = known_keys().get(".".join(map(str, where[:depth])))
        inner = typing.get_args(info.annotation)[1:] if info is not None and typing.get_origin(info.annotation) is dict else ()
        if depth == len(where) - 2 and inner and isinstance(inner[0], type) and issubclass(inner[0], Section):
            return inner[0]
    return None


def _fix(field: str, value: Any, choices: str | None = None) -> str:
    if _is_section(field):
        return f"write its keys below it: {', '.join(_keys_of(field))}"
    return _fix_of(known_keys()[field], value, choices)


def _fix_of(info: FieldInfo, value: Any, choices: str | None) -> str:
    if info.annotation in (str, str | None) and not isinstance(value, (dict, list)):
        return f'quote it: "{shown(value)}"'
    misspelt = closest(str(value), re.findall(r"'([^']+)'", choices)) if choices else ""
    meaning = f" ({info.description})" if info.description else ""
    default = {key: part.model_dump() if isinstance(part, Section) else part for key, part in info.default.items()} if isinstance(info.default, dict) else info.default
    return f"the default is {shown(default)}{misspelt}{meaning}"


def _is_section(field: Any) -> bool:
    return any(key.startswith(f"{field}.") for key in known_keys())


def _keys_of(section: str) -> list[str]:
    prefix = f"{section}." if section else ""
    return [key for key in known_keys() if key.startswith(prefix) and "." not in key[len(prefix) :]]
