"""Reading a recipe: values, precedence, and messages that name field, value, rule and fix."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalign.config import load
from megalign.config.errors import ConfigError, Problem
from megalign.config.load import apply_overrides, dump_recipe, load_recipe
from megalign.config.schema import Recipe
from megalign.config.yaml12 import read_yaml, write_yaml
from megalign.models.presets import PRESETS

DEFAULTS = Recipe.model_validate({})


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def problems(path: object, *overrides: str) -> dict[str, str]:
    """field -> message of each problem that loading raises."""
    with pytest.raises(ConfigError) as raised:
        load_recipe(path, list(overrides))  # pyright: ignore[reportArgumentType]
    assert all(str(problem) in str(raised.value) for problem in raised.value.problems)
    return {problem.field: str(problem) for problem in raised.value.problems}


def test_defaults_are_asked_for(write):
    """An empty file is more often one that was not saved."""
    for nothing in ("", "# data: later\n", "---\n"):
        assert "holds no key" in "".join(problems(write(nothing)).values())
    assert load_recipe(write("{}")) == DEFAULTS
    assert load_recipe(write("model:\n  # hidden_size: 3\ndata: {tokenizer:}\n")) == DEFAULTS


@pytest.mark.parametrize(
    "text,value",
    # yaml.org/spec/1.2.2, section 10.3.2: examples of the core schema
    [("1e-4", 1e-4), ("2E5", 2e5), ("+12e03", 12e3), ("-.5", -0.5), ("3.", 3.0), ("0", 0), ("-19", -19), ("~", None),
     ("", None), ("true", True), ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("1_000", "1_000"), ("'1e-4'", "1e-4"),
     ("2026-11-21", "2026-11-21"), ("[a, 1e3]", ["a", 1e3]), ("1e-4x", "1e-4x"), ("-.inf", float("-inf"))],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text, value):
    read = read_yaml(text)
    assert read == value and type(read) is type(value)


WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8)  # PyYAML itself loses others
TRICKY = st.sampled_from(["1e-4", "no", "null", "0x1F", "010", "1.", "~", "<<", "=", "", "- a", "a: b", "#"])


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS, TRICKY), max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_back(data):
    back = read_yaml(write_yaml(data))
    assert back == data and [type(value) for value in back] == [type(value) for value in data]


def test_overrides_beat_the_file_and_the_file_beats_the_preset(write):
    file = write("model: {preset: tiny-moe, num_layers: 6, num_moe_experts: 8}\noptimizer: {lr: 3e-4}\n")
    recipe = load_recipe(file, ["optimizer.lr=1e-4", "model.num_moe_experts=16", "data.train=[a.jsonl, b.jsonl]"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.model.num_moe_experts == 16  # override over file over preset (4)
    assert recipe.model.num_layers == 6  # file over preset (4)
    assert recipe.model.moe_ffn_hidden_size == PRESETS["tiny-moe"]["moe_ffn_hidden_size"]  # preset over default
    assert recipe.model.moe_ffn_hidden_size != DEFAULTS.model.moe_ffn_hidden_size
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.data.sequence_length == DEFAULTS.data.sequence_length


def test_an_explicit_null_beats_the_preset_and_a_preset_can_be_an_override(write):
    recipe = load_recipe(write("model: {num_moe_experts: null}"), ["model.preset=mixtral-8x7b"])
    assert recipe.model.num_moe_experts is None
    assert recipe.model.hidden_size == 4096


def test_an_override_of_a_section_keeps_its_other_keys(write):
    recipe = load_recipe(write("optimizer: {lr: 3e-4, weight_decay: 0.1}"), ["optimizer={lr: 1e-4}"])
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1e-4, 0.1)
    assert load_recipe(write("{}"), ["data.tokenizer.path=tok"]).data.tokenizer.path == "tok"
    assert load_recipe(write("{}"), ["output=runs/a=b"]).output == "runs/a=b"


def test_overrides_of_a_recipe_in_hand(write):
    recipe = load_recipe(write("optimizer: {lr: 3e-4}"))
    changed = apply_overrides(recipe, ["parallel.tensor_model_parallel_size=2"])
    assert (changed.parallel.tensor_model_parallel_size, changed.optimizer.lr) == (2, 3e-4)
    assert recipe.parallel.tensor_model_parallel_size == 1
    assert apply_overrides(recipe, []) == recipe
    with pytest.raises(ConfigError, match="unknown key tp; did you mean parallel.tensor_model_parallel_size"):
        apply_overrides(recipe, ["tp=2"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_come_back_from_their_dump(write, preset):
    recipe = load_recipe(write(f"model: {{preset: {preset}}}\nname: 1e-4x\noutput: '1e-4'\n"))
    assert {key: getattr(recipe.model, key) for key in PRESETS[preset]} == PRESETS[preset]
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_a_dump_does_not_need_the_preset_it_came_from(write, monkeypatch):
    dumped = dump_recipe(load_recipe(write("model: {preset: tiny-moe}")))
    monkeypatch.setitem(PRESETS, "tiny-moe", {"hidden_size": 4})
    assert load_recipe(write(dumped)).model.hidden_size == 128


def test_every_error_at_once(write):
    found = problems(
        write("optimizer: {lerning_rate: 1e-3, weight_decay: -1}\nmodel: {num_layers: four}\nlr: 1\n"),
        "train.precision=fp64",
    )
    assert set(found) == {"optimizer.lerning_rate", "optimizer.weight_decay", "model.num_layers", "lr", "train.precision"}
    assert found["optimizer.lerning_rate"] == "unknown key optimizer.lerning_rate; did you mean optimizer.lr?"
    assert found["lr"] == "unknown key lr; did you mean optimizer.lr?"
    assert found["optimizer.weight_decay"].startswith("optimizer.weight_decay=-1: should be greater than or equal to 0; ")
    assert found["model.num_layers"].startswith("model.num_layers=four: should be a valid integer")
    assert "'fp32' or 'bf16'; the default is fp32" in found["train.precision"]


@pytest.mark.parametrize(
    "text,field,words",
    [
        ("train: {micro_batch_size: true}", "train.micro_batch_size", "=true: takes no true or false; the default is 1"),
        ("optimizer: {lr: .inf}", "optimizer.lr", "finite"),
        ("optimizer: {weight_decay: .nan}", "optimizer.weight_decay", "finite"),
        ("train: {global_batch_size: 2.5}", "train.global_batch_size", "=2.5: should be a valid integer"),
        ("optimizer: {lr: 0}", "optimizer.lr", "greater than 0"),
        ("optimizer: {lr_decay_style: cosin}", "optimizer.lr_decay_style", "did you mean cosine?"),
        ("name: 12", "name", 'quote it: "12"'),
        ("parallel: 3", "parallel", "is a section, not a value; write its keys below it: parallel.tensor"),
        ("data: {train: [1]}", "data.train", "should be a valid string"),
        ("model: {preset: tiny-mo}", "model.preset", "did you mean tiny-moe?"),
        ("optimizer.lr: 1e-4", "optimizer.lr", "dots are for overrides"),
        ("3: 4", "3", "unknown key 3"),
        ("train: {zzzqq: 1}", "train.zzzqq", "keys here are train.micro_batch_size, "),
    ],
)
def test_a_bad_value_says_what_to_write(write, text, field, words):
    found = problems(write(text))
    assert list(found) == [field]
    assert words in found[field]


def test_bad_yaml_names_file_and_line(write):
    file = write("model:\n  num_layers: 2\n  hidden_size: [3\ntrain: 3\n")
    assert f"{file}, line 4" in problems(file)[str(file)]
    file = write("optimizer:\n  lr: 1\n  lr: 2\n")
    assert f"{file}, line 3, column 3: key 'lr' is given twice" in problems(file)[str(file)]
    file = write("- a\n- b\n")
    assert "holds a list, not keys" in problems(file)[str(file)]
    assert problems(write("a: \t\n\t- b"))
    assert problems(write("? [a, b]\n: 3"))
    file.write_bytes(b"name: \xff\xfe")
    assert "UTF-8" in problems(file)[str(file)]


def test_bad_overrides_are_listed_with_the_other_errors(write):
    found = problems(write("lr: 1"), "x", "name=[", "=3")
    assert set(found) == {"x", "name=[", "=3", "lr"}
    assert "override 'x' is not section.key=value" in found["x"]


def test_a_missing_file_lists_the_recipes_there_are(tmp_path, monkeypatch):
    (tmp_path / "quickstart.yaml").write_text("name: quick\n")
    (tmp_path / "sft-moe.yaml").write_text("name: moe\n")
    monkeypatch.setattr(load, "RECIPES", tmp_path)
    assert load.list_recipes() == ["quickstart", "sft-moe"]
    (message,) = problems("quikstart").values()
    assert "no such file" in message and "quickstart, sft-moe" in message and "did you mean quickstart?" in message
    (message,) = problems(tmp_path).values()
    assert "is a folder" in message
    assert load_recipe("quickstart").name == load_recipe("quickstart.yaml").name == "quick"
    assert problems("nowhere/quickstart")  # a path is a path, not a name


def test_a_local_file_comes_before_a_recipe_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "quickstart.yaml").write_text("name: package\n")
    (tmp_path / "quickstart.yaml").write_text("name: local\n")
    monkeypatch.setattr(load, "RECIPES", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart.yaml").name == "local"
    assert load_recipe("quickstart").name == "package"


def test_every_recipe_of_the_package_loads():
    for name in load.list_recipes():
        assert isinstance(load_recipe(name), Recipe)


def test_the_error_survives_the_way_from_a_worker_process():
    error = ConfigError([Problem("a.b", "is wrong", "mend it", 3), Problem("file", "no such file", "write it")], "x.yaml")
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error) == "2 problems in x.yaml:\n  - a.b=3: is wrong; mend it\n  - no such file; write it"
    assert back.problems[0].value == 3
    assert str(pickle.loads(pickle.dumps(ConfigError("plain")))) == "plain"
