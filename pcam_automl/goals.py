"""What a study optimises: name, direction, words, and the value of a rung. Computes no metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from pcam_automl.errors import InputError, did_you_mean

ObjectiveName = Literal["auc", "worst_domain_auc", "log_loss"]


class Figures(Protocol):
    """What a rung's result knows of the scoring rows."""

    @property
    def auc(self) -> float | None: ...

    @property
    def loss(self) -> float | None: ...

    @property
    def worst_domain_auc(self) -> float | None: ...


@dataclass(frozen=True)
class Goal:
    """An objective with its words.

    Attributes:
        name: as ``--objective`` names it.
        short: for a line of a terminal: ``AUC 0.9812``.
        label: for axes and sentences: ``validation AUC``.
        metric: Optuna's metric name, which optuna-dashboard shows.
        maximize: whether larger values are better.
    """

    name: ObjectiveName
    short: str
    label: str
    metric: str
    maximize: bool

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if self.maximize else "minimize"

    @property
    def sign(self) -> float:
        """Times a value it grows with quality."""
        return 1.0 if self.maximize else -1.0

    def value_of(self, figures: Figures) -> float | None:
        """The objective's value of a rung; None where it has none."""
        return figures.loss if self.name == "log_loss" else getattr(figures, self.name)

    def best(self, values: Iterable[float]) -> float:
        """The best of at least one value."""
        return max(values) if self.maximize else min(values)


AUC = Goal("auc", "AUC", "validation AUC", "validation ROC AUC", True)
_GOALS: Mapping[str, Goal] = {
    "auc": AUC,
    "worst_domain_auc": Goal(
        "worst_domain_auc",
        "worst-domain AUC",
        "validation AUC of the worst domain",
        "validation ROC AUC, worst domain",
        True,
    ),
    "log_loss": Goal("log_loss", "log-loss", "validation log-loss (nats)", "validation log-loss (nats)", False),
}


def goal_of(name: str) -> Goal:
    """The objective of that name.

    Raises:
        InputError: there is none.
    """
    if name not in _GOALS:
        known = get_args(ObjectiveName)
        raise InputError(f"--objective must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")
    return _GOALS[name]
