"""Studies whose truth is known: rungs that are faithful or noise, trials whose stored scores have a given quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.config import StudySettings
from pcam_automl.data.store import PatchStore
from pcam_automl.metrics import auc
from pcam_automl.scores import FILE, Scores, write_scores
from pcam_automl.search.reading import SETTINGS_KEY
from pcam_automl.search.storage import open_storage

STEPS = (100, 300, 900)


def settings_of(store: PatchStore | None = None, pack: str = "p") -> StudySettings:
    return StudySettings(
        data="d", pack=str(store.root) if store else pack, pack_hash=store.content_hash if store else "0" * 64,
        split_hash="1" * 64, seed=0, holdout=0.0, weights="none", start={}, space="parameters: {}", pins={}, sampler="tpe",
        pruner="asha", rungs=tuple((step, step) for step in STEPS), n_score=500, cap_s=None, plan={}, versions={},
    )  # fmt: skip


def rung_values(n: int, noise: Sequence[float], *, seed: int = 0) -> np.ndarray:
    """(n, 3) values at the rungs: a recipe's quality, standard normal, and each rung's own noise."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=n)
    return np.stack([quality + rng.normal(size=n) * sd for sd in noise], axis=1)


def pruned_by_thirds(values: np.ndarray) -> np.ndarray:
    """The same with NaN behind each rung at which a recipe was not among the best third."""
    kept = values.copy()
    for place in range(values.shape[1] - 1):
        at = np.flatnonzero(~np.isnan(kept[:, place]))
        n_kept = max(1, len(at) // 3)
        kept[at[kept[at, place].argsort()[:-n_kept]], place + 1 :] = np.nan
    return kept


def trials_of(values: np.ndarray, *, first: int = 0) -> list[FrozenTrial]:
    """A lineage each; complete with a value at the last rung, else pruned."""
    trials = []
    for number, row in enumerate(values.tolist(), first):
        reported = {step: value for step, value in zip(STEPS, row, strict=True) if value == value}
        complete = STEPS[-1] in reported
        trial = create_trial(
            state=TrialState.COMPLETE if complete else TrialState.PRUNED,
            value=reported[STEPS[-1]] if complete else None,
            intermediate_values=reported,
            user_attrs={"lineage": str(number)},
        )
        trial.number = number
        trials.append(trial)
    return trials


def study_with(
    trials: Sequence[FrozenTrial], url: str | None = None, settings: StudySettings | None = None
) -> optuna.Study:
    storage = None if url is None else open_storage(url)
    study = optuna.create_study(study_name="pcam", storage=storage, direction="maximize")
    study.set_user_attr(SETTINGS_KEY, (settings or settings_of()).model_dump_json())
    study.add_trials(trials)
    return study


def scored_trial(
    store: PatchStore, folder: Path, number: int, prob: np.ndarray, *, rows: np.ndarray | None = None, **attrs: object
) -> FrozenTrial:
    """A complete trial whose scores lie where a search leaves them; its value is their AUC."""
    rows = store.development_rows() if rows is None else rows
    label = np.asarray(store.label)[rows].astype(np.int64)
    write_scores(folder / "trials" / str(number) / FILE, Scores(rows, label, prob, "validation"), store.ids)
    value = auc(label, prob)
    named = {"lineage": str(number), "device": "cpu", "images_per_s": 100.0, **attrs}
    return create_trial(value=value, user_attrs=named, intermediate_values={STEPS[-1]: value})


def probs_of(store: PatchStore, noise: float, *, seed: int = 0) -> np.ndarray:
    """(development patches,) probabilities that lean towards the label; every seed is noise of its own."""
    label = np.asarray(store.label)[store.development_rows()].astype(np.float64)
    shared = np.random.default_rng(99).normal(size=len(label))
    own = np.random.default_rng(seed).normal(size=len(label))
    return np.asarray(1 / (1 + np.exp(-(2 * label - 1 + shared + noise * own))))
