"""The best trials confirmed, the chosen ones retrained on all labelled patches but those kept back, then the test set's submission.

Searches nothing; what is chosen is decided in finalizing/, what is predicted and written in finalizing/patches.py and maps.py.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from optuna.trial import FrozenTrial
from torch import Tensor

from pcam_automl.bundle import CARD, load_bundle, write_bundle, write_calibration
from pcam_automl.calibration import Calibration
from pcam_automl.data.store import PatchStore
from pcam_automl.ensemble import CARD as ENSEMBLE
from pcam_automl.ensemble import member_folder, write_ensemble
from pcam_automl.errors import DataError, InputError, StudyError, TrainingDiverged, first_few
from pcam_automl.files import check_can_write
from pcam_automl.finalizing.choice import choose_trial, chosen_trial, settle_ties
from pcam_automl.finalizing.decision import Decision, decide
from pcam_automl.finalizing.earlier import (
    earlier_recipe,
    goes_on,
    is_begun,
    is_under_way,
    much_longer,
    n_of_earlier_calls,
)
from pcam_automl.finalizing.kept_back import FinalRows, final_rows
from pcam_automl.finalizing.maps import finish_maps
from pcam_automl.finalizing.patches import RAW, finish_patches
from pcam_automl.finalizing.recipe import final_recipe, recipe_by_clock, recipe_of_study
from pcam_automl.finalizing.result import FinalOptions, FinalResult, FinalWatch, check_options, words_of
from pcam_automl.finalizing.seconds import averaging_within, confirm_seconds, members_that_fit, pace_of
from pcam_automl.recipe import Recipe
from pcam_automl.search.budget import budget_of, was_short
from pcam_automl.search.confirm import confirm, confirm_folds
from pcam_automl.search.confirmations import Candidate, top_candidates, value_of_goal
from pcam_automl.search.lineages import lineage_of
from pcam_automl.search.pareto import Pick
from pcam_automl.search.reading import auc_of
from pcam_automl.search.study import OpenStudy
from pcam_automl.search.whose_folder import ID_KEY
from pcam_automl.submission import check_threshold
from pcam_automl.terminal import duration
from pcam_automl.train import check_ranks, checkpoints_beside, train_to_bundle
from pcam_automl.training.engine import Training
from pcam_automl.training.pace import Pace
from pcam_automl.training.ranks import from_first, part, ranks
from pcam_automl.training.scoring import Averaging

__all__ = ["FinalOptions", "FinalResult", "FinalWatch", "final_recipe", "finalize"]


class Assisted(Exception):
    """A rank has trained its share; the first rank predicts and writes."""


def check_test_set(store: PatchStore) -> None:
    """A submission must be possible before hours of training are spent on it.

    Raises:
        DataError: ids of the sample submission have no image.
    """
    missing = list(store.source.get("missing_test_ids", ()))
    if missing:
        raise DataError(
            f"{len(missing):,} ids of the sample submission have no test image ({first_few(missing)}), and a study stays with the files it "
            "began with; give --no-submission for the network alone, which `pcam-automl predict --sample CSV` predicts a whole test folder "
            "with, or start another study on the whole folder"
        )


def finalize(
    opened: OpenStudy,
    *,
    which: str = "best",
    out: Path | None = None,
    threshold: float | None = None,
    epochs: float | None = None,
    device: torch.device,
    pick: Pick = "best",
    watch: FinalWatch | None = None,
    options: FinalOptions | None = None,
) -> FinalResult:
    """Confirm, retrain, bundle, predict, write and check. After a kill the same call goes on from the last checkpoint.

    Args:
        opened: the study with its data.
        which: ``best``, ``highest`` or a trial's number.
        out: folder to fill; ``studies/<study>/final`` by default.
        threshold: also write 0/1 labels at this probability.
        epochs: passes over the training patches; None derives them from the trial.
        device: where to train and to predict.
        pick: what ``best`` means: the best value, or the knee of value against latency.
        watch: progress.
        options: confirmations, ensemble, comparison, seconds; by default three trials are confirmed on one fold.

    Under `torchrun` all ranks train; the first one decides, predicts and writes.

    Raises:
        Assisted: this is another rank, whose part is done.
        StudyError, DataError, InputError: nothing to finalize, options that do not go together, or an incomplete test set,
            before any training.
    """
    watch, options, began = watch or FinalWatch(), options or FinalOptions(), time.perf_counter()
    check_threshold(threshold)
    if epochs is not None and not 0 < epochs < math.inf:
        raise InputError(f"--epochs must be greater than 0, got {epochs:g}")
    asked: dict[str, str] = {"pick": pick}
    asked["finalize"] = shlex.join(
        words_of(options, which=which, pick=pick, threshold=threshold, epochs=epochs, budget_s=budget_of(opened.study))
    )
    unconfirmed = (
        options.seconds is not None
        and options.ensemble == 1
        and was_short(opened.study, opened.settings.plan.get("budget"))
    )
    trial = chosen_trial(opened, which, pick, options.confirm > 1 and not unconfirmed, watch.train.note)
    which = which if pick == "best" else str(trial.number)
    dense = Candidate(lineage_of(trial), trial).recipe.task == "dense"
    check_options(
        options,
        which=which,
        dense=dense,
        n_holdout=len(opened.split.holdout_rows()),
        objective=opened.settings.goal.name,
    )
    if options.submission and not dense:  # a dense ending writes maps of the images that are there
        check_test_set(opened.store)
    check_ranks(Candidate(lineage_of(trial), trial).recipe)
    rows = final_rows(
        opened,
        options.keep_back,
        options.confirm_folds,
        confirms=options.confirm > 0,
        limited=options.seconds is not None,
        note=watch.train.note,
    )
    rows = replace(rows, compares=options.compare and not dense)
    rows = replace(rows, test=opened.store.test_rows()) if options.submission else rows
    out = (out or opened.folder / "final").resolve()
    check_can_write(out)  # before minutes of confirmations
    used_up = options.seconds is not None and options.seconds <= 0 and epochs is None
    n_members = options.ensemble
    if used_up and not from_first(lambda: any(is_begun(out, number) for number in range(n_members))):
        raise _used_up(opened)
    if used_up:
        watch.train.note(
            "the budget is used up: what an earlier finalize trained is completed, and nothing trained anew"
        )
    if unconfirmed and options.confirm > 0 and len(rows.held) > 0:  # else nothing would judge the result
        watch.train.note(f"trial {trial.number} is not confirmed: its seconds go to the final training")
        options = replace(options, confirm=0)
    decision = from_first(lambda: _decided(opened, trial, which, epochs, rows, out, device, options, watch, began))
    watch.decided(decision)
    for number, member in enumerate(decision.members):
        pace = None
        if options.seconds is not None and epochs is None:
            pace = pace_of(opened, decision.members, number, rows, began + options.seconds, device)
        _train_member(opened, member, number, rows, out, decision, epochs, device, watch, pace, asked, used_up)
    if not part().is_first:
        raise Assisted
    averaging: Averaging | None = None
    if options.seconds is not None and epochs is None and not dense:
        if decision.one_view:
            averaging = "none"
        elif decision.oof is None:  # else it was asked when that was predicted, in as many views as are handed over
            averaging = averaging_within(opened, decision, rows, device, watch.train.note)
    _settle_members(out, decision)
    first = decision.members[0].trial
    if dense:
        result = finish_maps(
            opened, first, decision, rows, out, threshold=threshold, device=device, watch=watch, asked=asked
        )
    else:
        result = finish_patches(
            opened,
            first,
            decision,
            rows,
            out,
            threshold=threshold,
            compare=options.compare,
            device=device,
            watch=watch,
            averaging=averaging,
            asked=asked,
        )
    return replace(result, seconds=time.perf_counter() - began)


def _decided(
    opened: OpenStudy,
    trial: FrozenTrial,
    which: str,
    epochs: float | None,
    rows: FinalRows,
    out: Path,
    device: torch.device,
    options: FinalOptions,
    watch: FinalWatch,
    began: float,
) -> Decision:
    """What is trained in the end: the chosen trial, or what its confirmation and that of the next best say.

    A single candidate is not confirmed where seconds are limited and slides are kept back: there is nothing to choose, and
    those slides say more of the final network than a shorter training would.
    """
    chosen = Candidate(lineage_of(trial), trial)
    if options.confirm == 0:
        return Decision((chosen,), (1.0,))
    others = top_candidates(opened.study, options.confirm) if which == "best" else []
    candidates = [chosen, *(one for one in others if one.lineage != chosen.lineage)][: options.confirm]
    if len(candidates) == 1 and options.seconds is not None and rows.kept_back:
        watch.train.note(
            f"trial {trial.number} is the only candidate: not confirmed, its seconds go to the final training"
        )
        return Decision((chosen,), (1.0,))
    why: list[str] = []  # of ties, by the search's values
    if (
        which == "best" and len(candidates) > 1 and options.seconds is not None
    ):  # one confirmation shall be of what is trained then
        trial = choose_trial(opened.study, settle_ties(opened, which, why.append))
        chosen = Candidate(lineage_of(trial), trial)
        candidates = [chosen, *(one for one in candidates if one.lineage != chosen.lineage)][: options.confirm]
    folds = confirm_folds(opened, options.confirm_folds)
    if not folds:
        watch.train.note(
            f"trial {trial.number} is not confirmed: no other fold holds two domains with patches enough of either label"
        )
        return Decision((chosen,), (1.0,))
    limited = options.seconds is not None and epochs is None
    if goes_on := limited and is_under_way(opened, candidates, epochs, rows, out):
        watch.train.note(
            "an earlier call was cut off in its final training: no other trial is confirmed before that is done"
        )
    confirmations = confirm(
        opened,
        candidates,
        folds=folds,
        spared=rows.held,
        device=device,
        seconds=None if goes_on else confirm_seconds(opened, chosen, rows, options.seconds, device),
        stored_only=goes_on,
        watch=watch.confirm,
    )
    if len({one.lineage for one in confirmations}) < 2:  # nothing to compare but by the search
        for line in why:
            watch.train.note(line)
    most_members = options.ensemble
    if most_members > 1 and options.seconds is not None:
        left_s = options.seconds - (time.perf_counter() - began)
        begun = n_of_earlier_calls(opened, candidates, epochs, rows, out, most_members)
        fit = members_that_fit(opened, candidates, epochs, rows, device, left_s)
        most_members = max(1, min(most_members, begun + fit))
        if most_members < options.ensemble:
            watch.train.note(
                f"--ensemble {options.ensemble}: the time that is left is enough for {most_members} final training{'s' * (most_members > 1)}"
            )
    decided = partial(
        decide,
        candidates,
        confirmations,
        opened.store,
        most_members=most_members,
        seed=opened.settings.seed,
        value_of=value_of_goal(opened.settings.goal, np.asarray(opened.store.domain)),
        maximise=opened.settings.goal.maximize,
        timed=not opened.settings.deterministic and not was_short(opened.study, opened.settings.plan.get("budget")),
    )
    decision = decided()
    if limited and decision.oof is not None and averaging_within(opened, decision, rows, device, watch.train.note):
        return decided(one_view=True)  # its temperature and figures are of what is handed over
    return decision


def _train_member(
    opened: OpenStudy,
    member: Candidate,
    number: int,
    rows: FinalRows,
    out: Path,
    decision: Decision,
    epochs: float | None,
    device: torch.device,
    watch: FinalWatch,
    pace: Pace | None,
    asked: dict[str, str],
    used_up: bool,
) -> None:
    """One of the final networks, as a bundle with its calibration; nothing where it lies there already.

    Raises:
        StudyError: it is neither there nor begun, and the budget is used up.
    """
    trial, folder = member.trial, member_folder(out, number)
    plain, n_train = recipe_of_study(opened, trial, epochs, rows.train)
    planned = plain.n_views(n_train) if pace is None else round(pace.n_expected())

    def settled() -> tuple[Recipe, bool]:
        found = earlier_recipe(
            opened, plain, rows, folder, planned=planned, by_clock=pace is not None, note=watch.train.note
        )
        if found is not None:
            return found
        alone = len(decision.members) == 1  # several share the seconds
        return (recipe_by_clock(opened, trial, plain, n_train, planned) if pace is not None and alone else plain), False

    recipe, done = from_first(settled)
    watch.plan(trial, recipe, n_train, folder)
    if not done and recipe.augment > (own := member.recipe.augment):
        watch.train.note(
            f"augmentation {own:g} -> {recipe.augment:g}, since its patches are shown more often than a trial's"
        )
    if not done:
        begun = pace is not None and from_first(lambda: goes_on(opened, recipe, rows, folder))
        if used_up and not begun:
            raise _used_up(opened)
        held = 0 if begun else from_first(lambda: much_longer(folder, opened, planned))
        if held and pace is None:
            watch.train.note(
                f"{folder} held a network that has seen {held:,} images; this one will have seen {planned:,} and takes its place"
            )
        elif held:
            raise StudyError(
                f"{folder} holds a network of this study that has seen {held:,} images, and what is left of the budget is enough for "
                f"{planned:,} of another; give finalize --epochs E, --no-budget or another --out"
            )
        confirmed = next((one for one in decision.confirmed if one.lineage == member.lineage), None)
        provenance = {
            "study": opened.name,
            "study_id": opened.study.user_attrs.get(ID_KEY),
            "trial": trial.number,
            "trial_auc": None if math.isnan(value := auc_of(trial, opened.settings.goal)) else value,
            "objective": opened.settings.goal.name,
            "trial_value": trial.value,
            "confirmed": None if confirmed is None else confirmed.to_json(),
            **asked,
            "split_hash": opened.split.hash,
            "holdout": opened.settings.holdout,
            "kept_back": len(rows.held) if rows.kept_back else 0,
            "weights": str(opened.weights),
        }
        last: dict[str, Tensor] = {}
        keeps = number == 0 and recipe.task == "patch" and recipe.ema > 0 and len(rows.held) > 0
        try:
            trained = train_to_bundle(
                recipe,
                opened.store,
                train_rows=rows.train,
                score_rows=np.zeros(0, np.int64),
                weights=opened.weights,
                device=device,
                speed=opened.speed_book,
                out=folder,
                provenance=provenance,
                judged_rows=rows.held if len(rows.held) else None,
                pace=pace,
                watch=replace(watch.train, trained=lambda training: last.update(_weights_of(training)))
                if keeps
                else watch.train,
            )
        except TrainingDiverged as fault:
            if ranks().is_first:  # what led there is not gone on from
                shutil.rmtree(checkpoints_beside(folder), ignore_errors=True)
            raise StudyError(
                f"the final training of trial {trial.number} diverged ({fault}): at this length its learning rate of {recipe.lr:.3g} is too "
                "large; finalize another with --trial N (`status` of the study lists the best), or train fewer --epochs"
            ) from fault
        if keeps and ranks().is_first:
            write_bundle(out / RAW, replace(trained.bundle, state=last))
    fitted_last = rows.kept_back and decision.calibration is None  # to the slides kept back, once they are predicted
    if ranks().is_first and not fitted_last:
        _calibrate(folder, decision.calibrations[number])


def _used_up(opened: OpenStudy) -> StudyError:
    return StudyError(
        f"study {opened.name!r} has used up its budget of {duration(budget_of(opened.study) or 0.0)}; give finalize --epochs E, or --no-budget"
    )


def _weights_of(training: Training) -> dict[str, Tensor]:
    """The weights of the last step, before any averaging."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in training.network.state_dict().items()}


def _calibrate(folder: Path, calibration: Calibration | None) -> None:
    if load_bundle(folder).calibration != calibration:
        write_calibration(folder, calibration)


def _settle_members(out: Path, decision: Decision) -> None:
    """Write ``ensemble.json`` where there are several, and remove bundles of an earlier run that are no members any more."""
    n = len(decision.members)
    for folder in out.glob("model-*"):
        number = folder.name.removeprefix("model-")
        if number.isdigit() and int(number) > n and (folder / CARD).is_file():
            shutil.rmtree(folder)
    if n == 1:  # not earlier: where a training is refused or cut off the networks before it stay what they were
        (out / ENSEMBLE).unlink(missing_ok=True)
    else:
        write_ensemble(out, decision.weights, decision.calibration, {"chosen": decision.to_json()})
