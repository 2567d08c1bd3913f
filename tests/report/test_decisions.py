"""Thresholds, reject curve, confirmations and ingredients on the page, from what finalize writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_content import scores_of

from pcam_automl.commands.final_card import final_figures
from pcam_automl.data.store import open_store
from pcam_automl.errors import DataError
from pcam_automl.finalizing.compare import steps_of
from pcam_automl.operating import operate
from pcam_automl.report.blocks import Block, Picture, Table, Text
from pcam_automl.report.content import ReportContent
from pcam_automl.report.decision_figures import decision_blocks


def card_of(n: int = 600) -> dict[str, Any]:
    """A ``submission.json`` as finalize writes it."""
    rng, label = np.random.default_rng(0), np.arange(n) % 2
    group, base = np.arange(n) // 2 % 12, 2.2 * label - 1.1
    raw, smooth = (1 / (1 + np.exp(-4 * (base + rng.normal(0, s, n)))) for s in (1.2, 0.8))
    mild = 1 / (1 + np.exp(-np.log(smooth / (1 - smooth)) / 3))
    scorings = [("one view, last weights", raw), ("8 views", smooth), ("temperature", mild)]
    oof = operate(label, raw, f"{n} patches of a fold by networks that did not see them")
    holdout = operate(label, mild, f"holdout of {n} patches", oof)
    return {
        "operating": [oof.to_json(), holdout.to_json()],
        "confirmed": [
            {"trial": 4, "search": 0.97, "values": [0.95, None], "mean": 0.95, "drop": 0.02},
            {"trial": 1, "search": None, "values": [0.9, 0.9], "mean": 0.9, "drop": None},
        ],
        "mean_drop": 0.02,
        "ensemble": {"used": True, "why": "out of fold the blend's AUC is +0.0040"},
        "weights": [0.7, 0.3],
        "members": [4, 1],
        "calibration": {"temperature": 1.5, "log_loss": [0.3, 0.25], "error": [0.05, 0.01], "on": "600 patches"},
        "calibration_on_holdout": {"log_loss": [0.31, 0.27], "error": [0.06, 0.02]},
        "compare": [step.to_json() for step in steps_of(label, group, scorings)],
    }


def blocks_of(card: dict[str, Any]) -> list[Block]:
    return list(decision_blocks(ReportContent("t", final=final_figures(card))))


def test_everything_that_finalize_measured_is_shown() -> None:
    blocks = blocks_of(card_of())
    tables = [block for block in blocks if isinstance(block, Table)]
    assert [len(table.rows) for table in tables] == [10, 2, 3]
    assert [block.name for block in blocks if isinstance(block, Picture)] == ["reject.png", "ingredients.png"]
    assert tables[0].rows[0][:2] == ("finds 90 % of tumour", "out of fold")
    assert tables[0].rows[-1][:3] == ("0.5 as it is", "holdout", "0.500")
    assert tables[1].rows[0] == ("trial 4", "0.9700", "0.9500, diverged", "0.9500", "+0.0200")
    assert tables[2].rows[0][2] == ""
    texts = " ".join(block.text for block in blocks if isinstance(block, Text))
    assert "Together judge 0.70 x trial 4 + 0.30 x trial 1" in texts
    assert "0.3100 -> 0.2700" in texts
    assert "belongs to the recipe, not to these weights" in texts


def test_scores_alone_have_thresholds_of_their_own_and_say_so(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    scores = scores_of(store)
    blocks = list(decision_blocks(ReportContent("t", store=store, scores=scores)))
    table = next(block for block in blocks if isinstance(block, Table))
    assert len(table.rows) == 5
    assert "chosen on these very patches" in table.caption
    own = scores.label == 1
    ones = replace(scores, rows=scores.rows[own], label=scores.label[own], prob=scores.prob[own])
    aside = [b for b in decision_blocks(ReportContent("t", store=store, scores=ones)) if isinstance(b, Text)]
    assert any(block.style == "aside" for block in aside)


def test_an_older_card_has_no_such_figures_and_a_strange_one_is_a_fault_in_one_line() -> None:
    assert final_figures({}).operating == ()
    with pytest.raises(DataError, match=r"submission\.json holds other figures.*run it again"):
        final_figures({"operating": [{"on": "x"}]})


def test_pictures_of_equal_figures_are_equal() -> None:
    one, two = (next(b for b in blocks_of(card_of()) if isinstance(b, Picture)) for _ in range(2))
    assert one.png == two.png
