"""The page: sections from tiny contents, what is left out, numbers, self-containedness, a real browser."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from report_content import RECIPE, bundle_of, epochs_of, full_content, scores_of, study_of

from pcam_automl.data.store import open_store
from pcam_automl.errors import DataError, InputError
from pcam_automl.metrics import accuracy, auc, auc_interval, confusion, log_loss
from pcam_automl.predict import build_predictor
from pcam_automl.report import examples
from pcam_automl.report.blocks import Picture, Section, Table, Text
from pcam_automl.report.content import RateCurve, ReportContent
from pcam_automl.report.examples import example_section
from pcam_automl.report.page import MARKER, Written, build_sections, summary, write_report
from pcam_automl.training.compute import Compute

SECTIONS = ["scores", "examples", "data", "search", "network", "training", "recipe"]


def pictures_of(sections: list[Section]) -> set[str]:
    return {block.name for section in sections for block in section.blocks if isinstance(block, Picture)}


def left_out_of(sections: list[Section]) -> dict[str, list[str]]:
    return {s.anchor: [b.text for b in s.blocks if isinstance(b, Text) and b.style == "aside"] for s in sections}


@pytest.fixture(scope="module")
def full(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The page of everything, which takes seconds to draw."""
    content, bundle = full_content(easy_pack), bundle_of()
    content = replace(
        content,
        lr_curve=RateCurve(np.arange(9), np.linspace(1, 0, 9)),
        stages=(("stage 1", content.scores),),  # type: ignore[arg-type]
        threshold=0.3,
    )
    folder = tmp_path_factory.mktemp("full")
    return write_report(content, folder, predictor=build_predictor(bundle, Compute("cpu")))


def test_full_page_holds_every_section_and_its_pictures_beside_it(full: Written) -> None:
    text = full.page.read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert re.findall(r'href="#(\w+)"', text) == SECTIONS
    beside = sorted(p.name for p in (full.page.parent / "report").iterdir() if p.name != MARKER)
    assert beside == sorted(p.name for p in full.pictures)
    inside = [base64.b64decode(uri) for uri in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert inside == [p.read_bytes() for p in full.pictures]
    names = {p.stem for p in full.pictures}
    assert names >= {"roc", "precision_recall", "confusion", "confusion_stage_1", "calibration", "auc_domains"}
    assert names >= {"classes", "samples_tumour", "samples_no_tumour", "augmented", "batch", "slides", "brightness"}
    assert names >= {"search_history", "search_parallel", "search_crop", "search_backbones"}
    assert names >= {"training_curves", "learning_rate", "most_wrong", "most_right", "random"}
    assert len(text) < 6e6
    assert "attention lies in the centre" in text


def test_page_fetches_nothing_and_describes_every_picture(full: Written) -> None:
    text = full.page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href|action)=[\"'](?!data:image/png|#)", text)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", text)
    alts = re.findall(r'<img src="[^"]*" alt="([^"]*)"', text)
    assert len(alts) == text.count("<img")
    assert all(len(alt) > 10 for alt in alts)


def test_figures_on_the_page_are_those_of_the_metrics(full: Written, easy_pack: Path) -> None:
    store = open_store(easy_pack)
    scores = scores_of(store)
    text = html.unescape(full.page.read_text(encoding="utf-8"))
    low, high = auc_interval(scores.label, scores.prob, np.asarray(store.group)[scores.rows])
    counts = confusion(scores.label, scores.prob, 0.3)
    assert f"<dd>{auc(scores.label, scores.prob):.4f}</dd>" in text
    assert f"AUC (95 %: {low:.4f} to {high:.4f}, drawn over " in text
    assert f"{100 * accuracy(scores.label, scores.prob, 0.3):.1f} %" in text
    assert f"<dd>{log_loss(scores.label, scores.prob):.4f}</dd>" in text
    assert f"{counts.false_negative} false negative, {counts.true_positive} true positive" in text


def test_report_of_data_alone_says_what_is_missing(easy_pack: Path) -> None:
    sections = build_sections(ReportContent("data", store=open_store(easy_pack)))
    assert {"classes.png", "samples_tumour.png", "slides.png"} <= pictures_of(sections)
    assert not {"roc.png", "augmented.png", "search_history.png", "most_wrong.png"} & pictures_of(sections)
    missing = left_out_of(sections)
    for anchor in SECTIONS:
        assert missing[anchor], anchor
        assert all(line.startswith("Left out: ") and line.endswith((".", ":")) for line in missing[anchor])


def test_report_of_a_study_alone(easy_pack: Path) -> None:
    sections = build_sections(ReportContent("search", study=study_of()))
    expected = {"search_history.png", "search_parallel.png", "search_crop.png", "search_backbones.png"}
    assert pictures_of(sections) == expected
    assert any("no pack" in line for line in left_out_of(sections)["data"])


def test_the_summary_says_what_the_network_is_shown_and_counts_one_trial_as_one() -> None:
    study = study_of()
    lone = optuna.create_study()
    lone.add_trial(study.get_trials()[0])
    shrunk = RECIPE.model_copy(update={"crop_size": 96, "input_size": 64})
    facts = dict(fact[::-1] for fact in summary(ReportContent("x", recipe=shrunk, study=lone)).facts)
    assert facts["sees the centre 96 px, resized to 64"] == shrunk.backbone
    assert facts["trial of the search"] == "1"
    whole = RECIPE.model_copy(update={"crop_size": 96, "input_size": None})
    facts = dict(fact[::-1] for fact in summary(ReportContent("x", recipe=whole, study=study)).facts)
    assert facts["sees the centre 96 px"] == whole.backbone
    assert facts["trials of the search"] == f"{len(study.get_trials())}"


