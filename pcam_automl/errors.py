"""The error tree. Raises nothing itself, imports nothing of the package.

PcamError                    everything this package raises on purpose
├── InputError               the user's input is at fault: one line, exit code 2
│   ├── DataError            a source folder, table, patch or pack
│   │   └── WriteError       a full or read-only disk
│   ├── RecipeError          a recipe, search space or ``--set``
│   ├── StudyError           a study, its storage or a contradiction with what it remembers
│   └── BundleError          a model bundle or checkpoint that cannot be trusted or read
├── SearchFailed             too many trials failed: exit code 1
├── TrainingDiverged         NaN or runaway loss; ends a trial as pruned
├── OutOfTime                the search's part of a budget is over; pauses a trial
└── Interrupted              Ctrl-C or SIGTERM after everything was put in order: exit code 130 or 143
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class PcamError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class InputError(PcamError):
    """The user's input is at fault. The message gives key, rule, value and remedy in one line."""

    exit_code = 2


class DataError(InputError):
    """A source folder, a table, a patch file or a pack cannot be used."""


class WriteError(DataError):
    """A file cannot be written: the disk is full, or the place is read-only. A trial that meets it goes on later."""


class RecipeError(InputError):
    """A recipe, a search space or a ``--set`` assignment is invalid."""


class StudyError(InputError):
    """A study does not exist, cannot be reached, or contradicts what was asked."""


class NoStudyError(StudyError):
    """There is no such study, or none at all."""


class BundleError(InputError):
    """A model bundle or a checkpoint is corrupt, foreign or of another version."""


class SearchFailed(PcamError):
    """So many trials failed that going on makes no sense."""


class DeviceFailed(PcamError):
    """A GPU failed in this process (an illegal access, a fault of the hardware): all that the process asks of it fails from then on."""


class TrainingDiverged(PcamError):
    """The training loss became NaN or infinite."""


class OutOfTime(PcamError):
    """The search's part of a budget is over while a rung is being trained."""


class Interrupted(PcamError):
    """A signal ended the run after its state was stored.

    Args:
        message: what was stored and how to go on.
        signum: the signal's number; the exit code is 128 + signum.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'lr'?)`` for the nearest known name, an empty string if none is near."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names joined by commas, and how many more there are."""
    shown = ", ".join(map(str, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
