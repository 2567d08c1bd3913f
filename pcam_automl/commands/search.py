"""`search`, `status` and `dashboard`. What trains is imported in :func:`run_search`, so that the others start at once."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl import terminal
from pcam_automl.config import storage_url, studies_folder
from pcam_automl.interrupt import stop_signal
from pcam_automl.search.reading import FINISHED, best_of, load_study_to_read, n_finished_of
from pcam_automl.search.storage_url import safe_url
from pcam_automl.search.summary import READ_ATTRS, Summary, summarise

if TYPE_CHECKING:  # these import torch and timm, which `status` and `dashboard` do without
    from pcam_automl.recipe import Recipe
    from pcam_automl.search.objective import Watch
    from pcam_automl.search.study import Asked, OpenStudy
    from pcam_automl.search.worker import SearchEnd
    from pcam_automl.training.engine import RungResult


def run_search(
    name: str,
    url: str | None,
    asked: Asked,
    *,
    n_trials: int,
    timeout_s: float | None,
    as_json: bool,
    n_workers: int | None = None,
    per_device: str | None = None,
) -> None:
    """Create or open the study and run trials until it has ``n_trials`` finished ones, in this process or in several."""
    from pcam_automl.commands.workers import devices_for, run_many
    from pcam_automl.search.create import create_or_open_study
    from pcam_automl.search.objective import Objective
    from pcam_automl.search.storage import storage_faults
    from pcam_automl.search.worker import run_worker
    from pcam_automl.training.compute import use_device

    began = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    devices = devices_for(asked, n_workers, per_device, studies_folder(storage_url(url)))
    asked = replace(asked, n_workers=len(devices), command=terminal.this_command())
    go_on = "every finished trial is stored; the same command goes on"
    with stop_signal(go_on) as stop, storage_faults(storage_url(url)):
        with terminal.counting("packing") as call:
            opened = create_or_open_study(name, url, asked, say=terminal.say, pack_call=call)
        print_plan(opened, n_trials)
        if len(devices) > 1:
            end = run_many(opened, url, asked, devices, n_trials=n_trials, timeout_s=timeout_s, stop=stop)
        else:
            device = use_device(asked.device, deterministic=opened.settings.deterministic)
            with terminal.Bars() as bars:
                show = _SearchShow(bars, opened, n_trials)
                objective = Objective(opened, device, stop=stop.check, watch=show.watch())
                with stop.deferred():
                    end = run_worker(objective, n_trials=n_trials, timeout_s=timeout_s, finished=show.finished)
    _print_end(opened, end, time.monotonic() - began, n_trials, url, as_json)


def print_plan(opened: OpenStudy, n_trials: int) -> None:
    """What a trial will do, before the first one starts."""
    from pcam_automl.search.start import n_prescribed

    settings, plan = opened.settings, opened.settings.plan
    rungs = " -> ".join(f"{views:,} views of {subset:,} patches" for views, subset in settings.rungs)
    done = n_finished_of(opened.study)
    terminal.say(f"study {opened.name}: {done} of {n_trials} trials finished; data {opened.store.root}")
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
    if n_first := n_prescribed(len(settings.enqueued), n_trials):
        terminal.say(
            f"  first: {'; '.join(entry.origin for entry in settings.enqueued[:n_first])}; then {settings.sampler}"
        )
    for name, why in plan["dropped"].items():
        terminal.say(f"  left out: {name}, {why}")


class _SearchShow:
    """One line a trial, and two bars: the study and the running trial."""

    def __init__(self, bars: terminal.Bars, opened: OpenStudy, n_trials: int) -> None:
        self.bars, self.opened = bars, opened
        self.total = bars.add("trials", n_trials)
        bars.set(self.total, done=n_finished_of(opened.study))
        self.trial = bars.add("preparing", None)
        self._score = ""

    def watch(self) -> Watch:
        from pcam_automl.search.objective import Watch

        return Watch(
            begins=self._begins, views=lambda n: self.bars.step(self.trial, n), rung=self._rung, note=terminal.say
        )

    def _begins(self, number: int, recipe: Recipe, views: int) -> None:
        self._name = f"trial {number} {recipe.backbone}"
        self.bars.restart(self.trial, f"{self._name} views", views)

    def _rung(self, number: int, result: RungResult) -> None:
        self.bars.set(self.trial, text=f"{self._name} AUC {result.auc:.4f} views")

    def finished(self, trial: FrozenTrial, trials: list[FrozenTrial]) -> None:
        best = best_of(trials)
        self.bars.set(self.total, done=sum(t.state in FINISHED for t in trials))
        terminal.say(finished_line(trial, best))


def finished_line(trial: FrozenTrial, best: FrozenTrial | None) -> str:
    """A trial that has just ended, and the best one so far."""
    return trial_line(trial) + (f"  best {best.value:.4f} (trial {best.number})" if best is not None else "")


def trial_line(trial: FrozenTrial) -> str:
    """One trial in one line."""
    attrs, params = trial.user_attrs, trial.params
    state = "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()
    score = list(trial.intermediate_values.values())[-1] if trial.intermediate_values else None
    text = f"trial {trial.number:>3} {state:<8} " + (f"AUC {score:.4f}" if score is not None else "AUC   -   ")
    text += f"  {params.get('backbone', ''):<24}" + (f" crop {params['crop_size']}" if "crop_size" in params else "")
    text += f"  {terminal.duration(float(attrs.get('seconds', 0.0)))}"
    if trial.state != TrialState.COMPLETE:
        text += f"  {attrs.get('reason', '')}"
    return text


def _print_end(
    opened: OpenStudy, end: SearchEnd, seconds: float, n_trials: int, url: str | None, as_json: bool
) -> None:
    summary = summarise(opened.study, opened.settings)
    if as_json:
        terminal.print_json({**summary.to_json(), "wall_s": round(seconds, 1), "ended": end.why})
        return
    done = n_finished_of(opened.study)
    if end.n_finished == 0 and end.why == "done":
        terminal.say(f"study {opened.name} has its {done} finished trials already; a larger --trials adds more")
    elif end.why == "timeout":
        terminal.say(f"time is up: {done} of {n_trials} trials finished; the same command goes on")
    elif end.why != "done":
        terminal.say(f"{done} of {n_trials} trials finished; other processes hold the rest")
    if summary.best is not None:
        options = command_options(opened.name, url)
        terminal.result(
            f"best: trial {summary.best['number']}, validation AUC {summary.best['auc']:.4f} ({terminal.duration(seconds)})"
        )
        terminal.say(
            f"next: pcam-automl dashboard{command_options(None, url)} to inspect, pcam-automl finalize{options} for the submission"
        )


def command_options(name: str | None, url: str | None) -> str:
    """``--study`` and ``--storage`` as a following command needs them; a password is left out of it."""
    text = "" if name in (None, "pcam") else f" --study {shlex.quote(str(name))}"
    return text + (f" --storage {shlex.quote(safe_url(url))}" if url else "")


def run_status(name: str, url: str | None, *, as_json: bool) -> None:
    """Print a study's counts, best trial, importances and seconds."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, settings = load_study_to_read(name, url, READ_ATTRS)
    summary = summarise(study, settings)
    if as_json:
        terminal.print_json(summary.to_json())
        return
    _print_summary(summary)


