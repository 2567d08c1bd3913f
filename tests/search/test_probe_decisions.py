"""What follows from a probe's ranking: hopeless backbones, starts, and whether the study bears it out."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from pcam_automl.search import probe_decisions
from pcam_automl.search.feature_probe import ProbeResult
from pcam_automl.search.lineages import Lineage, lineages_of
from pcam_automl.search.probe_decisions import (
    _tau,
    hopeless_backbones,
    probe_fidelity,
    ranked_starts,
    results_of,
)

STEPS = (100, 300, 900)


def result(backbone: str, auc: float, *, crop: int = 64, upscale: float = 1.0, half: float = 0.02) -> ProbeResult:
    return ProbeResult(backbone, crop, upscale, round(crop * upscale), auc, (auc - half, auc + half), 1.0)


def lineage_trial(name: str, backbone: str, values: list[float], *, crop: int = 64, state=TrialState.COMPLETE):
    recipe = {"backbone": backbone, "crop_size": crop, "input_size": None}
    return create_trial(
        state=state,
        value=values[-1] if state == TrialState.COMPLETE else None,
        params={"lr": 0.1},
        distributions={"lr": FloatDistribution(0.0, 1.0)},
        intermediate_values=dict(zip(STEPS, values, strict=False)),
        user_attrs={"lineage": name, "recipe": json.dumps(recipe)},
    )


def study_of(pairs: list[tuple[str, float]]) -> list[Lineage]:
    trials = [lineage_trial(str(i), backbone, [0.5, 0.6, value]) for i, (backbone, value) in enumerate(pairs)]
    for number, trial in enumerate(trials):
        trial.number = number
    return lineages_of(trials)


def test_only_what_is_behind_both_intervals_and_the_margin_is_hopeless() -> None:
    found = [result("a", 0.95), result("b", 0.94), result("c", 0.93), result("d", 0.90), result("e", 0.70)]
    assert list(hopeless_backbones(found)) == ["e"]
    assert "0.700 (up to 0.720), that of a's 0.950 (from 0.930)" in hopeless_backbones(found)["e"]


def test_three_backbones_and_trial_zeros_stay() -> None:
    found = [result("a", 0.95), result("b", 0.6), result("c", 0.6), result("d", 0.6), result("e", 0.6)]
    assert set(hopeless_backbones(found)) == {"d", "e"}
    assert set(hopeless_backbones(found, keep=("e",))) == {"d"}
    assert not hopeless_backbones(found[:3])
    assert not hopeless_backbones([])


def test_backbones_are_compared_at_their_first_view() -> None:
    first = [result(name, auc) for name, auc in (("a", 0.80), ("b", 0.79), ("c", 0.78), ("d", 0.77))]
    assert not hopeless_backbones([*first, result("a", 0.99, crop=96)])


def test_starts_are_the_best_view_of_each_backbone_then_the_second_best() -> None:
    found = [result("a", 0.90), result("a", 0.95, crop=96), result("b", 0.85), result("b", 0.99, upscale=2.0)]
    starts = ranked_starts(
        found,
        {"backbone": "a", "crop_size": 64, "upscale": 1.0, "lr": 0.1},
        varied=["backbone", "crop_size", "upscale", "lr"],
        limit=4,
    )
    assert [(s["backbone"], s["crop_size"], s["upscale"]) for s in starts] == [
        ("b", 64, 2.0),
        ("a", 96, 1.0),
        ("b", 64, 1.0),
    ]
    assert {s["lr"] for s in starts} == {0.1}


def test_starts_name_nothing_that_the_space_fixes_and_do_not_repeat() -> None:
    found = [result("a", 0.90), result("a", 0.95, crop=96)]
    assert ranked_starts(found, {"lr": 0.1}, varied=["lr", "crop_size"]) == [
        {"lr": 0.1, "crop_size": 96},
        {"lr": 0.1, "crop_size": 64},
    ]
    assert ranked_starts(found, {"lr": 0.1}, varied=["lr"]) == []


def test_tau_equals_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.permutation(12).astype(float), rng.permutation(12).astype(float)
    agree = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in combinations(range(12), 2)]
    assert _tau(x, y) == pytest.approx(np.mean(agree))


def test_a_ranking_that_whole_trainings_repeat_holds_and_the_reverse_misleads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_decisions, "_DRAWS", 200)
    names = [f"n{i}" for i in range(8)]
    probed = [result(name, 0.6 + 0.04 * i) for i, name in enumerate(names)]
    rng = np.random.default_rng(1)
    same = [(name, 0.7 + 0.03 * i + rng.normal(0, 0.003)) for i, name in enumerate(names) for _ in range(2)]
    reverse = [(name, 1.6 - value) for name, value in same]
    held = probe_fidelity(study_of(same), probed, whole_step=900)
    assert held.verdict == "holds"
    assert held.tau is not None
    assert held.tau > 0.8
    assert (held.n_lineages, held.n_cells) == (16, 8)
    assert probe_fidelity(study_of(reverse), probed, whole_step=900).verdict == "misleads"
    assert "holds, Kendall tau" in str(held)


def test_too_few_lineages_or_cells_are_unclear() -> None:
    probed = [result("a", 0.8), result("b", 0.9)]
    few = probe_fidelity(study_of([("a", 0.8), ("b", 0.9)]), probed, whole_step=900)
    assert (few.tau, few.verdict, few.n_lineages) == (None, "unclear", 2)
    two_cells = probe_fidelity(study_of([("a", 0.8), ("b", 0.9)] * 6), probed, whole_step=900)
    assert (two_cells.verdict, two_cells.n_cells) == ("unclear", 2)


def test_a_lineage_of_two_rows_counts_once_and_pruned_ones_do_not() -> None:
    rows = [
        lineage_trial("x", "a", [0.5, 0.6], state=TrialState.PRUNED),
        lineage_trial("x", "a", [0.5, 0.6, 0.7]),
        lineage_trial("y", "a", [0.5], state=TrialState.PRUNED),
        lineage_trial("z", "unknown", [0.5, 0.6, 0.7]),
    ]
    for number, row in enumerate(rows):
        row.number = number
    assert probe_fidelity(lineages_of(rows), [result("a", 0.8)], whole_step=900).n_lineages == 1


def test_a_lineage_takes_the_most_similar_view() -> None:
    probed = [result("a", 0.7, crop=32), result("a", 0.9, crop=96)]
    rows = [lineage_trial(str(i), "a", [0.5, 0.6, 0.7], crop=crop) for i, crop in enumerate((32, 48, 80, 96))]
    for number, row in enumerate(rows):
        row.number = number
    assert probe_fidelity(lineages_of(rows), probed, whole_step=900).n_cells == 2


def test_results_survive_the_studys_json() -> None:
    found = [result("a", 0.9, crop=96, upscale=1.5)]
    record = json.loads(json.dumps({"results": [asdict(one) for one in found]}))
    assert results_of(record) == found
    assert results_of({}) == []
