"""Pictures of the domains and of quality against cost: what is drawn, what is said where nothing can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from pcam_automl.data.store import open_store
from pcam_automl.goals import AUC, goal_of
from pcam_automl.report.blocks import Picture, Table, Text
from pcam_automl.report.domain_figure import domain_blocks, domain_figure
from pcam_automl.report.tradeoff_figure import tradeoff_blocks


def trial(number: int, value: float, **attrs: object) -> FrozenTrial:
    made = optuna.create_trial(value=value, user_attrs={"device": "cpu", **attrs})
    made.number = number
    return made


def test_domains_are_drawn_with_their_sizes(easy_pack: Path) -> None:
    drawn = domain_figure(open_store(easy_pack))
    assert drawn is not None
    assert drawn.alt.endswith("scanner0 (60 patches), scanner1 (60 patches)")
    assert "stain of every slide" in drawn.caption


def test_patches_of_no_slide_and_more_domains_than_lines_are_said(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    names = tuple(f"centre {n}" for n in range(9))
    many = replace(store, group=np.full(len(store), -1, np.int32), domain_names=names)
    many = replace(many, domain=(np.arange(len(store)) % 9).astype(np.int32))
    drawn = domain_figure(many)
    assert drawn is not None
    assert "stain of every patch" in drawn.caption
    assert drawn.caption.endswith("The 6 largest are shown.")


def test_unknown_domains_are_left_out_with_a_sentence(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    unknown = replace(store, domain=np.full(len(store), -1, np.int32), domain_names=())
    (block,) = domain_blocks(unknown)
    assert isinstance(block, Text)
    assert "--domains estimate" in block.text


def test_front_and_knee_are_drawn_and_listed() -> None:
    points = [(0.90, 1.0, 5), (0.97, 2.0, 9), (0.98, 30.0, 40), (0.5, 40.0, 70)]
    trials = [trial(n, v, latency_ms=ms, n_parameters=1e6 * size) for n, (v, ms, size) in enumerate(points)]
    _, drawn, table = tradeoff_blocks(trials, AUC)
    assert isinstance(drawn, Picture)
    assert isinstance(table, Table)
    assert "3 are on the front, its knee is trial 1 with 2.00 ms" in drawn.alt
    assert [(row[0], row[2], row[3], row[5]) for row in table.rows] == [
        ("0", "0.9000", "1.00", ""),
        ("1", "0.9700", "2.00", "knee"),
        ("2", "0.9800", "30.00", "best"),
    ]


def test_of_a_loss_the_lowest_is_best() -> None:
    trials = [trial(n, v, latency_ms=ms) for n, (v, ms) in enumerate([(0.5, 1.0), (0.2, 2.0), (0.4, 3.0)])]
    *_, table = tradeoff_blocks(trials, goal_of("log_loss"))
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["0", "1"]


def test_untimed_trials_leave_a_sentence() -> None:
    _, sentence = tradeoff_blocks([trial(0, 0.9), trial(1, 0.8)], AUC)
    assert isinstance(sentence, Text)
    assert sentence.text.startswith("Left out: quality against latency")
