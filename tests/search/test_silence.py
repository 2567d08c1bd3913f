"""Workers of hosts that cannot be asked: who is silent, what becomes of their trials, and of one that was only asleep."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState

from pcam_automl.search import settling as settling_module
from pcam_automl.search import silence as silence_module
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.lineages import lineages_of
from pcam_automl.search.objective import Objective, Watch
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.retrying_storage import RetryingStorage
from pcam_automl.search.settling import LOST, Settled, end_silent, settle_lost
from pcam_automl.search.silence import Silent, Watchman, heartbeat_seconds, running_rows
from pcam_automl.search.slots import Slot, Slots, owner_of_this_process
from pcam_automl.search.storage import engine_of, open_storage, rdb_of
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits, prescribed
from pcam_automl.search.worker import SlotOfTrial, run_worker

pytestmark = pytest.mark.filterwarnings("ignore")
ELSEWHERE = "elsewhere/4026531836:17:boot-1"
GRACE_S = 100.0


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(study_name="s", storage=open_storage(f"sqlite:///{tmp_path}/s.db"), direction="maximize")


@pytest.fixture
def slots(study: optuna.Study) -> Slots:
    return Slots(engine_of(study), "s")


def claimed_by(study: optuna.Study, slots: Slots, owner: str) -> int:
    slot, trial = slots.claim(9, owner), study.ask()
    assert slot is not None
    trial.set_user_attr("lineage", str(trial.number))
    slots.started(slot, trial.number, str(trial.number))
    return trial.number


def test_a_heartbeat_is_a_fifth_of_the_grace_at_most_a_minute() -> None:
    assert [heartbeat_seconds(grace) for grace in (2.0, 10.0, 300.0, 3600.0)] == [1, 2, 60, 60]


def test_a_claim_is_silent_once_nothing_of_it_has_changed_for_the_grace(study: optuna.Study, slots: Slots) -> None:
    clock = Clock()
    watchman = Watchman(slots, GRACE_S, clock)
    number = claimed_by(study, slots, ELSEWHERE)
    trial_id = study.get_trials()[number]._trial_id
    for clock.seconds in (0, 20, 40, 60, 80):
        assert not watchman.look()
    clock.seconds = 90
    rdb_of(study).record_heartbeat(trial_id)  # the first sign after the claim
    assert running_rows(slots.engine, "s")[number] is not None
    for clock.seconds in (90, 110, 130, 150, 170):
        assert not watchman.look()
    clock.seconds = 189
    assert not watchman.look(), "99 s since the heartbeat was seen"
    clock.seconds = 190
    silent = watchman.look()
    assert [slot.trial_number for slot in silent.slots] == [number]
    assert silent.rows == ()


def test_a_patrol_that_looks_less_often_than_a_short_grace_asks_for_sees_who_vanished(
    study: optuna.Study, slots: Slots
) -> None:
    clock = Clock()
    seldom, often = Watchman(slots, 2.0, clock, every_s=10.0), Watchman(slots, 2.0, clock)
    number = claimed_by(study, slots, ELSEWHERE)
    assert not seldom.look()
    assert not often.look()
    clock.seconds = 10
    assert [slot.trial_number for slot in seldom.look().slots] == [number]
    assert not often.look(), "it should have looked before: it was away"


def test_an_observer_that_could_not_see_starts_anew(
    study: optuna.Study, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    watchman = Watchman(slots, GRACE_S, clock)
    number = claimed_by(study, slots, ELSEWHERE)
    assert not watchman.look()
    clock.seconds = 20
    assert not watchman.look()
    real = silence_module.running_rows

    def away(*words: object) -> object:
        clock.seconds += 245  # the database comes back
        return real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(silence_module, "running_rows", away)
    clock.seconds = 40
    assert not watchman.look(), "245 s of silence, of which nobody could have heard anything"
    monkeypatch.setattr(silence_module, "running_rows", real)
    for clock.seconds in (300, 320, 340, 360, 380):
        assert not watchman.look()
    clock.seconds = 386
    assert [slot.trial_number for slot in watchman.look().slots] == [number]
    clock.seconds = 800  # asleep itself
    assert not watchman.look()


def test_a_look_that_failed_counts_as_none(study: optuna.Study, slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    watchman = Watchman(slots, GRACE_S, clock)
    claimed_by(study, slots, ELSEWHERE)
    for clock.seconds in (0, 20, 40, 60, 80):
        assert not watchman.look()

    def gone(*_: object) -> None:
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(silence_module, "running_rows", gone)
        with pytest.raises(OSError, match="away"):
            watchman.look()
    clock.seconds = 100
    assert not watchman.look()


def test_who_runs_on_this_host_is_never_silent(study: optuna.Study, slots: Slots) -> None:
    clock = Clock()
    watchman = Watchman(slots, GRACE_S, clock)
    claimed_by(study, slots, owner_of_this_process())
    for clock.seconds in (0, 1_000):
        assert not watchman.look()


def test_a_row_without_a_claim_is_silent_and_ended(study: optuna.Study, slots: Slots, tmp_path: Path) -> None:
    clock = Clock()
    watchman = Watchman(slots, GRACE_S, clock)
    orphan = study.ask().number
    for clock.seconds in (0, 20, 40, 60, 80):
        assert not watchman.look()
    clock.seconds = 101
    silent = watchman.look()
    assert silent == Silent(rows=(orphan,))
    url = f"sqlite:///{tmp_path}/s.db"
    assert end_silent("s", url, silent, checkpoints=tmp_path) == Settled((orphan,))
    assert study.get_trials()[orphan].state == TrialState.FAIL
    assert study.get_trials()[orphan].user_attrs["reason"] == LOST
    assert not watchman.look()


def test_a_silent_claim_goes_on_in_its_slot(study: optuna.Study, slots: Slots, tmp_path: Path) -> None:
    number = claimed_by(study, slots, ELSEWHERE)
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path) == Settled(), "nobody knows of that host"
    silent = Silent(tuple(slots.claimed()))
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path, silent=silent) == Settled((number,))
    (slot,) = slots.all()
    assert (slot.state, slot.lineage) == ("open", str(number))
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path, silent=silent) == Settled()


def test_a_claim_that_has_moved_on_since_the_look_is_left_alone(
    study: optuna.Study, slots: Slots, tmp_path: Path
) -> None:
    claimed_by(study, slots, ELSEWHERE)
    stale = Silent(tuple(replace(slot, attempts=slot.attempts + 1) for slot in slots.claimed()))
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path, silent=stale) == Settled()
    assert [trial.state for trial in study.get_trials()] == [TrialState.RUNNING]


def test_optunas_own_sweep_leaves_rows_alone(study: optuna.Study) -> None:
    study.ask()
    rdb_of(study).record_heartbeat(study.get_trials()[0]._trial_id)
    rdb_of(study).grace_period = -1
    optuna.storages.fail_stale_trials(study)
    assert [trial.state for trial in study.get_trials()] == [TrialState.RUNNING]


# --- with a worker ---------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(easy_pack: Path, tmp_path: Path) -> OpenStudy:
    torch.set_num_threads(1)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu", grace_s=2.0)
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    return create_or_open_study("one", url, asked, say=lambda text: None)


def test_the_last_trial_of_a_vanished_host_is_waited_for_and_taken_over(opened: OpenStudy) -> None:
    slots, notes = Slots(engine_of(opened.study), opened.name), []
    gone = claimed_by(opened.study, slots, ELSEWHERE)
    objective = Objective(opened, torch.device("cpu"), watch=Watch(note=notes.append))
    end = run_worker(objective, Limits(2))
    assert (end.n_finished, end.why) == (2, "done")
    trials = opened.study.get_trials()
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 1
    assert trials[gone].user_attrs["reason"] == LOST
    assert [trial.user_attrs["lineage"] for trial in trials].count(str(gone)) == 2, "its lineage went on"
    assert n_finished_of(opened.study) == 2
    assert slots.counts() == {"claimed": 0, "done": 2, "open": 0}
    assert any(note == "waiting for other workers' last trial, in case it is lost" for note in notes)
    assert any(note.startswith(f"no sign of life of trial {gone}") for note in notes)


def test_a_worker_that_was_only_asleep_drops_its_trial_and_goes_on(opened: OpenStudy) -> None:
    slots, notes = Slots(engine_of(opened.study), opened.name), []

    def taken_for_lost(number: int, result: object) -> None:
        if number == 0 and not opened.study.get_trials()[0].state.is_finished():
            silent = Silent(tuple(slots.claimed()))
            assert end_silent(opened.name, opened.url, silent, checkpoints=opened.checkpoints) == Settled((0,))

    objective = Objective(opened, torch.device("cpu"), watch=Watch(rung=taken_for_lost, note=notes.append))
    end = run_worker(objective, Limits(2))
    assert end.why == "done"
    trials = opened.study.get_trials()
    assert trials[0].user_attrs["reason"] == LOST
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 1
    assert n_finished_of(opened.study) == 2
    assert slots.counts() == {"claimed": 0, "done": 2, "open": 0}
    assert any("was taken for lost" in note for note in notes)


def test_a_row_of_a_dead_worker_is_ended_at_once_though_no_slot_knows_it(
    study: optuna.Study, slots: Slots, tmp_path: Path
) -> None:
    storage = rdb_of(study)
    assert isinstance(storage, RetryingStorage)
    owner = owner_of_this_process()
    storage.owner = f"{owner.partition(':')[0]}:999999999:x"
    killed = study.ask()
    storage.owner = ELSEWHERE
    unknown = study.ask()
    storage.owner = owner
    running = study.ask()
    assert running.user_attrs == {"owner": owner}
    running.set_user_attr("more", 1)
    assert running.suggest_float("x", 0.0, 1.0) == study.get_trials()[running.number].params["x"]
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path) == Settled((killed.number,))
    states = {trial.number: trial.state for trial in study.get_trials()}
    assert states == {
        killed.number: TrialState.FAIL,
        unknown.number: TrialState.RUNNING,
        running.number: TrialState.RUNNING,
    }
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path) == Settled()


def test_a_row_that_finished_in_the_last_moment_is_done_and_not_trained_again(
    study: optuna.Study, slots: Slots, tmp_path: Path
) -> None:
    number = claimed_by(study, slots, ELSEWHERE)
    silent, before = Silent(tuple(slots.claimed())), study.get_trials()
    study.tell(number, 0.5)  # it woke, told, and was cut off before it closed its slot
    assert settle_lost(study, slots, before, checkpoints=tmp_path, silent=silent) == Settled()
    assert [slot.state for slot in slots.all()] == ["done"]


def test_only_the_claim_that_was_judged_is_given_back(
    study: optuna.Study, slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent host wakes while its trial is being ended, drops it and claims another slot."""
    number = claimed_by(study, slots, ELSEWHERE)
    silent = Silent(tuple(slots.claimed()))
    real = settling_module._fail_lost

    def fail_and_wake(*words: object) -> bool:
        failed = real(*words)  # type: ignore[arg-type]
        claimed_by(study, slots, ELSEWHERE)
        return failed

    monkeypatch.setattr(settling_module, "_fail_lost", fail_and_wake)
    assert settle_lost(study, slots, study.get_trials(), checkpoints=tmp_path, silent=silent) == Settled((number,))
    assert [(slot.state, slot.owner) for slot in slots.all()] == [("open", None), ("claimed", ELSEWHERE)]


