"""Searches by a budget: paused trials go on where they stopped, in their own slot, and count once."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from pcam_automl.config import parse_bytes
from pcam_automl.errors import InputError, OutOfTime, StudyError, TrainingDiverged
from pcam_automl.finalize import finalize
from pcam_automl.search import settling
from pcam_automl.search import worker as worker_module
from pcam_automl.search.budget import BudgetClock, ShortSearch, set_budget
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.lineages import lineages_of
from pcam_automl.search.objective import Objective
from pcam_automl.search.paused_folders import keep_within
from pcam_automl.search.promotion import rung_ratio
from pcam_automl.search.pruner import SuccessiveHalving
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.settling import settle_lost
from pcam_automl.search.slots import Slot, Slots, owner_of_this_process
from pcam_automl.search.soundness import check_study
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits, Turn, next_turn, whole_trial_s
from pcam_automl.search.worker import SearchEnd, SlotOfTrial, run_worker
from pcam_automl.training.checkpoint import CheckpointWriter
from pcam_automl.training.fit import branch_share

CPU = torch.device("cpu")


@dataclass
class Told(BudgetClock):
    """A clock that a test sets."""

    left: float = 1e6

    def left_s(self) -> float:
        return self.left


def told(left: float = 1e6) -> Told:
    return Told(100.0, 0.0, time.monotonic(), 0, left=left)


def opened_in(folder: Path, asked: Asked) -> OpenStudy:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    opened = create_or_open_study(
        "tiny", f"sqlite:///{folder / 'studies' / 's.db'}", replace(asked, deterministic=True), say=lambda text: None
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    return opened


def run(opened: OpenStudy, n: int, clock: BudgetClock | None) -> tuple[SearchEnd, int]:
    """How it ended, and the views that were trained."""
    seen: list[int] = []
    objective = Objective(opened, CPU)
    objective.watch.views = seen.append
    return run_worker(objective, Limits(n, clock=clock)), sum(seen)


def test_paused_trials_go_on_until_the_time_is_over_and_nothing_is_trained_twice(tmp_path: Path, asked: Asked) -> None:
    straight = opened_in(tmp_path / "straight", replace(asked, pruner="none"))
    _, views_straight = run(straight, 3, None)
    opened = opened_in(tmp_path / "thawed", asked)
    end, views = run(opened, 3, told())
    assert end == SearchEnd(3, "done")  # nothing is left to thaw
    trials = opened.study.get_trials()
    lineages = lineages_of(trials)
    assert len(trials) > len(lineages) == n_finished_of(opened.study) == 3
    assert views == views_straight
    slots = Slots(engine_of(opened.study), opened.name)
    assert [slot.state for slot in slots.all()] == ["done"] * 3
    for lineage, whole in zip(lineages, straight.study.get_trials(), strict=True):
        assert lineage.last.state == TrialState.COMPLETE
        assert {row.params["lr"] for row in lineage.rows} == {whole.params["lr"]}
        assert lineage.values == whole.intermediate_values  # to the last bit, across the pauses
        thawed_from = [row.user_attrs.get("thawed_from") for row in lineage.rows]
        assert thawed_from == [None, *(row.number for row in lineage.rows[:-1])]
        assert {row.user_attrs["slot"] for row in lineage.rows} == {int(lineage.name)}
    assert list(opened.checkpoints.iterdir()) == [], "a complete lineage never goes on"


@pytest.mark.parametrize("budget", ["ours", "another's", "none"])
def test_a_paused_trial_has_its_newest_checkpoint_on_the_disk_before_its_slot_is_free(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """Else another worker thaws it at once, and trains the rung again or finds half a folder. Where none may, it is not waited for."""
    whole, ends, held = CheckpointWriter.submit, SlotOfTrial.ends, list[bool]()

    def slowly(self: CheckpointWriter, write: Any) -> None:
        whole(self, lambda: (time.sleep(0.2), write())[1])

    def noted(self: SlotOfTrial, connection: Any, trial_id: int, state: TrialState) -> None:
        if state == TrialState.PRUNED:
            row = opened.study.get_trials(deepcopy=False)[-1]
            rung = [views for views, _ in opened.settings.rungs].index(max(row.intermediate_values))
            held.append((opened.checkpoints / row.user_attrs["lineage"] / str(rung) / "state.json").is_file())
        ends(self, connection, trial_id, state)

    monkeypatch.setattr(CheckpointWriter, "submit", slowly)
    monkeypatch.setattr(SlotOfTrial, "ends", noted)
    opened = opened_in(tmp_path, asked)
    if budget == "another's":  # a terminal that searches the same study by the clock
        set_budget(opened.study, 600.0)
    run(opened, n := 9, told() if budget == "ours" else None)
    assert len(held) >= 1
    assert all(held) == (budget != "none")
    rows = opened.study.get_trials()
    assert (
        check_study(rows, Slots(engine_of(opened.study), opened.name).all(), opened.checkpoints, total=n).faults == ()
    )


def paused_study(tmp_path: Path, asked: Asked, values: list[float], **other: Any) -> tuple[OpenStudy, Slots, list[Any]]:
    """A study whose rows are paused at the first rung with these values, but for the first, which is complete; checkpoints and all."""
    opened = opened_in(tmp_path, replace(asked, **other))
    slots, steps, rows = Slots(engine_of(opened.study), opened.name), [views for views, _ in opened.settings.rungs], []
    for number, value in enumerate(values):
        slot = slots.claim(99, "me")
        assert slot is not None
        state = TrialState.COMPLETE if number == 0 else TrialState.PRUNED
        row = optuna.trial.create_trial(
            state=state,
            value=value,
            intermediate_values=dict.fromkeys(steps if number == 0 else steps[:1], value),
            user_attrs={"lineage": str(number), "rungs": [{"seconds": second} for second in (2.0, 9.0, 99.0)]},
        )
        row.number = number
        rows.append(row)
        slots.started(slot, number, str(number))
        slots.finish(slot)
        (opened.checkpoints / str(number) / "0").mkdir(parents=True)
        (opened.checkpoints / str(number) / "0" / "state.json").touch()
    return opened, slots, rows


@pytest.mark.parametrize(("objective", "best"), [("auc", 3), ("log_loss", 1)])
def test_the_best_of_a_third_goes_on_before_anything_new_and_the_rest_when_nothing_new_fits(
    tmp_path: Path, asked: Asked, objective: str, best: int
) -> None:
    values = [0.9, 0.55, 0.6, 0.8, 0.7] if objective == "auc" else [0.1, 0.2, 0.6, 0.8, 0.7]
    opened, slots, rows = paused_study(tmp_path, asked, values, objective=objective)

    def turn(rows: list[Any], left: float = 1e6, n: int = 99, **limits: Any) -> Turn | str:
        found = next_turn(opened, slots, rows, Limits(n, clock=told(left), **limits), "me")
        if isinstance(found, Turn):  # given back, for the next question
            slots.leave_paused(found.slot) if found.thawed_from is not None else slots.reopen(
                found.slot, keep_lineage=False
            )
        return found

    # Of five at the first rung one goes on by itself, the complete one: nobody is promoted, a new one begins.
    new = turn(rows)
    assert isinstance(new, Turn)
    assert (new.thawed_from, new.slot.number) == (None, 5)
    # A sixth, and two of six go on: the complete one and the best of the others.
    sixth = paused_like(rows[4], 5, 0.5 if objective == "auc" else 0.9)
    thawed = turn([*rows, sixth])
    assert isinstance(thawed, Turn)
    assert thawed.thawed_from == best
    assert isinstance(unthawed := turn([*rows, sixth], thaws=False), Turn)
    assert unthawed.thawed_from is None
    # Where no new one fits, the most promising goes on, as long as its next rung does.
    steps, decay = [views for views, _ in opened.settings.rungs], branch_share(opened.start)
    first, second = rung_ratio(steps, 0, decay), rung_ratio(steps, 1, decay)
    assert whole_trial_s(opened, lineages_of(rows)) == pytest.approx(2.0 * (1 + first + first * second))
    last = turn(rows, left=2.0 * first + 0.1)
    assert isinstance(last, Turn)
    assert last.thawed_from == best
    assert turn(rows, left=2.0 * first - 0.1) == "budget"
    slots.finish(new.slot)
    total = turn(rows, n=5)
    assert isinstance(total, Turn)
    assert total.thawed_from == best, "no new one is wanted"


@pytest.mark.parametrize("reason", ["interrupted", "worker lost"])
def test_an_interrupted_trial_goes_on_where_its_next_rung_fits_though_no_whole_trial_does(
    tmp_path: Path, asked: Asked, reason: str
) -> None:
    opened, slots, rows = paused_study(tmp_path, asked, [0.9, 0.55, 0.6, 0.8])
    steps, decay = [views for views, _ in opened.settings.rungs], branch_share(opened.start)
    one_more = 2.0 * rung_ratio(steps, 0, decay) + 0.1
    held = slots.claim(99, "gone")
    assert held is not None
    slots.started(held, 4, "4")
    slots.reopen(held, keep_lineage=True)
    cut = optuna.trial.create_trial(
        state=TrialState.FAIL,
        intermediate_values={steps[0]: 0.5},
        user_attrs={**rows[3].user_attrs, "lineage": "4", "reason": reason},
    )
    cut.number = 4
    rows.append(cut)

    def turn(left: float, n: int = 99) -> Turn | str:
        return next_turn(opened, slots, rows, Limits(n, clock=told(left)), "me")

    assert turn(one_more - 0.2) == "budget"
    paused = turn(one_more)
    assert isinstance(paused, Turn)
    assert paused.thawed_from == 3, "nothing is left of the interrupted one: it would need a whole trial's time"
    slots.leave_paused(paused.slot)
    (opened.checkpoints / "4" / "0").mkdir(parents=True)
    (opened.checkpoints / "4" / "0" / "state.json").touch()
    beyond = turn(one_more, 4)
    assert isinstance(beyond, Turn)
    assert beyond.thawed_from == 3, "the total has been lowered"
    slots.leave_paused(beyond.slot)
    found = turn(one_more)
    assert isinstance(found, Turn)
    assert (found.slot.number, found.slot.lineage, found.slot.attempts, found.thawed_from) == (4, "4", 2, None)
    assert slots.go_on("4", "another") is None, "it is being gone on with"
    assert isinstance(other := turn(one_more), Turn)
    assert other.thawed_from == 3


def paused_like(row: Any, number: int, value: float) -> Any:
    step = next(iter(row.intermediate_values))
    made = optuna.trial.create_trial(
        state=TrialState.PRUNED,
        value=value,
        intermediate_values={step: value},
        user_attrs={**row.user_attrs, "lineage": str(number)},
    )
    made.number = number
    return made


def test_without_time_for_a_rung_the_search_ends_with_its_trials_paused(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    clock = told(left=0.0)
    assert run(opened, 5, clock)[0] == SearchEnd(1, "budget")  # the first one runs through whatever the time
    assert [t.state for t in opened.study.get_trials()] == [TrialState.COMPLETE]
    clock.left = 1e6
    objective = Objective(opened, CPU)

    def over(number: int, result: object) -> None:
        clock.left = 1e-9

    objective.watch.rung = over
    assert run_worker(objective, Limits(5, clock=clock)) == SearchEnd(1, "budget")
    second = opened.study.get_trials()[1]
    assert second.state == TrialState.PRUNED
    assert list(second.intermediate_values) == [21]
    assert (opened.checkpoints / "1" / "0" / "state.json").is_file()
    # without a budget it stays as it is; the total counts it
    assert run(opened, 2, None)[0] == SearchEnd(0, "done")


def test_time_that_ends_within_a_rung_pauses_at_the_one_before(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)

    class Ends(Told):
        def check(self, *, first: bool = False) -> None:
            if opened.study.get_trials(deepcopy=False)[-1].intermediate_values:
                self.left = 0.0
                raise OutOfTime("the search's part of the budget is used up")

    assert run(opened, 5, Ends(100.0, 0.0, time.monotonic(), 0))[0] == SearchEnd(1, "budget")
    (trial,) = opened.study.get_trials()
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"].startswith("paused at rung 1 of 3: the search's part")
    run(opened, 1, told())
    assert opened.study.get_trials()[1].state == TrialState.COMPLETE
    assert n_finished_of(opened.study) == 1


def test_a_search_that_is_out_of_time_before_its_first_score_ends(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    assert run(opened, 5, told(left=-50.0))[0] == SearchEnd(0, "budget")  # nothing is begun
    assert opened.study.get_trials() == []

    class Ends(Told):
        def check(self, *, first: bool = False) -> None:
            self.left = -50.0
            super().check(first=first)

    assert run(opened, 5, Ends(100.0, 0.0, time.monotonic(), 0))[0] == SearchEnd(0, "budget")
    (trial,) = opened.study.get_trials()
    assert (trial.state, trial.user_attrs["reason"][:12]) == (TrialState.FAIL, "interrupted:")
    with pytest.raises(StudyError, match="no complete trial yet"):
        finalize(opened, device=CPU)
    assert run(opened, 1, told())[0] == SearchEnd(1, "done")  # with more time the same lineage goes on in its slot
    assert [t.user_attrs["lineage"] for t in opened.study.get_trials()] == ["0", "0"]


def test_the_quota_gives_up_the_least_promising_checkpoints(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    end = run_worker(Objective(opened, CPU), Limits(3, clock=told(), quota_bytes=0))
    assert end == SearchEnd(3, "done")
    assert [t.state for t in opened.study.get_trials()] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert list(opened.checkpoints.iterdir()) == []


def test_the_quota_leaves_those_whose_slot_waits_for_somebody_to_go_on(tmp_path: Path, asked: Asked) -> None:
    """An interrupted trial has no place among the paused ones, and would be the first to go."""
    steps = (100, 300, 900)
    rows = [
        optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"lineage": "0", "reason": "interrupted"}),
        optuna.trial.create_trial(
            state=TrialState.PRUNED, value=0.6, intermediate_values={100: 0.6}, user_attrs={"lineage": "1"}
        ),
    ]
    for number, row in enumerate(rows):
        row.number = number
        (tmp_path / str(number) / "0").mkdir(parents=True)
        (tmp_path / str(number) / "0" / "optim.safetensors").write_bytes(bytes(1000))
    assert keep_within(tmp_path, rows, steps, quota_bytes=1500, sign=1.0, keep=lambda: {"0"}) == ["1"]
    opened, asked_with = opened_in(tmp_path / "study", asked), list[dict[str, Any]]()
    slots = Slots(engine_of(opened.study), opened.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "keep_within", lambda *args, **options: asked_with.append(options) or [])
        run(opened, 1, None)
    assert len(asked_with) == 2, "after the trial, and once its checkpoint is on the disk"
    options = asked_with[0]
    slot = slots.claim(9, "me")
    assert slot is not None
    slots.started(slot, 1, "one")
    slots.reopen(slot, keep_lineage=True)
    assert options["keep"]() == {"one"}
    assert options["sign"] == 1.0


def test_the_quota_is_counted_while_a_checkpoint_is_being_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0", ".1.partial"):
        (tmp_path / "3" / name).mkdir(parents=True)
        (tmp_path / "3" / name / "state.json").write_text("12345")
    scandir = os.scandir

    def renamed_just_before(path: Any = ".") -> Any:
        if str(path).endswith(".partial"):
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", renamed_just_before)
    assert keep_within(tmp_path, [], [1], quota_bytes=5, sign=1.0) == []
    assert not (tmp_path / "3" / ".1.partial").exists()


def test_a_thaw_that_its_worker_did_not_begin_is_undone(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    run_worker(Objective(opened, CPU), Limits(2, clock=told(), quota_bytes=0))
    slots = Slots(engine_of(opened.study), opened.name)
    slot = slots.thaw("1", "elsewhere:1:2")
    assert slot is not None
    assert (slot.state, slot.number, slot.attempts) == ("thawing", 1, 2)
    assert slots.thaw("1", "another") is None
    trials = opened.study.get_trials()
    settle_lost(opened.study, slots, trials, checkpoints=opened.checkpoints)
    assert slots.counts() == {"claimed": 1, "done": 1, "open": 0}, "another host's thaw is not taken for finished"
    assert slots.claim(2, "third") is None
    slots.leave_paused(slot)
    mine = slots.thaw("1", f"{slot.owner}")
    assert mine is not None
    assert slots.started(mine, 7, "1")
    assert slots.claimed()[0].trial_number == 7
    assert slots.reopen(slots.claimed()[0], keep_lineage=True)  # begun: to be continued
    assert slots.all()[1].state == "open"
    assert slots.thaw("1", "x") is None


@pytest.mark.parametrize(
    ("text", "want"), [("5GB", 5 * 10**9), ("800 mb", 8 * 10**8), ("1.5k", 1500), ("12 B", 12), ("0", 0)]
)
def test_sizes_are_read_as_people_write_them(text: str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 XB", "nan", "1e30", "5", "2e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--checkpoint-quota must be a size like 5GB"):
        parse_bytes(text)


def test_the_first_trial_runs_through_whatever_others_reached_until_one_is_complete(
    tmp_path: Path, asked: Asked
) -> None:
    """A search needs a winner, and has one once any trial is complete."""
    opened = opened_in(tmp_path, asked)
    objective, judged = Objective(opened, CPU), list[bool]()

    def pruned(self: object, study: object, trial: object) -> bool:
        judged.append(True)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SuccessiveHalving, "prune", pruned)
        run_worker(objective, Limits(2, clock=told(left=-1.0), thaws=False))
        assert opened.study.get_trials()[0].state == TrialState.COMPLETE
        assert judged == []
        objective.slot = Slot(0, "claimed", "0", None, "x", 2, 0)
        objective.clock = told()
        assert not objective._is_needed(), "one is complete: thawed or begun again it has no privilege"


def test_a_lineage_that_diverged_is_no_winner_and_the_next_one_runs_through(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the search's end, too, and in one row: an ending row a step would use up the time."""
    opened, whole = opened_in(tmp_path, asked), Objective._train

    def first_diverges(self: Objective, trial: optuna.Trial, lineage: str) -> float:
        if lineage == "0":
            raise TrainingDiverged("the loss became NaN")
        return whole(self, trial, lineage)

    monkeypatch.setattr(Objective, "_train", first_diverges)
    clock = told(left=-30.0)  # beyond the 5 % by which a rung may be late, before 70 % of the budget
    clock.reserve_s = 70.0
    end, _ = run(opened, 9, clock)
    assert end == SearchEnd(2, "budget")
    rows = opened.study.get_trials()
    assert [row.state for row in rows] == [TrialState.PRUNED, TrialState.COMPLETE]
    assert [row.user_attrs["slot"] for row in rows] == [0, 1]


