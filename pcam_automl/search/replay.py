"""Replay: a trial trained again from its SQL row alone, rung by rung, and compared. Writes nothing, reads no checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from optuna.trial import FrozenTrial

from pcam_automl.errors import StudyError, TrainingDiverged
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.search.lineages import has_diverged, lineage_of
from pcam_automl.search.objective import Objective
from pcam_automl.search.plan import scaled
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.compute import Compute, cpu_name, device_name
from pcam_automl.training.engine import Rung, RungResult
from pcam_automl.training.fit import fit
from pcam_automl.versions import versions

Verdict = Literal["bit for bit", "within the band", "differs"]

BAND = 0.02
"""Of the last rung's AUC. Where other threads, kernels or precision round otherwise, a replay is another training of the
recipe, and 0.02 is what the smallest scoring set cannot tell apart: the standard error of an AUC of 0.97 on 250 + 250 patches
is 0.008 (Hanley & McNeil 1982), of the difference of two 0.011, and twice that is 0.02. Earlier rungs are shown, not judged.
Measured once (resnet10t, 900 views of colon patches, not deterministic, one CPU): equal on the same 2 threads; on 1 in place of
2 off by 0.0002 at the last rung and 0.0024 at the second (`python -m benchmarks replay`). No GPU was at hand.
"""
COMPARED = ("auc", "loss", "train_loss")
"""Figures of a rung that must be equal for ``bit for bit``; its seconds never are."""


@dataclass(frozen=True)
class Conditions:
    """Where a rung was trained, as far as its last bits depend on it. None is "not recorded"."""

    device: str
    threads: int | None
    cpu: str | None
    versions: dict[str, str]

    def differences(self, other: Conditions) -> list[str]:
        """A line for each difference, with this one's value first; what is not recorded in one of them is passed over."""
        lines = [] if self.device == other.device else [f"device: {self.device} then, {other.device} now"]
        for name in ("threads", "cpu"):
            then, now = getattr(self, name), getattr(other, name)
            if None not in (then, now) and then != now:
                lines.append(f"{name}: {then} then, {now} now")
        for name in sorted(self.versions.keys() & other.versions.keys() - {"optuna"}):  # Optuna trains nothing
            if self.versions[name] != other.versions[name]:
                lines.append(f"{name}: {self.versions[name]} then, {other.versions[name]} now")
        return lines


