"""The best of a search trained anew, with fresh seeds and on other folds, so that the winner is not the luckiest.

Decides nothing and keeps no ranking (see confirmations.py). Every confirmation is stored when it ends; a killed one goes on
from its last rung.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcam_automl.batches import Patches, open_masks, open_patches
from pcam_automl.calibration import probs_at
from pcam_automl.counter import key_of
from pcam_automl.cpu import machine_of
from pcam_automl.errors import StudyError, TrainingDiverged
from pcam_automl.files import locked, sha256_of_json
from pcam_automl.heap import return_freed_memory
from pcam_automl.metrics import auc, scorable_domains
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.search.confirmations import (
    FOLDER,
    Candidate,
    Confirmation,
    folder_of,
    read_confirmation,
    write_confirmation,
)
from pcam_automl.search.plan import EVAL_SPEEDUP, OVERHEAD, scaled
from pcam_automl.search.study import VALIDATION_FOLD, OpenStudy
from pcam_automl.training.compute import cpu_name, device_name
from pcam_automl.training.engine import Rung, Training
from pcam_automl.training.fit import fit
from pcam_automl.training.scoring import Views, logits_of_rows
from pcam_automl.training.start import Rows, choose_rows, data_key, start_training

LEAST_SCORED = 500
N_VIEWS = 9
"""Shown of each patch that is scored: the plain centre view, as in the search, and eight, as in a prediction."""


@dataclass
class ConfirmWatch:
    """What confirmations tell the one who shows them."""

    begins: Callable[[Candidate, int, Training, int], None] = lambda candidate, fold, training, views: None
    views: Callable[[int], None] = lambda n: None
    done: Callable[[Confirmation], None] = lambda confirmation: None
    note: Callable[[str], None] = lambda text: None
    stop: Callable[[], None] = lambda: None


def confirm_folds(opened: OpenStudy, n: int) -> tuple[int, ...]:
    """The first ``n`` folds that did not validate the search and on which the study's objective has a value.

    A fold may be a whole domain, and hold one label only; of a rare domain it may hold too few patches for a worst one. Where no fold
    can tell a worst domain nothing can be confirmed: none is given.

    Args:
        opened: the study; its split.
        n: at least 1.

    Raises:
        StudyError: there are some, and fewer.
    """
    split, rows = opened.split, n_scored(opened.rungs[-1].views)
    others = [fold for fold in range(int(split.fold.max()) + 1) if fold != VALIDATION_FOLD]
    usable = [fold for fold in others if has_value_on(opened, split.score_rows(fold, rows))]
    of_domains = opened.settings.goal.name == "worst_domain_auc"
    if of_domains and not usable:
        return ()
    held = (
        "two domains that can be scored" if of_domains else "tumour" if opened.start.task == "dense" else "both labels"
    )
    why = "" if usable == others else f" and not all others hold {held}"
    if n > len(usable):
        raise StudyError(
            f"--confirm-folds must be at most {len(usable)}, got {n}: of the split's {len(others) + 1} folds one validated"
            f" the search{why}; --confirm 0 goes without"
        )
    return tuple(usable[:n])


def has_value_on(opened: OpenStudy, rows: np.ndarray) -> bool:
    """Whether the study's objective has a value on these store rows: both labels; of a worst domain two that can be scored;
    of a dense task tumour in any mask.
    """
    label = np.asarray(opened.store.label)[rows]
    if opened.start.task == "dense":
        return bool((label == 1).any())
    if opened.settings.goal.name == "worst_domain_auc":
        return len(scorable_domains(label, np.asarray(opened.store.domain)[rows])) >= 2
    return len(np.unique(label)) == 2


def n_scored(views: int) -> int:
    """Patches that a confirmation is scored on: as many as take about as long as its training, at least 500.

    Args:
        views: training images of a whole trial of the study, the same for every network, so that the patches are, too.
    """
    return max(LEAST_SCORED, int(views * EVAL_SPEEDUP / N_VIEWS))


def images_per_s(opened: OpenStudy, candidate: Candidate, recipe: Recipe, device: torch.device) -> float:
    """Training images a second: what the trial had, where it ran on such a device, else by a measured step."""
    attrs = candidate.trial.user_attrs
    own = machine_of(device_name(device), cpu_name())
    here = machine_of(attrs.get("device"), attrs.get("cpu", cpu_name())) == own  # an early release's row names none
    rate = attrs.get("images_per_s") if here else None
    return float(rate) if rate else opened.speed_book.images_per_s(recipe, device)


def expected_seconds(rungs: tuple[Rung, ...], n: int, images_per_s: float) -> float:
    """Of a confirmation: its training and the views of the patches that it is scored on."""
    return OVERHEAD * (rungs[-1].views + n * N_VIEWS / EVAL_SPEEDUP) / images_per_s


def fresh_recipe(recipe: Recipe, study_seed: int, lineage: str, fold: int) -> Recipe:
    """The recipe with a seed that only this lineage has on this fold: other weights at the start, other views."""
    return recipe.model_copy(update={"seed": key_of(study_seed, "confirm", lineage, fold) % 2**31})


def confirm(
    opened: OpenStudy,
    candidates: Sequence[Candidate],
    *,
    folds: Sequence[int],
    device: torch.device,
    seconds: float | None = None,
    spared: np.ndarray | None = None,
    stored_only: bool = False,
    watch: ConfirmWatch | None = None,
) -> list[Confirmation]:
    """Train the candidates, the best first, on the first fold, then on the next; what is stored is not repeated.

    Args:
        opened: the study with its data.
        candidates: from :func:`~pcam_automl.search.confirmations.top_candidates`, the best first.
        folds: from :func:`confirm_folds`.
        device: where to train.
        seconds: wall clock; a training that would not end in it is left out, and all after it. None is no limit.
        spared: store rows that nothing is scored on: of slides that shall judge the final network.
        stored_only: train nothing; what is not stored is passed over.
        watch: progress.

    Raises:
        DataError: another process confirms this study, or the disk is full.
        Interrupted: what is stored stays; a training that was cut off goes on from its last rung.
    """
    watch, began = watch or ConfirmWatch(), time.perf_counter()
    runner = _Runner(opened, device, watch, np.zeros(0, np.int64) if spared is None else spared)
    with locked(
        opened.folder / FOLDER / ".lock",
        busy=f"another process confirms the trials of study {opened.name}; wait for it, then repeat the command",
    ):
        return runner.run(candidates, folds, seconds, began, stored_only)


@dataclass(frozen=True)
class _Job:
    """One training: a candidate on a fold, its fresh recipe, and where its confirmation is kept under which key."""

    candidate: Candidate
    fold: int
    recipe: Recipe
    rows: Rows
    rungs: tuple[Rung, ...]
    key: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.checkpoints")


class _Runner:
    """The data on the device and how fast it turns out to be."""

    def __init__(self, opened: OpenStudy, device: torch.device, watch: ConfirmWatch, spared: np.ndarray) -> None:
        self.opened, self.device, self.watch, self.spared = opened, device, watch, spared
        self.n = n_scored(opened.rungs[-1].views)
        self.pace = 1.0  # measured by expected seconds of the last training
        self._patches: Patches | None = None
        self._masks: Patches | None = None
        self._said: set[int] = set()

    def run(
        self,
        candidates: Sequence[Candidate],
        folds: Sequence[int],
        seconds: float | None,
        began: float,
        stored_only: bool,
    ) -> list[Confirmation]:
        done: list[Confirmation] = []
        for fold in folds:
            for candidate in candidates:
                self.watch.stop()
                job = self._job(candidate, fold)
                stored = read_confirmation(job.folder, self.opened.store, job.key)
                if stored is None and stored_only:
                    continue
                if stored is None:
                    left = None if seconds is None else seconds - (time.perf_counter() - began)
                    expected = self._expected(candidate, job)
                    if left is not None and expected * self.pace > left:
                        self._say_left_out(len(done), len(candidates) * len(folds), left, expected * self.pace)
                        return done
                    stored, whole = self._train(job)
                    if whole:  # else it says nothing of the next one
                        self.pace = stored.seconds / expected
                    write_confirmation(job.folder, stored, self.opened.store)
                    # As the next run will read it.
                    stored = read_confirmation(job.folder, self.opened.store, job.key) or stored
                    shutil.rmtree(job.checkpoints, ignore_errors=True)
                done.append(stored)
                self.watch.done(stored)
        return done

    def _say_left_out(self, n_done: int, n_wanted: int, left: float, expected: float) -> None:
        self.watch.note(
            f"{n_done} of {n_wanted} confirmations fit the time: {max(left, 0.0):.0f} s are left for them, the next would take about {expected:.0f} s"
        )

    def _job(self, candidate: Candidate, fold: int) -> _Job:
        opened = self.opened
        recipe = fresh_recipe(candidate.recipe, opened.settings.seed, candidate.lineage, fold)
        split = opened.split
        rows = choose_rows(opened.store, recipe, split.train_order(fold), self._scored(fold))
        planned = opened.rungs
        rungs = scaled(planned, recipe.n_views(len(rows.train)) / planned[-1].views)
        parts = [recipe.hash, data_key(opened.store, rows), str(opened.weights), [[r.views, r.subset] for r in rungs]]
        return _Job(
            candidate,
            fold,
            recipe,
            rows,
            rungs,
            sha256_of_json(parts),
            folder_of(opened.folder, candidate.lineage, fold),
        )

    def _scored(self, fold: int) -> np.ndarray:
        """Rows of the fold to score on, without those to be spared; with them where the rest has no value of the objective."""
        whole = self.opened.split.score_rows(fold)
        rest = whole[~np.isin(whole, self.spared)][: self.n]
        if has_value_on(self.opened, rest):
            return rest
        if fold not in self._said:
            self.watch.note(
                f"fold {fold} cannot be scored without the slides kept back: they confirm, too, which flatters the final AUC a little"
            )
            self._said.add(fold)
        return whole[: self.n]

    def _expected(self, candidate: Candidate, job: _Job) -> float:
        rate = images_per_s(self.opened, candidate, job.recipe, self.device)
        return expected_seconds(job.rungs, len(job.rows.score), rate)

    def _train(self, job: _Job) -> tuple[Confirmation, bool]:
        """The confirmation, and whether its seconds are those of a whole training: neither cut short nor gone on with."""
        began = time.perf_counter()
        training = self._start(job)
        self.watch.begins(job.candidate, job.fold, training, job.rungs[-1].views)
        figures: dict[str, Any]
        try:
            for _ in fit(
                training,
                job.rows.train,
                job.rungs,
                scored=job.recipe.patience is not None,  # an early end needs scores; else the last rung's are enough
                checkpoints=job.checkpoints,
                note=self.watch.note,
                stop=self.watch.stop,
                progress=self.watch.views,
            ):
                pass
            figures = self._scores(training, job)
        except TrainingDiverged as fault:
            figures = {"auc": None, "auc_views": None, "diverged": str(fault)}
        whole = figures["auc"] is not None and training.n_resumed == 0
        views, rate = training.views, training.results[-1].images_per_s if training.results else 0.0
        del training
        self._release()
        candidate = job.candidate
        confirmation = Confirmation(
            lineage=candidate.lineage,
            trial=candidate.trial.number,
            fold=job.fold,
            key=job.key,
            search=candidate.search,
            n=len(job.rows.score),
            n_train=len(job.rows.train),
            views=views,
            seconds=round(time.perf_counter() - began, 3),
            images_per_s=round(rate, 1),
            device=device_name(self.device),
            cpu=cpu_name(),
            **figures,
        )
        return confirmation, whole

    def _start(self, job: _Job) -> Training:
        store = self.opened.store
        self._patches = self._patches or open_patches(store, self.device)
        if job.recipe.task == "dense":
            self._masks = self._masks or open_masks(store, self.device)
        return start_training(
            job.recipe,
            store,
            job.rows,
            patches=self._patches,
            masks=self._masks,
            weights=self.opened.weights,
            compute=self.opened.speed_book.compute_for(job.recipe, self.device, views=job.rungs[-1].views),
            key=key_of(job.recipe.seed, "views"),
        )

    def _scores(self, training: Training, job: _Job) -> dict[str, Any]:
        """Figures and scores by the centre view, as in the search, and by the recipe's views, as in a prediction."""
        on = f"fold {job.fold}, of a network that did not see it"
        figures, one_view = training.score(self.watch.stop)
        one_view = Scores(one_view.rows, one_view.label, one_view.prob, on)
        if job.recipe.task == "dense":
            return {"auc": figures.auc, "auc_views": None, "one_view": one_view, "scores": None}
        scores = self._averaged(training, job, on) if job.recipe.tta != "none" else one_view
        return {"auc": figures.auc, "auc_views": auc(scores.label, scores.prob), "one_view": one_view, "scores": scores}

    def _averaged(self, training: Training, job: _Job, on: str) -> Scores:
        assert self._patches is not None
        rows, label = job.rows.score, np.asarray(self.opened.store.label)[job.rows.score].astype(np.int64)
        views = Views(job.recipe, training.task.data.normalisation, job.recipe.tta)
        with training.averaged() as network:
            logits = logits_of_rows(network, self._patches, rows, views, training.compute, stop=self.watch.stop)
        if not np.isfinite(logits).all():
            raise TrainingDiverged("the network's outputs on the scored patches are not finite")
        return Scores(rows, label, probs_at(logits), on)

    def _release(self) -> None:
        """Give memory back before the next network, whose shapes are others."""
        gc.collect()
        return_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
