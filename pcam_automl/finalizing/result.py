"""What finalize is asked, what it tells while it runs, and what it made. Does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from pcam_automl.errors import InputError
from pcam_automl.finalizing.compare import Step
from pcam_automl.finalizing.decision import Decision
from pcam_automl.goals import AUC
from pcam_automl.operating import Operating
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.search.confirm import ConfirmWatch
from pcam_automl.train import TrainWatch

MOST_KEPT_BACK = 0.5


@dataclass(frozen=True)
class FinalOptions:
    """What finalize does beside one training.

    Attributes:
        confirm: so many of the best trials are trained anew on other folds first; 0 takes the search's word.
        confirm_folds: on so many folds each, 1 to 4.
        ensemble: at most so many networks judge together, if that helps out of fold.
        compare: measure on the holdout, or on the slides kept back, what each ingredient was worth.
        seconds: wall clock of all of it, for choosing how many are confirmed and blended; None is no limit. 0 trains nothing anew: what
            an earlier call trained is completed.
        keep_back: share of the patches, in whole slides, that the final training leaves out to be judged by; None is a tenth
            where ``seconds`` are limited and there is no holdout, else nothing.
        submission: predict the test patches and write the submission; False hands over the network alone.
    """

    confirm: int = 3
    confirm_folds: int = 1
    ensemble: int = 1
    compare: bool = False
    seconds: float | None = None
    keep_back: float | None = None
    submission: bool = True


def check_options(options: FinalOptions, *, which: str, dense: bool, n_holdout: int, objective: str = AUC.name) -> None:
    """Whether the options go together, before anything is trained.

    Args:
        options: to judge.
        which: ``best`` or how else the trial is chosen.
        dense: whether the trial's task is one of maps.
        n_holdout: patches set aside.
        objective: the study's.

    Raises:
        InputError: they do not.
    """
    if options.confirm < 0 or options.confirm_folds < 1 or options.ensemble < 1:
        raise InputError(
            "--confirm must be 0 or more, --confirm-folds and --ensemble 1 or more, got "
            f"{options.confirm}, {options.confirm_folds} and {options.ensemble}"
        )
    if dense and not options.submission:
        raise InputError("--no-submission belongs to task patch; a dense study writes maps and no submission")
    if options.ensemble > 1:
        if dense:
            raise InputError(f"--ensemble {options.ensemble} belongs to task patch; leave it out for a dense study")
        if objective != AUC.name:
            raise InputError(
                f"--ensemble {options.ensemble} blends for the AUC over all patches, and this study's objective is {objective}; leave it out"
            )
        if which != "best":
            raise InputError(
                f"--ensemble {options.ensemble} takes the best trials, so it goes with --trial best and --pick best, not with a single "
                f"trial (here {which}); leave one out"
            )
        if options.confirm < options.ensemble:
            raise InputError(
                f"--ensemble must be at most --confirm, got {options.ensemble} and {options.confirm}: "
                "its members are chosen by the predictions of the confirmed trials"
            )
    if options.compare and dense:
        raise InputError("--compare belongs to task patch; leave it out for a dense study")
    if options.keep_back is not None and not 0.0 <= options.keep_back <= MOST_KEPT_BACK:
        raise InputError(f"--keep-back must be in [0, {MOST_KEPT_BACK}], got {options.keep_back:g}")
    if options.keep_back and n_holdout:
        raise InputError(
            f"--keep-back {options.keep_back:g} is for studies without a holdout, and this one has a holdout of {n_holdout} patches; leave it out"
        )
    if options.compare and not (
        n_holdout or options.keep_back or (options.seconds is not None and options.keep_back is None)
    ):
        raise InputError(
            "--compare needs slides that the final network has not seen, and this study has no holdout; give --keep-back 0.1, or search with --holdout 0.1"
        )


def words_of(
    options: FinalOptions,
    *,
    which: str,
    pick: str,
    threshold: float | None,
    epochs: float | None,
    budget_s: float | None,
) -> list[str]:
    """The options of `finalize` that make the same anew; what is so by default is left out.

    Args:
        options: as they were asked for; without seconds a study's budget was not heeded.
        which: the trial.
        pick: what ``best`` means.
        threshold: of the 0/1 labels.
        epochs: of the final training.
        budget_s: the study's; None where it has none.
    """
    plain = FinalOptions()
    words = ["--trial", which] if which != "best" else []
    words += ["--pick", pick] if pick != "best" else []
    words += ["--threshold", typed(threshold)] if threshold is not None else []
    words += ["--epochs", typed(epochs)] if epochs is not None else []
    words += ["--no-budget"] if budget_s is not None and options.seconds is None and epochs is None else []
    for name in ("confirm", "confirm_folds", "ensemble", "keep_back"):
        if (value := getattr(options, name)) != getattr(plain, name):
            words += [f"--{name.replace('_', '-')}", f"{value:g}"]
    words += ["--compare"] if options.compare else []
    return words + ([] if options.submission else ["--no-submission"])


def typed(value: float) -> str:
    """A number as one would type it: no digit more than it takes to be the same one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


