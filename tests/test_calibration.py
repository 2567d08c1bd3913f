"""Temperatures: a planted one is found, order is kept, and nothing gets worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_automl.calibration import (
    COLDEST,
    HOTTEST,
    Calibration,
    calibrate,
    changes,
    fit_temperature,
    logits_of,
    probs_at,
)
from pcam_automl.errors import DataError
from pcam_automl.metrics import auc, log_loss


def planted(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from honest probabilities, and logits that are too sure by ``temperature``."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0.0, 2.0, n)
    return honest * temperature, (rng.random(n) < probs_at(honest, 1.0)).astype(np.int64)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 6.0])
def test_a_planted_temperature_is_found(temperature: float) -> None:
    logits, label = planted(20_000, temperature)
    assert fit_temperature(logits, label) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_is_the_best_of_a_fine_grid() -> None:
    logits, label = planted(3_000, 3.0, seed=1)
    grid = np.geomspace(COLDEST, HOTTEST, 4_000)
    best = min(grid, key=lambda t: log_loss(label, probs_at(logits, t)))
    assert fit_temperature(logits, label) == pytest.approx(best, rel=0.01)


@given(seed=st.integers(0, 10_000), n=st.integers(4, 60), scale=st.floats(0.01, 50.0))
def test_neither_loss_nor_order_gets_worse(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    logits = rng.normal(0.0, scale, n) + label * rng.uniform(-1, 3)
    temperature = fit_temperature(logits, label)
    assert COLDEST <= temperature <= HOTTEST
    (before, after), _ = changes(logits, label, temperature)
    assert after <= before
    mild = logits.clip(-20, 20)  # beyond, sigmoids are all 1
    assert auc(label, probs_at(mild, temperature)) == pytest.approx(auc(label, mild), abs=1e-9)


def test_labels_that_are_told_apart_without_fault_do_not_become_certain() -> None:
    label = np.arange(200) % 2
    logits = 4.0 * (2 * label - 1).astype(np.float64)
    probs = probs_at(logits, fit_temperature(logits, label))
    assert 0.98 < probs.max() < 0.9999


def test_logits_and_probabilities_are_each_others_inverse_and_stay_finite() -> None:
    logits = np.linspace(-15, 15, 61)
    assert np.allclose(logits_of(probs_at(logits, 1.0)), logits)
    assert np.isfinite(logits_of(np.array([0.0, 1.0]))).all()
    near = np.array([1e-300, 1e-20, 1 - 1e-9, 1 - 1e-12, 1 - 1e-15, 1.0])
    assert (np.diff(logits_of(near)) > 0).all()
    assert probs_at(np.array([-1e4, 1e4]), 1.0).tolist() == [0.0, 1.0]


def test_a_calibration_reads_back_and_refuses_a_temperature_out_of_range() -> None:
    logits, label = planted(500, 2.0)
    fitted = calibrate(logits, label, "500 patches")
    assert fitted.log_loss[1] < fitted.log_loss[0]
    assert fitted.error[1] < fitted.error[0]
    assert Calibration.from_json(fitted.to_json()) == fitted
    with pytest.raises(ValueError, match=r"temperature must be in \[0\.1, 20\.0\], got 0\.0"):
        Calibration.from_json({**fitted.to_json(), "temperature": 0})


def test_one_label_or_a_logit_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="both labels, got 3 of one"):
        fit_temperature([0.0, 1.0, 2.0], [1, 1, 1])
    with pytest.raises(DataError, match="1 of 2 logits are not finite"):
        fit_temperature([0.0, np.nan], [0, 1])
    with pytest.raises(DataError, match="equal length"):
        fit_temperature([0.0], [0, 1])
