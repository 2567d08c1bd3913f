"""What follows from a probe's ranking: starts, hopeless backbones, whether the study bears it out. Trains nothing, imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pcam_automl.search.lineages import Lineage

MARGIN = 0.02
"""AUC that a backbone must lie behind beyond both intervals: training moves features, and by more than noise does."""
LEAST_LEFT = 3
"""So many backbones stay, however bad their frozen features are."""
LEAST_LINEAGES, LEAST_CELLS = 8, 5
"""Below these a rank correlation with the probe says nothing."""
LEAST_TAU = 0.2
"""A ranking whose correlation cannot be above this is worth no seconds."""
_DRAWS = 1_000

Verdict = Literal["holds", "unclear", "misleads"]


@dataclass(frozen=True)
class ProbeResult:
    """How well frozen features tell the labels apart, at one backbone and one way to show it a patch.

    Attributes:
        backbone: a timm name.
        crop_size: px.
        upscale: as the space names it; what the network needs at least may raise ``input_px`` over it.
        input_px: side of what the network sees.
        auc: on validation rows.
        auc_95: its interval over slides.
        seconds: of features, fit and scoring.
    """

    backbone: str
    crop_size: int
    upscale: float
    input_px: int
    auc: float
    auc_95: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class ProbeFidelity:
    """Whether a probe ranked as whole trainings did.

    Attributes:
        tau: Kendall's tau-b between the probe's AUC and the whole training's, over lineages; None where undefined.
        tau_95: its interval by a bootstrap over the probe's cells, whose lineages share one value.
        n_lineages: that ran through all rungs and whose backbone was probed.
        n_cells: cells of the probe that these fall to.
        verdict: ``holds``: the interval lies above 0; ``misleads``: it lies below :data:`LEAST_TAU`; ``unclear``: neither,
            or fewer than 8 lineages or 5 cells.
    """

    tau: float | None
    tau_95: tuple[float, float] | None
    n_lineages: int
    n_cells: int
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.tau is None or self.tau_95 is None:
            return f"probe: {self.verdict} ({self.n_lineages} lineages at {self.n_cells} probed cells ran through)"
        low, high = self.tau_95
        return (
            f"probe: {self.verdict}, Kendall tau {self.tau:.2f} (95 % {low:.2f} to {high:.2f}) with the whole training, "
            f"{self.n_lineages} lineages at {self.n_cells} cells"
        )


def hopeless_backbones(results: Sequence[ProbeResult], *, keep: Sequence[str] = ()) -> dict[str, str]:
    """Backbone to reason, of those whose frozen features are far behind the best ones'.

    The first result of each backbone is compared, since all have that view: the upper end of its interval must lie
    :data:`MARGIN` below the lower end of the best one's. At least :data:`LEAST_LEFT` backbones stay.

    Args:
        results: in the order of probing.
        keep: backbones that stay whatever they give (that of trial 0).
    """
    first: dict[str, ProbeResult] = {}
    for result in results:
        first.setdefault(result.backbone, result)
    ranked = sorted(first.values(), key=lambda one: -one.auc)
    if not ranked:
        return {}
    bar = ranked[0].auc_95[0] - MARGIN
    return {
        one.backbone: f"the AUC of its frozen features is {one.auc:.3f} (up to {one.auc_95[1]:.3f}), "
        f"that of {ranked[0].backbone}'s {ranked[0].auc:.3f} (from {ranked[0].auc_95[0]:.3f})"
        for one in ranked[LEAST_LEFT:]
        if one.auc_95[1] < bar and one.backbone not in keep
    }


def ranked_starts(
    results: Sequence[ProbeResult], params: Mapping[str, Any], *, varied: Collection[str], limit: int = 3
) -> list[dict[str, Any]]:
    """Parameters of trials to begin with: the best view of each backbone, best first, then the second-best views.

    Args:
        results: of the probe.
        params: of the known-good recipe in the study's space; what the probe does not judge (rates, augmentation) stays.
        varied: names of the space's parameters; what the probe judged beside them is left out.
        limit: starts at most.

    Returns:
        parameter sets without repetition and other than ``params``.
    """
    place: dict[str, int] = {}
    turns = []
    for result in sorted(results, key=lambda one: -one.auc):
        place[result.backbone] = place.get(result.backbone, -1) + 1
        turns.append((place[result.backbone], -result.auc, result))
    starts: list[dict[str, Any]] = []
    for _, _, one in sorted(turns, key=lambda turn: turn[:2]):
        found = {"backbone": one.backbone, "crop_size": one.crop_size, "upscale": one.upscale}
        start = {**params, **{name: value for name, value in found.items() if name in varied}}
        if start != dict(params) and start not in starts:
            starts.append(start)
    return starts[:limit]


def probe_fidelity(
    lineages: Sequence[Lineage],
    results: Sequence[ProbeResult],
    *,
    whole_step: int,
    maximise: bool = True,
    seed: int = 0,
) -> ProbeFidelity:
    """Compare the probe's ranking with that of the trainings that ran through; each lineage counts once.

    A lineage has the probe's AUC of its backbone at the view most like its own. Only lineages that reached the last rung
    can be compared, and pruning lets the better ones get there: the correlation is one of a restricted range and
    understates the ranking of all.

    Args:
        lineages: of the study.
        results: of its probe.
        whole_step: the last rung's step, as trials report it.
        maximise: whether a higher value of a trial is better.
        seed: of the bootstrap.
    """
    cells, probed, trained = [], [], []
    for lineage in lineages:
        value, recipe = lineage.values.get(whole_step), lineage.attr("recipe")
        cell = None if value is None or recipe is None else _nearest(json.loads(recipe), results)
        if cell is not None and value is not None:
            cells.append(cell)
            probed.append(results[cell].auc)
            trained.append(value if maximise else -value)
    n_cells = len(set(cells))
    if len(cells) < LEAST_LINEAGES or n_cells < LEAST_CELLS:
        return ProbeFidelity(None, None, len(cells), n_cells, "unclear")
    x, y, code = np.array(probed), np.array(trained), np.array(cells)
    tau, interval = _tau(x, y), _tau_interval(x, y, code, np.random.default_rng(seed))
    verdict: Verdict = "unclear"
    if tau is not None and interval is not None:
        verdict = "holds" if interval[0] > 0 else "misleads" if interval[1] < LEAST_TAU else "unclear"
    return ProbeFidelity(tau, interval, len(cells), n_cells, verdict)


def results_of(record: Mapping[str, Any]) -> list[ProbeResult]:
    """The results in ``settings.plan["probe"]``; none where the study had no probe."""
    return [
        ProbeResult(**{**one, "auc_95": (float(one["auc_95"][0]), float(one["auc_95"][1]))})
        for one in record.get("results", ())
    ]


def _nearest(recipe: Mapping[str, Any], results: Sequence[ProbeResult]) -> int | None:
    """Number of the result of the recipe's backbone at the most similar view; None where the backbone was not probed."""
    crop = int(recipe["crop_size"])
    px = int(recipe["input_size"] or crop)
    own = [number for number, one in enumerate(results) if one.backbone == recipe["backbone"]]

    def unlike(number: int) -> float:
        one = results[number]
        return abs(math.log2(one.crop_size / crop)) + abs(math.log2(one.input_px / px))

    return min(own, key=unlike, default=None)


def _tau(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Kendall's tau-b; None where one side is constant."""
    from scipy.stats import kendalltau

    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return None
    return float(kendalltau(x, y).statistic)


def _tau_interval(
    x: NDArray[np.float64], y: NDArray[np.float64], cell: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float] | None:
    """95 % percentile bootstrap over cells; draws without a tau are left out, None where hardly any has one."""
    members = [np.flatnonzero(cell == one) for one in np.unique(cell)]
    values = []
    for _ in range(_DRAWS):
        rows = np.concatenate([members[one] for one in rng.integers(0, len(members), len(members))])
        if (tau := _tau(x[rows], y[rows])) is not None:
            values.append(tau)
    if len(values) < _DRAWS / 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