@dataclass(frozen=True)
class StoredTrial:
    """What a row says of its training.

    Attributes:
        number: the row's.
        recipe: complete, its seed included.
        compute: precision, layout and convolution routes; its device is the row's.
        plan: views and subset of every rung of a whole trial.
        rungs: what the row reports, at most one a rung of the plan.
        micro_batches: (step, images at a time) from which step on.
        conditions: where each of ``rungs`` was trained: rungs of one lineage may come from several rows.
        diverged: whether the training ended by diverging after ``rungs``.
        notes: what the row does not say, and what is assumed.
    """

    number: int
    recipe: Recipe
    compute: Compute
    plan: tuple[Rung, ...]
    rungs: tuple[RungResult, ...]
    micro_batches: tuple[tuple[int, int], ...]
    conditions: tuple[Conditions, ...]
    diverged: bool
    notes: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether the row says everything that the last bits depend on, and memory was never short."""
        recorded = all(None not in (one.threads, one.cpu) for one in self.conditions)
        return recorded and not self.notes and len(self.micro_batches) == 1


@dataclass(frozen=True)
class Replayed:
    """A stored trial beside its replay.

    Attributes:
        stored: from the row.
        rungs: of the replay; fewer than stored where it diverged.
        verdict: ``differs`` where a deterministic trial's figures are not equal under equal conditions, too.
        warnings: other versions, threads or devices, and what the row does not say.
    """

    stored: StoredTrial
    rungs: tuple[RungResult, ...]
    verdict: Verdict
    warnings: tuple[str, ...]


def read_trial(study_trials: Sequence[FrozenTrial], number: int, rungs: Sequence[Rung], split_hash: str) -> StoredTrial:
    """What the row ``number`` says, and the other rows of its lineage of the rungs that it took over.

    Args:
        study_trials: every row of the study, by number.
        number: the row to replay.
        rungs: the study's, for rows of earlier releases, which do not have their own.
        split_hash: the study's.

    Raises:
        StudyError: no such row, a row that reports no rung and did not diverge, or one of another split.
    """
    row = _checked_row(study_trials, number, split_hash)
    attrs = row.user_attrs
    recipe, compute = build_recipe(json.loads(attrs["recipe"]), where=f"trial {number}"), Compute(**attrs["compute"])
    micro_batches, notes = _micro_batches(attrs, recipe, compute)
    if "rung_plan" in attrs:
        plan = tuple(Rung(views, subset) for views, subset in attrs["rung_plan"])
    else:
        plan = scaled(tuple(rungs), recipe.n_views(0) / rungs[-1].views)
        notes.append("the row is of an earlier release: its rungs are those of the study, its CPU is not known")
    reported = attrs.get("rungs", [])
    lineage = [trial for trial in study_trials if lineage_of(trial) == lineage_of(row) and trial.number <= number]
    trained_in = [_trained_in(lineage, index, result) for index, result in enumerate(reported)]
    return StoredTrial(
        number,
        recipe,
        compute,
        plan,
        tuple(RungResult(**result) for result in reported),
        micro_batches,
        tuple(conditions_of(trial.user_attrs) for trial in trained_in),
        has_diverged(row),
        tuple(notes),
    )


def _checked_row(study_trials: Sequence[FrozenTrial], number: int, split_hash: str) -> FrozenTrial:
    """The row, if it can be replayed; see :func:`read_trial`."""
    row = next((trial for trial in study_trials if trial.number == number), None)
    if row is None:
        has = f"the study's are 0 to {len(study_trials) - 1}" if study_trials else "the study has none yet"
        raise StudyError(f"there is no trial {number}; {has}")
    attrs = row.user_attrs
    if "recipe" not in attrs or "compute" not in attrs or not (attrs.get("rungs") or has_diverged(row)):
        why = attrs.get("reason", row.state.name.lower())
        raise StudyError(f"trial {number} has no scored rung to compare with ({why}); choose a complete or pruned one")
    if attrs.get("split_hash") != split_hash:
        raise StudyError(
            f"trial {number} was trained on split {str(attrs.get('split_hash'))[:12]}, the study has {split_hash[:12]}; "
            "replay needs the split that it was trained on"
        )
    return row


def _trained_in(lineage: Sequence[FrozenTrial], index: int, result: dict[str, Any]) -> FrozenTrial:
    """The row that trained a rung: the first that reports it with just these seconds; later ones took it from a checkpoint."""
    return next(row for row in lineage if row.user_attrs.get("rungs", [])[index : index + 1] == [result])


def _micro_batches(
    attrs: dict[str, Any], recipe: Recipe, compute: Compute
) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """From which step on how many images at a time, and what had to be assumed."""
    first = min(recipe.batch_size, compute.micro_batch or recipe.batch_size)
    if "micro_batches" in attrs:
        return tuple((step, images) for step, images in attrs["micro_batches"]), []
    last = attrs.get("micro_batch", first)
    if last == first:
        return ((0, first),), []
    return ((0, last),), [f"memory was short: from {first} images at a time to {last}, at a step that is not recorded"]


def conditions_of(attrs: dict[str, Any]) -> Conditions:
    """Where a row was trained; threads of rows of earlier releases stand in their device's name."""
    device = str(attrs.get("device", "unknown"))
    named = re.search(r", (\d+) threads$", device)
    threads = attrs.get("threads", int(named[1]) if named else None)
    known = attrs.get("versions")
    versions_then = {"engine": "1", **known} if known else {}  # the first engine did not write its number
    return Conditions(_bare(device), threads, attrs.get("cpu"), versions_then)