def test_a_slot_that_was_lost_between_claim_and_row_is_not_trained_in(opened: OpenStudy) -> None:
    objective = Objective(opened, torch.device("cpu"))
    slots = Slots(engine_of(opened.study), opened.name)
    begun: list[int] = []

    class Sleeping(Slots):
        """Another host takes the first slot over before its row begins."""

        def claim(self, n_total: int, owner: str) -> Slot | None:
            slot = super().claim(n_total, owner)
            if slot is not None and not begun:
                begun.append(slot.number)
                slots.reopen(slot, keep_lineage=False)
            return slot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcam_automl.search.worker.Slots", Sleeping)
        end = run_worker(objective, Limits(2))
    assert end.why == "done"
    trials = opened.study.get_trials()
    assert (trials[0].state, trials[0].user_attrs["reason"]) == (TrialState.FAIL, "slot lost")
    assert n_finished_of(opened.study) == 2
    assert slots.counts() == {"claimed": 0, "done": 2, "open": 0}


def test_a_retry_takes_what_any_earlier_row_of_its_lineage_was_given(study: optuna.Study) -> None:
    """The soak's finding: a row that is killed while it asks has some parameters only, and the next one drew the rest anew."""
    space = {
        "lr": optuna.distributions.FloatDistribution(0.0, 1.0),
        "wd": optuna.distributions.FloatDistribution(0.0, 1.0),
    }

    def row(lineage: str, **params: float) -> None:
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.FAIL,
                params=params,
                distributions={name: space[name] for name in params},
                user_attrs={"lineage": lineage},
            )
        )

    row("0", lr=0.1)
    row("0", lr=0.1, wd=0.2)
    row("1", lr=0.7, wd=0.8)
    row("0", lr=0.1)
    row("0")
    opened = SimpleNamespace(study=study)
    of = [prescribed(opened, Slot(0, "claimed", lineage, None, None, 1, 0)) for lineage in ("0", "1", "9", None)]  # type: ignore[arg-type]
    assert of == [{"lr": 0.1, "wd": 0.2}, {"lr": 0.7, "wd": 0.8}, {}, {}]


