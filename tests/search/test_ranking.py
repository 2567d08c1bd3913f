"""Ranking: paired intervals, ties, the cheapest of equals, and what is read from a study's folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from planted_study import probs_of, scored_trial, settings_of, study_with

from pcam_automl.config import StudySettings
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.metrics import auc, auc_interval
from pcam_automl.search.budget import plan_budget, set_budget
from pcam_automl.search.ranking import (
    MOST_BEHIND,
    MOST_RANKED,
    Ranked,
    Ranking,
    choose_cheapest_tied,
    choose_least_trained_tied,
    margin,
    rank,
    rank_study,
)
from pcam_automl.search.reading import load_study_to_read
from pcam_automl.search.summary import READ_ATTRS, READ_OF_COMPLETE


@pytest.fixture
def store(easy_pack: Path) -> PatchStore:
    return open_store(easy_pack)


def ranking_of(store: PatchStore, folder: Path, trials: list[FrozenTrial]) -> Ranking:
    return rank_study(study_with(trials), settings_of(store), folder, store=store)


def shared_difficulty(n: int = 600, n_slides: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, slides and scores whose quality differs far more between slides than any two trials do."""
    rng = np.random.default_rng(5)
    slide, label = rng.integers(0, n_slides, n), rng.integers(0, 2, n)
    return label, slide, label * rng.uniform(0, 3, n_slides)[slide] + rng.normal(size=n)


def ranked(number: int, behind: float, *, images_per_s: float | None = 100.0, tied: bool = True) -> Ranked:
    return Ranked(number, 0.95 - behind, (0.9, 0.99), behind, (-0.01, 0.01), 0.001, False, tied, images_per_s)


def test_a_lead_that_overlapping_intervals_hide_is_seen_in_the_paired_difference() -> None:
    label, slide, scores = shared_difficulty()
    noise = np.random.default_rng(1).normal(size=len(label))
    probs = np.stack([scores + 0.8 * noise, scores])  # the second trial is the same network less some noise
    values = [auc(label, row) for row in probs]
    best, other = rank(label, probs, slide, numbers=[4, 7], values=values, images_per_s=[1.0, 1.0])
    assert (best.number, other.number) == (7, 4)
    assert best.interval[0] < other.interval[1]
    assert other.beaten
    assert not other.tied
    assert 0 < other.behind_interval[0] < other.behind < other.behind_interval[1]
    assert best.interval == auc_interval(label, scores, slide)


def test_equal_trials_tie_and_the_earlier_one_is_first() -> None:
    label, slide, scores = shared_difficulty()
    found = rank(label, [scores, scores], slide, numbers=[9, 2], values=[0.8, 0.8], images_per_s=[None, None])
    assert [trial.number for trial in found] == [2, 9]
    assert found[1].behind_interval == (0.0, 0.0)
    assert found[1].tied
    assert not found[1].beaten


def test_one_slide_gives_no_interval_and_no_tie() -> None:
    label, _, scores = shared_difficulty()
    best, other = rank(
        label,
        [scores, scores + 0.01 * label],
        np.zeros(600, np.int64),
        numbers=[0, 1],
        values=[0.8, 0.79],
        images_per_s=[1, 9],
    )
    assert math.isnan(best.interval[0])
    assert not other.tied
    assert choose_cheapest_tied((best, other))[0] == 0


@pytest.mark.parametrize(
    ("best", "se", "want"),
    [(0.90, 0.0005, 0.0005), (0.90, 0.5, MOST_BEHIND), (0.99, 0.5, 0.0005), (0.99, math.nan, 0.0), (1.0, 0.1, 0.0)],
)
def test_a_tie_is_one_standard_error_and_never_more_than_a_twentieth_of_the_error(
    best: float, se: float, want: float
) -> None:
    assert margin(best, se) == pytest.approx(want)


