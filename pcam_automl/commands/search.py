"""`search`. What trains is imported in :func:`run_search`: `worker`, `submit` and others take parts of this."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial

from pcam_automl import terminal
from pcam_automl.clock import process_age_s
from pcam_automl.commands.account import account_json, arrows, clock_of, say_account, say_budget, so_far
from pcam_automl.commands.advised import command_options
from pcam_automl.commands.status import finished_line, judged, print_judged
from pcam_automl.config import storage_url
from pcam_automl.defaults import MAX_RETRIES
from pcam_automl.errors import StudyError
from pcam_automl.interrupt import StopSignal, stop_signal
from pcam_automl.search.audit import audit_study
from pcam_automl.search.ranking import rank_study
from pcam_automl.search.reading import best_of, n_finished_in, n_finished_of
from pcam_automl.search.summary import summarise

if TYPE_CHECKING:  # these import torch and timm, which it can do without until it trains
    from pcam_automl.recipe import Recipe
    from pcam_automl.search.budget import BudgetClock
    from pcam_automl.search.ledger import Ledger
    from pcam_automl.search.objective import Watch
    from pcam_automl.search.study import Asked, OpenStudy
    from pcam_automl.search.turns import Limits, Waits
    from pcam_automl.search.worker import SearchEnd
    from pcam_automl.training.engine import RungResult


def run_search(
    name: str,
    url: str | None,
    asked: Asked,
    *,
    n_trials: int | None,
    timeout_s: float | None,
    as_json: bool,
    n_workers: int | None = None,
    per_device: str | None = None,
    quota_bytes: int | None = None,
    thaws: bool = True,
    max_retries: int = MAX_RETRIES,
    launcher: str | None = None,
    waits: Waits = "far",
    shows_end: bool = True,
) -> None:
    """Create or open the study and run trials until it has ``n_trials`` finished ones, or the search's part of the budget is
    over; in this process or in several. ``waits``: for which other workers' trials; ``shows_end``: whether the best trial is printed in
    the end.
    """
    from pcam_automl.commands.workers import devices_for
    from pcam_automl.search.create import create_or_open_study
    from pcam_automl.search.overview import note_asked
    from pcam_automl.search.storage import storage_faults

    began = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # On Ray the workers' devices are the cluster's; this process only makes the study.
    devices = [asked.device] if launcher is not None else devices_for(asked, n_workers, per_device, url)
    n_side_by_side = len(devices) if launcher is None else n_workers or 1
    asked = replace(
        asked, n_workers=len(devices), n_planned=n_side_by_side, n_trials=n_trials, command=terminal.this_command()
    )
    with stop_signal(GO_ON) as stop, storage_faults(storage_url(url)):
        with terminal.counting("packing") as call:
            opened = create_or_open_study(name, url, asked, say=terminal.say, pack_call=call, spends=launcher is None)
        if asked.budget_s is not None:
            give_budget(opened, asked.budget_s)  # refused before it is noted for all workers
        note_asked(opened.study, n_trials, asked.budget_s)
        work = Work(n_trials, asked.budget_s, timeout_s, quota_bytes, thaws, max_retries, waits)
        if launcher is None:
            end = work_on(opened, asked, devices, work, stop=stop)
        else:
            from pcam_automl.commands.ray import work_on_ray

            end = work_on_ray(opened, asked, n_workers or 1, launcher, work, stop=stop)
    if shows_end:
        _print_end(opened, end, time.monotonic() - began, n_trials, url, as_json)


GO_ON = "every finished trial is stored, and so is a finished pack; the same command goes on"


@dataclass(frozen=True)
class Work:
    """What a command does on a study: see :class:`~pcam_automl.search.turns.Limits`.

    Attributes:
        n_trials: the study's total; None where its budget alone ends it.
        budget_s: the study's.
        timeout_s: of this command.
        quota_bytes: of the checkpoints.
        thaws: whether paused trials go on.
        max_retries: of a trial whose worker was killed.
        waits: for which other workers' trials; see Limits.
        yields: see Limits; for a worker in this process.
        command: for the ledger of the budget.
        since: when its clock began, by ``time.monotonic``; None with the process.
    """

    n_trials: int | None
    budget_s: float | None
    timeout_s: float | None = None
    quota_bytes: int | None = None
    thaws: bool = True
    max_retries: int = MAX_RETRIES
    waits: Waits = "far"
    yields: Callable[[], bool] | None = None
    command: str = "search"
    since: float | None = None


def work_on(opened: OpenStudy, asked: Asked, devices: Sequence[str], work: Work, *, stop: StopSignal) -> SearchEnd:
    """Print the plan and run trials on the devices, in this process or in one for each of several."""
    from pcam_automl.commands.workers import run_many
    from pcam_automl.search.objective import Objective
    from pcam_automl.search.overview import SEARCHED_KEY, SEARCHED_TRIALS_KEY
    from pcam_automl.search.paused_folders import DEFAULT_QUOTA_BYTES
    from pcam_automl.search.turns import NEVER_ENDS, Limits
    from pcam_automl.search.worker import run_worker
    from pcam_automl.training.compute import use_device

    clock, ledger = _budget(opened, work)
    most = NEVER_ENDS if clock is None or clock.short is None else clock.short.n_trials
    limits = Limits(
        min(work.n_trials or most, most),
        work.timeout_s,
        clock,
        DEFAULT_QUOTA_BYTES if work.quota_bytes is None else work.quota_bytes,
        work.thaws,
        work.max_retries,
        work.waits,
        work.yields,
    )
    print_plan(opened, work.n_trials, clock)
    _check_time(opened, clock)
    try:
        if len(devices) > 1:
            end = run_many(opened, opened.url, devices, limits, stop=stop, noted=ledger.note)
        else:
            device = use_device(asked.device, deterministic=opened.settings.deterministic)
            with terminal.Bars() as bars:
                show = _SearchShow(bars, opened, limits, ledger)
                objective = Objective(opened, device, stop=stop.check, watch=show.watch())
                with stop.deferred():
                    end = run_worker(objective, limits, finished=show.finished)
    finally:
        ledger.close()
    if end.why in ("budget", "done") and work.budget_s is not None:
        opened.study.set_user_attr(SEARCHED_TRIALS_KEY, work.n_trials if end.why == "done" else None)
        opened.study.set_user_attr(SEARCHED_KEY, work.budget_s)
    return end


def _budget(opened: OpenStudy, work: Work) -> tuple[BudgetClock | None, Ledger]:
    """The clock of the budget that was asked for, and this command's entry among what is spent.

    Raises:
        StudyError: the study has a larger budget already.
    """
    from pcam_automl.search.budget import budget_of
    from pcam_automl.search.ledger import Ledger, spent_with

    kept = work.budget_s is not None or budget_of(opened.study) is not None
    ledger = Ledger(opened.study, work.command, kept=kept, since=work.since)
    if work.budget_s is None:
        return None, ledger
    began = time.monotonic() - process_age_s() if work.since is None else work.since
    age_s = time.monotonic() - began
    spent = spent_with(opened.study, age_s) - age_s  # what others have noted meanwhile is a part of this command's time
    give_budget(opened, work.budget_s)
    return clock_of(opened, work.budget_s, spent, began), ledger


def give_budget(opened: OpenStudy, budget_s: float) -> None:
    """The study's first budget, or a larger one.

    Raises:
        StudyError: it has a larger one already.
    """
    from pcam_automl.search.budget import budget_of, set_budget

    held = budget_of(opened.study)
    if held is not None and budget_s < held:
        raise StudyError(
            f"--budget is {terminal.duration(budget_s)}, study {opened.name!r} has {terminal.duration(held)}; give as much or more, or take another --study name"
        )
    set_budget(opened.study, budget_s)


def _check_time(opened: OpenStudy, clock: BudgetClock | None) -> None:
    """Whether a first trial may begin at all.

    Raises:
        StudyError: start-up, or earlier commands, have used up what it could have.
    """
    from pcam_automl.search.budget import too_late

    if clock is None or n_finished_of(opened.study):
        return
    spent_s = clock.spent_s + time.monotonic() - clock.began
    if (why := too_late(clock.total_s, spent_s, clock.predict_s)) is not None:
        raise StudyError(why)


def print_plan(opened: OpenStudy, n_trials: int | None, clock: BudgetClock | None = None) -> None:
    """What a trial will do, before the first one starts."""
    from pcam_automl.search.start import n_prescribed
    from pcam_automl.search.turns import NEVER_ENDS, n_expected_of

    settings, plan = opened.settings, opened.settings.plan
    of = "" if n_trials is None else f" of {n_trials}"
    rungs = " -> ".join(f"{views:,} views of {subset:,} patches" for views, subset in settings.rungs)
    done = n_finished_of(opened.study)
    terminal.say(f"study {opened.name}: {done}{of} trials finished; data {opened.store.root}")
    if clock is not None:
        say_budget(clock, plan.get("budget"), len(settings.rungs), n_trials)
    if len(settings.rungs) == 1 and (plan.get("budget") or {}).get("short") and (clock is None or clock.short is None):
        terminal.say(
            "  made for a short budget: its trials have one rung and none is pruned; another --study NAME has three"
        )
    terminal.say(
        f"  split: {plan['n_train']:,} patches train, {plan['n_valid']:,} validate ({settings.n_score:,} of them at each rung)"
        + (f", holdout {settings.holdout:.0%}" if settings.holdout else "")
    )
    terminal.say(
        f"  a trial: {rungs}"
        + (f", at most about {terminal.duration(settings.cap_s)} on {plan['device']}" if settings.cap_s else "")
    )
    about = plan.get("estimated", ())
    speeds = ", ".join(
        f"{name} {'~' if name in about else ''}{rate:,.0f}"
        for name, rate in sorted(plan["images_per_s"].items(), key=lambda pair: -pair[1])
    )
    estimated = " (~ estimated from its layers; a trial measures)" if about else ""
    terminal.say(f"  training images/s at {plan['planned_px']} px{estimated}: {speeds}")
    n_expected = n_expected_of(opened, n_trials or NEVER_ENDS)
    if n_first := min(n_expected, n_prescribed(len(settings.enqueued), n_expected)):
        then = f"; then {settings.sampler}" if n_first < n_expected else ""
        terminal.say(f"  first: {'; '.join(entry.origin for entry in settings.enqueued[:n_first])}{then}")
    for name, why in plan["dropped"].items():
        terminal.say(f"  left out: {name}, {why}")


class _SearchShow:
    """One line a trial, and two bars: the study and the running trial."""

    def __init__(self, bars: terminal.Bars, opened: OpenStudy, limits: Limits, ledger: Ledger) -> None:
        from pcam_automl.commands.workers import StudyBar

        self.bars, self.opened, self.ledger = bars, opened, ledger
        self.total = StudyBar(bars, limits, n_finished_of(opened.study))
        self.trial = bars.add("preparing", None)
        self._score = ""

    def watch(self) -> Watch:
        from pcam_automl.search.objective import Watch

        return Watch(begins=self._begins, views=self._views, rung=self._rung, note=terminal.say)

    def _begins(self, number: int, recipe: Recipe, views: int) -> None:
        self._name = f"trial {number} {recipe.backbone}"
        self.ledger.note()
        self.bars.restart(self.trial, f"{self._name} views", views)

    def _views(self, n: int) -> None:
        self.bars.step(self.trial, n)
        self.total.tick()

    def _rung(self, number: int, result: RungResult) -> None:
        self.ledger.note()
        goal = self.opened.settings.goal
        self.bars.set(self.trial, text=f"{self._name} {goal.short} {goal.value_of(result):.4f} views")

    def finished(self, trial: FrozenTrial, trials: list[FrozenTrial]) -> None:
        goal = self.opened.settings.goal
        best = best_of(trials, goal)
        self.total.set(n_finished_in(trials))
        self.ledger.note()
        terminal.say(finished_line(trial, best, goal))


def _print_end(
    opened: OpenStudy, end: SearchEnd, seconds: float, n_trials: int | None, url: str | None, as_json: bool
) -> None:
    from pcam_automl.search.budget import budget_of

    if opened.mirror is not None:
        opened.mirror.pull_trials()
    summary = summarise(opened.study, opened.settings)
    ranking = rank_study(opened.study, opened.settings, opened.folder, store=opened.store)
    audit = audit_study(opened.study, opened.settings)
    if as_json:
        found = {**summary.to_json(), **judged(ranking, audit), "wall_s": round(seconds, 1), "ended": end.why}
        terminal.print_json({**found, "budget": account_json(opened)})
        return
    done = n_finished_of(opened.study)
    if end.n_finished == 0 and end.why == "done" and budget_of(opened.study) is None:
        terminal.say(f"study {opened.name} has its {done} finished trials already; a larger --trials adds more")
    elif end.why == "timeout":
        terminal.say(f"time is up: {_of(done, n_trials)} finished; the same command goes on")
    elif end.why == "budget" or (end.why == "done" and budget_of(opened.study) is not None):
        _print_spent(opened, done, "the search's part of the budget is over" if end.why == "budget" else "all is done")
    elif end.why != "done":
        terminal.say(f"{_of(done, n_trials)} finished; other processes hold the rest")
    if summary.best is not None:
        options = command_options(opened.name, url)
        terminal.result(
            f"best: trial {summary.best['number']}, {opened.settings.goal.label} {summary.best['value']:.4f} (this search took {terminal.duration(seconds)})"
        )
        print_judged(ranking, audit, options)
        terminal.say(
            f"next: pcam-automl dashboard{command_options(None, url)} to inspect, pcam-automl finalize{options} for the submission"
        )


def _of(done: int, n_trials: int | None) -> str:
    return f"{done} trials" if n_trials is None else f"{done} of {n_trials} trials"


def _print_spent(opened: OpenStudy, done: int, why: str) -> None:
    """How the search ended, and the plan of it beside what happened."""
    from pcam_automl.search.budget import budget_of
    from pcam_automl.search.ledger import spent_s
    from pcam_automl.search.lineages import THAWED_FROM, lineages_of

    lineages, reached = lineages_of(opened.study.get_trials(deepcopy=False)), so_far(opened).reached
    n_thawed = sum(any(THAWED_FROM in row.user_attrs for row in lineage.rows) for lineage in lineages)
    rungs = f"{arrows(reached)} reached rungs 1 to {len(reached)}, " if len(reached) > 1 else f"{reached[0]} complete, "
    total, spent = budget_of(opened.study) or 0.0, spent_s(opened.study)
    terminal.say(
        f"{why}: {done} {'trial' if done == 1 else 'trials'}, {rungs}{n_thawed} went on after a pause; "
        f"{terminal.duration(spent)} of {terminal.duration(total)} spent, {terminal.duration(max(0.0, total - spent))} left for finalize and its report"
    )
    say_account(opened, finalized=False)