@dataclass
class FinalWatch:
    """What finalize tells the one who shows it; ``train`` is for the trainings, ``confirm`` for those before them."""

    train: TrainWatch = field(default_factory=TrainWatch)
    plan: Callable[[FrozenTrial, Recipe, int, Path], None] = lambda trial, recipe, n_train, out: None
    predicting: Callable[[int, str], None] = lambda n, what: None
    predicted: Callable[[int], None] = lambda n: None
    confirm: ConfirmWatch = field(default_factory=ConfirmWatch)
    decided: Callable[[Decision], None] = lambda decision: None


@dataclass(frozen=True)
class FinalResult:
    """What finalize made.

    Attributes:
        out: folder with ``model/`` (the bundle), ``submission.csv``, ``submission.json`` and the ``scores.csv`` of the holdout or the slides kept back.
        submission: the checked file, None where the data has no test patches.
        trial: the trial that was retrained, of an ensemble the first.
        auc: on the holdout, else on the slides kept back, else out of fold, else the trial's validation AUC.
        auc_on: which of them.
        auc_95: its interval; None for the trial's.
        seconds: wall clock of this run.
        notes: test patches that could not be read.
        scores: of the holdout or the slides kept back, None where there are neither.
        maps: folder of the test images' probability maps, for a dense task.
        dense: Dice, accuracy, accuracy of always-negative and loss on the pixels that the AUC is of; empty for patches, and where it is a trial's.
        on_test: Dice, accuracy and more on the test images that came with masks; empty where none did.
        labelled_test: n, auc, auc_95 and caveat of the test patches that came with labels; empty where none did, and for a dense task.
        decision: what was confirmed and chosen.
        operating: thresholds and reject curves out of fold, then on the slides that the network has not seen; those of them that there are.
        steps: what each ingredient was worth on the holdout; empty unless asked for.
        log_loss: of the patches that the AUC is of, with the temperature; None where it is a trial's, and for a dense task.
        log_loss_fitted: whether the temperature was fitted to those very patches.
        domain_aucs: of the same patches by domain, the worst first; empty where fewer than two can be scored.
    """

    out: Path
    submission: Path | None
    trial: int
    auc: float
    auc_on: str
    auc_95: tuple[float, float] | None
    seconds: float
    notes: tuple[str, ...]
    scores: Scores | None = None
    maps: Path | None = None
    on_test: dict[str, float | int | None] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    labelled_test: Mapping[str, Any] = field(default_factory=dict)
    decision: Decision | None = None
    operating: tuple[Operating, ...] = ()
    steps: tuple[Step, ...] = ()
    log_loss: float | None = None
    log_loss_fitted: bool = False
    domain_aucs: Mapping[str, float] = field(default_factory=dict)