def test_with_few_slides_a_bad_cheap_network_is_not_taken_although_it_is_not_beaten() -> None:
    rng = np.random.default_rng(3)
    slide = np.repeat(np.arange(3), 40)
    label = np.tile([0, 1], 60)
    good = label + rng.normal(size=120)
    bad = label * np.array([0.2, 1.2, 0.5])[slide] + rng.normal(size=120)
    values = [auc(label, good), auc(label, bad)]
    found = rank(label, [good, bad], slide, numbers=[0, 1], values=values, images_per_s=[10.0, 1000.0])
    assert not found[1].beaten
    assert found[1].behind > MOST_BEHIND
    assert choose_cheapest_tied(found)[0] == 0


def test_of_ties_the_cheapest_is_taken_if_it_saves_a_tenth() -> None:
    best = ranked(0, 0.0)
    number, why = choose_cheapest_tied(
        [best, ranked(1, 0.0004, images_per_s=250.0), ranked(2, 0.0009, images_per_s=200.0)]
    )
    assert number == 1
    assert "trial 0 scored 0.0004 higher" in why
    assert "2.5 times as long" in why
    assert choose_cheapest_tied([best, ranked(1, 0.0004, images_per_s=105.0)])[0] == 0
    assert choose_cheapest_tied([best, ranked(1, 0.0004, images_per_s=900.0, tied=False)])[0] == 0
    assert choose_cheapest_tied([best, ranked(1, 0.0004, images_per_s=None)])[0] == 0
    unknown = choose_cheapest_tied([replace(best, images_per_s=None), ranked(1, 0.0004, images_per_s=900.0)])
    assert unknown == (0, "it has the highest AUC, and its speed is not known")


def test_of_a_short_searchs_ties_the_one_with_fewer_views_is_taken() -> None:
    best, close = ranked(0, 0.0), replace(ranked(1, 0.004), behind_se=0.005)
    number, why = choose_least_trained_tied([best, close, replace(close, number=2)], [900, 400, 850])
    assert number == 1
    assert "trial 0 scored 0.0040 higher" in why
    assert "2.2 times the views" in why
    assert choose_least_trained_tied([best, ranked(1, 0.0)], [900, 400])[1].startswith("trial 0 scored the same")
    for other, views in (
        (close, 800),  # hardly fewer
        (close, 1800),
        (replace(close, beaten=True), 400),
        (replace(close, behind_se=0.003), 400),
        (replace(close, behind=0.03, behind_se=0.04), 400),  # more than half of the best's error of 0.05
        (replace(close, behind_se=math.nan), 400),
    ):
        number, why = choose_least_trained_tied([best, other], [900, views])
        assert (number, why[:26]) == (0, "it has the highest AUC, an")
    assert choose_least_trained_tied([best], [900]) == (0, "it is the only complete one")


def test_of_a_short_searchs_trials_that_have_learnt_nothing_the_start_is_taken() -> None:
    best = replace(ranked(1, 0.0), auc=0.56, interval=(0.47, 0.66))
    start = replace(ranked(0, 0.03), auc=0.53)
    number, why = choose_least_trained_tied([best, start], [900, 900], 0)
    assert number == 0
    assert why.startswith("trial 1 (0.5600, 95 % 0.4700 to 0.6600) is not told from chance")
    assert choose_least_trained_tied([best, start], [400, 900], 0)[0] == 0
    assert choose_least_trained_tied([best, start], [900, 900], 1)[0] == 1
    assert choose_least_trained_tied([best, start], [900, 400], 1)[0] == 1, "though the other has seen fewer views"
    assert choose_least_trained_tied([best], [900], 1) == (1, "it is the only complete one")
    assert choose_least_trained_tied([best, start], [900, 900], None)[0] == 1, "the start has diverged, say"
    for other in (replace(best, interval=(0.501, 0.66)), replace(best, interval=(math.nan, math.nan))):
        assert choose_least_trained_tied([other, start], [900, 900], 0)[0] == 1
    assert choose_least_trained_tied([best, replace(start, beaten=True)], [900, 900], 0)[0] == 1


