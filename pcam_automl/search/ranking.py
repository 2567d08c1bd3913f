"""Which complete trial is best, with what certainty, and which cheaper one is as good. Trains nothing, prints nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.config import StudySettings
from pcam_automl.cpu import machine_of
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError, first_few
from pcam_automl.intervals import auc_bounds, auc_difference_bounds, standard_error
from pcam_automl.metrics import auc, auc_draws, n_independent
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import NamedScores, clusters_of_rows, read_named_scores, rows_of
from pcam_automl.search.budget import was_short
from pcam_automl.search.lineages import lineages_of, sign_of

MOST_BEHIND = 0.002
"""A trial that is further behind the best in AUC is never taken in its place."""
MORE_ERROR = 0.05
"""Nor one whose error (1 - AUC) is larger by more than this share: 0.002 is little at an AUC of 0.95, much at 0.995."""
LEAST_SAVING = 0.1
"""Nor one whose training images take not at least this much less time: speeds of equal networks differ that much."""
CHANCE = 0.5
FEWER_VIEWS = 0.8
"""Of a short search's trials one has seen fewer views than another if it is less than this share,"""
MORE_ERROR_OF_FEWER = 0.5
"""and may have so much more of the best's error at most: few slides tell hardly anything apart."""
NO_SLIDES_HERE = (
    "no slides are known (--groups): patches of one slide lie in training and validation, the score is likely too good and its "
    "interval too narrow"
)
MOST_RANKED, MOST_RANKED_WITHOUT_SLIDES = 20, 8
"""The best trials by value that are compared; where every patch is drawn by itself a trial takes 0.1 s."""
MOST_ROWS_READ = 400_000
"""Rows of all files of scores together, about 1 s: of a dense study's 200,000 pixels the two best are compared."""
FEW_SLIDES = 10
SAME_VALUE = 5e-4
"""A trial's value and the AUC of its stored probabilities, which had eight digits until 2026-11-28, agree to this."""


@dataclass(frozen=True)
class Ranked:
    """A complete trial beside the best one. Intervals are 95 %, of bootstrap draws of whole slides.

    Attributes:
        number: of the trial.
        auc: on the validation patches.
        interval: of ``auc``; NaN where it cannot be drawn.
        behind: the best's AUC less this one's.
        behind_interval: of that difference, both scored on the same draws.
        behind_se: standard error of that difference; 0 for the best itself.
        beaten: whether that interval lies above 0.
        tied: not beaten, and close enough to be taken in the best's place, see :func:`choose_cheapest_tied`; what a short search
            takes is another question, see :func:`choose_least_trained_tied`.
        images_per_s: training images a second; None where it is unknown or of another device than the best's.
    """

    number: int
    auc: float
    interval: tuple[float, float]
    behind: float
    behind_interval: tuple[float, float]
    behind_se: float
    beaten: bool
    tied: bool
    images_per_s: float | None


@dataclass(frozen=True)
class Ranking:
    """The complete trials of a study that were compared, the best first.

    Attributes:
        trials: empty where nothing could be compared; ``notes`` says why.
        n_complete: complete lineages of the study, compared or not.
        n_patches: that the AUCs are of.
        n_clusters: slides among them; patches, where no slide is known.
        n_independent: of them those that hold the label which fewer hold: what the intervals rest on.
        picked: the trial that ``finalize`` takes; None where ``trials`` is empty.
        why: the reason of that choice, for people.
        notes: what was left out and why.
        what: ``patches``, or ``pixels`` of dense images; what ``n_patches`` counts.
        over: ``slides``, or ``images`` where no slide of a dense set is known; what ``n_clusters`` counts.
    """

    trials: tuple[Ranked, ...]
    n_complete: int
    n_patches: int = 0
    n_clusters: int = 0
    n_independent: int = 0
    picked: int | None = None
    why: str = ""
    notes: tuple[str, ...] = ()
    what: str = "patches"
    over: str = "slides"

    @property
    def best(self) -> Ranked | None:
        return self.trials[0] if self.trials else None

    @property
    def unbeaten(self) -> tuple[int, ...]:
        """Numbers of the trials that the best does not beat, itself left out."""
        return tuple(trial.number for trial in self.trials[1:] if not trial.beaten)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "unbeaten": list(self.unbeaten)}


