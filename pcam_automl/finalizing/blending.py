"""Which networks to average, and whether it pays: greedy selection on out-of-fold logits. Trains and reads nothing.

Blended are logits, not probabilities: the views of a patch are averaged so, the mean of logits needs one temperature to be
calibrated, and it is the product of the networks' odds, in which a sure network counts more than an undecided one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcam_automl.metrics import auc, group_codes
from pcam_automl.paired import Gain, auc_gain

ROUNDS = 20
"""Additions to the bag, so that weights are multiples of at least 1/21."""
PARTS = 5
LEAST_GAIN = 0.0005
"""AUC that an ensemble must gain on slides that did not choose it; less is not worth another training."""
LEAST_SURE = 0.8
"""How sure that must be over slides, see :class:`~pcam_automl.paired.Gain`."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Blend:
    """What greedy selection found, and whether it is used.

    Attributes:
        weights: (k,) of the candidates, summing to 1; all on the best single one where the blend is not used.
        found: (k,) what was selected on all the patches, used or not.
        used: whether it gained enough.
        why: in words.
        auc_single: of the best single one.
        auc_blend: of blends chosen on other slides than those they are scored on; None where that was not possible.
        gain: the difference, with an interval over slides.
        logits: (N,) of the cross-fitted blend where it is used, else of the single one.
    """

    weights: tuple[float, ...]
    found: tuple[float, ...]
    used: bool
    why: str
    auc_single: float
    auc_blend: float | None
    gain: Gain | None
    logits: Floats

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": list(self.weights),
            "found": list(self.found),
            "used": self.used,
            "why": self.why,
            "auc_single": self.auc_single,
            "auc_blend": self.auc_blend,
            "gain": None if self.gain is None else self.gain.to_json(),
        }


def greedy_weights(logits: Floats, label: Ints, *, most_members: int, rounds: int = ROUNDS) -> Floats:
    """Forward selection with replacement (Caruana et al., ICML 2004): (k,) weights that sum to 1.

    The bag begins with the best candidate; each round adds the one, perhaps again, that raises the AUC of the bag's mean
    the most, until none does. Of equals the earlier candidate is taken.

    Args:
        logits: (k, N) of the candidates, at least one.
        label: (N,) 0 or 1, both at least once.
        most_members: different candidates that the bag may hold, at least 1.
        rounds: most additions.
    """
    counts = np.zeros(len(logits), np.int64)
    singles = [auc(label, row) for row in logits]
    counts[int(np.argmax(singles))] = 1
    best, total = max(singles), counts @ logits
    for _ in range(rounds):
        full = np.count_nonzero(counts) >= most_members
        options = [k for k in range(len(logits)) if counts[k] or not full]
        tried = [auc(label, total + logits[k]) for k in options]  # the mean's order is the sum's
        place = int(np.argmax(tried))
        if tried[place] <= best + 1e-12:
            break
        best = tried[place]
        counts[options[place]] += 1
        total = total + logits[options[place]]
    return np.asarray(counts / counts.sum())


def cross_fitted(
    logits: Floats, label: Ints, group: Ints, *, single: int, most_members: int, seed: int
) -> Floats | None:
    """(N,) logits of blends, each patch by weights that were selected on the slides of other parts.

    Args:
        logits: (k, N).
        label: (N,) 0 or 1.
        group: (N,) slide codes, negative where unknown.
        single: the candidate that stands in where a selection is not possible.
        most_members: see :func:`greedy_weights`.
        seed: of the draw of slides into parts.

    Returns:
        None where there are fewer than two slides, or no part can be selected on.
    """
    code = group_codes(group, len(label))
    n_slides = int(code.max()) + 1
    n_parts = min(PARTS, n_slides)
    if n_parts < 2:
        return None
    part = (np.random.default_rng(seed).permutation(n_slides) % n_parts)[code]
    blended, n_selected = logits[single].copy(), 0
    for number in range(n_parts):
        inside = part == number
        if len(np.unique(label[~inside])) == 2:
            weights = greedy_weights(logits[:, ~inside], label[~inside], most_members=most_members)
            blended[inside], n_selected = weights @ logits[:, inside], n_selected + 1
    return blended if n_selected else None


def choose_blend(logits: Floats, label: Ints, group: Ints, *, single: int, most_members: int, seed: int = 0) -> Blend:
    """The greedy blend where it helps, else the single network.

    A selection flatters itself on the patches that it was made on, so its gain is measured by :func:`cross_fitted` blends,
    while the single one, which was chosen with all patches in view, keeps that advantage. It is used from a gain of 0.0005 on that is
    80 % sure over slides.

    Args:
        logits: (k, N) out-of-fold, of networks that did not see the patches.
        label: (N,) 0 or 1, both at least once.
        group: (N,) slide codes, negative where unknown.
        single: the best single candidate.
        most_members: different networks that the blend may hold.
        seed: of the draws.
    """
    alone = np.zeros(len(logits))
    alone[single] = 1.0
    auc_single = auc(label, logits[single])
    found = greedy_weights(logits, label, most_members=most_members) if most_members > 1 else alone
    if np.count_nonzero(found) < 2:
        why = "greedy selection found no blend better than the best network alone"
        return Blend(tuple(alone), tuple(found), False, why, auc_single, None, None, logits[single])
    blended = cross_fitted(logits, label, group, single=single, most_members=most_members, seed=seed)
    if blended is None:
        why = "too few slides to judge a blend on others than those that chose it"
        return Blend(tuple(alone), tuple(found), False, why, auc_single, None, None, logits[single])
    gain = auc_gain(label, logits[single], blended, group, seed=seed)
    used = gain.value >= LEAST_GAIN and gain.sure is not None and gain.sure >= LEAST_SURE
    sure = "" if gain.sure is None else f", {gain.sure:.0%} sure (Student's t over slides)"
    rule = f"wanted are {LEAST_GAIN:+.4f} and {LEAST_SURE:.0%}"
    why = f"out of fold the blend's AUC is {gain.value:+.4f} against the best network's{sure} ({rule})"
    weights, kept = (found, blended) if used else (alone, logits[single])
    return Blend(tuple(weights), tuple(found), used, why, auc_single, auc(label, blended), gain, kept)
