"""Which trial `finalize` starts from, by name, number or rank. Trains nothing and confirms nothing."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.errors import StudyError, first_few
from pcam_automl.search.budget import budget_of
from pcam_automl.search.confirmations import top_candidates
from pcam_automl.search.pareto import Pick, pick_knee
from pcam_automl.search.ranking import rank_study
from pcam_automl.search.study import OpenStudy


def choose_trial(study: optuna.Study, which: str) -> FrozenTrial:
    """``best`` or ``highest``, the complete trial of the best value, or a finished trial's number.

    What ``finalize`` takes for ``best`` is settled before by :func:`settle_ties`.

    Raises:
        StudyError: no finished trial, no such number, or a trial that did not complete.
    """
    trials = study.get_trials(deepcopy=False)
    if which in ("best", "highest"):
        best = top_candidates(study, 1)
        if not best:
            remedy = "run pcam-automl search first" if budget_of(study) is None else "search with a longer --budget"
            raise StudyError(f"study {study.study_name!r} has no complete trial yet ({len(trials)} trials); {remedy}")
        return best[0].trial
    if not which.isdigit():
        raise StudyError(f"--trial must be best, highest or a trial's number, got {which!r}")
    if int(which) >= len(trials):
        raise StudyError(f"study {study.study_name!r} has no trial {which}; its trials are 0 to {len(trials) - 1}")
    trial = trials[int(which)]
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or "recipe" not in trial.user_attrs:
        raise StudyError(
            f"trial {which} of study {study.study_name!r} is {trial.state.name}; choose a finished one, or best"
        )
    if trial.value is None:
        raise StudyError(
            f"trial {which} of study {study.study_name!r} ended without a score (it diverged, say); choose another, or best"
        )
    return trial


def settle_ties(opened: OpenStudy, which: str, note: Callable[[str], None] = lambda text: None) -> str:
    """For ``best`` the number of the cheapest trial among those as good as the best, of a short search of the one with more to gain;
    any other word as it is.

    Where the trials' scores cannot be compared, ``best`` stays, and ``note`` is told why.
    """
    if which != "best":
        return which
    ranking = rank_study(opened.study, opened.settings, opened.folder, store=opened.store)
    if not ranking.n_complete:
        return which
    if ranking.picked is None:
        note(f"ties are not looked for: {first_few(ranking.notes)}")
        return which
    note(f"trial {ranking.picked} is taken: {ranking.why}")
    return str(ranking.picked)


def chosen_trial(opened: OpenStudy, which: str, pick: Pick, confirms: bool, note: Callable[[str], None]) -> FrozenTrial:
    """The trial that is retrained unless its confirmation speaks against it. Ties are settled by confirmations where there are some."""
    if which == "best" and pick == "knee":
        picked = pick_knee(opened.study.get_trials(deepcopy=False), opened.settings.goal)
        note(picked.why)
        return picked.trial
    return choose_trial(opened.study, which if confirms else settle_ties(opened, which, note))