def test_a_row_that_never_began_leaves_its_lineage_as_it_was(opened: OpenStudy) -> None:
    """Neither a thaw that was killed while it asked nor a sleeper's late row hides what was paused."""
    study, slots, owner = opened.study, Slots(engine_of(opened.study), opened.name), owner_of_this_process()
    objective = Objective(opened, torch.device("cpu"))
    run_worker(objective, Limits(1))
    before = {one.name: one.rows for one in lineages_of(study.get_trials())}
    storage = rdb_of(study)
    assert isinstance(storage, RetryingStorage)
    assert (storage.owner, storage.begins_with) == (None, None)  # nothing holds the objective any more
    slot = slots.thaw("0", owner)
    assert slot is not None
    objective.slot, objective.thawed_from = slot, 0
    storage.owner, storage.begins_with = owner, objective.notes_at_birth
    late = study.ask()
    assert late.user_attrs["slot"] == slot.number
    study.tell(late, state=TrialState.FAIL)
    after = {one.name: one for one in lineages_of(study.get_trials())}
    assert after["0"].rows == before["0"]
    assert objective.first_notes(late.number).items() > objective.notes_at_birth(late.number).items()


def test_no_commit_shows_a_row_without_its_slot(opened: OpenStudy) -> None:
    """Whenever a worker is killed, a running row of a new lineage is in its slot, and a row that counts has closed it."""
    engine = engine_of(opened.study)
    seen: set[tuple[str, str]] = set()
    words = "SELECT t.state, s.state FROM trials t LEFT JOIN pcam_automl_slots s ON s.trial_number = t.number"

    def look(_: sa.Connection) -> None:  # what the commits before this one show
        with sqlite3.connect(str(engine.url.database)) as beside:
            seen.update(beside.execute(words).fetchall())

    sa.event.listen(engine, "commit", look)
    run_worker(Objective(opened, torch.device("cpu")), Limits(4))
    sa.event.remove(engine, "commit", look)
    assert {("RUNNING", "claimed"), ("COMPLETE", "done")} <= seen
    assert seen <= {("RUNNING", "claimed"), ("COMPLETE", "done"), ("PRUNED", "done")}


def test_a_thaw_that_is_killed_while_it_asks_leaves_its_slot_alone(opened: OpenStudy, tmp_path: Path) -> None:
    """Its slot goes on naming the paused row, which another process would else take for one that has none."""
    study, storage = opened.study, rdb_of(opened.study)
    run_worker(Objective(opened, torch.device("cpu")), Limits(1))
    dead = f"{owner_of_this_process().partition(':')[0]}:999999999:x"
    slots = Slots(engine_of(study), opened.name)
    assert isinstance(storage, RetryingStorage)
    slot, claim = slots.thaw("0", dead), SlotOfTrial(slots)
    assert slot is not None
    claim.hold(slot)
    storage.owner, storage.claim = dead, claim
    late = study.ask()  # and dies
    storage.owner = storage.claim = None
    fresh = Slots(engine_of(study), opened.name)
    settle_lost(study, fresh, study.get_trials(), checkpoints=tmp_path)
    (only,) = fresh.all()
    assert (only.state, only.lineage, only.trial_number) == ("done", "0", 0)
    assert study.get_trials()[late.number].state == TrialState.FAIL
