"""Forest plot and rungs against rungs: what is drawn, what is said, what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from planted_study import STEPS, probs_of, rung_values, scored_trial, settings_of, study_with, trials_of

from pcam_automl.data.store import open_store
from pcam_automl.report.blocks import Picture, Table, Text
from pcam_automl.report.content import ReportContent
from pcam_automl.report.ranking_figures import fidelity_figure, forest_figure, ranking_blocks
from pcam_automl.report.search_figures import search_section
from pcam_automl.search.audit import audit_trials, rung_table
from pcam_automl.search.audit_text import AUDIT_HEADER
from pcam_automl.search.lineages import lineages_of
from pcam_automl.search.ranking import Ranking, rank_study


def ranking_in(pack: Path, folder: Path) -> Ranking:
    store = open_store(pack)
    trials = [scored_trial(store, folder, i, probs_of(store, noise, seed=i)) for i, noise in enumerate((0.1, 0.5, 9.0))]
    return rank_study(study_with(trials), settings_of(store), folder, store=store)


def test_search_section_shows_intervals_and_rungs_and_warns(easy_pack: Path, tmp_path: Path) -> None:
    study = study_with(trials_of(rung_values(40, (9.0, 0.2, 0.0)) / 100 + 0.8))
    content = ReportContent("x", study=study, study_settings=settings_of(), ranking=ranking_in(easy_pack, tmp_path))
    blocks = search_section(content).blocks
    names = [block.name for block in blocks if isinstance(block, Picture)]
    assert {"search_intervals.png", "search_fidelity.png"} <= set(names)
    texts = [block.text for block in blocks if isinstance(block, Text)]
    assert any(text.startswith("Trial 0 has the highest AUC of 3 complete trials") for text in texts)
    assert any(text.startswith("Warning: after 100 views the scores mislead") for text in texts)
    assert any("A larger first rung: 300 -> 900 views" in text for text in texts)
    (table,) = [block for block in blocks if isinstance(block, Table) and block.header == AUDIT_HEADER]
    assert [row[0] for row in table.rows] == ["1 -> 2", "2 -> 3"]
    assert table.rows[0][-1] == "misleads"


def test_without_ranking_or_settings_a_sentence_stands_there() -> None:
    study = study_with(trials_of(np.full((3, 3), 0.8) + np.arange(3)[:, None] / 100))
    texts = [block.text for block in search_section(ReportContent("x", study=study)).blocks if isinstance(block, Text)]
    assert any("intervals of the trials: they were not drawn" in text for text in texts)
    assert any("rungs against rungs: the study's settings" in text for text in texts)
    (block,) = ranking_blocks(Ranking((), 1, notes=("the pack is gone",)), {})
    assert isinstance(block, Text)
    assert "the pack is gone" in block.text


def test_equal_rankings_give_equal_pictures_that_say_what_they_show(easy_pack: Path, tmp_path: Path) -> None:
    ranking = ranking_in(easy_pack, tmp_path)
    drawn = forest_figure(ranking, {0: "resnet18"})
    assert drawn.png == forest_figure(ranking, {0: "resnet18"}).png
    assert drawn.png != forest_figure(ranking, {0: "test_vit"}).png
    assert f"trial 0 is best with {ranking.trials[0].auc:.4f}" in drawn.alt


def test_tau_is_printed_on_the_fidelity_figure_and_one_rung_draws_none() -> None:
    trials = trials_of(rung_values(20, (0.2, 0.1, 0.0)))
    audit, table = audit_trials(trials, STEPS), rung_table(lineages_of(trials), STEPS)
    drawn = fidelity_figure(audit, table)
    assert drawn is not None
    for rung in audit.rungs:
        assert f"tau {rung.tau:.2f}, 20 recipes (holds)" in drawn.caption
    single = trials_of(np.full((4, 3), np.nan))
    assert fidelity_figure(audit_trials(single, STEPS), rung_table(lineages_of(single), STEPS)) is None
