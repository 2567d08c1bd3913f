"""The domains of a study: its data's own, or estimated and kept in its folder; whether its objective can use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import numpy as np

from pcam_automl.config import SplitBy
from pcam_automl.data.domains import Domains, estimate_domains, knows_domains, load_domains, write_domains
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, InputError, StudyError, did_you_mean, first_few
from pcam_automl.goals import Goal
from pcam_automl.metrics import LEAST_OF_A_LABEL
from pcam_automl.recipe import Recipe

DOMAINS = "domains.npz"
"""In the study's folder, where its domains were estimated."""
ESTIMATE = "estimate"
"""What ``--domains`` takes instead of a CSV."""


def split_of(name: str | None) -> SplitBy:
    """``--split``, slides by default.

    Raises:
        InputError: an unknown one.
    """
    found = next((known for known in get_args(SplitBy) if known == (name or "slides")), None)
    if found is None:
        known = get_args(SplitBy)
        raise InputError(f"--split must be one of {', '.join(known)}, got {name!r}{did_you_mean(str(name), known)}")
    return cast(SplitBy, found)


def choose_domains(
    store: PatchStore, goal: Goal, split_by: SplitBy, *, estimate: bool, seed: int, say: Callable[[str], None]
) -> Domains | None:
    """Domains estimated for a study where they are asked for, or needed and not known; None where the data's own hold.

    Args:
        store: the pack.
        goal: the study's.
        split_by: what its folds are.
        estimate: whether they were asked for.
        seed: the study's.
        say: told what was found, and what for.
    """
    needs = [f"--objective {goal.name}"] if goal.name == "worst_domain_auc" else []
    needs += ["--split domains"] if split_by == "domains" else []
    if not estimate and (not needs or knows_domains(store)):
        return None
    if not estimate:
        verb = "need" if len(needs) > 1 else "needs"
        say(
            f"{' and '.join(needs)} {verb} domains, the data name none (--domains CSV, given where the raw folder is packed, would): they are estimated"
        )
    domains = estimate_domains(store, seed=seed)
    say(domains.line())
    return domains


def kept_domains(store: PatchStore, file: Path, *, seed: int, expected: str) -> Domains:
    """The domains that were estimated for a study, estimated again where their file is gone.

    Args:
        store: the pack.
        file: of the study's folder.
        seed: the study's.
        expected: their hash.

    Raises:
        StudyError: they are not the ones that the study began with.
    """
    found = load_domains(file) if file.is_file() else estimate_domains(store, seed=seed)
    if found.hash != expected:
        raise StudyError(
            f"the study's estimated domains changed: {found.hash[:12]} here, {expected[:12]} in the study; restore {file}"
        )
    if not file.is_file():
        write_domains(found, file)
    return found


def check_domains(store: PatchStore, rows: np.ndarray, recipe: Recipe) -> list[str]:
    """Whether a worst domain can be told: two domains at least, each with enough patches of either label.

    Args:
        store: its domains.
        rows: those that each rung is scored on.
        recipe: of a dense task pixels are counted, by the masks.

    Returns:
        A line where there are domains with too few to be scored, which the objective cannot see.

    Raises:
        DataError: names what each domain holds.
    """
    domain = np.asarray(store.domain)[rows]
    n_positive, n_all = np.asarray(store.label)[rows].clip(min=0).astype(np.int64), np.ones(len(rows), np.int64)
    what = "patches"
    if recipe.task == "dense" and store.masks is not None:
        n_positive = np.array([int(np.count_nonzero(store.masks[row])) for row in rows.tolist()])
        n_all, what = n_all * int(np.prod(store.masks.shape[1:])), "pixels"
    counts = {
        store.domain_names[code]: (int(n_positive[own].sum()), int((n_all - n_positive)[own].sum()))
        for code in np.unique(domain[domain >= 0]).tolist()
        if (own := domain == code).any()
    }
    if sum(min(n) >= LEAST_OF_A_LABEL for n in counts.values()) < 2:
        held = ", ".join(f"{name} {positive} and {negative}" for name, (positive, negative) in counts.items())
        raise DataError(
            f"--objective worst_domain_auc needs at least 2 domains with {LEAST_OF_A_LABEL} {what} of either label among the "
            f"{len(rows)} that a rung is scored on, got (positive and negative) {held or 'no domain'}; give --domains CSV with "
            "more domains where the raw folder is packed, more slides of the rare one, another --seed, or --objective auc"
        )
    unseen = [name for name, n in counts.items() if min(n) < LEAST_OF_A_LABEL]
    if not unseen:
        return []
    return [
        f"warning: {first_few(unseen)} {'has' if len(unseen) == 1 else 'have'} fewer than {LEAST_OF_A_LABEL} {what} of a label among the "
        f"{len(rows)} that a rung is scored on: the worst domain is told among the others"
    ]
