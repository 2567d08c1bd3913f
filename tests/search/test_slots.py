"""One case against SQLite, PostgreSQL and MariaDB; the servers by PCAM_TEST_*_URL or on their local ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from warm_processes import warm_context

from pcam_automl.search.connections import engine_options
from pcam_automl.search.retrying_storage import set_user_attrs
from pcam_automl.search.slots import Slot, Slots, owner_alive, owner_of_this_process
from pcam_automl.search.storage import engine_of, open_storage
from pcam_automl.search.storage_url import normalised_url

N_WORKERS, N_SLOTS = 6, 20


@pytest.fixture
def slots(url: str) -> Iterator[Slots]:
    engine = engine_of(open_storage(url))
    own = Slots(engine, f"test-{uuid.uuid4().hex}")
    yield own
    own.clear()
    engine.dispose()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Slots]:
    engine = engine_of(open_storage(f"sqlite:///{tmp_path}/s.db"))
    yield Slots(engine, "local")
    engine.dispose()


def claim_all(url: str, study_name: str, n_total: int, start: Any, out: Any) -> None:
    """A worker: claims until nothing is left; every third slot is given back once."""
    url = normalised_url(url)
    engine = sa.create_engine(url, **engine_options(url))
    mine, owner = [], f"worker-{os.getpid()}"
    slots = Slots(engine, study_name)
    start.wait()
    while (slot := slots.claim(n_total, owner)) is not None:
        if slot.number % 3 == 0 and slot.attempts == 1:
            assert slots.reopen(slot, keep_lineage=True)
            continue
        assert slots.finish(slot)
        mine.append(slot.number)
    out.put(mine)
    engine.dispose()


def test_six_processes_share_exactly_twenty_slots(slots: Slots, url: str) -> None:
    context = warm_context()
    start, out = context.Barrier(N_WORKERS), context.Queue()
    arguments = (url, slots.study_name, N_SLOTS, start, out)
    workers = [context.Process(target=claim_all, args=arguments) for _ in range(N_WORKERS)]
    for worker in workers:
        worker.start()
    claimed = [number for _ in workers for number in out.get(timeout=120)]
    for worker in workers:
        worker.join()
    assert sorted(claimed) == list(range(N_SLOTS))
    assert slots.counts() == {"claimed": 0, "done": N_SLOTS, "open": 0}


def test_slot_lives_from_claim_to_done(slots: Slots) -> None:
    slot = slots.claim(2, "a:1:x")
    assert slot is not None
    assert (slot.number, slot.state, slot.lineage, slot.attempts) == (0, "claimed", None, 1)
    assert slots.started(slot, 7, "lin")
    assert slots.finish(slot)
    (done,) = slots.all()
    assert (done.state, done.lineage, done.trial_number, done.owner) == ("done", "lin", 7, None)


def test_interrupted_slot_is_claimed_first_and_keeps_its_lineage(slots: Slots) -> None:
    first, second = slots.claim(3, "a"), slots.claim(3, "b")
    assert first is not None
    assert second is not None
    slots.started(first, 0, "lin")
    slots.reopen(first, keep_lineage=True)
    again = slots.claim(3, "c")
    assert again is not None
    assert (again.number, again.lineage, again.trial_number, again.attempts) == (0, "lin", 0, 2)


def test_slot_after_an_error_starts_a_new_recipe(slots: Slots) -> None:
    slot = slots.claim(1, "a")
    assert slot is not None
    slots.started(slot, 0, "lin")
    slots.reopen(slot, keep_lineage=False)
    again = slots.claim(1, "a")
    assert again is not None
    assert (again.lineage, again.trial_number) == (None, None)


def test_claim_ends_at_the_total_and_goes_on_after_it_was_raised(slots: Slots) -> None:
    assert [s.number for s in (slots.claim(2, "a"), slots.claim(2, "a")) if s] == [0, 1]
    assert slots.claim(2, "a") is None
    raised = slots.claim(3, "a")
    assert raised is not None
    assert raised.number == 2
    assert slots.claim(0, "a") is None


def test_trials_without_a_slot_count_as_done(slots: Slots) -> None:
    assert slots.adopt([0, 1, 4]) == 3
    assert slots.adopt([0, 1, 4]) == 0
    slot = slots.claim(4, "a")
    assert slot is not None
    assert slot.number == 3
    assert slots.claim(4, "a") is None


def test_a_large_study_is_not_read_again_for_every_trial(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 300  # more than are looked up by name
    assert slots.adopt(range(n)) == n
    read, select = [], slots._select

    def counting(*conditions: Any) -> list[Slot]:
        found = select(*conditions)
        read.append(len(found))
        return found

    monkeypatch.setattr(slots, "_select", counting)
    slot = slots.claim(n + 2, "a")
    assert slot is not None
    assert slot.number == n
    slots.started(slot, n, "lin")
    assert slots.finish(slot)
    assert slots.adopt(range(n + 1)) == 0
    assert slots.adopt([*range(n + 1), n + 5]) == 1
    assert slots.claimed() == []
    assert sum(read) < 12
    assert slots.counts() == {"claimed": 0, "done": n + 2, "open": 0}
    slots.clear()
    assert slots.adopt([0]) == 1


def test_trial_that_finished_before_its_slot_was_told_makes_it_done(slots: Slots) -> None:
    killed, lost = slots.claim(5, "a"), slots.claim(5, "b")
    assert killed is not None
    assert lost is not None
    slots.started(killed, 0, "x")
    slots.started(lost, 1, "y")
    slots.reopen(lost, keep_lineage=True)
    assert slots.adopt([0, 1]) == 2
    assert slots.counts() == {"claimed": 0, "done": 2, "open": 0}
    assert not slots.finish(killed)


def test_lowered_total_is_not_exceeded_by_reopened_slots(slots: Slots) -> None:
    held = [slot for slot in (slots.claim(5, "a") for _ in range(5)) if slot]
    for slot in held[2:]:
        slots.finish(slot)
    for slot in held[:2]:
        slots.reopen(slot, keep_lineage=True)
    # three are done (slots 2, 3, 4): a total of 3 is reached although slots 0 and 1 are open
    assert slots.claim(3, "a") is None
    assert [s.number for s in (slots.claim(4, "a"), slots.claim(4, "a")) if s] == [0]


def test_a_claim_whose_answer_was_lost_is_found_again(local: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies after the commit: the statement is repeated and changes nothing more."""
    insert, update = Slots._insert, Slots._update

    def committed_but_unheard(real: Any) -> Any:
        def call(self: Slots, *words: Any, **values: Any) -> bool:
            real(self, *words, **values)
            return False

        return call

    monkeypatch.setattr(Slots, "_insert", committed_but_unheard(insert))
    first = local.claim(1, "me")
    assert first is not None
    assert (first.number, first.owner) == (0, "me")
    monkeypatch.setattr(Slots, "_insert", insert)
    local.reopen(first, keep_lineage=False)
    monkeypatch.setattr(Slots, "_update", committed_but_unheard(update))
    again = local.claim(1, "me")
    assert again is not None
    assert again.number == 0
    assert local.counts() == {"claimed": 1, "done": 0, "open": 0}


