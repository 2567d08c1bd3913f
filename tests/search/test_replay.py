"""Replay: a trial from its row alone, after retries, prunings, thaws and from several workers, gives the same figures."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from easy_set import write_easy_set
from optuna.trial import FrozenTrial, TrialState, create_trial
from warm_processes import warm_context

from pcam_automl.errors import DataError, Interrupted, StudyError, TrainingDiverged
from pcam_automl.interrupt import stop_signal
from pcam_automl.search import processes
from pcam_automl.search import replay as replay_module
from pcam_automl.search.budget import BudgetClock
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.processes import Heard, WorkerTask, run_workers
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.replay import Conditions, Replayed, judge, read_trial, replay
from pcam_automl.search.settling import settle_lost
from pcam_automl.search.slots import Slots
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker
from pcam_automl.training import engine
from pcam_automl.training.engine import Rung, RungResult

CPU = torch.device("cpu")
SPACE = """\
base: {batch_size: 8, crop_size: 32}
parameters:
  backbone: {choice: [test_resnet]}
  lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'studies' / 's.db'}"


@pytest.fixture(scope="module")
def shared(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenStudy:
    """A deterministic study without pruning, 48 views a trial, with one trial; tests add rows of other lineages."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = tmp_path_factory.mktemp("replay")
    (folder / "tiny.yaml").write_text(SPACE)
    asked = Asked(
        data=easy_pack,
        space=str(folder / "tiny.yaml"),
        weights="none",
        views=48,
        device="cpu",
        deterministic=True,
        pruner="none",
    )
    study = create_or_open_study("tiny", url_in(folder), asked, say=lambda text: None)
    torch.set_num_threads(1)
    run_worker(Objective(study, CPU), Limits(1))
    return study


@pytest.fixture
def opened(shared: OpenStudy) -> Iterator[OpenStudy]:
    torch.use_deterministic_algorithms(True)
    yield shared
    torch.use_deterministic_algorithms(False)


def next_number(opened: OpenStudy) -> int:
    return len(opened.study.get_trials(deepcopy=False))


def run_one_more(opened: OpenStudy) -> int:
    """Finish one more trial; returns the number of the last row."""
    run_worker(Objective(opened, CPU), Limits(n_finished_of(opened.study) + 1))
    return next_number(opened) - 1


def add(opened: OpenStudy, row: FrozenTrial, lineage: str | None = None) -> int:
    number = next_number(opened)
    row.user_attrs["lineage"] = lineage or f"added {number}"
    opened.study.add_trial(row)
    return number


def replayed(opened: OpenStudy, number: int) -> Replayed:
    """As another process would: the study opened anew, its checkpoints and scores out of reach."""
    again = open_study(opened.name, opened.url)
    again = replace(again, folder=again.folder / "nothing here")
    trials = again.study.get_trials(deepcopy=False)
    return replay(again, read_trial(trials, number, again.rungs, again.split.hash), CPU)


def test_a_trial_replays_bit_for_bit(opened: OpenStudy) -> None:
    found = replayed(opened, 0)
    assert (found.verdict, found.warnings) == ("bit for bit", ())
    assert [rung.auc for rung in found.rungs] == list(opened.study.trials[0].intermediate_values.values())


def test_a_pruned_trial_is_trained_as_far_as_it_came(opened: OpenStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", lambda trial: True)
        number = run_one_more(opened)
    assert opened.study.trials[number].state == TrialState.PRUNED
    seen: list[int] = []
    trials = opened.study.get_trials()
    found = replay(opened, read_trial(trials, number, opened.rungs, opened.split.hash), CPU, progress=seen.append)
    assert (found.verdict, len(found.rungs)) == ("bit for bit", 1)
    assert seen == [8, 8], "a step to the branch and one of its decay"


def test_a_trial_that_was_interrupted_and_went_on_replays_bit_for_bit(opened: OpenStudy) -> None:
    cut, first = next_number(opened), Objective(opened, CPU)

    def stop() -> None:
        trials = opened.study.get_trials(deepcopy=False)
        if len(trials) > cut and len(trials[cut].intermediate_values) == 2:
            raise Interrupted("enough", 15)

    first.stop = stop
    with pytest.raises(Interrupted):
        run_worker(first, Limits(n_finished_of(opened.study) + 1))
    whole = run_one_more(opened)
    trials = opened.study.trials
    assert trials[cut].user_attrs["lineage"] == trials[whole].user_attrs["lineage"]
    assert (trials[cut].state, trials[whole].state) == (TrialState.FAIL, TrialState.COMPLETE)
    for number, n_rungs in ((cut, 2), (whole, 3)):
        found = replayed(opened, number)
        assert (found.verdict, len(found.rungs)) == ("bit for bit", n_rungs)


def pruning_study(folder: Path, asked: Asked) -> OpenStudy:
    """A deterministic study whose pruner pauses trials."""
    opened = create_or_open_study("tiny", url_in(folder), replace(asked, deterministic=True), say=lambda text: None)
    torch.set_num_threads(1)
    return opened


def hours() -> BudgetClock:
    """Of a budget that leaves time to thaw whatever is paused."""
    return BudgetClock(36_000.0, 0.0, time.monotonic(), 0)


def test_a_row_that_a_search_thawed_replays_bit_for_bit(tmp_path: Path, asked: Asked) -> None:
    opened = pruning_study(tmp_path, asked)
    assert run_worker(Objective(opened, CPU), Limits(3, clock=hours())).why == "done"
    rows = opened.study.get_trials()
    thawed = [row for row in rows if "thawed_from" in row.user_attrs]
    assert thawed, "the search has paused trials and gone on with them"
    for row in (*thawed, *(rows[row.user_attrs["thawed_from"]] for row in thawed)):
        found = replayed(opened, row.number)
        assert (found.verdict, found.warnings) == ("bit for bit", ())
        assert [rung.auc for rung in found.rungs] == [rung["auc"] for rung in row.user_attrs["rungs"]]
    assert {len(row.user_attrs["rungs"]) for row in thawed if row.state == TrialState.COMPLETE} == {3}


class Killer:
    """Hears the workers, and kills the one that has just scored the first rung of trial 1."""

    def __init__(self, opened: OpenStudy) -> None:
        self.slots, self.begun, self.killed = Slots(engine_of(opened.study), opened.name), dict[int, int](), set[int]()

    def __call__(self, event: Heard) -> None:
        if event.kind == "begins":
            self.begun[event.values[0]] = event.worker
        if event.kind == "rung" and event.values[::2] == (1, 1):
            for slot in self.slots.claimed():
                if slot.trial_number == 1 and slot.owner is not None:
                    self.killed.add(int(slot.owner.split(":")[-2]))
                    os.kill(max(self.killed), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")  # of a process that is forked beside threads
def test_rows_of_two_worker_processes_one_of_them_killed_replay_bit_for_bit(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda method: warm_context()))
    opened = pruning_study(tmp_path, asked)
    slots, killer = Slots(engine_of(opened.study), opened.name), Killer(opened)

    def settle() -> str:
        return str(settle_lost(opened.study, slots, opened.study.get_trials(), checkpoints=opened.checkpoints))

    task = WorkerTask(opened.name, opened.url, Asked(data=opened.store.root), Limits(4, clock=hours()), 2)
    with stop_signal("") as stop, stop.deferred():
        assert run_workers(task, ["cpu", "cpu"], stop=stop, heard=killer, settle=settle).why == "done"
    rows = opened.study.get_trials()
    assert len(killer.killed) == 1
    assert rows[1].user_attrs["reason"] == "worker lost"
    scored = [row for row in rows if row.user_attrs.get("rungs")]
    beside = [
        (one, two)
        for one, two in itertools.combinations(scored, 2)
        if killer.begun[one.number] != killer.begun[two.number]
        and one.datetime_start < two.datetime_complete
        and two.datetime_start < one.datetime_complete
    ]
    assert beside, "trials of two processes ran at the same time"
    retried = next(row for row in rows[2:] if row.user_attrs["lineage"] == rows[1].user_attrs["lineage"])
    thawed = [row for row in scored if "thawed_from" in row.user_attrs]
    for number in sorted({row.number for row in (*beside[0], retried, *thawed)}):
        found = replayed(opened, number)
        assert (found.verdict, found.warnings) == ("bit for bit", ()), number


def row_of(trial: FrozenTrial, state: TrialState, n_rungs: int) -> FrozenTrial:
    """The trial's row as it would stand after so many rungs."""
    values = dict(list(trial.intermediate_values.items())[:n_rungs])
    return create_trial(
        state=state,
        value=None if state == TrialState.FAIL else trial.value,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**trial.user_attrs, "rungs": trial.user_attrs["rungs"][:n_rungs]},
        intermediate_values=values,
    )


