"""Rows of a trial's details and the statements that put them into Optuna's tables. Opens no database."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY as TPE_SHARED
from optuna.storages._rdb import models
from sqlalchemy.dialects import mysql, postgresql, sqlite

__all__ = ["TPE_SHARED", "Rows", "attr_row", "param_row", "rows_of", "upserts"]

Rows = dict[str, list[dict[str, Any]]]
"""Rows to be written, by the keys of ``_TABLES``."""

_TABLES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "params": (models.TrialParamModel, "param_name", ("param_value", "distribution_json")),
    "system_attrs": (models.TrialSystemAttributeModel, "key", ("value_json",)),
    "user_attrs": (models.TrialUserAttributeModel, "key", ("value_json",)),
    "values": (models.TrialIntermediateValueModel, "step", ("intermediate_value", "intermediate_value_type")),
}


@functools.cache
def _upsert(kind: str, dialect: str) -> sa.Insert:
    """Insert of rows of a table of ``_TABLES`` by trial and key that replaces the values of a row that is there."""
    model, key, values = _TABLES[kind]
    table = model.__table__
    if dialect == "mysql":
        put = mysql.insert(table)
        return put.on_duplicate_key_update({name: put.inserted[name] for name in values})
    insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    return insert.on_conflict_do_update(
        index_elements=[table.c.trial_id, table.c[key]], set_={name: insert.excluded[name] for name in values}
    )


def _step_row(trial_id: int, step: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return {"trial_id": trial_id, "step": step, "intermediate_value": stored, "intermediate_value_type": kind}


def param_row(trial_id: int, name: str, value: float, distribution: BaseDistribution) -> dict[str, Any]:
    """A parameter by its internal value."""
    text = distribution_to_json(distribution)
    return {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": text}


def attr_row(trial_id: int, key: str, value: Any) -> dict[str, Any]:
    """A user or system attribute; ``value`` as JSON."""
    return {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}


def rows_of(trial_id: int, user_attrs: Mapping[str, Any], values: Mapping[int, float]) -> Rows:
    """User attributes by key, and intermediate values by step."""
    return {
        "user_attrs": [attr_row(trial_id, key, value) for key, value in user_attrs.items()],
        "values": [_step_row(trial_id, step, float(value)) for step, value in values.items()],
    }


def upserts(rows: Rows, dialect: str) -> list[tuple[sa.Insert, list[dict[str, Any]]]]:
    """Statements that insert the rows or replace what is there under the same keys, and what each is executed with."""
    return [(_upsert(kind, dialect), of_kind) for kind, of_kind in rows.items() if of_kind]
