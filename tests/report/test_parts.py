"""Parts of the report: reliability bins, groups, sample choice, the network's table, example choice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import timm
from report_content import scores_of
from scipy.stats import binomtest

from pcam_automl.calibration import reliability
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.metrics import auc, log_loss
from pcam_automl.models.factory import normalisation
from pcam_automl.recipe import Recipe
from pcam_automl.report import rehearsal
from pcam_automl.report.blocks import Picture
from pcam_automl.report.content import SLIDE, ReportContent, losses
from pcam_automl.report.data_figures import batch_sheet, spread_rows
from pcam_automl.report.examples import N_SHOWN, chosen
from pcam_automl.report.group_figures import GroupAuc, forest_figure, group_aucs, group_blocks
from pcam_automl.report.network_table import MOST_ROWS, layer_rows
from pcam_automl.report.score_figures import interval_text
from pcam_automl.scores import Scores


def scores(n: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    return Scores(np.arange(n), label, (0.3 + 0.4 * label + rng.uniform(-0.3, 0.3, n)).clip(0, 1), "here")


def test_reliability_counts_every_patch_once_and_honest_probabilities_have_no_error() -> None:
    prob = np.repeat([0.0, 0.25, 0.75, 1.0], 8)
    label = np.concatenate([np.zeros(8), np.arange(8) < 2, np.arange(8) < 6, np.ones(8)]).astype(np.int64)
    bins = reliability(label, prob)
    assert bins.n.sum() == 32
    assert bins.n_tumour.sum() == label.sum()
    assert bins.error == pytest.approx(0.0)
    assert reliability(1 - label, prob).error > 0.4


def test_the_bounds_of_a_bins_share_are_wilsons() -> None:
    rng = np.random.default_rng(0)
    bins = reliability(rng.integers(0, 2, 60), rng.uniform(0, 0.85, 60))
    for k, n, low, high in zip(bins.n_tumour, bins.n, *bins.share_bounds(), strict=True):
        if n:
            expected = binomtest(int(k), int(n)).proportion_ci(method="wilson")
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        else:
            assert np.isnan(low)


def test_losses_average_to_the_log_loss() -> None:
    own = scores(50)
    assert losses(own).mean() == pytest.approx(log_loss(own.label, own.prob))


def test_group_auc_is_that_of_its_patches_and_the_worst_stands_first() -> None:
    own = scores(120)
    code = np.arange(120) // 2 % 3
    code[:4] = -1
    found = group_aucs(own, code, ("a", "b", "c"), own.rows)
    assert sorted(g.name for g in found) == ["a", "b", "c"]
    assert [g.auc for g in found] == sorted(g.auc for g in found)
    for group in found:
        rows = code == "abc".index(group.name)
        assert group.auc == auc(own.label[rows], own.prob[rows])
        assert group.interval is not None
        assert group.interval[0] <= group.auc <= group.interval[1]


def test_a_domain_with_few_of_a_label_is_not_the_worst_one_by_luck() -> None:
    own = scores(200)
    n, positive = int(own.rows.max()) + 1, own.rows[own.label == 1]
    domain = np.arange(n) // 2 % 2
    domain[positive] = 0
    domain[positive[:4]] = 1  # 4 with tumour beside some 50 without
    store = SimpleNamespace(
        group=np.arange(n) // 5, domain=domain, group_names=tuple(map(str, range(n))), domain_names=("A", "B")
    )
    like = cast("PatchStore", store)
    picture = next(b for b in group_blocks(like, own) if isinstance(b, Picture) and b.name == "auc_domains.png")
    assert "A 0." in picture.alt or "A 1." in picture.alt
    assert "B " not in picture.alt
    domain[positive[4]] = 1
    picture = next(b for b in group_blocks(like, own) if isinstance(b, Picture) and b.name == "auc_domains.png")
    assert "B " in picture.alt


def test_groups_with_one_label_or_few_patches_have_no_auc() -> None:
    own = scores(40)
    assert group_aucs(own, own.label.astype(np.int64), ("a", "b"), own.rows) == []
    assert group_aucs(own, np.arange(40) // 4, tuple(map(str, range(10))), own.rows) == []


def test_samples_come_from_as_many_slides_as_there_are(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    rows = store.development_rows()
    n_slides = len(np.unique(store.group[rows]))
    drawn = spread_rows(store, rows, n_slides)
    assert len(np.unique(store.group[drawn])) == n_slides
    assert (spread_rows(store, rows, n_slides) == drawn).all()


def test_examples_are_ordered_by_loss() -> None:
    own = scores(40)
    loss = losses(own)
    sheets = {name: places for name, _, _, places in chosen(own, 0.5)}
    assert loss[sheets["most_wrong"]].tolist() == sorted(loss, reverse=True)[:N_SHOWN]
    assert loss[sheets["most_right"]].tolist() == sorted(loss)[:N_SHOWN]
    assert len(np.unique(sheets["random"])) == N_SHOWN


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnet18", "densenet121"])
def test_network_table_is_short_and_counts_every_parameter(name: str) -> None:
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} if name == "test_vit" else {}
    network = timm.create_model(name, num_classes=1, **options)
    rows = layer_rows(network, 64)
    assert 4 <= len(rows) <= MOST_ROWS
    assert sum(row.n_parameters for row in rows) == sum(p.numel() for p in network.parameters())


def test_network_table_shows_outputs_in_the_order_of_execution() -> None:
    rows = layer_rows(timm.create_model("resnet18", num_classes=1), 64)
    shapes = {row.name: row.shape for row in rows}
    assert shapes["conv1"] == (64, 32, 32)
    assert shapes["fc"] == (1,)
    assert rows[0].name == "conv1"
    assert rows[-1].name == "fc"


def test_a_batch_without_a_network_yet_is_normalised_as_its_recipe_says(easy_pack: Path) -> None:
    store = open_store(easy_pack)

    def caption(**fields: object) -> str:
        recipe = Recipe(backbone="test_resnet", augment=0.0, **fields)  # type: ignore[arg-type]
        made = batch_sheet(store, recipe, ReportContent("t", store=store, recipe=recipe))
        assert isinstance(made, Picture)
        return made.caption

    def mean(text: str) -> float:
        return float(text.split("mean ")[1].split(",")[0])

    unit, usual = caption(normalise="unit"), caption(normalise="backbone")
    norm = normalisation("test_resnet")
    assert len(set(norm.mean)) == len(set(norm.std)) == 1, "else the means do not carry over so simply"
    assert mean(usual) == pytest.approx((mean(unit) - norm.mean[0]) / norm.std[0], abs=0.03)
    assert abs(mean(caption(normalise="dataset"))) < 1.0


def test_a_group_without_an_interval_says_what_the_draws_are_over() -> None:
    groups = [GroupAuc("a", 20, 0.9, None), GroupAuc("b", 20, 0.9, (0.8, 1.0))]
    assert "has all of a label in a single patch." in forest_figure(groups, "x.png", "slide", "").caption
    assert "in a single slide." in forest_figure(groups, "x.png", "scanner", "", over=SLIDE).caption
    assert "without a bar" not in forest_figure(groups[1:], "x.png", "slide", "").caption


def test_what_an_interval_is_drawn_over_counts_patches_of_no_known_slide_apart(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    held = scores_of(store)
    group = np.asarray(store.group).copy()
    unknown = held.rows[::3]
    group[unknown] = -1
    n_slides = len(np.unique(group[held.rows])) - 1
    partly = SimpleNamespace(group=group, group_names=store.group_names)
    text = interval_text(ReportContent("t", cast(PatchStore, partly)), held)
    assert f"drawn over {n_slides} slides and {len(unknown)} patches of no known slide" in text
    whole = interval_text(ReportContent("t", store), held)
    assert "of no known slide" not in whole


def test_a_report_is_expected_to_take_what_figures_take_here_now(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([9.0, 0.2, 0.1])  # the first one imports and reads fonts; of two the less disturbed counts
    monkeypatch.setattr(rehearsal, "_seconds_of_a_figure", lambda: next(took))
    assert rehearsal.expected_seconds() == pytest.approx(0.1 * rehearsal.FIGURES)
    monkeypatch.undo()
    assert 0.0 < rehearsal._seconds_of_a_figure() < 30.0
