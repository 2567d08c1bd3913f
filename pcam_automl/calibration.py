"""Whether probabilities can be believed: reliability, and one temperature that mends them. Reads no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_automl.errors import DataError
from pcam_automl.metrics import log_loss

COLDEST, HOTTEST = 0.1, 20.0
"""Bounds of a temperature; a fit that runs into one of them says that the logits carry no scale to speak of."""
N_BINS = 10
_LEAST_PROB, _MOST_PROB = float(np.finfo(np.float64).tiny), 1.0 - 2.0**-53
"""The nearest to 0 and 1 that have a logit: -708 and 36.7."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A temperature (Guo et al., ICML 2017) and what it changed on the patches that it was fitted to.

    Attributes:
        temperature: logits are divided by it; above 1 the network was too sure of itself.
        n: patches it was fitted to.
        on: which, for people.
        log_loss: nats before and after.
        error: expected calibration error before and after, in [0, 1].
    """

    temperature: float
    n: int
    on: str
    log_loss: tuple[float, float]
    error: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not, or its temperature is out of range.
        """
        temperature = float(fields["temperature"])
        if not COLDEST <= temperature <= HOTTEST:
            raise ValueError(f"calibration.temperature must be in [{COLDEST}, {HOTTEST}], got {temperature}")
        (loss, loss_after), (error, error_after) = fields["log_loss"], fields["error"]
        pairs = (float(loss), float(loss_after)), (float(error), float(error_after))
        return Calibration(temperature, int(fields["n"]), str(fields["on"]), *pairs)


def fit_temperature(logits: ArrayLike, label: ArrayLike) -> float:
    """The temperature with the least log-loss, in [0.1, 20]; 1 where none is better than the logits as they are.

    The targets are Platt's (1999): ``(n + 1) / (n + 2)`` for the n patches of label 1, ``1 / (m + 2)`` for the m others.
    Without them, logits that separate the labels would be pushed to certainty.

    Args:
        logits: (N,) finite.
        label: (N,) 0 or 1, both at least once.

    Raises:
        DataError: lengths differ, one label only, or a logit that is not finite.
    """
    from scipy.optimize import minimize_scalar

    scores, positive = _checked(logits, label)
    n = int(positive.sum())
    target = np.where(positive, (n + 1) / (n + 2), 1 / (len(positive) - n + 2))

    def loss(log_temperature: float) -> float:  # of one variable and convex in 1 / T: no local minimum
        scaled = scores / np.exp(log_temperature)
        return float((np.logaddexp(0.0, scaled) - target * scaled).mean())

    found = minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    raw, mended = (log_loss(positive, probs_at(scores, t)) for t in (1.0, temperature))
    return temperature if mended < raw else 1.0


def calibrate(logits: ArrayLike, label: ArrayLike, on: str) -> Calibration:
    """Fit a temperature and measure what it changes; ``on`` says on which patches.

    Raises:
        DataError: as :func:`fit_temperature`.
    """
    temperature = fit_temperature(logits, label)
    truth = np.asarray(label, np.int64)
    losses, errors = changes(logits, truth, temperature)
    return Calibration(temperature, len(truth), on, losses, errors)


def changes(
    logits: ArrayLike, label: NDArray[np.int64], temperature: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Log-loss and expected calibration error, each before and after the temperature."""
    scores = np.asarray(logits, np.float64)
    raw, mended = probs_at(scores, 1.0), probs_at(scores, temperature)
    loss = log_loss(label, raw), log_loss(label, mended)
    return loss, (reliability(label, raw).error, reliability(label, mended).error)


def probs_at(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """Sigmoid of the logits at a temperature: (N,) in [0, 1], without overflow for logits of any size."""
    from scipy.special import expit  # 0.2 s, which `--help` need not wait for

    return np.asarray(expit(np.asarray(logits, np.float64) / temperature))


def logits_of(probs: ArrayLike) -> Floats:
    """Logits of probabilities (N,), which are kept off 0 and 1 as little as float64 can: their order counts."""
    kept = np.asarray(probs, np.float64).clip(_LEAST_PROB, _MOST_PROB)
    return np.asarray(np.log(kept) - np.log1p(-kept))


def _checked(logits: ArrayLike, label: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    scores, positive = np.asarray(logits, np.float64), np.asarray(label) == 1
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise DataError(f"logits and labels must be (N,) of equal length, got {scores.shape} and {positive.shape}")
    if positive.all() or not positive.any():
        raise DataError(f"a temperature needs patches of both labels, got {len(positive)} of one")
    if not np.isfinite(scores).all():
        raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} logits are not finite numbers")
    return scores, positive


@dataclass(frozen=True)
class Reliability:
    """Patches or pixels by probability: edges (n + 1,), counts of both labels, mean probability and share of tumour (NaN if empty)."""

    edges: Floats
    n_normal: NDArray[np.int64]
    n_tumour: NDArray[np.int64]
    mean_prob: Floats

    @property
    def n(self) -> NDArray[np.int64]:
        return self.n_normal + self.n_tumour

    @property
    def share(self) -> Floats:
        """Of tumour, by bin."""
        return np.asarray(np.divide(self.n_tumour, self.n, out=np.full(len(self.n), np.nan), where=self.n > 0))

    def share_bounds(self) -> Floats:
        """(2, n) Wilson's 95 % interval of each share (Wilson, JASA 1927), patches taken as independent; NaN where a bin is empty."""
        n = np.where(self.n > 0, self.n, np.nan)
        share, z = self.share, 1.959964
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        return np.stack([middle - half, middle + half])

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al., AAAI 2015): mean distance, weighted by the patches."""
        full = self.n > 0
        return float((np.abs(self.share - self.mean_prob)[full] * self.n[full]).sum() / self.n.sum())


def reliability(label: NDArray[np.int64], prob: NDArray[np.float64], n_bins: int = N_BINS) -> Reliability:
    """Bins of equal width; the last includes 1."""
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    place = np.minimum((np.asarray(prob) * n_bins).astype(np.int64), n_bins - 1)
    total = np.bincount(place, minlength=n_bins)
    sums = np.bincount(place, weights=prob, minlength=n_bins)
    positive = np.bincount(place[np.asarray(label) == 1], minlength=n_bins)
    means = np.divide(sums, total, out=np.full(n_bins, np.nan), where=total > 0)
    return Reliability(edges, total - positive, positive, means)
