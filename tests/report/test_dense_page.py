"""The page of a dense task: pixels and images by their names, the baseline, intervals over images; what finalize keeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_content import RECIPE, bundle_of, epochs_of, scores_of, study_of

from pcam_automl.commands.final_card import final_card, holdout_scores, maps_of, maps_on_test
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError
from pcam_automl.metrics import accuracy, auc_interval, dice
from pcam_automl.recipe import Recipe
from pcam_automl.report.blocks import Code, Facts, Picture, Section, Table, Text
from pcam_automl.report.content import IMAGE, MapFigures, ReportContent, clusters_of
from pcam_automl.report.data_figures import augmented_sheet, boxed, data_section
from pcam_automl.report.group_figures import group_aucs, group_blocks
from pcam_automl.report.page import build_sections, summary
from pcam_automl.report.score_figures import score_section
from pcam_automl.scores import Scores, write_scores

DENSE = Recipe(task="dense", backbone="dense_linear", tile_size=96)
N_PIXELS = 40


def pixels_of(store: PatchStore) -> Scores:
    """Forty pixels of every development image; those of one image err together."""
    rows = np.repeat(store.development_rows(), N_PIXELS)
    rng = np.random.default_rng(0)
    share = np.repeat(rng.choice([0.02, 0.5], len(rows) // N_PIXELS), N_PIXELS)
    label = (rng.random(len(rows)) < share).astype(np.int64)
    shift = np.repeat(rng.normal(0, 0.25, len(rows) // N_PIXELS), N_PIXELS)
    prob = (0.25 + 0.2 * label + shift + rng.normal(0, 0.02, len(rows))).clip(0, 1)
    return Scores(rows, label, prob, f"{len(rows):,} px of {len(rows) // N_PIXELS} validation images")


def dense_content(pack: Path) -> ReportContent:
    store = open_store(pack)
    epochs = tuple(replace(epoch, dice=0.1, accuracy=0.8) for epoch in epochs_of())
    return ReportContent(
        "maps",
        store=store,
        split=make_split(store),
        recipe=DENSE,
        scores=pixels_of(store),
        epochs=epochs,
        study=study_of(),
    )


def words_of(sections: list[Section]) -> list[str]:
    """Every sentence, heading, cell and alternative text but the code to copy."""
    found: list[str] = []
    for section in sections:
        found.append(section.title)
        for block in section.blocks:
            match block:
                case Text():
                    found.append(block.text)
                case Picture():
                    found += [block.alt, block.caption]
                case Table():
                    found += [block.caption, *block.header]
                case Facts():
                    found += [name for _, name in block.facts]
                case Code():
                    pass
    return found


def test_a_dense_page_speaks_of_images_and_pixels_never_of_patches(easy_pack: Path) -> None:
    words = words_of(build_sections(dense_content(easy_pack)))
    assert [text for text in words if re.search("patch", text, re.IGNORECASE)] == []
    assert not any("box in the centre" in text or "to the one number" in text for text in words)
    assert any("tumour pixels missed" in text for text in words)
    of_patches = replace(dense_content(easy_pack), recipe=RECIPE)
    assert any("patch" in text for text in words_of([score_section(of_patches), data_section(of_patches)]))


def test_dice_and_accuracy_stand_beside_the_always_negative_baseline(easy_pack: Path) -> None:
    content = dense_content(easy_pack)
    scores = content.scores
    assert scores is not None
    own = content.on_maps
    assert own is not None
    assert (own.dice, own.accuracy) == (dice(scores.label, scores.prob), accuracy(scores.label, scores.prob))
    assert own.always_negative == pytest.approx(1 - scores.label.mean())
    whole = MapFigures("every pixel", 0.4321, 0.9461, 0.9482)
    of_section = next(b for b in score_section(replace(content, maps=whole)).blocks if isinstance(b, Facts))
    for facts in (summary(replace(content, maps=whole)), of_section):
        values = [value for value, _ in facts.facts]
        place = values.index("0.4321")
        assert values[place + 1 : place + 3] == ["94.6 %", "94.8 %"]
    assert replace(content, maps=whole, threshold=0.3).on_maps != whole  # it was measured at 0.5
    assert replace(content, recipe=RECIPE).on_maps is None


def test_test_images_with_masks_have_their_own_figures(easy_pack: Path) -> None:
    figures = {"n": 7, "dice": 0.25, "accuracy": 0.9, "always_negative_accuracy": 0.8, "auc": 0.7, "loss": 0.3}
    maps = maps_on_test({"test": figures})
    words = words_of([score_section(replace(dense_content(easy_pack), test_maps=maps))])
    assert any("the 7 test images that came with masks" in text for text in words)
    assert maps_on_test({"test": None}) is None
    caveat = ", of which 2 are of slides that were trained on: too high"
    told = maps_on_test({"test": figures, "test_caveat": caveat})
    assert told is not None
    assert told.on.endswith("the 7 test images that came with masks" + caveat)


def test_intervals_of_slides_are_over_images_and_the_number_is_of_images(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    scores = pixels_of(store)
    slide = np.asarray(store.group)[scores.rows].astype(np.int64)
    found = group_aucs(scores, slide, store.group_names, scores.rows)
    assert found
    for group in found:
        own = slide == store.group_names.index(group.name)
        assert group.n == own.sum() // N_PIXELS
        assert group.interval == auc_interval(scores.label[own], scores.prob[own], scores.rows[own])
        low, high = auc_interval(scores.label[own], scores.prob[own])  # over pixels, as if they were independent
        assert group.interval[1] - group.interval[0] > 1.5 * (high - low)
    picture = next(b for b in group_blocks(store, scores, IMAGE) if isinstance(b, Picture) and "slides" in b.name)
    assert "number of images in brackets" in picture.caption
    assert "drawn over the slide's images" in picture.caption


def test_a_group_of_one_slide_has_no_interval() -> None:
    label, prob = np.arange(40) % 2, np.linspace(0, 1, 40)
    scores = Scores(np.arange(40), label, prob, "here")
    (group,) = group_aucs(scores, np.zeros(40, np.int64), ("scanner",), np.zeros(40, np.int64))
    assert group.interval is None
    assert group.n == 40


def test_pixels_of_an_image_without_a_slide_are_one_cluster(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    scores = Scores(np.repeat([0, 1], 3), np.array([0, 1, 0, 1, 0, 1]), np.linspace(0, 1, 6), "here")
    assert clusters_of(None, scores).tolist() == [0, 0, 0, 1, 1, 1]
    unknown = replace(store, group=np.full(len(store), -1, np.int32))
    assert len(np.unique(clusters_of(unknown, scores))) == 2


def test_an_image_has_its_masks_outline_and_no_box(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    mask = np.zeros((len(store), 96, 96), np.uint8)
    mask[:, 20:40, 20:40] = 1
    store = replace(store, masks=mask)
    plain, shown = np.array(store.patches[0]), boxed(store, 0, IMAGE)
    changed = (plain != shown).any(axis=2)
    assert changed[20, 20:40].all()
    assert not changed[41:].any()
    assert (boxed(store, 0) != shown).any()


def test_a_recipe_that_changes_nothing_shows_one_view(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    still = augmented_sheet(store, RECIPE.model_copy(update={"augment": 0.0}))
    moving = augmented_sheet(store, RECIPE.model_copy(update={"augment": 0.5}))
    assert isinstance(still, Picture)
    assert isinstance(moving, Picture)
    assert still.width_px < moving.width_px / 2
    assert "every time it is shown, the patch looks the same" in still.caption


def test_figures_of_finalize_are_read_beside_its_own_bundle_alone(easy_pack: Path, tmp_path: Path) -> None:
    store, bundle = open_store(easy_pack), bundle_of()
    folder = tmp_path / "model"
    assert final_card(folder, bundle) == {}
    card = {"recipe": bundle.recipe.model_dump(mode="json"), "auc_on": "pixels of 3 holdout images", "auc": 0.9}
    card |= {"dice": 0.5, "accuracy": 0.9, "always_negative_accuracy": 0.8}
    (tmp_path / "submission.json").write_text(json.dumps(card))
    write_scores(tmp_path / "scores.csv", scores_of(store), store.ids)
    found = final_card(folder, bundle)
    assert found == card
    assert maps_of(bundle, found) == MapFigures("pixels of 3 holdout images", 0.5, 0.9, 0.8, 0.9)
    kept = holdout_scores(folder, found, store)
    assert kept is not None
    assert kept.rows.tolist() == scores_of(store).rows.tolist()
    other = replace(bundle, recipe=RECIPE.model_copy(update={"crop_size": 48}))
    assert final_card(folder, other) == {}  # a finalize that was cut off: the figures are of an older model
    assert holdout_scores(folder, {}, store) is None
    (tmp_path / "submission.json").write_text("{")
    with pytest.raises(DataError, match=r"submission\.json cannot be read.*finalize"):
        final_card(folder, bundle)
