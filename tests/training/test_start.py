"""Which rows a recipe trains on: exclusions, subsample and balance keep the nested order of each class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pcam_automl.data.splits import make_split
from pcam_automl.data.store import open_store
from pcam_automl.errors import DataError
from pcam_automl.recipe import Recipe
from pcam_automl.training.start import Rows, choose_rows, data_key, unseen_border


def in_order(part: np.ndarray, whole: np.ndarray) -> bool:
    return np.array_equal(whole[np.isin(whole, part)], part)


def test_excluded_ids_are_neither_trained_nor_scored_on(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    rows = store.development_rows()
    ids = store.ids[rows[:7]].tolist()
    left = choose_rows(store, Recipe(exclude_ids=tuple(ids)), rows, rows)
    assert len(left.train) == len(left.score) == len(rows) - 7
    assert not set(store.ids[left.train]) & set(ids)


@pytest.mark.parametrize(("side", "task", "warns"), [(96, "patch", False), (128, "patch", True), (256, "dense", False)])
def test_patches_larger_than_the_largest_crop_are_warned_of(side: int, task: str, warns: bool) -> None:
    store: Any = SimpleNamespace(patches=np.zeros((1, side, side, 3), np.uint8))
    recipe: Any = SimpleNamespace(task=task)
    found = unseen_border(recipe, store)
    assert (found is not None) is warns
    assert not warns or f"the patches are {side} px, and a network sees at most their centre 96 px" in str(found)


def test_one_class_alone_is_refused(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    rows = store.development_rows()
    negatives = store.ids[rows[store.label[rows] == 0]].tolist()
    with pytest.raises(DataError, match="training needs both classes"):
        choose_rows(store, Recipe(exclude_ids=tuple(negatives)), rows, rows)


def test_a_subsample_is_a_prefix_of_the_nested_order(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    order = make_split(store).train_order(0)
    part = choose_rows(store, Recipe(subsample=0.3), order, order[:5])
    assert np.array_equal(part.train, order[: round(0.3 * len(order))])
    assert np.array_equal(part.score, order[:5])


def test_undersampling_balances_every_prefix_and_keeps_the_order_of_each_class(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    order = store.development_rows()
    order = np.concatenate([order[store.label[order] == 1][:9], order[store.label[order] == 0]])
    part = choose_rows(store, Recipe(balance="undersample"), order, order[:0]).train
    assert (store.label[part] == 1).sum() == (store.label[part] == 0).sum() == 9
    positive = store.label[part] == 1
    assert in_order(part[positive], order)
    assert in_order(part[~positive], order)
    lead = np.cumsum(np.where(positive, 1, -1))  # a rung trains on a prefix
    assert np.abs(lead).max() == 1


def test_the_data_key_tells_data_rows_and_their_order_apart(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    rows = store.development_rows()
    keys = {
        data_key(store, Rows(rows[10:], rows[:10])),
        data_key(store, Rows(rows[9:], rows[:9])),
        data_key(store, Rows(rows, rows[:0])),  # the same rows in all, cut elsewhere
        data_key(store, Rows(rows[:9:-1], rows[:10])),
        data_key(replace(store, content_hash="0" * 64), Rows(rows[10:], rows[:10])),
    }
    assert len(keys) == 5
    assert data_key(store, Rows(rows[10:].copy(), rows[:10].astype(np.int32))) in keys
