"""`finalize` and `train`."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from pcam_automl import terminal
from pcam_automl.bundle import CARD, check_bundle_target
from pcam_automl.clock import process_age_s
from pcam_automl.commands.account import say_account
from pcam_automl.commands.advised import command_options
from pcam_automl.commands.final_text import print_final, say_confirmed, say_decision
from pcam_automl.commands.report import after_work, report_of_study, report_of_training
from pcam_automl.commands.setup import DataOptions, set_up
from pcam_automl.commands.status import whole_final
from pcam_automl.config import storage_url
from pcam_automl.ensemble import member_folder
from pcam_automl.errors import InputError, did_you_mean
from pcam_automl.finalize import Assisted, FinalOptions, FinalResult, FinalWatch, finalize
from pcam_automl.finalizing.decision import Decision
from pcam_automl.interrupt import stop_signal
from pcam_automl.recipe import Recipe
from pcam_automl.search.budget import budget_of
from pcam_automl.search.confirm import ConfirmWatch
from pcam_automl.search.confirmations import Candidate, Confirmation
from pcam_automl.search.ledger import FINALIZE, Ledger, spent_with
from pcam_automl.search.pareto import PICKS, Pick
from pcam_automl.search.storage import storage_faults
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.train import TrainWatch, stage_folder, train_to_bundle
from pcam_automl.training.compute import Compute, use_device
from pcam_automl.training.engine import RungResult, Training
from pcam_automl.training.pace import N_PARTS
from pcam_automl.training.ranks import first_before_others, from_first, joined, ranks

DENSE_FIGURES = ("auc_on", "dice", "accuracy", "always_negative_accuracy")
"""Of a bundle's metrics, those that a patch task's do not have."""


@contextmanager
def _training_bar(stop: Callable[[], None], *, parts: int | None = None) -> Iterator[TrainWatch]:
    """A bar of the training views, and one line an epoch; of a training by the clock one of its ``parts``."""
    with terminal.Bars() as bars:
        task = bars.add("preparing", None)

        def begins(recipe: Recipe, compute: Compute, views: int) -> None:
            terminal.say(
                f"training {recipe.backbone} at {recipe.network_px} px on {compute.device} ({compute.precision}"
                f"{', channels last' if compute.channels_last else ''}): {views:,} views"
                if views or parts is None
                else f"training {recipe.backbone} at {recipe.network_px} px on {compute.device}: no time is left for it, so that it has the least that gives a network"
            )
            bars.restart(task, "training views", views)

        def epoch(result: RungResult) -> None:
            bars.set(task, done=result.views)
            name, of = ("epoch", "") if parts is None else ("part", f" of {parts}")
            score = f"  validation AUC {result.auc:.4f}  loss {result.loss:.4f}" if result.auc is not None else ""
            score += f"  Dice {result.dice:.4f}" if result.dice is not None else ""
            terminal.say(
                f"{name} {result.rung + 1:>3}{of}  train loss {result.train_loss:.4f}{score}  {result.images_per_s:,.0f} images/s"
            )

        yield TrainWatch(begins=begins, views=lambda n: bars.step(task, n), epoch=epoch, note=terminal.say, stop=stop)


@contextmanager
def _final_watch(opened: OpenStudy, stop: Callable[[], None], ledger: Ledger, *, paced: bool) -> Iterator[FinalWatch]:
    """Bars and lines of a finalize; ``paced``: its training ends by the clock. When a confirmation or a training begins, and
    after each confirmation and epoch, or part, the ``ledger`` is written, so that a kill does not give its seconds back.
    """
    since_s = ledger.seconds  # from here on candidates are chosen and confirmed

    def plan(trial: FrozenTrial, recipe: Recipe, n_train: int, folder: Path) -> None:
        value = f" ({opened.settings.goal.label} {trial.value:.4f})" if trial.value is not None else ""
        length = "as many epochs as fit the budget" if paced else f"{recipe.epochs:g} epochs"
        terminal.say(f"trial {trial.number}{value}: {recipe.backbone}, {length} of {n_train:,} patches -> {folder}")

    with _training_bar(stop, parts=N_PARTS if paced else None) as train, terminal.Bars() as bars:
        task = bars.add("predicting", None)

        def epoch(result: RungResult) -> None:
            train.epoch(result)
            ledger.note()

        def begins(recipe: Recipe, compute: Compute, views: int) -> None:
            train.begins(recipe, compute, views)
            ledger.note()

        def decided(decision: Decision) -> None:
            ledger.confirmed()
            say_decision(decision, opened.settings.goal)

        yield FinalWatch(
            replace(train, begins=begins, epoch=epoch),
            plan,
            lambda n, what: bars.restart(task, f"predicting {what}", n),
            lambda n: bars.step(task, n),
            _confirm_watch(train, ledger, since_s),
            decided,
        )


def run_finalize(name: str, url: str | None, *, device: str, **options: Any) -> FinalResult | None:
    """:func:`finalize_study` in this process, or as one of those that `torchrun` started; None in all of them but the first."""
    with joined(device) as own:
        if ranks().is_first:
            return finalize_study(name, url, device=own, **options)
        terminal.mute()
        with contextlib.suppress(Assisted):
            finalize_study(name, url, device=own, **{**options, "with_report": False})
        return None


def finalize_study(
    name: str,
    url: str | None,
    *,
    which: str,
    data: Path | None,
    out: Path | None,
    threshold: float | None,
    epochs: float | None,
    device: str,
    as_json: bool,
    with_report: bool = True,
    pick: str = "best",
    options: FinalOptions | None = None,
    within_budget: bool = True,
) -> FinalResult:
    """Confirm the best trials, retrain the chosen one, write the bundle and the submission."""
    options = options or FinalOptions()
    chosen = check_pick(pick, which)
    go_on = "the same command goes on from the last checkpoint, if there is one yet"
    with stop_signal(go_on) as stop, storage_faults(storage_url(url)), contextlib.ExitStack() as at_end:
        with terminal.counting("packing") as call:
            asked = Asked(data=data)
            opened = first_before_others(lambda: open_study(name, url, asked, say=terminal.say, pack_call=call))
        if opened.mirror is not None and ranks().is_first:
            opened.mirror.pull_trials()
        for number in range(options.ensemble):
            folder = member_folder(out or opened.folder / "final", number)
            check_bundle_target(folder, option=f"{folder.name}/ of --out")
        place = use_device(device, deterministic=opened.settings.deterministic)
        ledger = Ledger(
            opened.study, FINALIZE, kept=budget_of(opened.study) is not None and within_budget and ranks().is_first
        )
        at_end.callback(ledger.close)  # however it ends: an interrupted one has spent, too
        earlier = whole_final(out or opened.folder / "final")
        if options.seconds is None and epochs is None and within_budget:
            options = replace(options, seconds=from_first(lambda: _seconds_left(opened, with_report)))
        paced = options.seconds is not None and epochs is None
        with stop.deferred(), _final_watch(opened, stop.check, ledger, paced=paced) as watch:
            final = finalize(
                opened,
                which=which,
                out=out,
                threshold=threshold,
                epochs=epochs,
                device=place,
                pick=chosen,
                watch=watch,
                options=options,
            )
        if with_report:
            after_work(
                lambda: report_of_study(
                    name,
                    url,
                    data=data,
                    model=final.out / "model",
                    out=final.out,
                    threshold=0.5 if threshold is None else threshold,
                    device=place,
                    scores=final.scores,
                ),
                again=f"pcam-automl report{command_options(name, url)}"
                if out is None
                else _report_again(final.out / "model", opened.store.root),
            )
        else:
            _say_old_report(final.out)
        if ledger.begun or earlier is None or earlier != whole_final(final.out):  # a mere repetition is free
            ledger.note()  # what is said next counts it
        if paced:
            _say_spent(opened)
    for note in final.notes:
        terminal.say(note)
    print_final(final, as_json)
    return final


def _say_old_report(out: Path) -> None:
    """Where a report lies beside a network that was made after it."""
    page = out / "report.html"
    if page.is_file() and page.stat().st_mtime < (out / "model" / CARD).stat().st_mtime:
        terminal.say(f"{page} is of the network that was here before; without --no-report a new one is written")


def _seconds_left(opened: OpenStudy, with_report: bool) -> float | None:
    """What is left of the study's budget for confirming, training and predicting; None where it has none. 0 where it is used up: an
    earlier finalize that was cut off while it predicted is completed all the same.
    """
    total_s = budget_of(opened.study)
    if total_s is None:
        return None
    report_s = 0.0
    if with_report:
        from pcam_automl.report.rehearsal import expected_seconds  # matplotlib, which only a report needs

        report_s = expected_seconds()
    left_s = total_s - spent_with(opened.study, process_age_s()) - report_s
    if left_s <= 0:
        return 0.0
    terminal.say(f"{terminal.duration(left_s)} of the budget of {terminal.duration(total_s)} are left for finalize")
    return left_s


def _say_spent(opened: OpenStudy) -> None:
    """The budget's parts as planned, and what was spent of it."""
    terminal.say(f"the budget of {terminal.duration(budget_of(opened.study) or 0.0)} as it was planned and spent:")
    say_account(opened, finalized=True)


