"""Recipes: validation, YAML, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.errors import RecipeError
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import load_recipe, merge_fields, parse_assignments
from pcam_automl.yaml_text import parse_yaml


def test_all_faults_are_reported_together_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError) as fault:
        build_recipe({"lrr": 1, "crop_size": 30, "optimizer": "adamww", "lr": -1})
    text = str(fault.value)
    assert "recipe.lrr is not a known field (did you mean 'lr'?)" in text
    assert "recipe.crop_size must be greater than or equal to 32, got 30" in text
    assert "got 'adamww' (did you mean 'adamw'?)" in text
    assert "recipe.lr must be greater than 0, got -1" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": 33}, r"recipe.crop_size must be even, got 33 \(did you mean 34\?\)"),
        ({"crop_size": 98}, "recipe.crop_size must be less than or equal to 96, got 98"),
        ({"epochs": 1, "views": 5}, "epochs and views exclude each other"),
        ({"warmup": 0.6, "decay": 0.6}, "warmup [+] decay must be at most 1"),
        ({"lr": float("nan")}, "recipe.lr"),
        ({"lr": "fast"}, "recipe.lr .*got 'fast'"),
        ({"batch_size": 1}, "recipe.batch_size must be greater than or equal to 2, got 1"),
        ({"augment": 1.5}, "recipe.augment must be less than or equal to 1, got 1.5"),
    ],
)
def test_values_out_of_range_name_key_rule_and_value(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(fields)


@given(
    lr=st.floats(1e-8, 10),
    crop=st.integers(16, 48).map(lambda n: 2 * n),
    augment=st.floats(0, 1),
    views=st.none() | st.integers(1, 10**9),
    ids=st.lists(st.text("0123456789abcdef", min_size=1, max_size=8), max_size=4),
)
def test_yaml_gives_the_same_recipe_back(
    lr: float, crop: int, augment: float, views: int | None, ids: list[str]
) -> None:
    recipe = build_recipe({"lr": lr, "crop_size": crop, "augment": augment, "views": views, "exclude_ids": ids})
    again = build_recipe(parse_yaml(recipe.to_yaml(), "x"))
    assert again == recipe
    assert again.hash == recipe.hash


def test_another_value_gives_another_hash() -> None:
    assert Recipe().hash != Recipe(lr=3e-3).hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nlr: 2\n", "lr given twice"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("lr: [", "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as fault:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(fault.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"backbone: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(tmp_path / "huge.yaml")


def test_assignments_are_typed_as_yaml_and_scientific_notation_is_a_number() -> None:
    assert parse_assignments(["lr=1e-3", "flips=false", "crop_size=64", "backbone=resnet18", "exclude_ids=[a, b]"]) == {
        "lr": 1e-3,
        "flips": False,
        "crop_size": 64,
        "backbone": "resnet18",
        "exclude_ids": ["a", "b"],
    }


def test_bad_assignments_are_reported_together() -> None:
    with pytest.raises(
        RecipeError,
        match=r"wants field=value, got 'lr'; --set cropsize: .*did you mean 'crop_size'.*; --set lr given twice",
    ):
        parse_assignments(["lr", "cropsize=3", "lr=1", "lr=2"])


def test_a_value_left_out_is_said_to_be_missing() -> None:
    with pytest.raises(RecipeError, match=r"--set crop_size= has no value; write .*; --set lr= has no value"):
        parse_assignments(["crop_size=", "lr= "])
    assert parse_assignments(["input_size=null"]) == {"input_size": None}


def test_keys_given_twice_are_found_at_every_level() -> None:
    text = "a: {b: {c: 1, c: 2}, d: [{e: 1, e: 1}]}\nf: 1\nf: 2\n"
    with pytest.raises(RecipeError) as fault:
        parse_yaml(text, "x.yaml")
    for key in ("a.b.c", "a.d.1.e", "f"):
        assert f"x.yaml: {key} given twice; keep one" in str(fault.value)
    assert parse_yaml("a: &same {b: 1}\nc: *same\nd: &loop [*loop]\n", "x")["c"] == {"b": 1}


def test_a_repeated_key_hides_no_other_fault_and_set_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("lr: 1\nlr: 2\nbatch_size: 1\n")
    with pytest.raises(RecipeError) as fault:
        load_recipe(file, overrides={"crop_size": 33})
    for part in (f"{file}: lr given twice", f"{file}.batch_size must be", "--set crop_size must be even"):
        assert part in str(fault.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nlr: [1,\n", "line 3, column 1"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        ("a: 1\nb: \a", "line 2, column 4"),
    ],
)
def test_yaml_faults_name_the_file_the_line_and_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"^mine/r.yaml is not valid YAML: {place}: ") as fault:
        load_recipe(Path("mine/r.yaml"))
    assert "unicode string" not in str(fault.value)


def test_naming_one_budget_drops_the_other() -> None:
    assert merge_fields({"epochs": 3, "lr": 1}, {"views": 10}) == {"views": 10, "lr": 1}
    assert merge_fields({"views": 3}, {"epochs": 2.0}) == {"epochs": 2.0}


def test_views_follow_epochs() -> None:
    assert Recipe(epochs=2.5).n_views(100) == 250
    assert Recipe(views=7).n_views(100) == 7
    assert Recipe().n_views(10) == 50
