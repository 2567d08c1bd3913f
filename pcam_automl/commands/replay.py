"""`replay`: a stored trial trained again and put beside what the study says of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna

from pcam_automl import terminal
from pcam_automl.config import storage_url
from pcam_automl.errors import StudyError
from pcam_automl.interrupt import stop_signal
from pcam_automl.search.reading import best_of
from pcam_automl.search.replay import BAND, COMPARED, Replayed, StoredTrial, read_trial, replay
from pcam_automl.search.storage import storage_faults
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.training.compute import use_device
from pcam_automl.training.fit import total_views

_WORDS = {
    "bit for bit": "bit for bit: AUC, log-loss and training loss of every rung are equal",
    "within the band": f"within the band of {BAND:g}: the last rung's AUC is off by {{apart:.2g}}",
    "differs": "differs: the last rung's AUC is off by {apart:.2g}{more}",
}


def run_replay(which: str, name: str, url: str | None, *, data: Path | None, device: str, as_json: bool) -> bool:
    """Replay a trial by number, or ``best``; returns whether it agrees."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with stop_signal("nothing was changed; repeat the command") as stop, storage_faults(storage_url(url)):
        with terminal.counting("packing") as call:
            opened = open_study(name, url, Asked(data=data), say=terminal.say, pack_call=call)
        stored = stored_trial(opened, which)
        place = use_device(device, deterministic=opened.settings.deterministic)
        terminal.say(
            f"trial {stored.number} of study {name}: {stored.recipe.backbone} at {stored.recipe.network_px} px, "
            f"{len(stored.rungs)} of {len(stored.plan)} rungs, seed {stored.recipe.seed}, {stored.compute.precision}"
        )
        with stop.deferred(), terminal.Bars() as bars:
            views = total_views(stored.recipe, stored.plan[: len(stored.rungs) + stored.diverged])
            task = bars.add("training views", views)
            found = replay(opened, stored, place, stop=stop.check, progress=lambda n: bars.step(task, n))
    _print(found, as_json)
    return found.verdict != "differs"


def stored_trial(opened: OpenStudy, which: str) -> StoredTrial:
    """The row of a number, or of the best complete trial.

    Raises:
        StudyError: neither ``best`` nor a number, no such row, or one that cannot be replayed.
    """
    trials = opened.study.get_trials(deepcopy=False)
    if which == "best":
        best = best_of(trials, opened.settings.goal)
        if best is None:
            raise StudyError(f"study {opened.name!r} has no complete trial yet; name a trial by its number")
        which = str(best.number)
    if not which.isdecimal():
        raise StudyError(f"TRIAL must be best or a trial's number, got {which!r}")
    return read_trial(trials, int(which), opened.rungs, opened.settings.split_hash)


def _print(found: Replayed, as_json: bool) -> None:
    stored = found.stored
    if as_json:
        terminal.print_json(
            {
                "trial": stored.number,
                "verdict": found.verdict,
                "band": BAND,
                "rungs": [
                    {"views": old.views, "stored": _figures(old), "replayed": _figures(new)}
                    for old, new in zip(stored.rungs, found.rungs, strict=False)
                ],
                "conditions": [asdict(one) for one in stored.conditions],
                "warnings": list(found.warnings),
            }
        )
        return
    for warning in found.warnings:
        terminal.say(f"warning: {warning}")
    terminal.table(
        f"trial {stored.number}, validation AUC",
        ("views", "patches", "stored", "replayed", "difference"),
        [
            (f"{old.views:,}", f"{old.subset:,}", f"{old.auc:.6f}", f"{new.auc:.6f}", _difference(old.auc, new.auc))
            for old, new in zip(stored.rungs, found.rungs, strict=False)
        ],
    )
    terminal.result(verdict_line(found))


def _figures(result: Any) -> dict[str, float | None]:
    return {name: getattr(result, name) for name in COMPARED}


def _difference(old: float | None, new: float | None) -> str:
    assert old is not None
    assert new is not None
    return "0" if old == new else f"{new - old:+.2e}"


def verdict_line(found: Replayed) -> str:
    """The verdict in one line, with how far the last rung's AUC is off."""
    pairs = list(zip(found.stored.rungs, found.rungs, strict=False))
    apart = abs((pairs[-1][0].auc or 0.0) - (pairs[-1][1].auc or 0.0)) if pairs else 0.0
    if len(found.rungs) != len(found.stored.rungs):
        more = f", and it has {len(found.rungs)} rungs where the trial had {len(found.stored.rungs)}"
    elif any("diverge" in warning for warning in found.warnings):
        more = ", and the warning above says how it ended"
    elif apart <= BAND:
        more = " although the study is deterministic and the conditions are the same"
    else:
        more = f", the band is {BAND:g}"
    return _WORDS[found.verdict].format(apart=apart, more=more)
