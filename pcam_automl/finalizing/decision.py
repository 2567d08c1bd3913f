"""Which networks are trained on everything, with what weights and at which temperature: from confirmations to a decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.calibration import Calibration, calibrate, logits_of, probs_at
from pcam_automl.cpu import machine_of
from pcam_automl.data.split_groups import slides_caveat
from pcam_automl.data.store import PatchStore
from pcam_automl.finalizing.blending import Blend, choose_blend
from pcam_automl.metrics import auc, auc_interval
from pcam_automl.scores import Scores, clusters_of_rows
from pcam_automl.search.confirmations import (
    Candidate,
    Confirmation,
    Confirmed,
    ValueOf,
    auc_of,
    complete_folds,
    mean_drop,
    ranked,
)
from pcam_automl.search.ranking import choose_cheapest_tied, rank


@dataclass(frozen=True)
class Decision:
    """What will be trained on all the data.

    Attributes:
        members: the networks, first the one that would be taken alone if it is among them: the best confirmed, or the cheapest that ties
            with it.
        weights: one each, positive, summing to 1.
        confirmed: every confirmed lineage, the best first; empty where none was.
        one_view: whether ``oof`` and the temperatures are of the plain view alone, as the test patches are then predicted.
        tie: why another than the best confirmed one is taken; None where it is not, or the blend does without it.
        blend: what the greedy selection found; None where no ensemble was asked for or possible.
        calibrations: of each member on its own; None where nothing was predicted out of fold.
        calibration: of all together.
        oof: calibrated out-of-fold probabilities of what was chosen; None where there are none.
        oof_auc: their AUC.
        oof_auc_95: its interval over slides.
    """

    members: tuple[Candidate, ...]
    weights: tuple[float, ...]
    confirmed: tuple[Confirmed, ...] = ()
    blend: Blend | None = None
    calibrations: tuple[Calibration | None, ...] = (None,)
    calibration: Calibration | None = None
    oof: Scores | None = None
    oof_auc: float | None = None
    oof_auc_95: tuple[float, float] | None = None
    tie: str | None = None
    one_view: bool = False

    @property
    def drop(self) -> float | None:
        """Mean of what the search's scores lost when they were confirmed."""
        return mean_drop(self.confirmed)

    def to_json(self) -> dict[str, Any]:
        return {
            "confirmed": [one.to_json() for one in self.confirmed],
            "mean_drop": self.drop,
            "tie": self.tie,
            "ensemble": None if self.blend is None else self.blend.to_json(),
            "members": [member.trial.number for member in self.members],
            "weights": list(self.weights),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "oof_auc": self.oof_auc,
            "oof_auc_95": self.oof_auc_95,
        }


def decide(
    candidates: Sequence[Candidate],
    confirmations: Sequence[Confirmation],
    store: PatchStore,
    *,
    most_members: int = 1,
    seed: int = 0,
    value_of: ValueOf = auc_of,
    maximise: bool = True,
    timed: bool = True,
    one_view: bool = False,
) -> Decision:
    """The best confirmed lineage or the cheapest that ties with it, or a blend of several if it helps; the search's best where nothing was
    confirmed.

    Args:
        candidates: the best of the search first, at least one.
        confirmations: of some of them.
        store: slides and labels of the scored patches.
        most_members: networks that may judge together.
        seed: of the draws of slides.
        value_of: figure that the study's value is.
        maximise: whether a larger one is better.
        timed: whether measured speed may settle a tie; in a deterministic study no measurement decides.
        one_view: whether the networks will predict by the plain view alone, not by their recipes' views.
    """
    confirmed = tuple(ranked(confirmations, value_of=value_of, maximise=maximise)) if confirmations else ()
    by_name = {candidate.lineage: candidate for candidate in candidates}
    if not confirmed or math.isnan(confirmed[0].mean):  # nothing, or every training diverged
        return Decision((candidates[0],), (1.0,), confirmed)
    settled = timed and value_of is auc_of
    first, tie = _cheapest_tied(confirmed, confirmations, store) if settled else (confirmed[0], None)
    winner = by_name[first.lineage]
    predicted = _out_of_fold(confirmations, [one.lineage for one in confirmed], one_view)
    if winner.lineage not in predicted:
        return Decision((winner,), (1.0,), confirmed, tie=tie)
    rows, label, on = _shared(predicted[winner.lineage])
    usable = {
        name: np.concatenate([logits_of(part.prob) for part in parts])
        for name, parts in predicted.items()
        if np.array_equal(_shared(parts)[0], rows)
    }
    names = list(usable)
    logits, group = np.stack([usable[name] for name in names]), np.asarray(store.group)[rows].astype(np.int64)
    on += slides_caveat(group)
    single = names.index(winner.lineage)
    blend = choose_blend(logits, label, group, single=single, most_members=most_members, seed=seed)
    chosen = [k for k, weight in enumerate(blend.weights) if weight > 0]
    chosen.sort(key=lambda k: (k != single, -blend.weights[k]))
    calibration = calibrate(blend.logits, label, on)
    oof = Scores(rows, label, probs_at(blend.logits, calibration.temperature), on)
    return Decision(
        members=tuple(by_name[names[k]] for k in chosen),
        weights=tuple(blend.weights[k] for k in chosen),
        confirmed=confirmed,
        blend=blend if most_members > 1 else None,
        calibrations=tuple(calibrate(logits[k], label, on) for k in chosen),
        calibration=calibration,
        oof=oof,
        oof_auc=auc(label, blend.logits),
        oof_auc_95=auc_interval(label, blend.logits, clusters_of_rows(store, rows)),
        tie=tie if single in chosen else None,
        one_view=one_view,
    )


