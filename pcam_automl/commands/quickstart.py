"""`quickstart`: synth, prepare, search, finalize, score, in one folder. The same functions as the single commands."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from pcam_automl import terminal
from pcam_automl.commands.data import run_prepare, run_synth
from pcam_automl.commands.models import finalize_study
from pcam_automl.commands.score import run_score
from pcam_automl.commands.search import run_search
from pcam_automl.data.tables import read_ids
from pcam_automl.errors import SearchFailed
from pcam_automl.finalizing.result import FinalOptions
from pcam_automl.search.study import Asked

N_SLIDES = 24
LEAST_AUC = 0.90
STUDY = "quickstart"
FINAL_EPOCHS = 5.0
VIEWS = 14_000
SEARCH_S = 100.0
"""No trial begins after that: a machine without bf16 would take six minutes for all eight; the same command goes on."""
CROP_PX = 48
"""Fixed, not planned from the speed: below about 10,000 no network gets going on this set, however busy the machine is."""


def run_quickstart(out: Path, *, n_patches: int, n_trials: int, seed: int, device: str) -> None:
    """Everything that a user does with real data, on a synthetic set; asserts a test AUC of at least 0.90.

    Raises:
        SearchFailed: the test AUC is lower.
    """
    began = time.monotonic()
    raw, pack, url = out / "synthetic", out / "pack", f"sqlite:///{out / 'study.db'}"
    if (raw / "train_labels.csv").exists():
        n_held = sum(len(read_ids(raw / name)) for name in ("train_labels.csv", "test_labels.csv"))
        _step(1, f"synth: the {n_held:,} patches that an earlier run has drawn")
    else:
        _step(1, f"synth: {n_patches:,} H&E-like patches of {N_SLIDES} slides and two scanners")
        run_synth(raw, n_patches=n_patches, n_slides=N_SLIDES, seed=seed)
    _step(2, "prepare: check and pack them")
    run_prepare(raw, pack, groups=None, domains=None, sample=None, keep_outliers=False, check=False, as_json=False)
    _step(3, f"search: {n_trials} trials, from scratch, validated on slides that training does not see")
    pins = {"crop_size": CROP_PX}  # half the cost of 64 px
    asked = Asked(data=pack, space="quick", pins=pins, weights="none", views=VIEWS, seed=seed, device=device)
    run_search(STUDY, url, asked, n_trials=n_trials, timeout_s=SEARCH_S, as_json=False)
    _step(4, "finalize: retrain the best trial on all the data, predict the test slides")
    final = finalize_study(
        STUDY,
        url,
        which="best",
        data=None,
        out=None,
        threshold=None,
        epochs=FINAL_EPOCHS,
        device=device,
        as_json=False,
        options=FinalOptions(confirm=0),  # three more trainings would not fit the six minutes
    )
    _step(5, "score: the submission against the test labels, which nothing has read so far")
    assert final.submission is not None
    score = run_score(
        final.submission, raw / "test_labels.csv", groups=raw / "test_groups.csv", threshold=0.5, as_json=False
    )
    terminal.result(f"submission: {final.submission}")
    terminal.result(f"dashboard:  pcam-automl dashboard --storage {shlex.quote(url)}")
    terminal.say(f"done in {terminal.duration(time.monotonic() - began)}")
    if score < LEAST_AUC:
        raise SearchFailed(
            f"quickstart: test AUC {score:.4f} is below {LEAST_AUC}; please report this with the output above"
        )


def _step(number: int, text: str) -> None:
    terminal.err.rule(f"[bold]{number}/5[/bold] {text}", align="left")
