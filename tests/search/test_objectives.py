"""Studies that optimise something else than the AUC, or whose validation fold is a domain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from test_search import opened_in, search

from pcam_automl.commands.report import search_options
from pcam_automl.commands.status import finished_line
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError, InputError, StudyError
from pcam_automl.finalizing.choice import choose_trial
from pcam_automl.goals import goal_of
from pcam_automl.metrics import log_loss, worst_domain_auc
from pcam_automl.report.content import ReportContent
from pcam_automl.report.search_figures import search_section
from pcam_automl.scores import read_scores
from pcam_automl.search.asking import check_options
from pcam_automl.search.domains import DOMAINS, check_domains, choose_domains
from pcam_automl.search.reading import best_of
from pcam_automl.search.study import Asked
from pcam_automl.search.summary import summarise


def test_a_study_of_the_log_loss_goes_down(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, objective="log_loss", views=64, pruner="none"))
    search(opened, 2)
    goal, trials = opened.settings.goal, opened.study.get_trials()
    assert opened.study.direction.name == "MINIMIZE"
    assert opened.study.metric_names == ["validation log-loss (nats)"]
    for trial in trials:
        scores = read_scores(opened.folder / "trials" / str(trial.number) / "scores.csv", opened.store.ids)
        assert trial.value == pytest.approx(log_loss(scores.label, scores.prob), rel=1e-5)
        assert trial.intermediate_values == {rung["views"]: rung["loss"] for rung in trial.user_attrs["rungs"]}
        assert trial.user_attrs["figures"]["auc"] == trial.user_attrs["rungs"][-1]["auc"]
        assert trial.user_attrs["latency_ms"] > 0
    best = min(trials, key=lambda t: t.value or 0.0)
    assert best_of(trials, goal) == choose_trial(opened.study, "best") == opened.study.best_trial == best
    summary = summarise(opened.study, opened.settings).best
    assert summary is not None
    assert (summary["value"], summary["auc"]) == (best.value, best.user_attrs["figures"]["auc"])
    assert f"log-loss {trials[1].value:.4f}" in finished_line(trials[1], best, goal)
    assert "--objective log_loss" in " ".join(search_options(opened.settings))
    words = str(search_section(ReportContent("t", study=opened.study, study_settings=opened.settings)))
    assert "best validation log-loss (nats)" in words
    assert "AUC" not in words
    with pytest.raises(StudyError, match="--objective is 'auc', the study has 'log_loss'"):
        opened_in(tmp_path, Asked(objective="auc"))


def test_the_latency_of_a_network_is_measured_once(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []
    monkeypatch.setattr("pcam_automl.search.objective.latency_ms", lambda *_: timed.append(1) or 7.0 + len(timed))
    opened = opened_in(tmp_path, replace(asked, views=32, pruner="none"))
    search(opened, 4)
    seen = {(t.params["backbone"], t.user_attrs["latency_ms"]) for t in opened.study.get_trials()}
    assert len(seen) == len(timed) == len({backbone for backbone, _ in seen}) == 2


def test_a_study_of_the_worst_domain_reports_it_at_every_rung(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, objective="worst_domain_auc", views=64))
    search(opened, 1)
    (trial,) = opened.study.get_trials()
    scores = read_scores(opened.folder / "trials" / "0" / "scores.csv", opened.store.ids)
    expected = worst_domain_auc(scores.label, scores.prob, np.asarray(opened.store.domain)[scores.rows])
    assert trial.value == pytest.approx(expected)
    assert list(trial.intermediate_values.values()) == [r["worst_domain_auc"] for r in trial.user_attrs["rungs"]]
    assert opened.settings.domains_hash is None


def test_a_split_by_domains_validates_on_one_of_them(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, split_by="domains", views=64))
    domain = np.asarray(opened.store.domain)
    assert [len(np.unique(domain[rows])) for rows in (opened.split.score_rows(0), opened.split.train_order(0))] == [
        1,
        1,
    ]
    assert "--split domains" in " ".join(search_options(opened.settings))
    (opened.folder / "split.npz").unlink()
    assert opened_in(tmp_path, Asked(split_by="domains")).split.hash == opened.split.hash
    with pytest.raises(StudyError, match="--split is 'slides', the study has 'domains'"):
        opened_in(tmp_path, Asked(split_by="slides"))


def test_estimated_domains_belong_to_the_study(tmp_path: Path, asked: Asked) -> None:
    """The easy set has one stain: that is found, kept, bound to the split and made again where its file is gone."""
    opened = opened_in(tmp_path, replace(asked, estimate_domains=True, views=64))
    assert opened.store.domain_names == ("stain 1",)
    assert open_store(opened.store.root).domain_names == ("scanner0", "scanner1")
    assert opened.split.domains == opened.settings.domains_hash
    (opened.folder / DOMAINS).unlink()
    again = opened_in(tmp_path, Asked(estimate_domains=True))
    assert np.array_equal(again.store.domain, opened.store.domain)
    assert (opened.folder / DOMAINS).is_file()
    assert "--domains estimate" in " ".join(search_options(opened.settings))


def test_a_study_of_known_domains_is_not_taken_for_one_of_estimated_ones(tmp_path: Path, asked: Asked) -> None:
    opened_in(tmp_path, replace(asked, views=64))
    with pytest.raises(StudyError, match="--domains is 'estimate', the study has None"):
        opened_in(tmp_path, Asked(estimate_domains=True))


def test_one_stain_leaves_no_worst_domain_and_is_said_before_a_trial(tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(
        DataError, match=r"needs at least 2 domains with 5 patches of either label .* stain 1 \d+ and \d+"
    ):
        opened_in(tmp_path, replace(asked, objective="worst_domain_auc", estimate_domains=True, views=64))


def test_domains_that_are_needed_and_not_known_are_estimated_and_said(easy_pack: Path) -> None:
    said: list[str] = []
    store = open_store(easy_pack)
    unknown = replace(store, domain=np.full(len(store), -1, np.int32), domain_names=())
    goal = goal_of("worst_domain_auc")
    assert choose_domains(store, goal, "slides", estimate=False, seed=0, say=said.append) is None
    assert choose_domains(unknown, goal_of("auc"), "slides", estimate=False, seed=0, say=said.append) is None
    assert said == []
    assert choose_domains(unknown, goal, "slides", estimate=False, seed=0, say=said.append) is not None
    assert said[0].startswith("--objective worst_domain_auc needs domains, the data name none")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(objective="acc"), "--objective must be one of auc, worst_domain_auc, log_loss, got 'acc'"),
        (Asked(split_by="slide"), r"--split must be one of slides, domains, got 'slide' \(did you mean 'slides'\?\)"),
        (Asked(objective="worst_domain_auc", split_by="domains"), "the validation fold is a single one"),
        (Asked(domains=Path("d.csv"), estimate_domains=True), "exclude each other"),
    ],
)
def test_options_that_cannot_be_are_refused_before_data_are_read(asked: Asked, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_options(replace(asked, device="cpu"))


def test_too_few_of_a_label_are_named_with_what_each_domain_holds(easy_pack: Path) -> None:
    from pcam_automl.recipe import Recipe

    store = open_store(easy_pack)
    label, domain = np.asarray(store.label), np.asarray(store.domain)
    rows = np.concatenate(
        [np.flatnonzero((domain == d) & (label == v))[:n] for d, v, n in ((0, 0, 9), (0, 1, 9), (1, 0, 9), (1, 1, 4))]
    )
    with pytest.raises(DataError, match="scanner0 9 and 9, scanner1 4 and 9"):
        check_domains(store, rows, Recipe())
    enough = np.append(rows, np.flatnonzero((domain == 1) & (label == 1))[4])
    assert check_domains(store, enough, Recipe()) == []
    rare = np.where(np.isin(np.arange(len(domain)), enough[:2]), 2, domain)  # two patches of a third scanner
    three = SimpleNamespace(label=label, domain=rare, domain_names=(*store.domain_names[:2], "rare"), masks=None)
    (line,) = check_domains(cast(PatchStore, three), np.append(enough, np.flatnonzero(domain == 0)[-9:]), Recipe())
    assert line.startswith("warning: rare has fewer than 5 patches of a label among the ")


def test_settings_of_earlier_releases_are_of_the_auc_over_slides(tmp_path: Path, asked: Asked) -> None:
    settings = opened_in(tmp_path, replace(asked, views=64)).settings
    fields = json.loads(settings.model_dump_json())
    for name in ("objective", "split_by", "domains_hash"):
        del fields[name]
    assert type(settings).model_validate(fields) == settings
    torch.set_num_threads(1)
