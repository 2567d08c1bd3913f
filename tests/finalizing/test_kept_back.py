"""Slides kept back from the final training: whole, of folds that chose nothing, and what the printed AUC is of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_automl.data.splits import make_split
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError, InputError, StudyError
from pcam_automl.finalizing import patches as patches_module
from pcam_automl.finalizing.kept_back import final_rows, kept_back
from pcam_automl.finalizing.result import FinalOptions, check_options
from pcam_automl.goals import AUC
from pcam_automl.metrics import auc
from pcam_automl.recipe import Recipe
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.engine import Rung


def study_of(n_slides: int, per_slide: int, seed: int, holdout: float = 0.0) -> OpenStudy:
    """A study over slides of both labels whose patches 0 and 1 of neighbouring slides have equal pixels."""
    n = n_slides * per_slide
    slide = np.repeat(np.arange(n_slides), per_slide)
    digest = np.arange(1, n + 1, dtype="<u8").repeat(2).view(np.uint8).reshape(n, 16).copy()
    digest[per_slide] = digest[0]  # slides 0 and 1 share a patch
    store = SimpleNamespace(
        label=(np.arange(n) % 2).astype(np.int8),
        group=slide.astype(np.int32),
        domain=np.full(n, -1, np.int16),
        domain_names=(),
        part=np.zeros(n, np.int8),
        digest=digest,
        masks=None,
        source={},
        development_rows=lambda: np.arange(n),
    )
    held = cast(PatchStore, store)
    split, settings_ = make_split(held, seed=seed, holdout=holdout), SimpleNamespace(goal=AUC, split_by="slides")
    words = {"store": held, "split": split, "settings": settings_}
    return cast(OpenStudy, SimpleNamespace(**words, rungs=(Rung(90, 90),), start=Recipe()))


@settings(max_examples=25, deadline=None)
@given(n_slides=st.integers(30, 60), per_slide=st.integers(2, 5), seed=st.integers(0, 99), folds=st.integers(1, 4))
def test_whole_slides_of_folds_that_chose_nothing_are_kept_back(
    n_slides: int, per_slide: int, seed: int, folds: int
) -> None:
    opened = study_of(n_slides, per_slide, seed)
    store, split = opened.store, opened.split
    rows = kept_back(opened, 0.1, folds)
    assert np.array_equal(rows, kept_back(opened, 0.1, folds)), "the same call keeps the same slides back"
    rest = np.setdiff1d(split.order, rows)
    assert not np.intersect1d(store.group[rows], store.group[rest]).size
    assert not {bytes(one) for one in store.digest[rows]} & {bytes(one) for one in store.digest[rest]}
    assert set(store.label[rows].tolist()) == set(store.label[rest].tolist()) == {0, 1}
    assert 0.02 <= len(rows) / len(split.order) <= 0.2
    chose = {0} if folds == 4 else set(range(folds + 1))
    assert not chose & set(split.fold[rows].tolist())


def test_a_holdout_judges_alone_and_nothing_is_kept_back_unless_seconds_are_limited() -> None:
    notes: list[str] = []
    with_holdout = study_of(40, 3, 0, holdout=0.2)
    rows = final_rows(with_holdout, None, 1, limited=True, note=notes.append)
    assert np.array_equal(rows.held, with_holdout.split.holdout_rows())
    assert (rows.kept_back, len(rows.train)) == (False, len(with_holdout.split.order))
    opened = study_of(40, 3, 0)
    assert len(final_rows(opened, None, 1, limited=False, note=notes.append).held) == 0
    assert len(final_rows(opened, 0.0, 1, limited=True, note=notes.append).held) == 0
    rows = final_rows(opened, None, 1, limited=True, note=notes.append)
    assert rows.kept_back
    assert len(rows.train) + len(rows.held) == len(opened.split.order)
    place = {row: k for k, row in enumerate(opened.split.order.tolist())}
    assert [place[row] for row in rows.train.tolist()] == sorted(place[row] for row in rows.train.tolist())
    assert notes == [
        f"{len(rows.held)} patches of {len(rows.held) // 3} slides are kept back to judge the final network; "
        "--keep-back 0 trains on them, too"
    ]


def test_of_folds_that_are_domains_none_is_left_out_whole() -> None:
    """The validation fold and the confirming one aside, what is left may be one rare scanner."""
    opened = study_of(60, 3, 0)
    third = opened.split.fold.copy()
    third[:] = np.repeat(np.arange(60) % 20, 3)
    third[third > 2] %= 2  # folds 0 and 1 hold most slides, fold 2 a twentieth of them
    opened = cast(OpenStudy, SimpleNamespace(**{**vars(opened), "split": replace(opened.split, fold=third)}))
    rare = set(np.flatnonzero(third == 2).tolist())
    assert set(kept_back(opened, 0.1, 1).tolist()) == rare
    opened.settings.split_by = "domains"
    rows = set(kept_back(opened, 0.1, 1).tolist())
    assert 0 < len(rows & rare) < len(rare) or not rows & rare
    assert rows - rare
    opened.settings.split_by = "slides"
    with pytest.raises(StudyError, match="--confirm 0 goes without"):
        kept_back(opened, 0.1, 3)
    assert len(kept_back(opened, 0.1, 3, confirms=False)) > 0


def test_where_a_label_is_too_rare_it_is_said_and_what_was_asked_for_is_refused() -> None:
    opened, notes = study_of(40, 3, 0), list[str]()
    rare = np.zeros(120, np.int8)
    for fold in range(5):  # label 1 in two folds only, one slide each
        if fold in (0, 1):
            rare[np.flatnonzero(opened.split.fold == fold)[0]] = 1
    opened.store.label[:] = rare
    rows = final_rows(opened, None, 1, limited=True, note=notes.append)
    assert len(rows.held) == 0
    assert "the printed AUC is of shorter trainings" in notes[0]
    assert "must hold patches of label 0 and of label 1" in notes[0]
    with pytest.raises(DataError, match=r"--keep-back 0.1: .*--keep-back 0 trains on everything"):
        final_rows(opened, 0.1, 1, limited=False, note=notes.append)


@pytest.mark.parametrize(
    ("options", "n_holdout", "said"),
    [
        (FinalOptions(keep_back=0.6), 0, r"--keep-back must be in \[0, 0.5\], got 0.6"),
        (FinalOptions(keep_back=0.1), 30, "is for studies without a holdout, and this one has a holdout of 30 patches"),
        (FinalOptions(compare=True), 0, "give --keep-back 0.1, or search with --holdout 0.1"),
        (FinalOptions(compare=True, keep_back=0.0, seconds=9.0), 0, "give --keep-back 0.1"),
    ],
)
def test_options_that_do_not_go_together(options: FinalOptions, n_holdout: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_options(options, which="best", dense=False, n_holdout=n_holdout)


def test_they_go_together() -> None:
    for options in (FinalOptions(compare=True, keep_back=0.1), FinalOptions(compare=True, seconds=9.0)):
        check_options(options, which="best", dense=False, n_holdout=0)


def test_the_printed_auc_is_of_the_final_network_on_slides_kept_back(
    command_line: Any, in_tmp: Path, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "tiny.yaml").write_text(
        "base: {batch_size: 16, crop_size: 32, backbone: test_resnet}\nparameters:\n  lr: {float: [1.0e-3, 1.0e-2], log: true}\n"
    )
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--trials", 1, "--views", 96)
    code, _, err = command_line("search", *options)
    assert code == 0, err
    code, out, err = command_line("finalize", "--keep-back", 0.2, "--epochs", 2, "--confirm", 0, "--json")
    assert code == 0, err
    said = json.loads(out)
    folder = Path(said["out"])
    scores = np.loadtxt(folder / "scores.csv", delimiter=",", skiprows=2, dtype=str)
    label, prob = scores[:, 1].astype(int), scores[:, 2].astype(float)
    assert said["auc"] == pytest.approx(auc(label, prob), abs=1e-9)
    assert said["auc_on"] == f"{len(scores)} patches of slides kept back from its training"
    card = json.loads((folder / "submission.json").read_text())
    assert card["kept_back"] == len(scores) == 120 - card["n_train"]
    assert said["calibration"]["on"] == f"{len(scores)} patches of slides kept back"
    assert json.loads((folder / "model" / "bundle.json").read_text())["calibration"] == said["calibration"]
    assert "slides kept back" in (folder / "report.html").read_text()
    code, again, err = command_line("finalize", "--keep-back", 0.2, "--epochs", 2, "--confirm", 0, "--json")
    assert code == 0, err
    assert {**json.loads(again), "seconds": 0} == {**said, "seconds": 0}, "what lies there is not trained again"
    assert "train loss" not in err
    assert said["log_loss_fitted"]
    text = command_line("finalize", "--keep-back", 0.2, "--epochs", 2, "--confirm", 0)[2]
    assert "(its temperature was fitted to these patches)" in text

    def cut_off(*_: Any, **__: Any) -> Any:
        raise DataError("the disk is gone")

    monkeypatch.setattr(patches_module, "_calibrated", cut_off)
    code, _, err = command_line("finalize", "--keep-back", 0.2, "--epochs", 2, "--confirm", 0)
    assert (code, "the disk is gone" in err) == (2, True)
    assert json.loads((folder / "model" / "bundle.json").read_text())["calibration"] == said["calibration"]
