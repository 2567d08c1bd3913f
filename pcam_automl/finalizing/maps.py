"""The ending of a dense task: figures on the holdout, one probability map a test image. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial

from pcam_automl.bundle import load_bundle
from pcam_automl.data.split_groups import slides_caveat, trained_caveat
from pcam_automl.errors import DataError
from pcam_automl.files import write_json
from pcam_automl.finalizing.decision import Decision
from pcam_automl.finalizing.kept_back import FinalRows
from pcam_automl.finalizing.result import FinalResult, FinalWatch
from pcam_automl.metrics import auc_interval
from pcam_automl.predict import compute_of
from pcam_automl.predict_dense import build_map_predictor, figures_on_test, score_maps, write_row_maps
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import clusters_of_rows, write_scores
from pcam_automl.search.reading import auc_of
from pcam_automl.search.study import OpenStudy
from pcam_automl.training.dense import always_negative_accuracy
from pcam_automl.training.start import without_excluded


def finish_maps(
    opened: OpenStudy,
    trial: FrozenTrial,
    decision: Decision,
    rows: FinalRows,
    out: Path,
    *,
    threshold: float | None,
    device: torch.device,
    watch: FinalWatch,
    asked: Mapping[str, str] | None = None,
) -> FinalResult:
    """Predict with ``out/model``; write maps, the scores of ``rows.held`` and provenance. Arguments as of ``finish_patches``."""
    bundle, store = load_bundle(out / "model"), opened.store
    predictor = build_map_predictor(bundle, compute_of(bundle, device))
    held = without_excluded(store, bundle.recipe, rows.held)
    test = store.test_rows()
    pixel_auc, on, scores = auc_of(trial, opened.settings.goal), f"validation pixels of trial {trial.number}", None
    figures: dict[str, Any] = {}
    interval: tuple[float, float] | None = None
    (out / SCORES).unlink(missing_ok=True)  # of an earlier network
    maps: Path | None = None
    notes: list[str] = []
    on_test: dict[str, float | int | None] = {}
    caveat = ""
    if len(test):
        maps = out / "maps"
        watch.predicting(len(test), "test")
        for name in store.ids[test].tolist() if threshold is None else []:
            (maps / f"{name}_mask.png").unlink(missing_ok=True)  # of an earlier network; before any is written
        _, notes = write_row_maps(
            predictor, store, test, maps, threshold=threshold, stop=watch.train.stop, progress=watch.predicted
        )
        on_test, unscored = figures_on_test(predictor, store, stop=watch.train.stop)
        notes = [*notes, *unscored]
        with_masks = test[(np.asarray(store.label)[test] >= 0) & ~np.isin(test, list(store.faults))]
        if on_test and (caveat := trained_caveat(store.group, store.digest, with_masks, rows.train)):
            notes.append(f"figures on the {on_test['n']:,} test images with masks{caveat}")
    if len(held):
        watch.predicting(len(held), rows.name)
        try:
            score, scores = score_maps(predictor, store, held, stop=watch.train.stop)
        except (
            DataError
        ) as fault:  # masks of one value: a new study refuses such a holdout, an older one has trained by now
            notes.append(f"the {rows.name}: not scored, {fault}")
        else:
            what = f"{len(held):,} images kept back" if rows.kept_back else f"{len(held):,} holdout images"
            what += slides_caveat(np.asarray(store.group)[held])
            pixel_auc, on = score.auc, f"pixels of {what}"
            scores = replace(scores, on=f"{len(scores.rows):,} px of {what}")
            write_scores(out / SCORES, scores, store.ids)
            interval = auc_interval(scores.label, scores.prob, clusters_of_rows(store, scores.rows))
            figures = {"dice": score.dice, "accuracy": score.accuracy, "loss": score.loss}
            figures["always_negative_accuracy"] = always_negative_accuracy(store, held)
    provenance = {
        **bundle.provenance,
        **(asked or {}),
        **figures,
        **decision.to_json(),
        "auc": pixel_auc,
        "auc_on": on,
        "auc_95": interval,
        "threshold": threshold,
        "n_test": len(test),
        "n_held": 0 if scores is None else len(held),
        "test": on_test or None,
        "test_caveat": caveat,
    }
    write_json(out / "submission.json", {**provenance, "recipe": bundle.recipe.model_dump(mode="json"), "notes": notes})
    return FinalResult(
        *(out, None, trial.number, pixel_auc, on, interval, 0.0, tuple(notes), scores, maps, on_test),
        dense=figures,
        decision=decision,
    )