def check_pick(pick: str, which: str) -> Pick:
    """``--pick``, judged.

    Raises:
        InputError: an unknown one, or ``--trial`` names the trial already.
    """
    chosen = next((known for known in PICKS if known == pick), None)
    if chosen is None:
        raise InputError(f"--pick must be one of {', '.join(PICKS)}, got {pick!r}{did_you_mean(pick, PICKS)}")
    if chosen != "best" and which != "best":
        raise InputError(f"--pick {pick} and --trial {which} both name a trial; keep one")
    return chosen


def _confirm_watch(train: TrainWatch, ledger: Ledger, since_s: float) -> ConfirmWatch:
    """The training's bar, and one line a confirmation; the ``ledger`` is written when it begins and ends. Where one is trained its
    seconds are of confirmations from ``since_s``.
    """

    def begins(candidate: Candidate, fold: int, training: Training, views: int) -> None:
        terminal.say(f"confirming trial {candidate.trial.number} with a fresh seed; scored on fold {fold}")
        train.begins(training.recipe, training.compute, views)
        ledger.confirming(since_s)
        ledger.note()

    def done(confirmation: Confirmation) -> None:
        say_confirmed(confirmation)
        ledger.close()  # if it was trained: those that are stored cost nothing

    return ConfirmWatch(begins, train.views, done, terminal.say, train.stop)