def test_report_of_a_training_alone() -> None:
    sections = build_sections(ReportContent("training", recipe=RECIPE, epochs=epochs_of()))
    assert pictures_of(sections) == {"training_curves.png", "learning_rate.png"}
    table = next(b for s in sections if s.anchor == "training" for b in s.blocks if isinstance(b, Table))
    assert table.header[:2] == ("epoch", "views")
    assert "Dice" not in table.header
    assert table.rows[1][2:5] == ("0.5700", "0.6000", "0.7000")


def test_a_training_by_the_clock_has_parts_and_says_what_it_saw() -> None:
    bundle = bundle_of()
    bundle = replace(bundle, provenance={**bundle.provenance, "by_clock": True, "views_seen": 12_345})
    sections = build_sections(ReportContent("t", bundle=bundle, epochs=epochs_of()))
    table = next(b for s in sections if s.anchor == "training" for b in s.blocks if isinstance(b, Table))
    assert table.header[0] == "part"
    words = [b.text for s in sections if s.anchor == "recipe" for b in s.blocks if isinstance(b, Text)]
    assert any("trained for the time that its budget left, 12,345 images" in text for text in words)


def test_scores_of_one_label_have_no_curves_but_a_confusion_matrix(easy_pack: Path) -> None:
    store = open_store(easy_pack)
    scores = scores_of(store)
    own = scores.label == 1
    ones = replace(scores, rows=scores.rows[own], label=scores.label[own], prob=scores.prob[own])
    sections = build_sections(ReportContent("t", store=store, scores=ones))
    assert "confusion.png" in pictures_of(sections)
    assert "roc.png" not in pictures_of(sections)
    assert any("same label" in line for line in left_out_of(sections)["scores"])


def test_strips_of_a_dense_run_are_shown_as_they_are(tmp_path: Path) -> None:
    strip = np.random.default_rng(0).integers(0, 255, (32, 128, 3)).astype(np.uint8)
    content = ReportContent("t", epochs=epochs_of(), strips=(("original, truth, epoch 1", strip),))
    written = write_report(content, tmp_path)
    again = ReportContent("t", epochs=epochs_of(), strips=(("from a file", tmp_path / "report" / "strip_1.png"),))
    copied = write_report(again, tmp_path / "again")
    assert (tmp_path / "again/report/strip_1.png").read_bytes() == (tmp_path / "report/strip_1.png").read_bytes()
    assert len(written.pictures) == len(copied.pictures)


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    page = write_report(ReportContent("<b>a&b</b>", reproduce=("echo '<script>'",)), tmp_path).page
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;b&gt;a&amp;b&lt;/b&gt;" in text


@pytest.mark.browser
def test_browser_draws_the_page_without_complaint(easy_pack: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = write_report(full_content(easy_pack), tmp_path).page
    shot = tmp_path / "shot.png"
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --window-size=1280,3000"
    done = subprocess.run(
        [chromium, *options.split(), f"--user-data-dir={tmp_path / 'chr'}", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "Refused to load" not in done.stderr
    assert shot.stat().st_size > 50_000


@pytest.mark.parametrize("name", ["notes.txt", "photo.png"])
def test_pictures_never_replace_a_folder_of_another_hand(tmp_path: Path, name: str) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / name).write_text("mine")
    with pytest.raises(DataError, match=rf"report is where a report's pictures go.*{name}.*rename it"):
        write_report(ReportContent("t", epochs=epochs_of()), tmp_path)
    assert (tmp_path / "report" / name).read_text() == "mine"
    assert not (tmp_path / "report.html").exists()


def test_a_new_report_replaces_the_pictures_of_an_older_one_but_not_what_was_added(tmp_path: Path) -> None:
    write_report(ReportContent("t", study=study_of()), tmp_path)
    written = write_report(ReportContent("t", epochs=epochs_of()), tmp_path)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {p.name for p in written.pictures} | {MARKER}
    (tmp_path / "report" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match=r"letter\.txt"):
        write_report(ReportContent("t", epochs=epochs_of()), tmp_path)


@pytest.mark.slow
def test_maps_of_a_trials_scores_are_said_to_be_of_a_network_trained_since(easy_pack: Path) -> None:
    content, predictor = full_content(easy_pack), build_predictor(bundle_of(), Compute("cpu"))
    for before in (False, True):
        sections = build_sections(replace(content, scores_before=before), predictor=predictor)
        texts = " ".join(b.text for s in sections for b in s.blocks if isinstance(b, Text))
        assert ("has since trained on them" in texts) == before


def test_a_network_without_a_map_of_positions_still_shows_its_patches(
    easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise InputError("Grad-CAM needs a square map of tokens, Odd has 7")

    monkeypatch.setattr(examples, "explain_patches", refuses)
    section = example_section(full_content(easy_pack), build_predictor(bundle_of(), Compute("cpu")), lambda _: None)
    assert left_out_of([section])["examples"] == ["Left out: Grad-CAM needs a square map of tokens, Odd has 7."]
    assert pictures_of([section]) == {"most_wrong.png", "most_right.png", "random.png"}