def rank(
    label: ArrayLike,
    probs: ArrayLike,
    cluster: ArrayLike,
    *,
    numbers: Sequence[int],
    values: Sequence[float],
    images_per_s: Sequence[float | None],
    n_draws: int = 1000,
    seed: int = 0,
) -> tuple[Ranked, ...]:
    """Compare trials with the best of them by a paired bootstrap over slides.

    The best's interval is that of one training; that it is the best of many makes its value too high by something that
    no interval shows (the winner's curse). Only new slides or a confirmation on other folds show that.

    Args:
        label: (N,) 0 or 1.
        probs: (M, N) probabilities of M trials for the same patches.
        cluster: (N,) integer codes of the slides, 0 or more.
        numbers: (M,) of the trials.
        values: (M,) their AUCs, which decide the order; of equal ones the smaller number is first.
        images_per_s: (M,) training images a second.
        n_draws: of the bootstrap.
        seed: of the draws.

    Raises:
        DataError: see :func:`~pcam_automl.metrics.auc_draws`.
    """
    order = sorted(range(len(numbers)), key=lambda i: (-values[i], numbers[i]))
    drawn = auc_draws(label, np.asarray(probs, np.float64)[order], cluster, n_draws, seed)  # (draws, M)
    drawn = drawn[~np.isnan(drawn).any(axis=1)]
    n_slides, n_positive = n_independent(label, np.asarray(cluster)), int(np.sum(np.asarray(label) == 1))
    if n_slides < 2:  # one says nothing of others, nor do several where one holds all of a label
        drawn = drawn[:0]
    top = values[order[0]]
    behind = drawn[:, :1] - drawn
    ranked = []
    for place, i in enumerate(order):
        gap = (math.nan, math.nan)
        if len(behind):
            gap = auc_difference_bounds(top - values[i], behind[:, place], n_slides=n_slides)
        se = standard_error(behind[:, place], n_slides) if len(behind) else math.nan
        beaten = place > 0 and gap[0] > 0
        bounds = (math.nan, math.nan)
        if len(drawn):
            n_negative = np.asarray(label).size - n_positive
            bounds = auc_bounds(
                drawn[:, place], values[i], n_slides=n_slides, n_positive=n_positive, n_negative=n_negative
            )
        tied = place == 0 or (not beaten and top - values[i] <= margin(top, se))
        ranked.append(
            Ranked(
                number=numbers[i],
                auc=values[i],
                interval=bounds,
                behind=top - values[i],
                behind_interval=gap,
                behind_se=se,
                beaten=beaten,
                tied=tied,
                images_per_s=images_per_s[i],
            )
        )
    return tuple(ranked)


def margin(best_auc: float, behind_se: float) -> float:
    """How far behind a trial may be to be taken in the best's place; 0 where its standard error is unknown.

    One standard error, as Breiman et al. choose among trees ("Classification and Regression Trees", 1984, 3.4.3), but of
    the paired difference, in which the slides' own difficulty cancels. With few slides even that is wide, everything
    would tie and the cheapest network win however bad it is; so a trial may also cost at most ``MORE_ERROR`` of the
    best's error and never more than ``MOST_BEHIND``.
    """
    if math.isnan(behind_se):
        return 0.0
    return min(behind_se, MORE_ERROR * (1 - best_auc), MOST_BEHIND)


def choose_cheapest_tied(trials: Sequence[Ranked]) -> tuple[int, str]:
    """The number of the trial to train finally, and why: of those as good as the best the cheapest.

    Cheap means the time of a training image as measured while the trial trained. A final training shows every candidate
    about as many images and prediction takes a share of it, while a trial's own seconds depend on how many views its
    network was given and on where it was interrupted.

    Args:
        trials: the best first, at least one, as :func:`rank` gives them.
    """
    best = trials[0]
    timed = [(t.images_per_s, t) for t in trials if t.tied and t.images_per_s]
    rate, fastest = max(timed, key=lambda pair: (pair[0], pair[1].auc), default=(None, best))
    if best.images_per_s is None or rate is None:
        return best.number, "it has the highest AUC, and its speed is not known"
    if fastest is best or best.images_per_s > (1 - LEAST_SAVING) * rate:
        if sum(trial.tied for trial in trials) < 2:
            others = "no other trial is as good" if len(trials) > 1 else "it is the only complete one"
        elif len(timed) > 1:
            others = "no trial as good is cheaper"
        else:
            others = "the speed of those as good is not known"
        return best.number, f"it has the highest AUC, and {others}"
    low, high = fastest.behind_interval
    lead = f"scored {fastest.behind:.4f} higher (95 % {low:.4f} to {high:.4f}), which is no certain lead,"
    slower = f"takes {rate / best.images_per_s:.1f} times as long for an image"
    return fastest.number, f"trial {best.number} {lead if fastest.behind else 'scored the same'} and {slower}"