def _report_again(model: Path, data: Path) -> str:
    return shlex.join(["pcam-automl", "report", "--model", str(model), "--data", str(data)])


def run_train(
    recipe: str,
    pins: dict[str, Any],
    options: DataOptions,
    *,
    out: Path,
    weights: str | None,
    device: str,
    as_json: bool,
    with_report: bool = True,
    deterministic: bool = False,
) -> None:
    """Train one recipe on the split's other folds, validated on one of them."""
    began = time.perf_counter()
    check_bundle_target(out)
    with stop_signal("every epoch that ended is stored; the same command goes on after the last of them") as stop:
        setup = set_up(recipe, pins, options, weights=weights, device=device, deterministic=deterministic)
        for number in range(len(setup.recipe.stages) - 1):
            check_bundle_target(stage_folder(out, number), option="a stage's folder beside --out,")
        with stop.deferred(), _training_bar(stop.check) as watch:
            trained = train_to_bundle(
                setup.recipe,
                setup.store,
                train_rows=setup.train_rows,
                score_rows=setup.score_rows,
                weights=setup.weights,
                device=setup.device,
                speed=setup.speed,
                out=out.resolve(),
                provenance={
                    "recipe_name": recipe,
                    "split_hash": setup.split.hash,
                    "fold": options.fold,
                    "command": terminal.this_command(),
                },
                watch=watch,
            )
        metrics, wall_s = trained.bundle.metrics, time.perf_counter() - began
        if with_report:
            after_work(
                lambda: report_of_training(
                    out.resolve(),
                    setup.store,
                    setup.split,
                    device=setup.device,
                    threshold=0.5,
                    title=f"Recipe {recipe}",
                ),
                again=_report_again(out, setup.store.root),
            )
    if as_json:
        terminal.print_json(
            {
                "auc": metrics["auc"],
                "auc_95": metrics["auc_95"],
                **{name: metrics[name] for name in DENSE_FIGURES if name in metrics},
                "images_per_s": metrics["images_per_s"],
                "wall_s": round(wall_s, 2),
                "out": str(out),
                "recipe": setup.recipe.model_dump(mode="json"),
            }
        )
        return
    low, high = metrics["auc_95"]
    terminal.say(f"{metrics['images_per_s']:,.0f} images/s in training, {terminal.duration(wall_s)} in all")
    if "dice" in metrics:
        terminal.result(
            f"{out}: validation Dice {metrics['dice']:.4f}, pixel accuracy {metrics['accuracy']:.4f} (always negative: "
            f"{metrics['always_negative_accuracy']:.4f}), pixel AUC {metrics['auc']:.4f}"
        )
        return
    terminal.result(f"{out}: validation AUC {metrics['auc']:.4f} (95 % {low:.4f} to {high:.4f})")
