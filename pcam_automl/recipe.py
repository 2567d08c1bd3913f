"""Recipe: one complete training with nothing left open. Reads no file; trains nothing and knows no search.

A trial is a recipe, the winner is a recipe, a model bundle carries its recipe. Fields are flat, so that every one
of them can be pinned with ``--set field=value`` or varied by a search space.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pcam_automl.errors import RecipeError, did_you_mean
from pcam_automl.files import sha256_of_json

PINS = "--set"
"""The option that fixes single fields, as messages name it."""
PATCH_PX = 96
CENTRE_PX = 32
"""Only the centre 32x32 decides the label (PatchCamelyon, Veeling et al. 2018)."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Stage(BaseModel):
    """A part of a training with its own learning rate and its own trainable layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    share: float = Field(gt=0.0, le=1.0, description="of the training's views; the shares of all stages sum to 1")
    lr: Positive = Field(description="peak learning rate of the classifier and the last layers")
    lr_low: Positive | None = Field(None, description="of the first layers, geometric in between; None is lr for all")
    weight_decay: NonNegative | None = Field(None, description="None is the recipe's")
    trainable: Fraction = Field(1.0, description="last share of the backbone that trains; 0 is the head alone")

    @model_validator(mode="after")
    def _rising(self) -> Stage:
        if self.lr_low is not None and self.lr_low > self.lr:
            raise ValueError(f"lr_low must be at most lr, got {self.lr_low} and {self.lr}")
        return self


class Recipe(BaseModel):
    """One complete training. Frozen, validated, hashable, readable as YAML; see the fields for units and ranges."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Literal["patch", "dense"] = Field("patch", description="one probability a patch, or one a pixel")
    backbone: str = Field("resnet10t", min_length=1, description="a timm model name, the notebooks' networks included")
    pretrained: bool = Field(False, description="start from pretrained weights; where they lie is a setting of the run")
    crop_size: int = Field(64, ge=CENTRE_PX, le=PATCH_PX, description="side of the centre crop in px, even")
    tile_size: int | None = Field(
        None, ge=16, le=2048, description="task dense, in place of crop_size: side of a tile in px, a multiple of 16"
    )
    input_size: int | None = Field(
        None, ge=CENTRE_PX, le=384, description="the crop is resized to this side; None keeps it"
    )
    normalise: Literal["backbone", "dataset", "unit"] = Field(
        "backbone", description="channel statistics: the backbone's own, those of the training set, or [0, 1] as it is"
    )
    decoder: Literal["none", "unet"] = Field("none", description="task dense: a U-Net decoder behind a timm backbone")
    head: Literal["linear", "mlp", "fastai"] = Field(
        "linear",
        description="linear: the network's own; mlp: pool, dropout, (dense, ReLU, BN) each; fastai: average and max pool, (BN, dropout, dense, ReLU) each, BN, dropout",
    )
    hidden: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        (), max_length=4, description="dense widths of an mlp or fastai head"
    )
    dropout: Fraction = Field(
        0.0, description="dropout before the classifier; a fastai head has half of it before its dense layers"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="0.1 trains towards 0.05 and 0.95")

    cnn_filters: tuple[Annotated[int, Field(ge=1, le=2048)], ...] | None = Field(
        None,
        min_length=1,
        max_length=6,
        description="filters of each block of a notebook's network; None is its own, here and below",
    )
    cnn_convs: int | None = Field(None, ge=1, le=8, description="convolutions in a block")
    cnn_kernel: Literal[1, 3, 5, 7] | None = Field(None, description="side of the convolutions' kernels")
    cnn_activation: Literal["relu", "prelu", "elu", "gelu", "silu", "leaky_relu"] | None = None
    cnn_pool: Literal["max", "avg"] | None = Field(None, description="2x2 pooling after a block")
    cnn_norm: Literal["none", "each", "block"] | None = Field(
        None, description="batch norm: none, after each convolution, or once behind a block's pooling"
    )
    cnn_dropout: Fraction | None = Field(None, description="dropout behind a block")
    cnn_dense: tuple[Annotated[int, Field(ge=1, le=8192)], ...] | None = Field(
        None, max_length=4, description="dense widths of the top"
    )

    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    lr: Positive = Field(2e-3, description="peak learning rate")
    weight_decay: NonNegative = Field(1e-2, description="decoupled for adamw, L2 else; not on biases and norms")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="adam's first beta; sgd's and rmsprop's momentum")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="adam's second beta; rmsprop's alpha")
    eps: Positive = 1e-8
    clip_norm: NonNegative = Field(1.0, description="gradient norm limit; 0 is no limit")
    ema: float = Field(0.99, ge=0.0, lt=1.0, description="decay of the weight average a step; 0 is none")

    schedule: Literal["wsd", "one_cycle", "constant"] = Field("one_cycle", description="wsd: warm-up, stable, decay")
    warmup: Fraction = Field(0.1, description="share of the training that warms up")
    decay: Fraction = Field(0.2, description="share of the training in the last decay (wsd)")
    frozen: Fraction = Field(0.0, description="first share of the training with only the classifier trainable")
    trainable: Fraction = Field(1.0, description="last share of the backbone's layers that trains; 0 is the head alone")
    lr_low: Positive | None = Field(
        None, description="learning rate of the first layers, geometric in between; None is lr"
    )
    stages: tuple[Stage, ...] = Field(
        (),
        max_length=8,
        description="parts of the training, each with its rates; replace lr, lr_low, trainable, frozen",
    )
    patience: int | None = Field(
        None, ge=1, description="end after this many epochs without a better monitor, and keep the best; None trains on"
    )
    monitor: Literal["auc", "loss"] = Field("auc", description="validation figure that patience watches")

    batch_size: int = Field(64, ge=2, le=8192, description="training images a step")
    epochs: Positive | None = Field(None, description="passes over the training patches; give this or views")
    views: int | None = Field(None, ge=1, description="training images seen in all; give this or epochs")
    seed: int = Field(0, ge=0, lt=2**31)
    exclude_ids: tuple[str, ...] = Field((), description="patch ids never trained or validated on")
    valid_share: float | None = Field(
        None,
        gt=0.0,
        le=0.5,
        description="`train` validates on whole slides of about this share; None is one of five folds",
    )
    subsample: float = Field(1.0, gt=0.0, le=1.0, description="share of the training patches that is used")
    balance: Literal["none", "undersample"] = Field(
        "none", description="undersample: as many training patches of one class as of the other"
    )
    tta: Literal["dihedral", "random", "none"] = Field(
        "dihedral",
        description="views averaged in a prediction: the eight flips and turns, random ones, or the plain one",
    )
    tta_views: int = Field(12, ge=1, le=64, description="number of random views")

    augment: Fraction = Field(
        0.5, description="scales every magnitude below; flips and quarter turns stay on while > 0"
    )
    flips: bool = True
    quarter_turns: bool = True
    rotation_deg: float = Field(20.0, ge=0.0, le=180.0, description="+- degrees")
    shift_px: float = Field(8.0, ge=0.0, le=32.0, description="+- px; the centre 32x32 always stays inside the crop")
    zoom: float = Field(0.2, ge=0.0, lt=1.0, description="scale 1 +- zoom")
    brightness: float = Field(0.2, ge=0.0, lt=1.0, description="factor 1 +- brightness")
    contrast: float = Field(0.2, ge=0.0, lt=1.0, description="factor 1 +- contrast")
    saturation: float = Field(0.2, ge=0.0, lt=1.0, description="factor 1 +- saturation")
    hue: float = Field(0.04, ge=0.0, le=0.5, description="+- turns of the colour circle")
    stain: float = Field(
        0.1, ge=0.0, lt=1.0, description="haematoxylin, eosin, residual each times 1 +- stain, plus +- stain / 10"
    )
    blur: float = Field(0.5, ge=0.0, le=1.0, description="up to this share of a 3x3 binomial blur is mixed in")

    @field_validator("tile_size")
    @classmethod
    def _sixteens(cls, value: int | None) -> int | None:
        if value is not None and value % 16:
            raise ValueError(f"must be a multiple of 16, got {value} (did you mean {(value + 8) // 16 * 16 or 16}?)")
        return value

    @field_validator("crop_size", "input_size")
    @classmethod
    def _even(cls, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise ValueError(f"must be even, got {value} (did you mean {value + 1}?)")
        return value

    @field_validator("exclude_ids")
    @classmethod
    def _sorted_ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        if self.epochs is not None and self.views is not None:
            raise ValueError(f"epochs and views exclude each other, got epochs={self.epochs} and views={self.views}")
        if self.warmup + self.decay > 1.0:
            raise ValueError(f"warmup + decay must be at most 1, got {self.warmup} + {self.decay}")
        return self

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        """Fields that only make sense together; every fault in one message."""
        faults = []
        if self.task == "dense":
            if self.tile_size is None:
                faults.append("tile_size is required by task dense (a multiple of 16)")
            if self.head != "linear" or self.input_size is not None:
                faults.append("head and input_size belong to task patch; leave them out of task dense")
        else:
            if self.tile_size is not None:
                faults.append(f"tile_size belongs to task dense, got {self.tile_size}; task patch has crop_size")
            if self.decoder != "none":
                faults.append(f"decoder belongs to task dense, got {self.decoder}")
        if self.hidden and self.head == "linear":
            faults.append(f"hidden belongs to head mlp or fastai, got {list(self.hidden)} with head linear")
        if self.stages and abs(sum(stage.share for stage in self.stages) - 1.0) > 1e-6:
            faults.append(f"stages: the shares must sum to 1, got {sum(stage.share for stage in self.stages):g}")
        if self.stages and (self.lr_low is not None or self.trainable < 1.0 or self.frozen > 0.0):
            faults.append("stages replace lr_low, trainable and frozen; give one or the other")
        if self.stages and self.schedule == "wsd":
            faults.append("stages have a cycle of their own each; schedule must be one_cycle or constant, got wsd")
        if self.lr_low is not None and self.lr_low > self.lr:
            faults.append(f"lr_low must be at most lr, got {self.lr_low} and {self.lr}")
        if self.patience is not None and self.stages:
            faults.append(
                "patience and stages exclude each other (an early end would leave the later stages out); give one"
            )
        if self.patience is not None and self.schedule != "constant":
            faults.append(
                f"patience needs schedule constant (a cut cycle is no finished training), got {self.schedule}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def network_px(self) -> int:
        """Side in px of what the network sees."""
        if self.tile_size is not None:
            return self.tile_size
        return self.input_size or self.crop_size

    @property
    def phases(self) -> tuple[Stage, ...]:
        """The stages, or the whole training as one."""
        return self.stages or (
            Stage(share=1.0, lr=self.lr, lr_low=self.lr_low, weight_decay=None, trainable=self.trainable),
        )

    def n_views(self, n_train: int) -> int:
        """Training images this recipe sees on ``n_train`` patches; 5 epochs where it names no budget."""
        if self.views is not None:
            return self.views
        return max(1, math.ceil((5.0 if self.epochs is None else self.epochs) * n_train))

    def n_views_of(self, averaging: Literal["dihedral", "random", "none"]) -> int:
        """Views of a patch that such a prediction averages."""
        return {"dihedral": 8, "random": self.tta_views, "none": 1}[averaging]

    @property
    def n_test_views(self) -> int:
        """Views of a patch that a prediction averages, as ``tta`` says."""
        return self.n_views_of(self.tta)

    @property
    def hash(self) -> str:
        """SHA-256 over every field."""
        return sha256_of_json(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """Every field, in order, as YAML that :func:`load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def build_recipe(fields: Mapping[str, Any], *, where: str = "recipe", pinned: Collection[str] = ()) -> Recipe:
    """A recipe from its fields; all faults are reported together.

    Args:
        fields: field name to value; fields left out keep their defaults.
        where: what to call the origin in the message.
        pinned: fields that came from ``--set``; their faults are named after it.

    Raises:
        RecipeError: unknown fields, values out of range, contradictions.
    """
    try:
        return Recipe.model_validate(dict(fields))
    except ValidationError as fault:
        raise RecipeError("; ".join(validation_faults(fault, where, Recipe.model_fields, pinned))) from None


def key_of(where: str, *parts: object) -> str:
    """How a message names a field: ``recipe.lr``, ``my/space.yaml.parameters.lr``, ``--set lr``."""
    name = ".".join(map(str, parts))
    return f"{where}{' ' if where == PINS else '.'}{name}" if name else where


_RULES = {
    "tuple_type": "must be a list",
    "float_parsing": "must be a number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
}
"""Pydantic's words for these speak of Python."""


def validation_faults(
    fault: ValidationError, where: str, known: Sequence[str] | Mapping[str, Any], pinned: Collection[str] = ()
) -> list[str]:
    """One readable line for each fault: ``recipe.lr must be greater than 0, got -1``."""
    lines = []
    for error in fault.errors():
        loc = error["loc"]
        shown = (part + 1 if isinstance(part, int) else part for part in loc)  # people count from 1, so does --stage
        key = key_of(PINS if loc and loc[0] in pinned else where, *shown)
        if error["type"] == "extra_forbidden":
            lines.append(f"{key} is not a known field{did_you_mean(str(loc[-1]), known)}")
        elif error["type"] == "missing":
            lines.append(f"{key} is required")
        elif error["type"] == "value_error":
            colon = "" if loc else ":"  # a rule between fields, said of the whole
            lines.append(f"{key}{colon} {error['msg'].removeprefix('Value error, ')}")
        else:
            rule = _RULES.get(error["type"], error["msg"])
            rule = rule.replace("Input should be", "must be", 1).replace("Input should", "must", 1)
            if error["type"] == "tuple_type":
                rule += f" such as {'[{share: 1.0, lr: 0.001}]' if loc[-1] == 'stages' else '[8, 16]'}"
            value = error["input"]
            nearest = (
                did_you_mean(value, error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
                if error["type"] == "literal_error" and isinstance(value, str)
                else ""
            )
            lines.append(f"{key} {rule}, got {value!r}{nearest}")
    return lines


def scratch_warning(recipe: Recipe) -> str | None:
    """What to say of a backbone that starts from random weights and is not trained whole; None where all is well."""
    if recipe.pretrained or min(phase.trainable for phase in recipe.phases) == 1.0:
        return None
    return (
        "warning: the backbone starts from random weights, and parts of it train never or late; "
        "give --weights, or --set trainable=1 (a recipe with stages: --set stages=[])"
    )
