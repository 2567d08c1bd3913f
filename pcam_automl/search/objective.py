"""One trial: a suggested recipe trained rung by rung, pruned and recorded. Chooses no slot (see worker.py)."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import Trial, TrialState

from pcam_automl.batches import Patches, open_masks, open_patches
from pcam_automl.counter import key_of
from pcam_automl.errors import (
    DataError,
    DeviceFailed,
    Interrupted,
    OutOfTime,
    SearchFailed,
    StudyError,
    TrainingDiverged,
    WriteError,
    first_few,
)
from pcam_automl.heap import return_freed_memory
from pcam_automl.models.factory import n_parameters, smallest_input
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, write_scores
from pcam_automl.search.budget import ROW_S, BudgetClock, budget_of
from pcam_automl.search.lineages import FINISHED, LINEAGE, THAWED_FROM, has_diverged, lineage_of
from pcam_automl.search.patience import PATIENCE, is_transient
from pcam_automl.search.plan import SLOWEST_SHARE, scaled, trial_seconds
from pcam_automl.search.promotion import rung_ratio
from pcam_automl.search.reading import ERROR, FIGURES, NO_DATABASE
from pcam_automl.search.retrying_storage import end_with, report, set_user_attrs, write_now
from pcam_automl.search.slots import Slot
from pcam_automl.search.study import VALIDATION_FOLD, OpenStudy
from pcam_automl.search.wilcoxon import SLIDE_LOSSES, losses_by_slide
from pcam_automl.training.checkpoint import CheckpointWriter
from pcam_automl.training.compute import Compute, cpu_name, device_name, has_lost_its_device, is_of
from pcam_automl.training.engine import Rung, RungResult, Training, peak_memory_bytes
from pcam_automl.training.fit import best_result, branch_share, fit, total_views
from pcam_automl.training.latency import latency_ms
from pcam_automl.training.speed import SpeedBook, network_shape
from pcam_automl.training.start import Rows, choose_rows, start_training
from pcam_automl.versions import versions

LONG_TRIAL_S = 300.0
"""Of training: from then on a trial's variant is chosen by the thorough probe, which takes seconds. Not compiled: most end at a rung."""
SLOT_LOST = "slot lost"
"""Reason of a row whose worker slept between the claim and the row."""


@dataclass
class Watch:
    """What the objective tells the one who shows it: the trial begins, views pass, a rung is scored."""

    begins: Callable[[int, Recipe, int], None] = lambda number, recipe, views: None
    views: Callable[[int], None] = lambda n: None
    rung: Callable[[int, RungResult], None] = lambda number, result: None
    note: Callable[[str], None] = lambda text: None