def choose_least_trained_tied(
    trials: Sequence[Ranked], views: Sequence[int], start: int | None = None
) -> tuple[int, str]:
    """The same for the few trials of a short search: of those that cannot be told from the best the one that has seen the fewest views.

    What follows is a training several times as long, of the same seconds for whichever is taken: the larger crop, or the slower
    network, has more to gain from it, and none is cheaper. Where not even the best is told from chance, they have hardly begun to
    learn, and the recipe that the search starts from is taken, unless it is beaten or has far more error: few slides tell nothing from
    chance.

    Args:
        trials: the best first, at least one.
        views: of each, by the end of its training.
        start: number of the trial of the recipe that the search starts from; None where it is not among them.
    """
    best, least = trials[0], FEWER_VIEWS * views[0]
    most = MORE_ERROR_OF_FEWER * (1.0 - best.auc)
    first = next((t for t in trials if t.number == start and not t.beaten and t.behind <= most), None)
    if best.interval[0] <= CHANCE and first is not None and len(trials) > 1:
        low, high = best.interval
        shown = f"trial {best.number} ({best.auc:.4f}, 95 % {low:.4f} to {high:.4f}) is not told from chance"
        return first.number, f"{shown}, and the search starts from what is known to be good"
    alike = [
        (n, t)
        for n, t in zip(views, trials, strict=True)
        if t is best or (not t.beaten and t.behind <= min(t.behind_se, most))
    ]
    n, fewest = min(alike, key=lambda pair: (pair[0], -pair[1].auc))
    if fewest is best or n > least:
        if len(trials) == 1:
            return best.number, "it is the only complete one"
        return best.number, "it has the highest AUC, and no other that cannot be told from it has seen fewer views"
    low, high = fewest.behind_interval
    lead = f"scored {fewest.behind:.4f} higher (95 % {low:.4f} to {high:.4f})" if fewest.behind else "scored the same"
    return fewest.number, (
        f"trial {best.number} {lead}, which is no certain lead, with {views[0] / n:.1f} times the views; "
        "a short search takes the one that has more to gain from the longer training"
    )


def rank_study(
    study: optuna.Study, settings: StudySettings, folder: Path, *, store: PatchStore | None = None
) -> Ranking:
    """Rank the study's best complete trials by the probabilities that they left on this machine.

    Args:
        study: with the user attributes lineage, images_per_s and device.
        settings: what it remembers.
        folder: ``studies/<name>``, which holds ``trials/<number>/scores.csv``.
        store: the study's pack; opened where it was if not given.
    """
    complete = complete_rows(study)
    if not complete:
        return Ranking((), 0, notes=("no complete trial yet",))
    if settings.objective != "auc":
        why = f"intervals and ties are drawn for the AUC only, this study optimises {settings.objective}"
        with suppress(DataError):  # without its data nothing more can be said
            store = store if store is not None else _remembered_pack(settings)
        unknown = store is not None and not _has_slides(store, store.development_rows())
        return Ranking((), len(complete), notes=(why, *([NO_SLIDES_HERE] if unknown else [])))
    try:
        store = store if store is not None else _remembered_pack(settings)
        short = was_short(study, settings.plan.get("budget"))
        return _ranking_of(complete, folder, store, timed=not settings.deterministic, short=short)
    except DataError as fault:
        return Ranking((), len(complete), notes=(f"no interval can be drawn: {fault}",))


def complete_rows(study: optuna.Study) -> list[FrozenTrial]:
    """The complete row of each lineage that has one, the best first, of equals the earliest."""
    rows = [lineage.finished for lineage in lineages_of(study.get_trials(deepcopy=False))]
    kept = [row for row in rows if row is not None and row.state == TrialState.COMPLETE]
    kept = [row for row in kept if row.value is not None and math.isfinite(row.value)]
    sign = -sign_of(study)
    return sorted(kept, key=lambda row: (sign * float(row.value or 0.0), row.number))


def _remembered_pack(settings: StudySettings) -> PatchStore:
    store = open_store(Path(settings.pack))
    if store.content_hash != settings.pack_hash:
        raise DataError(f"{settings.pack} is no longer the pack that the study began with")
    return store


