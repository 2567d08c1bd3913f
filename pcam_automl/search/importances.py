"""PED-ANOVA without the seconds that importing scikit-learn takes. Reads a study, says nothing of its trials."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from typing import Any

import optuna

_PACKAGE = "optuna.importance"


def ped_anova(study: optuna.Study) -> dict[str, float]:
    """Parameter to share of the variance, in [0, 1], falling (PED-ANOVA, Watanabe et al. 2023, Optuna's default).

    Raises:
        ValueError, RuntimeError: there is nothing to compare, as Optuna says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # "some regimes have less than 2 trials", on conditional parameters of few trials
        shares: dict[str, float] = _importance_package().get_param_importances(study)
    return shares


@functools.cache
def _importance_package() -> Any:
    """Optuna's importance package, imported without scikit-learn.

    PED-ANOVA needs numpy alone, but its package also imports fANOVA, which imports scikit-learn, scipy and pandas
    where it finds them (5 of the 6 s that `status` took for 1,000 trials; the shares themselves take 0.1 s). Optuna
    does without scikit-learn where it is absent, so it is hidden for the length of this import. What was imported is
    then forgotten, so that who imports optuna.importance later has all of it.
    """
    loaded = sys.modules.get(_PACKAGE)
    if loaded is not None:
        return loaded
    hidden = "sklearn" not in sys.modules
    if hidden:
        sys.modules["sklearn"] = None  # type: ignore[assignment]  # Python's own mark of a module that cannot be had
    try:
        return importlib.import_module(_PACKAGE)
    finally:
        if hidden:
            del sys.modules["sklearn"]
            for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
                del sys.modules[name]
            vars(optuna).pop("importance", None)