@pytest.mark.parametrize(("waits", "expected"), [("far", "claimed elsewhere"), ("all", "done")])
def test_before_finalizing_a_search_waits_for_the_trials_of_another_terminal(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, waits: Any, expected: str
) -> None:
    opened = opened_in(tmp_path, asked)
    slots = Slots(engine_of(opened.study), opened.name)
    owner = f"{owner_of_this_process().rpartition(':')[0]}:"  # alive, and of this machine
    held = slots.claim(2, owner)
    assert held is not None

    def ends(seconds: float) -> None:
        opened.study.add_trial(
            optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"lineage": "other"})
        )
        slots.finish(held)

    monkeypatch.setattr(worker_module, "time", SimpleNamespace(**{**vars(time), "sleep": ends}))
    assert run_worker(Objective(opened, CPU), Limits(2, waits=waits)) == SearchEnd(1, expected)


def test_past_its_end_a_search_begins_nothing_beside_the_trial_that_it_waits_for(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    slots, clock = Slots(engine_of(opened.study), opened.name), told(left=-1.0)
    running = optuna.create_trial(state=TrialState.RUNNING, user_attrs={"lineage": "0"})  # another worker's
    assert next_turn(opened, slots, [running], Limits(9, clock=clock), "me") == "budget"
    assert isinstance(next_turn(opened, slots, [], Limits(9, clock=clock), "me"), Turn)


def killed_first_trial(tmp_path: Path, asked: Asked) -> tuple[OpenStudy, Slots]:
    """A study whose only row runs for ever, in the slot of a worker called ``gone``."""
    opened = opened_in(tmp_path, asked)
    slots = Slots(engine_of(opened.study), opened.name)
    held = slots.claim(9, "gone")
    assert held is not None
    opened.study.add_trial(optuna.create_trial(state=TrialState.RUNNING, user_attrs={"lineage": "0"}))
    slots.started(held, 0, "0")
    return opened, slots


def test_a_first_trial_whose_worker_was_killed_is_gone_on_with_past_the_search_s_end(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = killed_first_trial(tmp_path, asked)
    monkeypatch.setattr("pcam_automl.search.settling.owner_alive", lambda owner: owner != "gone")
    assert run(opened, 9, told(left=-1.0))[0] == SearchEnd(1, "budget"), "its row does not run any more"


def test_a_lost_lineage_that_its_worker_gave_back_itself_keeps_its_checkpoints(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, slots = killed_first_trial(tmp_path, asked)
    (opened.checkpoints / "0" / "0").mkdir(parents=True)
    monkeypatch.setattr("pcam_automl.search.settling.owner_alive", lambda owner: False)
    whole = settling._give_back

    def late(study: optuna.Study, slots: Slots, slot: Slot, max_retries: int) -> bool:
        assert slots.reopen(slot, keep_lineage=True)  # the worker, which lives, was quicker
        return whole(study, slots, slot, max_retries)

    monkeypatch.setattr(settling, "_give_back", late)
    trials = opened.study.get_trials()
    found = settle_lost(opened.study, slots, trials, checkpoints=opened.checkpoints, max_retries=0)
    assert (found.ended, found.given_up) == ((0,), ())
    assert (opened.checkpoints / "0" / "0").exists()
    assert slots.all()[0].lineage == "0"


def test_a_trial_that_went_on_twice_is_one_that_was_finished_here(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, whole, cut = opened_in(tmp_path, asked), Objective._train, list[int]()

    def cut_off(self: Objective, trial: optuna.Trial, lineage: str) -> float:
        if self.thawed_from is not None and not cut:
            cut.append(trial.number)
            raise OutOfTime("time is up")  # before a rung of this row: its lineage goes on in its slot
        return whole(self, trial, lineage)

    monkeypatch.setattr(Objective, "_train", cut_off)
    assert run(opened, 3, told())[0] == SearchEnd(3, "done")
    assert len(cut) == 1
    assert n_finished_of(opened.study) == 3


def test_a_short_search_begins_its_second_trial_also_where_the_first_was_slower_than_planned(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_in(tmp_path, asked)
    slots, clock = Slots(engine_of(opened.study), opened.name), told(left=45.0)
    monkeypatch.setattr("pcam_automl.search.turns.whole_trial_s", lambda opened, lineages: 100.0)
    row = optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.9, user_attrs={"lineage": "0"})
    assert next_turn(opened, slots, [row], Limits(2, clock=clock), "me") == "budget", "a whole trial does not fit"
    clock.short = ShortSearch(2, 100.0)
    assert isinstance(next_turn(opened, slots, [row], Limits(2, clock=clock), "me"), Turn), "0.4 of one does"
    late = told(left=39.0)
    late.short = ShortSearch(2, 100.0)
    assert next_turn(opened, slots, [row], Limits(3, clock=late), "me") == "budget"


@pytest.mark.parametrize("n_failures", [1, 99])
def test_a_thaw_that_ends_by_an_error_is_tried_once_more(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, n_failures: int
) -> None:
    opened, whole, failed = opened_in(tmp_path, asked), Objective._train, list[int]()

    def fails(self: Objective, trial: optuna.Trial, lineage: str) -> float:
        if self.thawed_from is not None and len(failed) < n_failures:
            failed.append(self.thawed_from)
            raise RuntimeError("CUDA error: an illegal memory access")
        return whole(self, trial, lineage)

    monkeypatch.setattr(Objective, "_train", fails)
    assert run(opened, 3, told())[0] == SearchEnd(3, "done")
    rows, slots = opened.study.get_trials(), Slots(engine_of(opened.study), opened.name).all()
    paused = [lineage for lineage in lineages_of(rows) if any(row.state == TrialState.PRUNED for row in lineage.rows)]
    assert paused
    if n_failures == 1:
        assert len(failed) == 1
        assert {lineage.last.state for lineage in lineages_of(rows)} == {TrialState.COMPLETE}
    else:
        assert sorted(failed) == sorted(2 * [lineage.rows[0].number for lineage in paused]), "from the paused row"
        assert {lineage.last.state for lineage in paused} == {TrialState.FAIL}
    assert [slot.state for slot in slots] == ["done"] * 3
    assert check_study(rows, slots, opened.checkpoints, total=3).faults == ()