def conditions_here(device: torch.device) -> Conditions:
    """Those of this process."""
    return Conditions(_bare(device_name(device)), torch.get_num_threads(), cpu_name(), versions())


def _bare(device: str) -> str:
    """A device's name without its threads, which stand beside it."""
    return re.sub(r", \d+ threads$", "", device)


def replay(
    opened: OpenStudy,
    stored: StoredTrial,
    device: torch.device,
    *,
    stop: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda n: None,
    scored: Callable[[RungResult], None] = lambda result: None,
) -> Replayed:
    """Train the trial again from its start up to the last rung that it reports, and compare.

    On a CPU every rung runs on as many threads as it had.

    Args:
        opened: the study with its data and split, both checked against it.
        stored: from :func:`read_trial`.
        device: where to train.
        stop: called at every step; raises to end early.
        progress: called with the number of views just seen.
        scored: called with each rung.
    """
    with _threads_kept():
        results = _rungs_of(opened, stored, device, stop, progress)
        rungs, differences, diverged = _train_again(results, stored, device, scored)
    warnings = [*stored.notes, *differences]
    if len(stored.micro_batches) > 1:
        warnings.append("memory was short: a step that ran out of it moved batch statistics before it was repeated")
    promised = opened.settings.deterministic and device.type == "cpu" and stored.is_exact and not differences
    verdict = judge(stored.rungs, rungs, promised_exact=promised)
    if diverged != stored.diverged:
        warnings.append(f"the training {'diverged' if diverged else 'did not diverge'} now, other than then")
        verdict = "differs"
    return Replayed(stored, tuple(rungs), verdict, tuple(dict.fromkeys(warnings)))


def _train_again(
    results: Iterator[RungResult], stored: StoredTrial, device: torch.device, scored: Callable[[RungResult], None]
) -> tuple[list[RungResult], list[str], bool]:
    """The rungs that the row reports, other conditions than then, and whether the training diverged."""
    rungs: list[RungResult] = []
    differences: list[str] = []
    try:
        for conditions in stored.conditions:
            if device.type == "cpu" and conditions.threads is not None:
                torch.set_num_threads(conditions.threads)
            differences += conditions.differences(conditions_here(device))
            if (result := next(results, None)) is None:
                break
            rungs.append(result)
            scored(result)
        if stored.diverged:
            next(results, None)
    except TrainingDiverged:
        return rungs, differences, True
    return rungs, differences, False


def _rungs_of(
    opened: OpenStudy,
    stored: StoredTrial,
    device: torch.device,
    stop: Callable[[], None],
    progress: Callable[[int], None],
) -> Iterator[RungResult]:
    """The trial's rungs, trained as they are asked for."""
    compute = stored.compute.moved_to(device)
    training, rows = Objective(opened, device).build(stored.recipe, compute)
    training.given_micro_batches = dict(stored.micro_batches)
    return fit(training, rows.train, stored.plan, stop=stop, progress=progress)


def judge(stored: Sequence[RungResult], replayed: Sequence[RungResult], *, promised_exact: bool) -> Verdict:
    """``bit for bit`` where every compared figure of every rung is equal; else by the last rung's AUC and :data:`BAND`.

    Args:
        stored: of the row.
        replayed: of the replay.
        promised_exact: whether nothing but equality will do: a deterministic study, on the same kind of CPU with the same
            number of threads and the same versions.
    """
    if len(stored) != len(replayed):
        return "differs"
    if all(
        getattr(one, name) == getattr(two, name) for one, two in zip(stored, replayed, strict=True) for name in COMPARED
    ):
        return "bit for bit"
    one, two = stored[-1].auc, replayed[-1].auc
    assert one is not None
    assert two is not None
    return "within the band" if not promised_exact and abs(one - two) <= BAND else "differs"


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Torch's number of threads is what it was when the block ends."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