def test_each_rung_runs_on_the_threads_of_the_row_that_trained_it(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened.study.trials[0]
    for n_rungs, state, threads in ((2, TrialState.PRUNED, 3), (3, TrialState.COMPLETE, 2)):
        row = row_of(whole, state, n_rungs)
        row.user_attrs["threads"] = threads
        number = add(opened, row, "on two machines")
    stored = read_trial(opened.study.get_trials(), number, opened.rungs, opened.split.hash)
    assert [one.threads for one in stored.conditions] == [3, 3, 2]
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(replay_module.torch, "set_num_threads", seen.append)
        replay(opened, stored, CPU)
    assert seen == [3, 3, 2, torch.get_num_threads()]


def test_changed_figures_differ_and_other_conditions_are_named(opened: OpenStudy) -> None:
    whole = opened.study.trials[0]
    wrong = row_of(whole, TrialState.COMPLETE, n_rungs=3)
    wrong.user_attrs["rungs"] = [{**rung, "auc": rung["auc"] - 1e-3} for rung in whole.user_attrs["rungs"]]
    found = replayed(opened, add(opened, wrong))
    assert found.verdict == "differs", "a deterministic trial under the same conditions has no band"
    wrong.user_attrs |= {"cpu": "abacus", "versions": {**whole.user_attrs["versions"], "torch": "0.4"}}
    found = replayed(opened, add(opened, wrong))
    assert found.verdict == "within the band"
    assert found.warnings[0].startswith("cpu: abacus then, ")
    assert found.warnings[1] == f"torch: 0.4 then, {whole.user_attrs['versions']['torch']} now"


def test_steps_that_ran_out_of_memory_are_repeated_with_the_same_micro_batches(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, failed = engine.Training._gradients, []

    def short_of_memory(self: engine.Training, *args: Any) -> Any:
        if self.n_steps == 3 and not failed:
            failed.append(self.micro_batch)
            raise RuntimeError("not enough memory: you tried to allocate 9 bytes")
        return gradients(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Training, "_gradients", short_of_memory)
        number = run_one_more(opened)
    assert failed == [8]
    assert opened.study.trials[number].user_attrs["micro_batches"] == [[0, 8], [3, 4]]
    found = replayed(opened, number)
    assert found.verdict == "bit for bit"  # the failed try had touched nothing yet
    assert "memory was short" in found.warnings[0]


def test_a_diverged_trial_diverges_again(opened: OpenStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = engine.Training.step

    def diverging(self: engine.Training, *args: Any) -> Any:
        if self.n_steps > 2:
            raise TrainingDiverged("the training loss became nan")
        return steps(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Training, "step", diverging)
        number = run_one_more(opened)
        row = opened.study.trials[number]
        assert (row.state, len(row.user_attrs["rungs"])) == (TrialState.PRUNED, 1)
        assert replayed(opened, number).verdict == "bit for bit"
    found = replayed(opened, number)
    assert found.verdict == "differs"
    assert found.warnings == ("the training did not diverge now, other than then",)


def test_a_row_of_an_earlier_release_replays_with_what_it_says(opened: OpenStudy) -> None:
    row = row_of(opened.study.trials[0], TrialState.COMPLETE, n_rungs=3)
    for name in ("rung_plan", "threads", "cpu", "micro_batches"):
        del row.user_attrs[name]
    number = add(opened, row)
    stored = read_trial(opened.study.get_trials(), number, opened.rungs, opened.split.hash)
    assert stored.plan == opened.rungs
    assert [one.threads for one in stored.conditions] == [1, 1, 1]
    found = replay(opened, stored, CPU)
    assert found.verdict == "bit for bit"
    assert "earlier release" in found.warnings[0]
    row.user_attrs["micro_batch"] = 4
    number = add(opened, row)
    again = read_trial(opened.study.get_trials(), number, opened.rungs, opened.split.hash)
    assert again.micro_batches == ((0, 4),)
    assert "from 8 images at a time to 4" in again.notes[0]


def test_changed_data_another_split_and_rows_without_a_score_are_refused(opened: OpenStudy, tmp_path: Path) -> None:
    whole = opened.study.trials[0]
    other = row_of(whole, TrialState.COMPLETE, n_rungs=3)
    other.user_attrs["split_hash"] = "f" * 64
    empty = row_of(whole, TrialState.FAIL, n_rungs=0)
    empty.user_attrs["reason"] = "interrupted"
    first = add(opened, other)
    add(opened, empty)
    trials = opened.study.get_trials()
    for number, message in (
        (first, rf"trial {first} was trained on split ffffffffffff, the study has"),
        (first + 1, rf"trial {first + 1} has no scored rung to compare with \(interrupted\)"),
        (first + 2, rf"there is no trial {first + 2}; the study's are 0 to {first + 1}"),
    ):
        with pytest.raises(StudyError, match=message):
            read_trial(trials, number, opened.rungs, opened.split.hash)
    changed = write_easy_set(tmp_path / "changed", seed=1)
    with pytest.raises(DataError, match="the data changed since the study began"):
        open_study(opened.name, opened.url, Asked(data=changed))


def results(*aucs: float) -> list[RungResult]:
    return [RungResult(i, 10, 10, auc, 0.5, 0.5, 1.0, 1.0, 0.1) for i, auc in enumerate(aucs)]


def test_the_verdict_is_of_the_last_rung_and_an_exact_promise_has_no_band() -> None:
    band = replay_module.BAND
    assert judge(results(0.6, 0.9), results(0.6, 0.9), promised_exact=False) == "bit for bit"
    assert judge(results(0.3, 0.9), results(0.6, 0.9 - 0.9 * band), promised_exact=False) == "within the band"
    assert judge(results(0.6, 0.9), results(0.6, 0.9 - 1.1 * band), promised_exact=False) == "differs"
    assert judge(results(0.6, 0.9), results(0.6, 0.9 + 1e-9), promised_exact=True) == "differs"
    assert judge(results(0.6, 0.9), results(0.6), promised_exact=False) == "differs"


def test_conditions_name_only_what_both_sides_record() -> None:
    one = Conditions("x86_64 CPU", 2, None, {"torch": "2.15", "optuna": "5.0"})
    two = Conditions("NVIDIA H100", None, "abacus", {"torch": "2.15", "optuna": "6.0", "numpy": "2"})
    assert one.differences(two) == ["device: x86_64 CPU then, NVIDIA H100 now"]
    assert one.differences(one) == []


def test_rungs_of_a_row_stand_for_themselves(opened: OpenStudy) -> None:
    """The row's own plan is used, not the study's, which a later plan may have changed."""
    stored = read_trial(opened.study.get_trials(), 0, [Rung(7, 7)], opened.split.hash)
    assert stored.plan == opened.rungs
    assert json.loads(opened.study.trials[0].user_attrs["recipe"])["views"] == 48