def test_that_few_slides_tell_nothing_from_chance_does_not_make_a_far_worse_start_the_winner() -> None:
    best = replace(ranked(1, 0.0), auc=0.957, interval=(0.41, 1.0))
    worse = replace(ranked(0, 0.2), auc=0.756)
    assert choose_least_trained_tied([best, worse], [900, 900], 0)[0] == 1
    near = replace(ranked(0, 0.02), auc=0.937)
    assert choose_least_trained_tied([best, near], [900, 900], 0)[0] == 0, "half of the best's error at most"


def test_a_study_of_a_short_search_takes_the_tie_that_has_more_to_gain(store: PatchStore, tmp_path: Path) -> None:
    prob = probs_of(store, 0.1)
    trials = [
        scored_trial(store, tmp_path, number, prob, images_per_s=speed, recipe=json.dumps({"views": views}))
        for number, (views, speed) in enumerate(((900, 300.0), (400, 100.0)))
    ]
    settings = settings_of(store)
    budget = asdict(plan_budget(180.0, used_s=12.0, may_be_short=True))
    short = settings.model_copy(update={"plan": {"budget": budget}})

    def picked(settings: StudySettings, budget_s: float, trials: list[FrozenTrial]) -> int | None:
        study = study_with(trials)
        set_budget(study, budget_s)
        return rank_study(study, settings, tmp_path, store=store).picked

    assert picked(short, 180.0, trials) == 1
    url = f"sqlite:///{tmp_path / 'short.db'}"
    set_budget(study_with(trials, url, short), 180.0)
    read, kept = load_study_to_read("pcam", url, READ_ATTRS, of_complete=READ_OF_COMPLETE)
    assert rank_study(read, kept, tmp_path, store=store).picked == 1, "status says the same"
    assert picked(short, 360.0, trials) == 0, "a raised budget has searched; the quicker of equals is cheaper"
    assert picked(settings, 180.0, trials) == 0
    assert picked(short.model_copy(update={"deterministic": True}), 180.0, trials) == 0
    del trials[1].user_attrs["recipe"]
    assert picked(short, 180.0, trials) == 0, "views are not known"


def test_a_study_is_ranked_from_the_scores_of_its_trials(store: PatchStore, tmp_path: Path) -> None:
    probs = [probs_of(store, noise, seed=seed) for seed, noise in enumerate((3.0, 0.1, 1.0))]
    found = ranking_of(store, tmp_path, [scored_trial(store, tmp_path, i, prob) for i, prob in enumerate(probs)])
    rows = store.development_rows()
    label, slide = np.asarray(store.label)[rows], np.asarray(store.group)[rows]
    assert found.best is not None
    assert [trial.number for trial in found.trials] == [1, 2, 0]
    assert found.best.interval == pytest.approx(auc_interval(label, probs[1], slide), abs=1e-9)
    assert (found.n_patches, found.n_clusters, found.n_complete) == (len(rows), len(np.unique(slide)), 3)
    assert found.picked == 1
    assert 0 in [trial.number for trial in found.trials if trial.beaten]
    assert found.to_json()["unbeaten"] == list(found.unbeaten)


