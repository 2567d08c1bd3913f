"""`status --check`: sound studies are sound, and each kind of damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcam_automl.search.slots import Slot, owner_of_this_process
from pcam_automl.search.soundness import check_study
from pcam_automl.training.checkpoint import write_checkpoint

DEAD = f"{owner_of_this_process().partition(':')[0]}:999999999:x"


def row(
    number: int, lineage: str, state: TrialState, steps: list[int], seconds: list[float] | None = None
) -> FrozenTrial:
    attrs: dict[str, Any] = {"lineage": lineage, "rungs": [{"seconds": s} for s in (seconds or steps)]}
    trial = create_trial(
        state=state,
        value=0.9 if state == TrialState.COMPLETE else None,
        intermediate_values=dict.fromkeys(steps, 0.5),
        user_attrs=attrs,
    )
    trial.number = number
    return trial


def slot(number: int, state: Any, lineage: str | None, trial: int | None, owner: str | None = None) -> Slot:
    return Slot(number, state, lineage, trial, owner, 1, 0)


SOUND_TRIALS = [
    row(0, "0", TrialState.FAIL, [1]),
    row(1, "1", TrialState.PRUNED, [1]),
    row(2, "0", TrialState.COMPLETE, [1, 3, 9]),
    row(3, "3", TrialState.RUNNING, []),
]
SOUND_SLOTS = [
    slot(0, "done", "0", 2),
    slot(1, "done", "1", 1),
    slot(2, "claimed", "3", 3, owner_of_this_process()),
    slot(3, "open", None, None),
]


def test_a_sound_study_is_sound(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "1" / "0", parts={"model": {"w": torch.zeros(2)}}, state={"views": 3})
    found = check_study(SOUND_TRIALS, SOUND_SLOTS, tmp_path, total=4)
    assert found.faults == ()
    assert (found.n_lineages, found.n_recomputed, found.n_checkpoints) == (2, 0, 1)


def test_a_thaw_that_was_interrupted_leaves_its_slot_open_and_the_study_sound(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "1" / "0", parts={"model": {"w": torch.zeros(2)}}, state={"views": 3})
    trials = [*SOUND_TRIALS[:3], row(3, "1", TrialState.FAIL, [])]
    slots = [SOUND_SLOTS[0], slot(1, "open", "1", None)]
    assert check_study(trials, slots, tmp_path, total=4).faults == ()
    slots = [slot(0, "open", "0", None), SOUND_SLOTS[1]]
    found = check_study(SOUND_TRIALS[:3], slots, tmp_path, total=4).faults
    assert found == ("lineage 0 is finished and no slot is done for it",), (
        "one that is complete has nothing to go on with"
    )


@pytest.mark.parametrize(
    ("trials", "slots", "fault"),
    [
        ([], [slot(9, "done", "1", 1)], "2 slots hold lineage 1"),
        ([row(4, "4", TrialState.COMPLETE, [1, 3, 9])], [], "lineage 4 is finished and no slot is done for it"),
        ([], [slot(9, "done", None, None)], "slot 9 is done without a trial"),
        ([row(4, "4", TrialState.FAIL, [])], [slot(9, "done", "4", 4)], "slot 9 is done, its trial 4 is fail"),
        ([row(4, "4", TrialState.RUNNING, [])], [slot(9, "claimed", "4", 4, DEAD)], "slot 9 is claimed by a process that is dead"),
        ([row(4, "4", TrialState.RUNNING, [])], [], "trial 4 is running and no slot is claimed for it"),
        ([row(4, "1", TrialState.FAIL, [1, 9]), row(5, "1", TrialState.FAIL, [1, 3])], [], "trial 4 reports steps [1, 9], its lineage 1 has [1, 3, 9]"),
    ],
)  # fmt: skip
def test_each_damage_is_named(trials: list[FrozenTrial], slots: list[Slot], fault: str, tmp_path: Path) -> None:
    found = check_study([*SOUND_TRIALS, *trials], [*SOUND_SLOTS, *slots], tmp_path)
    assert any(fault in line for line in found.faults), found.faults


def test_more_than_was_asked_for_is_a_fault(tmp_path: Path) -> None:
    assert check_study(SOUND_TRIALS, SOUND_SLOTS, tmp_path, total=1).faults == (
        "2 trials are finished, 1 were asked for",
    )


def test_a_row_that_was_killed_while_it_asked_has_some_parameters_only(tmp_path: Path) -> None:
    def asked(number: int, params: dict[str, float]) -> FrozenTrial:
        trial = row(number, "0", TrialState.FAIL, [])
        trial.params = params
        return trial

    rows = [asked(0, {"lr": 0.1}), asked(1, {"lr": 0.1, "wd": 0.2})]
    slots = [slot(0, "open", "0", 1)]
    assert check_study(rows, slots, tmp_path).faults == ()
    (fault,) = check_study([*rows, asked(2, {"lr": 0.1, "wd": 0.3})], slots, tmp_path).faults
    assert fault == "trial 2 has other parameters than its lineage 0 began with"


def test_rungs_that_were_trained_twice_are_counted(tmp_path: Path) -> None:
    again = [
        row(0, "0", TrialState.FAIL, [1, 3], [1.0, 2.0]),
        row(1, "0", TrialState.COMPLETE, [1, 3, 9], [1.0, 2.5, 7.0]),
    ]
    assert check_study(again, [slot(0, "done", "0", 1)], tmp_path).n_recomputed == 1


def test_a_flipped_byte_and_a_folder_of_nobody_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "1" / "0", parts={"model": {"w": torch.zeros(2)}}, state={"views": 3})
    write_checkpoint(tmp_path / "77" / "0", parts={"model": {"w": torch.zeros(2)}}, state={"views": 3})
    file = tmp_path / "1" / "0" / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    faults = check_study(SOUND_TRIALS, SOUND_SLOTS, tmp_path).faults
    assert len(faults) == 2
    assert any("model.safetensors has changed since it was written" in fault for fault in faults)
    assert any("checkpoints of lineage 77, of which there is no trial" in fault for fault in faults)
