"""The shipped recipes and spaces: what stands in the files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.models.factory import build_network, check_runs
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.search.space import load_space

NOTEBOOKS = {
    "keras_cnn_1",
    "keras_cnn_2",
    "resnet152v2_transfer",
    "densenet169_onecycle",
    "cnn_basic",
    "cnn_deep",
    "cnn_prelu",
    "unet_dense",
    "dense_linear",
    "unet_timm",
}
KERAS = {"weight_decay": 0.0, "clip_norm": 0.0, "ema": 0.0, "schedule": "constant", "warmup": 0.0, "augment": 0.0}


def recipe_of(name: str, **overrides: Any) -> Recipe:
    return load_recipe(find_config("recipes", name), overrides=overrides)


def test_every_notebook_has_its_recipe() -> None:
    assert set(list_configs("recipes")) >= NOTEBOOKS


@pytest.mark.parametrize("name", list_configs("recipes"))
def test_recipe_runs_and_its_first_line_describes_it(name: str) -> None:
    recipe = recipe_of(name, pretrained=False)
    check_runs(recipe)
    px = recipe.network_px
    with torch.device("meta"):
        output = build_network(recipe, Weights("none"), seed=0)(torch.empty(2, 3, px, px))
    assert output.shape in [(2, 1), (2, 1, px, px), (2, 2, px, px)]
    first = find_config("recipes", name).read_text().splitlines()[0]
    assert first.startswith("# ")
    assert 20 < len(first) <= 140


@pytest.mark.parametrize(
    "name", ["keras_cnn_1", "keras_cnn_2", "cnn_basic", "cnn_deep", "cnn_prelu", "resnet152v2_transfer"]
)
def test_keras_notebooks_train_plainly(name: str) -> None:
    recipe = recipe_of(name)
    assert {field: getattr(recipe, field) for field in KERAS} == KERAS
    assert recipe.eps == 1e-7
    assert recipe.tta == "none"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("keras_cnn_1", {"lr": 1e-4, "batch_size": 256, "epochs": 10, "valid_share": 0.25, "input_size": 64, "crop_size": 96}),
        ("keras_cnn_2", {"lr": 1e-4, "batch_size": 256, "epochs": 10, "valid_share": 0.25, "normalise": "unit"}),
        ("cnn_basic", {"optimizer": "adam", "lr": 1e-3, "epochs": 10, "batch_size": 50, "balance": "undersample", "beta2": 0.999}),
        ("cnn_deep", {"optimizer": "adam", "lr": 1e-4, "epochs": 30, "valid_share": 0.15}),
        ("cnn_prelu", {"optimizer": "rmsprop", "lr": 1e-3, "epochs": 30, "beta1": 0.0, "beta2": 0.9}),
        ("resnet152v2_transfer", {"backbone": "resnetv2_101.a1h_in1k", "pretrained": True, "head": "mlp", "hidden": (64, 64),
                                  "dropout": 0.2, "label_smoothing": 0.1, "trainable": 0.1, "epochs": 3, "batch_size": 64}),
        ("densenet169_onecycle", {"crop_size": 90, "head": "fastai", "hidden": (512,), "dropout": 0.5, "normalise": "dataset",
                                  "tta": "random", "tta_views": 12, "rotation_deg": 3.0, "shift_px": 2.0, "brightness": 0.07,
                                  "contrast": 0.05, "hue": 0.0, "stain": 0.0, "augment": 1.0, "valid_share": 0.1}),
        ("unet_dense", {"task": "dense", "tile_size": 512, "batch_size": 6, "epochs": 5, "lr": 1e-4, "optimizer": "adam"}),
    ],
)  # fmt: skip
def test_recipe_has_its_notebooks_values(name: str, fields: dict[str, Any]) -> None:
    recipe = recipe_of(name)
    assert {field: getattr(recipe, field) for field in fields} == fields


@pytest.mark.parametrize("name", ["cnn_basic", "cnn_deep", "cnn_prelu"])
def test_two_patches_are_left_out(name: str) -> None:
    assert recipe_of(name).exclude_ids == (
        "3147e34a392cc94d7071dc31fb56c76c8c7a4d87",
        "9369c7278ec8bcc6c880d99194de09fc2bd4efbe",
    )


def test_one_cycle_recipe_has_two_stages_of_8_and_12_epochs() -> None:
    recipe = recipe_of("densenet169_onecycle")
    frozen, whole = recipe.stages
    assert [stage.share * (recipe.epochs or 0) for stage in recipe.stages] == pytest.approx([8, 12])
    assert (frozen.lr, frozen.trainable, frozen.weight_decay) == (2e-2, 0.0, 1e-4)
    assert (whole.lr_low, whole.lr, whole.trainable) == (4e-5, 4e-4, 1.0)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("resnet152v2_transfer", {"backbone": "resnetv2_152", "pretrained": False, "trainable": 1.0}),
        ("unet_dense", {"tile_size": 96, "batch_size": 32}),
        ("resnet152v2_transfer", {"subsample": 0.3, "augment": 0.5}),
    ],
)
def test_what_the_comments_suggest_works(name: str, overrides: dict[str, Any]) -> None:
    check_runs(recipe_of(name, **overrides))


@pytest.mark.parametrize("name", ["lr_only", "cnn", "dense"])
def test_space_varies_what_its_name_says(name: str) -> None:
    space = load_space(name)
    wanted = {"lr_only": {"lr"}, "cnn": {"cnn_convs", "cnn_kernel", "cnn_norm"}, "dense": {"backbone", "batch_size"}}
    assert wanted[name] <= set(space.parameters)
    if name == "lr_only":
        assert list(space.parameters) == ["lr"]
        assert (space.base["patience"], space.base["monitor"], space.base["epochs"]) == (2, "loss", 10)


def test_every_combination_of_the_cnn_space_fits_its_smallest_crop() -> None:
    space = load_space("cnn")
    for backbone in space.choices("backbone"):
        for norm in space.choices("cnn_norm"):
            fields = {"backbone": backbone, "cnn_norm": norm, "cnn_convs": 3, "cnn_kernel": 5, "crop_size": 64}
            check_runs(Recipe(**fields))


def test_every_encoder_of_the_dense_space_has_a_decoder() -> None:
    space = load_space("dense")
    for backbone in space.choices("backbone"):
        check_runs(Recipe(task="dense", decoder="unet", tile_size=96, backbone=str(backbone)))