def _print_summary(summary: Summary) -> None:
    states = ", ".join(f"{n} {state}" for state, n in summary.states.items()) or "no trials yet"
    terminal.result(f"study {summary.study}: {states}; {terminal.duration(summary.seconds)} of trials")
    for reason in sorted(set(summary.errors)):
        terminal.result(f"  {summary.errors.count(reason)} x {reason}")
    if summary.best is None:
        terminal.result("no complete trial yet")
    else:
        best: dict[str, Any] = summary.best
        terminal.result(
            f"best: trial {best['number']}, validation AUC {best['auc']:.4f}, {terminal.duration(best['seconds'] or 0.0)} on {best['device']}"
        )
        recipe = best["recipe"] or {}
        varied = [name for name in recipe if name in best["params"] or name in ("pretrained", "views", "input_size")]
        terminal.table(
            "its recipe (what the search varied)",
            ("field", "value"),
            [
                (name, f"{recipe[name]:.4g}" if isinstance(recipe[name], float) else str(recipe[name]))
                for name in varied
            ],
        )
    if summary.importances:
        rows = [(name, f"{share:.1%}", "█" * round(30 * share)) for name, share in summary.importances.items()]
        terminal.table("what mattered (PED-ANOVA share of the variance)", ("parameter", "share", ""), rows)
    else:
        terminal.result(f"parameter importances: {summary.importances_note}")


def run_dashboard(url: str | None, *, host: str, port: int) -> None:
    """Serve optuna-dashboard until Ctrl-C."""
    from pcam_automl.dashboard import check_port, serve_dashboard

    url = storage_url(url)
    check_port(host, port)
    if host not in ("127.0.0.1", "localhost", "::1"):
        terminal.say(
            f"warning: optuna-dashboard has no login; everyone who reaches {host}:{port} can change and delete studies"
        )
    line = f"dashboard of {safe_url(url)}: http://{host}:{port}/  (Ctrl-C ends it)"
    with stop_signal("nothing was lost"):
        serve_dashboard(
            url,
            host=host,
            port=port,
            artifacts=studies_folder(url) / "artifacts",
            ready=lambda: terminal.result(line),
        )
