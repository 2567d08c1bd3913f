"""What `finalize` and `status` say of results that are no ordinary numbers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pcam_automl.commands.audit import ranking_lines
from pcam_automl.commands.final_text import print_final, say_decision
from pcam_automl.finalizing.result import FinalResult
from pcam_automl.goals import AUC
from pcam_automl.search.ranking import Ranked, Ranking


def decision_of(*means: float) -> Any:
    confirmed = [
        SimpleNamespace(trial=number, search=0.98, mean=mean, drop=0.98 - mean) for number, mean in enumerate(means)
    ]
    member = SimpleNamespace(trial=SimpleNamespace(number=3))
    drops = [one.drop for one in confirmed if not math.isnan(one.drop)]
    return SimpleNamespace(
        confirmed=confirmed,
        drop=sum(drops) / len(drops) if drops else math.nan,
        members=[member],
        weights=[1.0],
        tie=None,
        blend=None,
        calibration=None,
    )


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_confirmation_that_diverged_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    say_decision(decision_of(0.97, math.nan), AUC)
    text = said(capsys)
    assert "trial 1: AUC 0.9800 in the search, diverged with a fresh seed confirmed best: trial 0, AUC 0.9700" in text
    assert "nan" not in text
    say_decision(decision_of(math.nan), AUC)
    text = said(capsys)
    assert "no confirmation came to an end: trial 3 is taken by the search's word" in text
    assert "nan" not in text


@pytest.mark.parametrize(("n", "named"), [(1, "final/model"), (2, "final")])
def test_without_a_submission_the_network_is_named_of_an_ensemble_the_folder_of_all(
    n: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decision = SimpleNamespace(members=[None] * n)
    final = FinalResult(tmp_path / "final", None, 0, 0.9, "holdout", None, 1.0, (), decision=cast(Any, decision))
    print_final(final, as_json=False)
    out = capsys.readouterr().out.replace("\n", "")
    assert out.startswith(f"{tmp_path / named} (no test patches")


def test_the_figures_of_maps_are_said_beside_their_auc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = {"dice": 0.1234, "accuracy": 0.95, "always_negative_accuracy": 0.94, "loss": 0.2}
    final = FinalResult(tmp_path, None, 0, 0.9, "pixels of 5 images", None, 1.0, (), dense=dense)
    print_final(final, as_json=False)
    assert "Dice 0.1234, pixel accuracy 0.9500 (always negative: 0.9400)" in said(capsys)


def test_a_dense_study_s_interval_is_of_pixels_and_images() -> None:
    best = Ranked(3, 0.96, (0.95, 0.97), 0.0, (0.0, 0.0), 0.0, False, False, None)
    counted = {"n_complete": 1, "n_patches": 200_000, "n_clusters": 30}
    (line, *_) = ranking_lines(Ranking((best,), **counted, what="pixels", over="images"))
    assert line.endswith("(200,000 validation pixels drawn by 30 images)")
    (line, *_) = ranking_lines(Ranking((best,), **counted))
    assert line.endswith("(200,000 validation patches drawn by 30 slides)")