@dataclass
class Objective:
    """Optuna's objective over an open study.

    Attributes:
        opened: the study and its data.
        device: where to train.
        slot: the claimed slot, set by the worker before each trial.
        origin: where the slot's prescribed parameters come from; None where the sampler chooses them all.
        stop: called at every step; raises :class:`Interrupted`.
        interrupted: what ended the last trial and ends the worker, too: a signal, a disk that takes no more, or a GPU that failed.
        begun: called once the trial's number and lineage are known.
        clock: of a budget, None without one.
        thawed_from: the paused row that the next trial goes on from, set by the worker.
        goes_on: whether the last trial, which failed, left a lineage to go on with.
        writer: of the checkpoints; the worker flushes it.
        number: of the last trial that began.
        pack: the patches on ``device``, where another process holds them for several workers.
    """

    opened: OpenStudy
    device: torch.device
    stop: Callable[[], None] = lambda: None
    watch: Watch = field(default_factory=Watch)
    begun: Callable[[Slot, int, str], bool] = lambda slot, number, lineage: True
    slot: Slot | None = None
    origin: str | None = None
    interrupted: Interrupted | WriteError | DeviceFailed | None = None
    clock: BudgetClock | None = None
    thawed_from: int | None = None
    goes_on: bool = False
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)
    number: int | None = None
    pack: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_weights_here(self.opened)
        self._patches: Patches = open_patches(self.opened.store, self.device, self.pack)
        dense = self.opened.start.task == "dense" or self.opened.space.base.get("task") == "dense"
        self._masks = open_masks(self.opened.store, self.device) if dense else None
        self._speed: SpeedBook = self.opened.quick_speed_book
        self._latencies: dict[tuple[object, ...], float] = {}
        self._network: dict[str, float] = {}  # of the running trial, for its attributes
        self._runs_through = False  # whatever others reach, and beyond the search's end
        self._unreleased = False  # whether the last trial's network may still be held by its error's traceback
        split = self.opened.split
        self._train_rows = split.train_order(VALIDATION_FOLD)
        self._score_rows = split.score_rows(VALIDATION_FOLD, self.opened.settings.n_score)

    def expect(self) -> None:
        """A trial is about to be asked for: none has begun yet."""
        self.number = None

    def __call__(self, trial: Trial) -> float:
        """Train, report every rung at its planned views, return the last value of the study's objective.

        Raises:
            optuna.TrialPruned: the pruner said so, or the training diverged.
        """
        assert self.slot is not None
        self.interrupted, self.goes_on, self.number = None, False, trial.number
        notes = self.first_notes(trial.number)
        lineage = str(notes[LINEAGE])
        if not self.begun(self.slot, trial.number, lineage):
            end_with(trial, reason=SLOT_LOST)
            raise SearchFailed(f"trial {trial.number}: its slot was given to another worker meanwhile")
        began, self._network, self._runs_through = time.perf_counter(), {}, self._is_needed()
        if not notes.items() <= trial.user_attrs.items():  # a row that somebody has enqueued, or of another storage
            set_user_attrs(trial, **notes)
        reason = "complete"
        try:
            if self._unreleased:
                self._release()
            self._unreleased = True
            value = self._written(trial, lineage)
            self._unreleased = False
            return value
        except optuna.TrialPruned as pruned:
            reason = str(pruned)
            raise
        except TrainingDiverged as fault:
            reason = f"diverged: {fault}"
            raise optuna.TrialPruned(reason) from fault
        except OutOfTime as fault:
            if (n_rungs := len(trial.storage.get_trial(trial._trial_id).intermediate_values)) == 0:
                reason, self.goes_on = f"interrupted: {fault}", True
                raise
            reason = f"paused at rung {n_rungs} of {len(self.opened.rungs)}: {fault}"
            raise optuna.TrialPruned(reason) from fault
        except Interrupted as fault:
            reason, self.interrupted, self.goes_on = "interrupted", fault, True
            raise
        except WriteError as fault:
            reason, self.interrupted, self.goes_on = f"interrupted: {fault}", fault, True
            raise
        except (StorageInternalError, sa.exc.SQLAlchemyError) as fault:
            # Not the trial's fault where the server is away: its rungs lie in checkpoints.
            root = fault.__cause__ or fault
            self.goes_on = is_transient(fault) or PATIENCE.exhausted
            reason = f"{NO_DATABASE if self.goes_on else ERROR}{type(root).__name__}: {str(root)[:500]}"
            raise
        except Exception as fault:
            root = fault.__cause__ or fault  # Optuna's word on a fault of the database says nothing of it
            reason = f"{ERROR}{type(root).__name__}: {str(root)[:500]}"
            if has_lost_its_device(root):
                first = (str(root).splitlines() or [""])[0]
                self.interrupted = DeviceFailed(
                    f"{self.device} failed in trial {trial.number} ({first}), and this process cannot use it any more; every finished trial is "
                    "stored, and the same command goes on without this one"
                )
            raise
        finally:
            seconds, peak = round(time.perf_counter() - began, 3), peak_memory_bytes(self.device)
            end_with(trial, reason=reason, seconds=seconds, peak_memory_bytes=peak, **self._network)
            if not self._unreleased:
                self._release()  # last: a GPU that has failed may fail here, too, and the row shall have its reason

    def _written(self, trial: Trial, lineage: str) -> float:
        """The training; where it is paused in a study with a budget, its newest checkpoint is on the disk before its row's end frees the slot for
        others to thaw. Without one nobody does, and the next trial begins while the checkpoint is written.
        """
        try:
            return self._train(trial, lineage)
        except (optuna.TrialPruned, OutOfTime):
            if self.clock is not None or budget_of(self.opened.study) is not None:  # of another terminal
                self.writer.flush()
            raise

    def first_notes(self, number: int) -> dict[str, Any]:
        """User attributes of the row of that number, once its slot is known to be ours still."""
        assert self.slot is not None
        return {
            "slot": self.slot.number,
            LINEAGE: self.slot.lineage or f"{number}",
            "split_hash": self.opened.split.hash,
            "device": device_name(self.device),
            "versions": versions(),
            **({} if self.thawed_from is None else {THAWED_FROM: self.thawed_from}),
            **({} if self.origin is None else {"origin": self.origin}),
        }

    def notes_at_birth(self, number: int) -> dict[str, Any]:
        """Those of :meth:`first_notes` that the row may have before its slot is known to be ours still. A lineage that has other
        rows is not among them: a row that never begins would be its last one, and it could neither be thawed nor kept.
        """
        notes = self.first_notes(number)
        if self.slot is not None and self.slot.lineage is not None:
            del notes[LINEAGE]
            notes.pop(THAWED_FROM, None)
        return notes

    def _train(self, trial: Trial, lineage: str) -> float:
        mirror = self.opened.mirror
        recipe, compute, rungs = self._settle(trial, lineage)
        training, rows = self.build(recipe, compute)
        forward_ms = self._latency_ms(training, recipe, compute)
        self._network = {"n_parameters": n_parameters(training.network), "latency_ms": round(forward_ms, 3)}
        self.watch.begins(trial.number, recipe, total_views(recipe, rungs))
        if self.slot is not None and self.slot.lineage is not None:
            self.writer.flush()  # the lineage may be one that was just paused
            if mirror is not None:
                mirror.pull_checkpoint(lineage)
        planned = self.opened.rungs
        try:
            for result in fit(
                training,
                rows.train,
                rungs,
                checkpoints=self.opened.checkpoints / lineage,
                writer=self.writer,
                written=None if mirror is None else mirror.push_checkpoint,
                note=self.watch.note,
                stop=self._check,
                progress=self.watch.views,
            ):
                report(
                    trial,
                    self._value(result),
                    step=planned[result.rung].views,
                    **self._network,
                    rungs=[asdict(done) for done in training.results],
                    **{FIGURES: figures_of(best_result(training.results, recipe))},
                    images_per_s=round(result.images_per_s, 1),
                    micro_batch=training.micro_batch,
                    micro_batches=training.micro_batches,
                )
                if self.opened.settings.pruner == "wilcoxon":
                    self._note_slides(trial, training.scores, planned[result.rung].views)
                self.watch.rung(trial.number, result)
                self._judge(trial, training, rungs, result)
        finally:
            self._note_micro_batch(training)
        if training.scores is not None:
            write_scores(
                self.opened.folder / "trials" / str(trial.number) / SCORES, training.scores, self.opened.store.ids
            )
            if mirror is not None:
                mirror.push_trial(trial.number)
        return self._value(best_result(training.results, recipe))

    def _note_micro_batch(self, training: Training) -> None:
        """What the network's next training begins with. A full disk or a GPU that failed loses the note and hides no other fault."""
        if training.n_steps <= training.micro_batches[-1][0]:
            return  # no step has been taken with it: it may not fit either
        with contextlib.suppress(WriteError, OSError, RuntimeError):
            self._speed.note_micro_batch(training.recipe, self.device, training.micro_batch)

    def _value(self, result: RungResult) -> float:
        """The objective's.

        Raises:
            DataError: it has none, which no study may come to whose creation was checked.
        """
        value = self.opened.settings.goal.value_of(result)
        if value is None:
            raise DataError(f"objective {self.opened.settings.objective} has no value on the scored patches")
        return value

    def _check(self) -> None:
        self.stop()
        if self.clock is not None:
            self.clock.check(first=self._runs_through)

    def _is_needed(self) -> bool:
        """Whether the running trial is the first of a budget that has no complete one yet: a search needs a winner. Where the first
        diverged it is the second, and so on.
        """
        if self.clock is None or self.slot is None:
            return False
        trials = self.opened.study.get_trials(deepcopy=False)
        if any(row.state == TrialState.COMPLETE for row in trials):
            return False
        diverged = {row.user_attrs.get("slot") for row in trials if row.state in FINISHED and has_diverged(row)}
        return self.slot.number == next(number for number in itertools.count() if number not in diverged)

    def _judge(self, trial: Trial, training: Training, rungs: tuple[Rung, ...], result: RungResult) -> None:
        """Whether the trial goes on behind a rung.

        Raises:
            optuna.TrialPruned: it is not among the best, or its next rung would not end in time.
        """
        if result.rung == len(rungs) - 1 or result.rung < training.n_resumed - (self.thawed_from is None):
            return  # done; or judged before: a thawed lineage's last rung, too, which is why it was thawed
        where = f"at rung {result.rung + 1} of {len(rungs)}"
        is_short = self.clock is not None and self.clock.short is not None  # a few whole trials
        self._runs_through &= self._is_needed()
        if not is_short and not self._runs_through and trial.should_prune():
            raise optuna.TrialPruned(f"pruned {where}")
        if self.clock is not None and not self._runs_through:
            next_s = result.seconds * rung_ratio(
                [rung.views for rung in rungs], result.rung, branch_share(training.recipe)
            )
            if next_s > self.clock.left_for_rungs_s():
                raise optuna.TrialPruned(f"paused {where}: the next one would not end in the search's time")

    def _note_slides(self, trial: Trial, scores: Scores | None, step: int) -> None:
        """What the pruner compares; of a rung that a checkpoint holds there are no scores any more, but earlier notes."""
        if scores is not None:
            losses = losses_by_slide(scores.label, scores.prob, np.asarray(self.opened.store.group)[scores.rows])
            set_user_attrs(trial, **{SLIDE_LOSSES: {**trial.user_attrs.get(SLIDE_LOSSES, {}), str(step): losses}})

    def _settle(self, trial: Trial, lineage: str) -> tuple[Recipe, Compute, tuple[Rung, ...]]:
        """Recipe, variant and rungs: the lineage's own where it has run before, else suggested and measured."""
        opened, settings = self.opened, self.opened.settings
        defaults = opened.start.model_dump()
        seed = key_of(settings.seed, "lineage", lineage) % 2**31
        recipe = opened.space.suggest(trial, {**defaults, "epochs": None, "seed": seed}, smallest_input=smallest_input)
        earlier = self._earlier(lineage, trial.number)
        if earlier is not None:
            recipe = build_recipe(json.loads(earlier["recipe"]))
            compute = Compute(**earlier["compute"]).moved_to(self.device)
            if not is_of(earlier.get("device"), self.device):
                compute = replace(compute, micro_batch=None)
        else:
            if not self._speed.knows(recipe, self.device):
                write_now(trial)  # what it is about to try, before it times the network
            compute = self._measured(recipe)
        # Of a short search's trial that was cut off before its first rung nothing is kept, and less time is left.
        if earlier is None or (self._is_short_follower and not self._has_a_rung(lineage)):
            views = scaled(opened.rungs, self._share(recipe))[-1].views
            recipe = recipe.model_copy(update={"views": views, "epochs": None})
        rungs = scaled(opened.rungs, recipe.n_views(0) / opened.rungs[-1].views)
        set_user_attrs(
            trial,
            recipe=recipe.model_dump_json(),
            compute=compute.to_json(),
            views_share=round(rungs[-1].views / opened.rungs[-1].views, 4),
            rung_plan=[(rung.views, rung.subset) for rung in rungs],
            threads=torch.get_num_threads(),
            cpu=cpu_name(),
        )
        return recipe, compute, rungs

    def _measured(self, recipe: Recipe) -> Compute:
        """The variant of a new lineage: by the quick probe, and where its trial is long by the thorough one."""
        quick = self._speed.compute_for(recipe, self.device)
        if self.opened.settings.deterministic:
            return quick
        views = scaled(self.opened.rungs, self._share(recipe))[-1].views
        if views / self._speed.images_per_s(recipe, self.device) < LONG_TRIAL_S:
            return quick
        return self.opened.speed_book.compute_for(recipe, self.device)

    def _latency_ms(self, training: Training, recipe: Recipe, compute: Compute) -> float:
        """Timed once for networks of one shape: a fifth of a second each was a twentieth of trials of four seconds."""
        shape = (*network_shape(recipe), recipe.network_px, compute.precision, compute.channels_last, compute.routed)
        if shape not in self._latencies:
            self._latencies[shape] = latency_ms(training.network, recipe.network_px, compute)
        return self._latencies[shape]

    def _share(self, recipe: Recipe) -> float:
        """1, or the share of the views that fits into the study's seconds for a trial on this device.

        Behind the first trial of a short search it is what is left of these seconds, at the pace of the trials before: one that
        does not end could not be compared.
        """
        cap_s = self.opened.settings.cap_s
        if cap_s is None:
            return 1.0
        whole_s = self._expected_s(recipe, 1.0)
        share = min(1.0, cap_s / whole_s)
        if self.clock is not None and self._is_short_follower:
            left_s = self.clock.left_s() - ROW_S
            share = min(share, max(SLOWEST_SHARE, left_s / (whole_s * self._pace())))
        return share

    @property
    def _is_short_follower(self) -> bool:
        """Whether the running trial is one behind the first of a short search."""
        return self.clock is not None and self.clock.short is not None and not self._runs_through

    def _expected_s(self, recipe: Recipe, share: float) -> float:
        """Of a trial that sees that share of the views."""
        rate = self._speed.images_per_s(recipe, self.device)
        return trial_seconds(recipe, scaled(self.opened.rungs, share), self.opened.settings.n_score, rate)

    def _pace(self) -> float:
        """Seconds that the complete trials took by those that were expected; 1 before there are any."""
        took = expected = 0.0
        for row in self.opened.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if "rungs" in row.user_attrs and "recipe" in row.user_attrs:
                took += sum(float(rung["seconds"]) for rung in row.user_attrs["rungs"])
                expected += self._expected_s(
                    build_recipe(json.loads(row.user_attrs["recipe"])), float(row.user_attrs["views_share"])
                )
        return took / expected if expected > 0.0 else 1.0

    def _earlier(self, lineage: str, number: int) -> dict[str, Any] | None:
        """User attributes of the lineage's last row before this one, if it got as far as a recipe."""
        if self.slot is None or self.slot.lineage is None:  # it begins with this row
            return None
        for other in reversed(self.opened.study.get_trials(deepcopy=False)):
            attrs = other.user_attrs
            if other.number != number and attrs.get("lineage") == lineage and "recipe" in attrs and "compute" in attrs:
                return attrs
        return None

    def _has_a_rung(self, lineage: str) -> bool:
        """Whether any row of the lineage has come to the end of one, so that a checkpoint may hold it."""
        rows = self.opened.study.get_trials(deepcopy=False)
        return any(row.intermediate_values for row in rows if lineage_of(row) == lineage)

    def build(self, recipe: Recipe, compute: Compute) -> tuple[Training, Rows]:
        """The recipe's training at its start on the study's validation fold, and its rows; a replay starts here, too."""
        rows = choose_rows(self.opened.store, recipe, self._train_rows, self._score_rows)
        training = start_training(
            recipe,
            self.opened.store,
            rows,
            patches=self._patches,
            masks=self._masks,
            weights=self.opened.weights,
            compute=compute,
            key=key_of(recipe.seed, "views"),
        )
        return training, rows

    def _release(self) -> None:
        """Give memory back before the next trial, whose network has other shapes."""
        gc.collect()
        return_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def check_weights_here(opened: OpenStudy) -> None:
    """Whether a study of pretrained networks finds its weights on this machine: else every trial of a worker would fail, and take
    others' along.

    Raises:
        StudyError: the folder, or a network's file in it, is not here.
    """
    weights = opened.weights
    if weights.kind != "folder" or not opened.space.base.get("pretrained"):
        return
    missing = [name for name in opened.space.choices("backbone") or (opened.start.backbone,) if not weights.has(name)]
    if missing:
        raise StudyError(
            f"study {opened.name!r} trains from the weights in {weights.folder}, where {first_few(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing on this machine; put the same files there"
        )


def figures_of(result: RungResult) -> dict[str, float]:
    """Every objective's value at a rung, those that it has."""
    figures = {"auc": result.auc, "worst_domain_auc": result.worst_domain_auc, "log_loss": result.loss}
    return {name: value for name, value in figures.items() if value is not None}