def _cheapest_tied(
    confirmed: Sequence[Confirmed], confirmations: Sequence[Confirmation], store: PatchStore
) -> tuple[Confirmed, str | None]:
    """Of the lineages that the best confirmed one does not beat the cheapest, and why it is not the best one itself.

    As the search's own ties are settled (:func:`~pcam_automl.search.ranking.choose_cheapest_tied`), where one fold confirmed. Of several
    the mean decides alone: their networks are different ones, so that draws over all of their patches would be of another figure.
    """
    best, folds = confirmed[0], complete_folds(confirmations)
    held = {one.lineage: one for one in confirmations if one.fold == folds[0]}
    first = held[best.lineage].one_view
    if len(folds) > 1 or first is None:
        return best, None
    alike = [
        (one, scores)
        for one in confirmed
        if (scores := held[one.lineage].one_view) is not None
        and np.array_equal(scores.rows, first.rows)
        and np.array_equal(scores.label, first.label)  # pixels of the same images may be others
    ]

    def machine(one: Confirmed) -> tuple[str | None, str | None]:
        return machine_of(held[one.lineage].device, held[one.lineage].cpu)

    ranks = rank(
        first.label,
        np.stack([scores.prob for _, scores in alike]),
        clusters_of_rows(store, first.rows),
        numbers=[one.trial for one, _ in alike],
        values=[one.mean for one, _ in alike],
        images_per_s=[
            held[one.lineage].images_per_s or None if machine(one) == machine(best) else None for one, _ in alike
        ],
    )
    number, why = choose_cheapest_tied(ranks)
    if number in (best.trial, ranks[0].number):  # of equal values the search's better one is the best
        return best, None
    return next(one for one, _ in alike if one.trial == number), why


def _out_of_fold(
    confirmations: Sequence[Confirmation], lineages: Sequence[str], one_view: bool
) -> dict[str, list[Scores]]:
    """Lineage to its scores on each complete fold; without those that diverged somewhere, and without dense ones."""
    folds = complete_folds(confirmations)
    held = {(one.lineage, one.fold): one.scores and (one.one_view if one_view else one.scores) for one in confirmations}
    found = {}
    for lineage in lineages:
        parts = [scores for fold in folds if (scores := held[lineage, fold]) is not None]
        if len(parts) == len(folds):
            found[lineage] = parts
    return found


def _shared(parts: Sequence[Scores]) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Rows, labels and what they are of, for people."""
    rows, label = np.concatenate([part.rows for part in parts]), np.concatenate([part.label for part in parts])
    many = f"{len(parts)} folds" if len(parts) > 1 else "a fold"
    return rows, label, f"{len(rows):,} patches of {many} by networks that did not see them"
