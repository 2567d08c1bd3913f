"""What `finalize` left beside a bundle, read back for a report. Draws nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pcam_automl.bundle import ModelBundle
from pcam_automl.commands.status import of_one_training
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError
from pcam_automl.finalizing.patches import OOF
from pcam_automl.operating import Operating
from pcam_automl.report.content import FinalFigures, MapFigures
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, read_scores


def final_card(folder: Path, bundle: ModelBundle) -> dict[str, Any]:
    """What `finalize` wrote of this bundle into ``submission.json`` beside it; empty where it wrote none, or of another one."""
    file = folder.parent / "submission.json"
    if not file.is_file():
        return {}
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise DataError(
            f"{file} cannot be read ({str(fault)[:120]}); `pcam-automl finalize` of its study writes it anew"
        ) from None
    same = isinstance(card, dict) and card.get("recipe") == bundle.recipe.model_dump(mode="json")
    return card if same and of_one_training(card, bundle.provenance) else {}


def holdout_scores(folder: Path, card: dict[str, Any], store: PatchStore) -> Scores | None:
    """Those of the holdout or the slides kept back, which `finalize` keeps beside the bundle; None where there are neither."""
    file = folder.parent / SCORES
    if not card or not card.get("n_held", 1):  # cards of before it was noted: the file says it
        return None
    return read_scores(file, store.ids, store.part) if file.is_file() else None


def out_of_fold_scores(folder: Path, card: dict[str, Any], store: PatchStore) -> Scores | None:
    """Those of the confirmations that chose the bundle, which `finalize` keeps beside it; None where there are none."""
    file = folder.parent / OOF
    return read_scores(file, store.ids, store.part) if card.get("oof_auc") is not None and file.is_file() else None


def final_figures(card: dict[str, Any]) -> FinalFigures:
    """What `finalize` measured beside the scores; empty for a bundle of before it did.

    Raises:
        DataError: the card was changed by another hand.
    """
    try:
        return FinalFigures(
            tuple(Operating.from_json(one) for one in card.get("operating", ())),
            tuple(card.get("confirmed") or ()),
            card.get("mean_drop"),
            tuple(_final_notes(card)),
            tuple(card.get("compare", ())),
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(
            f"submission.json holds other figures than `pcam-automl finalize` writes ({type(fault).__name__}: {fault}); run it again"
        ) from None


def _final_notes(card: dict[str, Any]) -> list[str]:
    """The blend's judgement and what the temperature changed, a sentence each."""
    notes = []
    if tie := card.get("tie"):
        notes.append(f"Trial {card['members'][0]} is taken: {tie}.")
    if blend := card.get("ensemble"):
        parts = zip(card["weights"], card["members"], strict=True)
        shares = " + ".join(f"{weight:.2f} x trial {number}" for weight, number in parts)
        notes.append(f"{f'Together judge {shares}' if blend['used'] else 'One network judges'}: {blend['why']}.")
    if fitted := card.get("calibration"):
        (loss, loss_after), (error, error_after) = fitted["log_loss"], fitted["error"]
        text = (
            f"Logits are divided by {fitted['temperature']:.2f}, which was fitted to {fitted['on']}: log-loss {loss:.4f} -> "
            f"{loss_after:.4f}, mean error of the probabilities {100 * error:.1f} % -> {100 * error_after:.1f} %. "
            + (
                "It was judged where it was fitted, which flatters it a little"
                if "kept back" in fitted["on"]
                else "It belongs to the recipe, not to these weights, which were trained longer and on more"
            )
        )
        if held := card.get("calibration_on_holdout"):
            text += (
                f"; on the slides that judge the network log-loss {held['log_loss'][0]:.4f} -> {held['log_loss'][1]:.4f}, "
                f"mean error {100 * held['error'][0]:.1f} % -> {100 * held['error'][1]:.1f} %"
            )
        notes.append(f"{text}.")
    return notes


def maps_of(bundle: ModelBundle, card: dict[str, Any]) -> MapFigures | None:
    """Dice and accuracy over every pixel of the validation images, of a final network those of the holdout."""
    known = card if "dice" in card else bundle.metrics
    if not {"dice", "accuracy", "always_negative_accuracy"} <= set(known):
        return None
    return MapFigures(
        str(known["auc_on"]), known["dice"], known["accuracy"], known["always_negative_accuracy"], known["auc"]
    )


def maps_on_test(card: dict[str, Any]) -> MapFigures | None:
    """The same of the test images that came with masks."""
    if not (test := card.get("test")):
        return None
    on = f"every pixel of the {test['n']:,} test images that came with masks{card.get('test_caveat', '')}"
    return MapFigures(on, test["dice"], test["accuracy"], test["always_negative_accuracy"], test["auc"])
