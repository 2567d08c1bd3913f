"""The cheapest rung: a logistic regression on the frozen features of a pretrained network. Ranks and drops nothing.

Legend: B images, F features behind the network's own pooling, px the input side.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_automl.batches import Patches, open_patches
from pcam_automl.calibration import probs_at
from pcam_automl.data.store import PatchStore, channel_moments
from pcam_automl.errors import DataError, RecipeError
from pcam_automl.metrics import auc, auc_interval
from pcam_automl.models.factory import build_network, normalisation_of
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.search.probe_decisions import ProbeResult
from pcam_automl.training.compute import Compute
from pcam_automl.training.scoring import Averaging, Views, logits_of_rows, mean_over_views, outputs_of_rows
from pcam_automl.training.start import Rows

N_TRAIN = 2_000
"""Training patches of a probe: the first ones of the nested order, so of every slide and both labels in proportion."""
N_SCORE = 1_000
STRENGTH = 1e-2
"""scikit-learn's C on standardised features: of 1e-4 to 10 the best by validation on colon96 (0.9947; test 0.980), where
2,000 patches meet 1,280 features; a grouped cross-validation over C would cost more than the features do."""
MOST_STEPS = 300
_DRAWS = 400

Stop = Callable[[], None]


@dataclass(frozen=True)
class Probe:
    """A pretrained network as it is, and the classifier that was fitted to its features.

    Attributes:
        network: images (B, 3, px, px) normalised -> logits (B, 1); in evaluation mode, on ``compute.device``.
        compute: device, precision, layout.
        views: what is shown of each patch.
        n_train: patches that the classifier was fitted to.
        converged: whether the fit ended by itself and not at its limit of steps.
        seconds: of building, features and fit.
    """

    network: nn.Module
    compute: Compute
    views: Views
    n_train: int
    converged: bool
    seconds: float

    def rows(
        self, patches: Patches, rows: np.ndarray, *, averaging: Averaging = "none", stop: Stop = lambda: None
    ) -> NDArray[np.float64]:
        """Probabilities (n,) of store rows, in their order; logits are averaged over the views."""
        views = Views(self.views.recipe, self.views.normalisation, averaging)
        return probs_at(logits_of_rows(self.network, patches, rows, views, self.compute, stop=stop))


def fit_probe(
    store: PatchStore,
    rows: Rows,
    recipe: Recipe,
    weights: Weights,
    device: torch.device,
    *,
    patches: Patches | None = None,
    compute: Compute | None = None,
    n_train: int = N_TRAIN,
    stop: Stop = lambda: None,
) -> Probe:
    """Fit the classifier to the features of the recipe's pretrained network; no weight of the network moves.

    Args:
        store: labels and channel statistics.
        rows: ``train`` is fitted to, from its beginning; ``score`` is not read.
        recipe: backbone, crop, input and normalisation are used; head, dropout and the whole training are not.
        weights: where the pretrained weights are.
        device: where the network runs.
        patches: the store's patches there; opened where None.
        compute: precision and layout; float32 with channels last where None.
        n_train: patches at most.
        stop: called once a batch; raises to end early.

    Raises:
        RecipeError: no pretrained weights, or a network without features behind one pooling.
        DataError: training rows of one label only.
    """
    check_probed(recipe, weights)
    began = time.perf_counter()
    train = np.array(rows.train[:n_train])
    label = np.asarray(store.label)[train]
    if len(np.unique(label)) < 2:
        raise DataError(f"a probe needs both labels among its {len(train)} training patches, got one")
    plain = recipe.model_copy(update={"head": "linear", "hidden": (), "dropout": 0.0, "pretrained": True})
    compute = compute or Compute(str(device), "fp32", channels_last=True)
    features = _Features(build_network(plain, weights, seed=0), recipe.backbone)
    features = compute.place(features).eval()  # type: ignore[assignment]
    views = Views(plain, normalisation_of(plain, *channel_moments(np.asarray(store.stats[rows.train]))))
    patches = open_patches(store, device) if patches is None else patches
    classifier, converged = _fitted(features_of_rows(features, patches, train, views, compute, stop=stop), label)
    network = nn.Sequential(features, classifier.to(device)).eval()
    return Probe(network, compute, views, len(train), converged, time.perf_counter() - began)


def probe_result(
    store: PatchStore,
    rows: Rows,
    recipe: Recipe,
    weights: Weights,
    device: torch.device,
    *,
    upscale: float,
    patches: Patches | None = None,
    compute: Compute | None = None,
    stop: Stop = lambda: None,
) -> ProbeResult:
    """Fit a probe and score it on the first :data:`N_SCORE` of ``rows.score``; see :func:`fit_probe` for the rest.

    Raises:
        RecipeError, DataError: as :func:`fit_probe`; validation rows of one label only.
    """
    began = time.perf_counter()
    patches = open_patches(store, device) if patches is None else patches
    probe = fit_probe(store, rows, recipe, weights, device, patches=patches, compute=compute, stop=stop)
    score = np.array(rows.score[:N_SCORE])
    label, group = np.asarray(store.label)[score], np.asarray(store.group)[score]
    probs = probe.rows(patches, score, stop=stop)
    return ProbeResult(
        recipe.backbone,
        recipe.crop_size,
        upscale,
        recipe.network_px,
        auc(label, probs),
        auc_interval(label, probs, group, n=_DRAWS),
        round(time.perf_counter() - began, 3),
    )


def check_probed(recipe: Recipe, weights: Weights) -> None:
    """Whether there are pretrained features to probe.

    Raises:
        RecipeError: a dense task, no weights at all, or none for this backbone.
    """
    if recipe.task != "patch":
        raise RecipeError(f"a probe judges whole patches; recipe.task must be patch, got {recipe.task}")
    if not weights.pretrained or not weights.has(recipe.backbone):
        raise RecipeError(
            f"a probe needs pretrained weights, got none for {recipe.backbone} (weights: {weights}); "
            "random features rank nothing; give --weights hub or a folder, or --probe off"
        )


def features_of_rows(
    network: nn.Module,
    patches: Patches,
    rows: np.ndarray,
    views: Views,
    compute: Compute,
    *,
    stop: Stop = lambda: None,
) -> NDArray[np.float32]:
    """Features (n, F) of store rows in their order, averaged over the views.

    Args:
        network: images (B, 3, px, px) -> (B, F), in evaluation mode on ``compute.device``.
        patches: the source of uint8 batches.
        rows: (n,) int64, at least one.
        views: what is shown of each patch.
        compute: precision and layout.
        stop: called once a batch; raises to end early.
    """
    found = outputs_of_rows(
        lambda images: mean_over_views(network, images, views, compute),
        patches,
        rows,
        px=views.recipe.network_px,
        stop=stop,
    )
    assert found is not None
    return found


class _Features(nn.Module):
    """A timm network up to its classifier: (B, 3, px, px) -> (B, F)."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
            raise RecipeError(f"recipe.backbone {name} has no features behind one pooling; a probe needs another one")
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        maps = self.network.forward_features(images)  # type: ignore[operator]
        pooled: Tensor = self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        return pooled.flatten(1)


class _Classifier(nn.Module):
    """Standardised features (B, F) to logits (B, 1)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, **arrays: NDArray[np.float64]) -> None:
        super().__init__()
        for name, values in arrays.items():
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return ((features.float() - self.mean) / self.scale) @ self.weight.T + self.bias


def _fitted(features: NDArray[np.float32], label: NDArray[np.int8]) -> tuple[_Classifier, bool]:
    """The classifier of features (n, F) and labels (n,), and whether its fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standard = scaler.fit_transform(features.astype(np.float64))
    regression = LogisticRegression(C=STRENGTH, max_iter=MOST_STEPS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(standard, label)
    classifier = _Classifier(
        mean=scaler.mean_, scale=scaler.scale_, weight=regression.coef_, bias=regression.intercept_
    )
    return classifier, not any(issubclass(w.category, ConvergenceWarning) for w in said)
