from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.study import VALIDATION_FOLD, Asked
from pcam_automl.search.turns import Limits
from pcam_automl.search.wilcoxon import MOST_PARTS, SLIDE_LOSSES, losses_by_slide, worse_p
from pcam_automl.search.worker import run_worker
from pcam_automl.training.compute import Compute

RUNGS = (100, 300, 900)


def trial_attrs(lineage: str, losses: list[float], step: int = 100) -> dict[str, Any]:
    return {"lineage": lineage, SLIDE_LOSSES: {str(step): losses}}


def study_of(*rows: tuple[float, list[float]]) -> optuna.Study:
    study = optuna.create_study(direction="maximize", pruner=build_pruner("wilcoxon", rungs=RUNGS))
    for number, (value, losses) in enumerate(rows):
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED,
                intermediate_values={100: value},
                user_attrs=trial_attrs(f"{number}", losses),
            )
        )
    return study


def pruned(study: optuna.Study, value: float, losses: list[float], *, lineage: str = "own", step: int = 100) -> bool:
    trial = study.ask()
    for name, held in trial_attrs(lineage, losses, step).items():
        trial.set_user_attr(name, held)
    trial.report(value, step)
    return trial.should_prune()


BEST = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
WORSE = [loss + 0.1 + 0.01 * place for place, loss in enumerate(BEST)]
MIXED = [loss + (0.1 if place % 2 else -0.1) for place, loss in enumerate(BEST)]


def test_trial_that_is_worse_on_every_slide_ends() -> None:
    assert pruned(study_of((0.9, BEST)), 0.8, WORSE)


def test_trial_that_is_worse_on_half_of_the_slides_goes_on() -> None:
    assert not pruned(study_of((0.9, BEST)), 0.8, MIXED)


def test_trial_with_a_better_value_goes_on_whatever_its_losses() -> None:
    assert not pruned(study_of((0.9, BEST)), 0.95, WORSE)


def test_it_is_the_best_trial_that_is_compared_with() -> None:
    assert pruned(study_of((0.7, WORSE), (0.9, BEST), (0.8, WORSE)), 0.75, WORSE)
    assert not pruned(study_of((0.7, BEST), (0.9, WORSE)), 0.8, WORSE)


def test_own_lineage_other_rungs_and_the_first_trial_do_not_end_it() -> None:
    assert not pruned(study_of((0.9, BEST)), 0.8, WORSE, lineage="0")
    assert not pruned(study_of((0.9, BEST)), 0.8, WORSE, step=300)
    assert not pruned(study_of(), 0.1, WORSE)


def test_a_rung_that_a_checkpoint_held_is_judged_by_what_the_interrupted_row_noted() -> None:
    for losses, ends in ((WORSE, True), (MIXED, False)):
        study = study_of((0.9, BEST))
        attrs = trial_attrs("own", losses)
        cut = create_trial(state=TrialState.FAIL, intermediate_values={100: 0.8}, user_attrs=attrs)
        study.add_trial(cut)
        resumed = study.ask()
        resumed.set_user_attr("lineage", "own")
        resumed.report(0.8, 100)
        assert resumed.should_prune() == ends


def test_fully_trained_trial_is_never_pruned_and_nan_always() -> None:
    assert not pruned(study_of((0.9, BEST)), 0.1, WORSE, step=900)
    assert pruned(study_of((0.9, BEST)), math.nan, WORSE)


def test_too_few_slides_decide_nothing() -> None:
    assert not pruned(study_of((0.9, BEST[:5])), 0.8, WORSE[:5])


def test_p_value_is_that_of_counting_all_signs() -> None:
    """Exact: of the 2^n signs of the ranks the share whose positive ranks sum up to as much."""
    losses, best = np.array([0.5, 0.1, 0.9, 0.3, 0.65, 0.2]), np.array([0.4, 0.15, 0.5, 0.28, 0.3, 0.27])
    ranks = np.argsort(np.argsort(np.abs(losses - best))) + 1
    observed = ranks[losses > best].sum()
    signs = (np.arange(2**6)[:, None] >> np.arange(6)) & 1
    assert worse_p(losses, best) == pytest.approx(np.mean(signs @ ranks >= observed))
    assert worse_p(best, best) == 1.0


def test_losses_are_means_of_slides_and_patches_without_a_slide_are_their_own() -> None:
    label, prob = np.array([1, 0, 1, 0, 1]), np.array([0.9, 0.2, 0.5, 0.4, 0.0])
    got = losses_by_slide(label, prob, np.array([7, 3, 7, -1, -1]))
    want = [-math.log(0.8), (-math.log(0.9) - math.log(0.5)) / 2, -math.log(0.6), -math.log(1e-7)]
    np.testing.assert_allclose(got, want, atol=6e-5)


def test_many_slides_become_parts_of_whole_slides() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(200), 5)
    label, prob = rng.integers(0, 2, 1000), rng.uniform(0.01, 0.99, 1000)
    got = losses_by_slide(label, prob, group)
    loss = -np.log(np.where(label == 1, prob, 1 - prob))
    assert len(got) == MOST_PARTS
    np.testing.assert_allclose(got, [loss[group % MOST_PARTS == part].mean() for part in range(MOST_PARTS)], atol=6e-5)


def test_a_search_stores_a_loss_for_each_slide_and_rung_and_only_for_this_pruner(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Compute("cpu", step_s=0.1)
    monkeypatch.setattr("pcam_automl.training.speed.measure_fitting", lambda *_, **__: measured)
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    for pruner in ("wilcoxon", "asha"):
        opened = create_or_open_study(pruner, url, replace(asked, views=64, pruner=pruner), say=lambda text: None)
        run_worker(Objective(opened, torch.device("cpu")), Limits(1))
        (trial,) = opened.study.get_trials()
        if pruner == "asha":
            assert SLIDE_LOSSES not in trial.user_attrs
            continue
        slides = np.unique(opened.store.group[opened.split.score_rows(VALIDATION_FOLD)])
        losses = trial.user_attrs[SLIDE_LOSSES]
        assert list(losses) == [str(step) for step in trial.intermediate_values]
        assert [len(of_rung) for of_rung in losses.values()] == [len(slides)] * 3