def test_slot_that_was_taken_over_cannot_be_changed_by_its_old_owner(slots: Slots) -> None:
    old = slots.claim(1, "a")
    assert old is not None
    assert slots.reopen(old, keep_lineage=True)  # as whoever finds the owner dead does
    assert slots.claim(1, "a") is not None  # the same process, but another claim
    assert not slots.finish(old)
    assert not slots.started(old, 3, "x")
    assert not slots.reopen(old, keep_lineage=True)
    assert slots.counts()["claimed"] == 1


def test_studies_do_not_see_each_others_slots(local: Slots) -> None:
    other = Slots(local.engine, "other")
    local.claim(1, "a")
    assert other.counts() == {"claimed": 0, "done": 0, "open": 0}
    other.clear()
    assert local.counts()["claimed"] == 1


def test_a_process_that_has_ended_is_known_as_dead_and_one_elsewhere_is_unknown() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        dead = owner_of_this_process().replace(f":{os.getpid()}:", f":{child.pid}:")
    assert [owner_alive(owner) for owner in (dead, owner_of_this_process(), "elsewhere:1:x")] == [False, True, None]


def test_owner_is_known_by_host_pid_and_start() -> None:
    owner = owner_of_this_process()
    host, pid, start = owner.rsplit(":", 2)
    assert socket.gethostname() in owner
    assert owner_alive(owner) is True
    assert owner_alive(f"{host}:{pid}:0") is (not start)  # the pid was given to another process
    assert owner_alive(f"{host}:{2**22 + 1}:{start}") is False
    assert owner_alive(f"{host}:{2**80}:{start}") is False
    assert owner_alive(f"elsewhere:{pid}:{start}") is None
    assert owner_alive("nonsense") is None


def test_tables_of_optuna_stay_usable_beside_ours(local: Slots) -> None:
    assert {"pcam_automl_slots", "trials", "studies"} <= set(sa.inspect(local.engine).get_table_names())


def test_attributes_are_written_together_and_read_as_optunas_own(url: str) -> None:
    study = optuna.create_study(storage=open_storage(url))
    in_memory = optuna.create_study()

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("reason", "begun")
        set_user_attrs(trial, reason="complete", rungs=[{"auc": 0.5}], seconds=1.5)
        assert trial.user_attrs == {"reason": "complete", "rungs": [{"auc": 0.5}], "seconds": 1.5}
        return 1.0

    for one in (study, in_memory):
        one.optimize(objective, n_trials=1)
        assert one.trials[0].user_attrs == {"reason": "complete", "rungs": [{"auc": 0.5}], "seconds": 1.5}
    storage = study._storage._backend
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.write(study.trials[0]._trial_id, user_attrs={"late": 1})
    assert "late" not in optuna.load_study(study_name=study.study_name, storage=storage).trials[0].user_attrs
    optuna.delete_study(study_name=study.study_name, storage=storage)
    engine_of(study).dispose()


def test_a_lineage_that_was_thawed_meanwhile_gets_no_second_slot(slots: Slots) -> None:
    """Its row is read as the newest, finished one; the slot names the next row by now."""
    slot = slots.claim(3, "a")
    assert slot is not None
    slots.started(slot, 0, "0")
    slots.finish(slot)
    thawed = slots.thaw("0", "b")
    assert thawed is not None
    slots.started(thawed, 5, "0")
    other = Slots(slots.engine, slots.study_name)  # of a process that has not seen row 0 end
    assert other.adopt([0], {0: "0"}) == 0
    assert other.adopt([0, 7], {0: "0", 7: "7"}) == 1, "a row of a lineage without any slot is adopted as before"
    assert [one.lineage for one in slots.all()] == ["0", None]


def test_what_somebody_waits_to_go_on_with_is_told(slots: Slots) -> None:
    done, open_, running, fresh = (slots.claim(4, "a") for _ in range(4))
    for number, slot in enumerate((done, open_, running)):
        assert slot is not None
        slots.started(slot, number, f"{number}")
    assert done is not None
    assert open_ is not None
    assert fresh is not None
    slots.finish(done)
    slots.reopen(open_, keep_lineage=True)
    assert slots.going_on() == {"1", "2"}