def _ranking_of(complete: list[FrozenTrial], folder: Path, store: PatchStore, *, timed: bool, short: bool) -> Ranking:
    """``timed``: whether measured speed may settle a tie; in a deterministic study no measurement decides. ``short``: whether the
    search was.
    """
    best = complete[0]
    file = folder / "trials" / str(best.number) / SCORES
    first = read_named_scores(file)
    if fault := _not_the_value(first, best):
        raise DataError(fault)
    rows_here = rows_of(first.ids, store.ids, store.part, of=file)
    cluster = clusters_of_rows(store, rows_here)
    n_clusters, n_of_label = len(np.unique(cluster)), n_independent(first.label, cluster)
    limit = MOST_RANKED if n_clusters < len(cluster) else MOST_RANKED_WITHOUT_SLIDES
    compared = complete[: max(2, min(limit, MOST_ROWS_READ // max(len(cluster), 1)))]
    rows, probs, notes = _alike(first, compared, folder)
    n_unknown = int((np.asarray(store.group)[rows_here] < 0).sum())
    if n_unknown == len(rows_here):
        notes.append(NO_SLIDES_HERE)
    elif n_unknown:
        notes.append(
            f"{n_unknown:,} of these patches have no known slide and count singly: the AUC is likely too high and its interval too narrow"
        )
    elif n_of_label < FEW_SLIDES:
        few = f"{n_of_label} slides" if n_of_label == n_clusters else f"{n_of_label} slides of a label"
        notes.append(f"{few} are few: the intervals are wide, and hardly any trial can be told from another")
    if any(_device(row) != _device(best) for row in rows):
        notes.append("speeds are compared among trials of the best one's device only")
    trials = rank(
        first.label,
        probs,
        cluster,
        numbers=[row.number for row in rows],
        values=[float(row.value or 0.0) for row in rows],
        images_per_s=[_speed(row) if timed and _device(row) == _device(best) else None for row in rows],
    )
    views = [_views(row) if _device(row) == _device(best) else 0 for row in rows]
    if short and timed and all(views):
        start = next((row.number for row in rows if row.user_attrs.get("slot") == 0), None)
        picked, why = choose_least_trained_tied(trials, views, start)
    else:
        picked, why = choose_cheapest_tied(trials)
    is_dense = len(np.unique(rows_here)) < len(rows_here)  # several pixels of one image
    over = "images" if is_dense and n_unknown == len(rows_here) else "slides"
    counts = (len(complete), len(cluster), n_clusters, n_of_label)
    return Ranking(trials, *counts, picked, why, tuple(notes), "pixels" if is_dense else "patches", over)


def _has_slides(store: PatchStore, rows: NDArray[np.int64]) -> bool:
    return bool((np.asarray(store.group)[rows] >= 0).any())


def _alike(
    first: NamedScores, compared: list[FrozenTrial], folder: Path
) -> tuple[list[FrozenTrial], NDArray[np.float64], list[str]]:
    """The trials that were scored on the very patches of the first, their probabilities (M, N), and what is missing."""
    rows, probs, faults = [compared[0]], [first.prob], []
    for row in compared[1:]:
        try:
            own = read_named_scores(folder / "trials" / str(row.number) / SCORES)
        except DataError as fault:
            faults.append(f"trial {row.number}: {fault}")
            continue
        if own.ids != first.ids or not np.array_equal(own.label, first.label):
            faults.append(f"trial {row.number} was scored on other patches")
        elif fault_ := _not_the_value(own, row):
            faults.append(fault_)
        else:
            rows.append(row)
            probs.append(own.prob)
    return rows, np.stack(probs), [f"not compared: {first_few(faults)}"] if faults else []


def _not_the_value(scores: NamedScores, row: FrozenTrial) -> str | None:
    """What is wrong if the trial's value is no AUC of its scores, e.g. where the study ranks by something else."""
    own = auc(scores.label, scores.prob)
    if abs(own - float(row.value or 0.0)) <= SAME_VALUE:
        return None
    return f"the value {row.value:.4f} of trial {row.number} is not the AUC of its scores ({own:.4f})"


def _speed(row: FrozenTrial) -> float | None:
    speed = row.user_attrs.get("images_per_s")
    return float(speed) if isinstance(speed, (int, float)) and speed > 0 else None


def _views(row: FrozenTrial) -> int:
    """That its recipe shows; 0 where the row does not say."""
    return int(json.loads(row.user_attrs.get("recipe", "{}")).get("views") or 0)


def _device(row: FrozenTrial) -> tuple[str | None, str | None]:
    return machine_of(row.user_attrs.get("device"), row.user_attrs.get("cpu"))
