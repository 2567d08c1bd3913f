"""Ensembles: the mean of logits, and a folder that is refused where its bundles are not the ones it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcam_automl.calibration import Calibration, probs_at
from pcam_automl.ensemble import Blended, is_ensemble, member_folder, open_judge, write_ensemble
from pcam_automl.errors import BundleError
from pcam_automl.predict import image_probs, row_probs

CPU = torch.device("cpu")
FITTED = Calibration(1.7, 100, "100 patches", (0.3, 0.2), (0.05, 0.01))


class Constant:
    """A member whose logits are one number, and whose own temperature must not matter."""

    temperature = 9.0

    def __init__(self, logit: float) -> None:
        self.logit = logit

    def row_logits(self, patches: Any, rows: np.ndarray, stop: Any, progress: Any) -> np.ndarray:
        stop()
        progress(len(rows))
        return np.full(len(rows), self.logit, np.float32)

    def image_logits(self, images: np.ndarray) -> np.ndarray:
        return np.full(len(images), self.logit, np.float32)


def test_probabilities_are_of_the_weighted_mean_of_logits_at_the_temperature() -> None:
    blended, shown = Blended((Constant(2.0), Constant(-1.0)), (0.75, 0.25), 2.0), list[int]()
    probs = row_probs(blended, None, np.arange(3), progress=shown.append)  # type: ignore[arg-type]
    assert probs == pytest.approx(probs_at(np.full(3, 1.25), 2.0))
    assert image_probs(blended, np.zeros((2, 8, 8, 3), np.uint8)) == pytest.approx(probs[:2])
    assert sum(shown) == 6


def written(root: Path) -> dict[str, Any]:
    for number in range(2):
        member_folder(root, number).mkdir(parents=True)
        (member_folder(root, number) / "bundle.json").write_text(json.dumps({"weights_sha256": f"sum {number}"}))
    write_ensemble(root, (0.6, 0.4), FITTED, {"chosen": "by hand"})
    return dict(json.loads((root / "ensemble.json").read_text()))


def test_the_card_names_its_bundles_by_their_weights(tmp_path: Path) -> None:
    assert not is_ensemble(tmp_path)
    card = written(tmp_path)
    assert is_ensemble(tmp_path)
    assert [(m["folder"], m["weight"], m["weights_sha256"]) for m in card["members"]] == [
        ("model", 0.6, "sum 0"),
        ("model-2", 0.4, "sum 1"),
    ]
    assert Calibration.from_json(card["calibration"]) == FITTED
    assert card["chosen"] == "by hand"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "other"}, "has format 'other', this version reads"),
        ({"members": []}, "weights must be positive and sum to 1"),
        ({"calibration": {"temperature": 0.0}}, "not a complete ensemble"),
        ({"members": [{"folder": "model", "weight": 0.5, "weights_sha256": "sum 0"}]}, "sum to 1, got"),
        ({"members": [{"folder": "model", "weight": 1.0, "weights_sha256": "x"}]}, "other bundles than lie in model"),
        (
            {"members": [{"folder": "../model", "weight": 1.0, "weights_sha256": "x"}]},
            "other bundles than lie in model",
        ),
        ({"members": "model"}, "not a complete ensemble"),
    ],
)
def test_a_card_at_fault_is_one_line(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    card = written(tmp_path)
    (tmp_path / "ensemble.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(BundleError, match=fault):
        open_judge(tmp_path, CPU)