def test_a_cheaper_trial_of_equal_scores_is_picked_and_finalize_takes_it(store: PatchStore, tmp_path: Path) -> None:
    prob = probs_of(store, 0.1)
    trials = [scored_trial(store, tmp_path, 0, prob), scored_trial(store, tmp_path, 1, prob, images_per_s=300.0)]
    found = ranking_of(store, tmp_path, trials)
    assert found.picked == 1
    fixed = settings_of(store).model_copy(update={"deterministic": True})
    assert rank_study(study_with(trials), fixed, tmp_path, store=store).picked == 0, "no measurement decides there"
    other_cpu = [
        scored_trial(store, tmp_path, 0, prob, device="x86_64 CPU, 2 threads", cpu="slow"),
        scored_trial(store, tmp_path, 1, prob, images_per_s=300.0, device="x86_64 CPU, 2 threads", cpu="quick"),
    ]
    found = ranking_of(store, tmp_path, other_cpu)
    assert found.picked == 0, "the device's name tells no model"
    assert any("device" in note for note in found.notes)
    other_device = scored_trial(store, tmp_path, 1, prob, images_per_s=300.0, device="cuda")
    found = ranking_of(store, tmp_path, [trials[0], other_device])
    assert found.picked == 0
    assert any("device" in note for note in found.notes)


def test_a_lineage_with_two_rows_is_ranked_once(store: PatchStore, tmp_path: Path) -> None:
    prob = probs_of(store, 0.1)
    lost = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"lineage": "0"})
    pruned = optuna.trial.create_trial(
        state=TrialState.PRUNED, user_attrs={"lineage": "0"}, intermediate_values={100: 0.6}
    )
    again = [scored_trial(store, tmp_path, number, prob, lineage="0") for number in (2, 3)]
    found = ranking_of(store, tmp_path, [lost, pruned, *again])
    assert [trial.number for trial in found.trials] == [3]
    assert found.n_complete == 1


def test_what_cannot_be_compared_is_named(store: PatchStore, tmp_path: Path) -> None:
    trials = [scored_trial(store, tmp_path, number, probs_of(store, 0.1, seed=number)) for number in range(4)]
    rows = store.development_rows()
    best = np.asarray(store.label)[rows] + 0.0
    best[:2] = 0.5
    trials[0] = scored_trial(store, tmp_path, 0, best)
    (tmp_path / "trials" / "1" / "scores.csv").unlink()
    trials[2] = scored_trial(store, tmp_path, 2, best[:-1] * 0.9, rows=rows[:-1])
    trials[3].value = 0.5
    found = ranking_of(store, tmp_path, trials)
    assert [trial.number for trial in found.trials] == [0]
    (note,) = [note for note in found.notes if note.startswith("not compared")]
    for part in (
        "trial 1: ",
        "trial 2 was scored on other patches",
        "value 0.5000 of trial 3 is not the AUC of its scores",
    ):
        assert part in note


def test_without_scores_pack_or_trials_a_ranking_says_why(store: PatchStore, tmp_path: Path) -> None:
    assert ranking_of(store, tmp_path, []).notes == ("no complete trial yet",)
    trial = scored_trial(store, tmp_path, 0, probs_of(store, 0.1))
    gone = rank_study(study_with([trial]), settings_of(pack=str(tmp_path / "gone")), tmp_path)
    assert (gone.picked, gone.n_complete) == (None, 1)
    assert "gone does not exist" in gone.notes[0]
    (tmp_path / "trials" / "0" / "scores.csv").unlink()
    assert "its trial ran on another machine" in ranking_of(store, tmp_path, [trial]).notes[0]
    other = settings_of(store).model_copy(update={"objective": "worst_domain_auc"})
    note = rank_study(study_with([trial]), other, tmp_path, store=store).notes[0]
    assert note == "intervals and ties are drawn for the AUC only, this study optimises worst_domain_auc"


def test_only_the_best_trials_are_read_and_their_number_is_said(store: PatchStore, tmp_path: Path) -> None:
    n = MOST_RANKED + 3
    trials = [scored_trial(store, tmp_path, number, probs_of(store, 0.05 * number, seed=number)) for number in range(n)]
    found = ranking_of(store, tmp_path, trials)
    assert (len(found.trials), found.n_complete) == (MOST_RANKED, n)
    assert (
        min(trial.auc for trial in found.trials)
        == sorted((t.value or 0 for t in trials), reverse=True)[MOST_RANKED - 1]
    )
