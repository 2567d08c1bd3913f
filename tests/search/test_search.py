"""Whole searches on a tiny study: exact totals, resuming, failures, contradictions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import torch
from easy_set import TINY, write_easy_set
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from PIL import Image
from probe_weights import write_probe_weights
from warm_processes import warm_context

from pcam_automl.configs_folder import find_config, list_configs
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.errors import (
    DataError,
    InputError,
    Interrupted,
    RecipeError,
    SearchFailed,
    StudyError,
    TrainingDiverged,
    WriteError,
)
from pcam_automl.files import sha256_of_file
from pcam_automl.finalize import finalize
from pcam_automl.models.factory import check_backbone, check_runs, smallest_input
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.search import asking as asking_module
from pcam_automl.search import objective as objective_module
from pcam_automl.search.asking import around_recipe, check_networks, default_space
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.settling import Settled, settle_lost
from pcam_automl.search.slots import Slots, owner_of_this_process
from pcam_automl.search.space import load_space, parse_space
from pcam_automl.search.storage import engine_of, open_storage
from pcam_automl.search.study import VALIDATION_FOLD, Asked, OpenStudy, open_study, start_recipe
from pcam_automl.search.summary import summarise
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import SearchEnd, run_worker
from pcam_automl.training import speed as speed_module
from pcam_automl.training.compute import Compute

CPU = torch.device("cpu")
DEAD = f"{owner_of_this_process().partition(':')[0]}:999999999:x"


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'studies' / 's.db'}"


def opened_in(folder: Path, asked: Asked, name: str = "tiny") -> OpenStudy:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    opened = create_or_open_study(name, url_in(folder), asked, say=lambda text: None)
    torch.set_num_threads(1)
    return opened


@pytest.fixture(scope="module")
def small(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study without trials, for tests that open it and change nothing."""
    folder = tmp_path_factory.mktemp("small")
    opened_in(folder, replace(asked, views=64))
    return folder


def search(opened: OpenStudy, n: int, **options: Any) -> SearchEnd:
    return run_worker(Objective(opened, CPU), Limits(n, **options))


def test_a_search_ends_with_its_total_and_repeated_does_nothing(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    assert search(opened, 3) == SearchEnd(3, "done")
    assert search(opened_in(tmp_path, Asked()), 3) == SearchEnd(0, "done")
    assert search(opened_in(tmp_path, Asked()), 4) == SearchEnd(1, "done")
    trials = opened.study.get_trials()
    assert [t.number for t in trials] == [0, 1, 2, 3]
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_trial_carries_everything_that_it_takes_to_repeat_it(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, asked)
    search(opened, 1)
    (trial,) = opened.study.get_trials()
    attrs = trial.user_attrs
    recipe = build_recipe(json.loads(attrs["recipe"]))
    assert recipe.lr == trial.params["lr"]
    assert recipe.backbone == trial.params["backbone"]
    assert (recipe.crop_size, recipe.schedule, recipe.views) == (32, "wsd", 192)
    assert attrs["split_hash"] == opened.split.hash
    assert list(trial.intermediate_values) == [views for views, _ in opened.settings.rungs] == [21, 64, 192]
    assert trial.value == trial.intermediate_values[192]
    assert [rung["views"] for rung in attrs["rungs"]] == [21, 64, 192]
    assert attrs["versions"]["torch"] == torch.__version__.partition("+")[0]
    for name in ("seconds", "images_per_s", "peak_memory_bytes", "n_parameters"):
        assert attrs[name] > 0
    assert (attrs["slot"], attrs["lineage"], attrs["reason"]) == (0, "0", "complete")


def test_trial_0_is_the_known_good_recipe(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, views=64))
    search(opened, 1)
    assert opened.study.trials[0].params["lr"] == pytest.approx(2e-3)


def test_same_seed_same_study_other_seed_another(tmp_path: Path, asked: Asked) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        # Deterministic: which variant of a network is the quickest is measured in each study.
        opened = opened_in(tmp_path / str(number), replace(asked, seed=seed, views=64, deterministic=True))
        search(opened, 3)
        runs.append([(t.params, t.value) for t in opened.study.get_trials()])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def _search_in_process(folder: str, n: int) -> None:
    search(opened_in(Path(folder), Asked()), n)


def test_the_total_is_exact_with_three_processes(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, views=64))
    workers = [warm_context().Process(target=_search_in_process, args=(str(tmp_path), 7)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert n_finished_of(opened.study) == len(opened.study.trials) == 7


def test_an_interrupted_trial_goes_on_from_its_last_rung_in_the_same_slot(tmp_path: Path, asked: Asked) -> None:
    asked = replace(asked, deterministic=True)  # else both would run as they were timed, and differ in the last bits
    whole = opened_in(tmp_path / "whole", asked)
    search(whole, 1)
    opened = opened_in(tmp_path / "cut", asked)
    objective = Objective(opened, CPU)

    def stop() -> None:
        trials = opened.study.get_trials(deepcopy=False)
        if trials and len(trials[-1].intermediate_values) == 2:
            raise Interrupted("enough", 15)

    objective.stop = stop
    with pytest.raises(Interrupted):
        run_worker(objective, Limits(1))
    assert [t.state for t in opened.study.get_trials()] == [TrialState.FAIL]
    assert opened.study.get_trials()[0].user_attrs["reason"] == "interrupted"
    seen: list[int] = []
    again = Objective(opened, CPU)
    again.watch.views = seen.append
    run_worker(again, Limits(1))
    first, second = opened.study.get_trials()
    assert second.state == TrialState.COMPLETE
    assert (second.user_attrs["lineage"], second.user_attrs["slot"]) == ("0", 0)
    assert second.params == first.params
    assert second.value == whole.study.trials[0].value
    assert second.intermediate_values == whole.study.trials[0].intermediate_values
    assert sum(seen) < 192, "the first two rungs were computed again"


@pytest.mark.parametrize(("max_retries", "lineage"), [(3, "0"), (0, "1")])
def test_a_trial_of_a_dead_worker_is_marked_and_its_slot_continued(
    tmp_path: Path, asked: Asked, max_retries: int, lineage: str
) -> None:
    opened = opened_in(tmp_path, replace(asked, views=64))
    slots = Slots(engine_of(opened.study), opened.name)
    dead = warm_context().Process(target=_claim_and_die, args=(str(tmp_path),))
    dead.start()
    dead.join(180)
    assert dead.exitcode == -9
    assert [t.state for t in opened.study.get_trials()] == [TrialState.RUNNING]
    search(opened, 2, max_retries=max_retries)
    states = [t.state for t in opened.study.get_trials()]
    assert states[0] == TrialState.FAIL
    assert opened.study.get_trials()[1].user_attrs["lineage"] == lineage, "given up only after so many retries"
    assert opened.study.get_trials()[0].user_attrs["reason"] == "worker lost"
    assert n_finished_of(opened.study) == 2
    assert slots.counts()["done"] == 2


def claimed_by(study: optuna.Study, slots: Slots, owner: str) -> None:
    slot, trial = slots.claim(9, owner), study.ask()
    assert slot is not None
    trial.set_user_attr("lineage", str(trial.number))
    slots.started(slot, trial.number, str(trial.number))


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_two_processes_may_settle_a_dead_worker_at_once(tmp_path: Path) -> None:
    study, other = (optuna.load_study(study_name="s", storage=open_storage(_empty(tmp_path))) for _ in range(2))
    slots = Slots(engine_of(study), "s")
    claimed_by(study, slots, DEAD)
    read, found = study.get_trials, []

    def read_and_be_overtaken(*args: Any, **options: Any) -> Any:
        trials = read(*args, **options)
        if not found:
            found.append(settle_lost(other, Slots(engine_of(other), "s"), [], checkpoints=tmp_path))
        return trials

    study.get_trials = read_and_be_overtaken  # type: ignore[method-assign]
    assert settle_lost(study, slots, [], checkpoints=tmp_path) == Settled()
    assert found == [Settled((0,))]
    assert [t.state for t in read()] == [TrialState.FAIL]
    assert slots.counts() == {"claimed": 0, "done": 0, "open": 1}


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_worker_that_dies_while_another_is_settled_waits_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(_empty(tmp_path)))
    slots, later = Slots(engine_of(study), "s"), DEAD.replace(":x", ":later")
    claimed_by(study, slots, DEAD)
    claimed_by(study, slots, later)
    asked: list[str] = []

    def alive(owner: str) -> bool:
        asked.append(owner)
        return owner == later and asked.count(later) == 1  # it dies just after it was asked for

    monkeypatch.setattr("pcam_automl.search.settling.owner_alive", alive)
    assert settle_lost(study, slots, [], checkpoints=tmp_path) == Settled((0,))
    assert [t.state for t in study.get_trials()] == [TrialState.FAIL, TrialState.RUNNING]
    assert settle_lost(study, slots, [], checkpoints=tmp_path) == Settled((1,))
    assert [t.state for t in study.get_trials()] == [TrialState.FAIL, TrialState.FAIL]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
@pytest.mark.parametrize(("thawed", "state"), [(False, "open"), (True, "done")])
def test_a_trial_that_is_given_up_leaves_no_checkpoint_and_the_total_exact(
    tmp_path: Path, thawed: bool, state: str
) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(_empty(tmp_path)))
    slots, checkpoints = Slots(engine_of(study), "s"), tmp_path / "checkpoints"
    if thawed:
        claimed_by(study, slots, "elsewhere:1:2")
        slots.finish(slots.all()[0])
        study.tell(0, state=TrialState.PRUNED)
        slot, trial = slots.thaw("0", DEAD), study.ask()
        assert slot is not None
        trial.set_user_attr("lineage", "0")
        slots.started(slot, trial.number, "0")
    else:
        claimed_by(study, slots, DEAD)
    (checkpoints / "0").mkdir(parents=True)
    lost = len(study.get_trials()) - 1
    found = settle_lost(study, slots, [], checkpoints=checkpoints, max_retries=0)
    assert found == Settled((lost,), (lost,))
    assert [slot.state for slot in slots.all()] == [state]
    assert not (checkpoints / "0").exists()


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_lineage_survives_as_many_deaths_as_there_are_retries(tmp_path: Path) -> None:
    study = optuna.load_study(study_name="s", storage=open_storage(_empty(tmp_path)))
    slots, checkpoints = Slots(engine_of(study), "s"), tmp_path / "checkpoints"
    (checkpoints / "0").mkdir(parents=True)
    claimed_by(study, slots, DEAD)
    assert settle_lost(study, slots, [], checkpoints=checkpoints, max_retries=1) == Settled((0,))
    assert [(slot.state, slot.lineage) for slot in slots.all()] == [("open", "0")]
    assert (checkpoints / "0").exists()
    slot, trial = slots.claim(9, DEAD), study.ask()
    assert slot is not None
    trial.set_user_attr("lineage", slot.lineage)
    slots.started(slot, trial.number, "0")
    assert settle_lost(study, slots, [], checkpoints=checkpoints, max_retries=1) == Settled((1,), (1,))
    assert [(slot.state, slot.lineage) for slot in slots.all()] == [("open", None)]
    assert not (checkpoints / "0").exists()


def _empty(folder: Path) -> str:
    url = f"sqlite:///{folder / 's.db'}"
    optuna.create_study(study_name="s", storage=open_storage(url), load_if_exists=True)
    return url


def _claim_and_die(folder: str) -> None:
    import os
    import signal

    objective = Objective(opened_in(Path(folder), Asked()), CPU)
    objective.watch.rung = lambda number, result: os.kill(os.getpid(), signal.SIGKILL)
    run_worker(objective, Limits(1))


def test_failing_trials_are_recorded_and_stop_the_search_in_the_end(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(objective_module, "start_training", broken)
    opened = opened_in(tmp_path, asked)
    with pytest.raises(SearchFailed, match=r"10 trials failed.*10 times: RuntimeError: no kernel image"):
        search(opened, 2)
    trials = opened.study.get_trials()
    assert [t.state for t in trials] == [TrialState.FAIL] * 10
    assert trials[0].params != trials[1].params, "a failed slot must not repeat the recipe that failed"
    assert summarise(opened.study, opened.settings).errors[0].startswith("error: RuntimeError")


def test_failures_of_an_earlier_start_do_not_stop_a_search_whose_cause_was_mended(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the GPU is occupied")

    opened = opened_in(tmp_path, asked)
    with monkeypatch.context() as patch:
        patch.setattr(objective_module, "start_training", broken)
        with pytest.raises(SearchFailed, match="10 trials failed"):
            search(opened, 2)
    assert search(opened, 2) == SearchEnd(2, "done")
    assert n_finished_of(opened.study) == 2


def test_a_trial_whose_database_is_away_is_gone_on_with(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_in(tmp_path, asked)
    report, calls = objective_module.report, []

    def away(*words: Any, **named: Any) -> None:
        calls.append(words)
        if len(calls) == 2:
            gone = sa.exc.OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
            raise StorageInternalError("An exception is raised during the commit.") from gone
        report(*words, **named)

    monkeypatch.setattr(objective_module, "report", away)
    assert search(opened, 1) == SearchEnd(1, "done")
    cut, again = opened.study.get_trials()
    assert cut.state == TrialState.FAIL
    assert cut.user_attrs["reason"].startswith("interrupted: the database: OperationalError: ")
    assert again.params == cut.params
    assert again.user_attrs["lineage"] == cut.user_attrs["lineage"]
    assert again.user_attrs["rungs"][0] == cut.user_attrs["rungs"][0], "its first rung is not trained again"


def test_a_fault_of_the_database_that_stays_is_the_trials_own(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise StorageInternalError("commit") from ValueError("Data too long for column")

    opened = opened_in(tmp_path, asked)
    monkeypatch.setattr(objective_module, "report", refused)
    with pytest.raises(SearchFailed, match=r"10 trials failed.*10 times: ValueError: Data too long"):
        search(opened, 500)
    trials = opened.study.get_trials()
    assert len({trial.user_attrs["lineage"] for trial in trials}) == 10, "its slot takes another recipe"


def test_a_machine_without_the_weights_refuses_before_its_trials_fail(tmp_path: Path, asked: Asked) -> None:
    folder = write_probe_weights(tmp_path / "weights", steps=0)
    opened = opened_in(tmp_path, replace(asked, weights=str(folder), space=None, pins={"backbone": TINY}))
    Objective(opened, CPU)
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(
        StudyError, match=f"trains from the weights in {folder}, where {TINY} is missing on this machine"
    ):
        Objective(opened, CPU)


def test_a_worker_whose_every_trial_fails_ends_whatever_the_others_reach(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(objective_module, "start_training", broken)
    with pytest.raises(SearchFailed, match="10 trials failed"):
        search(opened_in(tmp_path, asked), 500)


def test_a_pack_stands_for_the_raw_folder_and_its_table_of_slides(tmp_path: Path) -> None:
    raw, table = write_easy_set(tmp_path / "raw"), tmp_path / "wsi.csv"
    found = raw / "train_groups.csv"
    found.rename(table)
    opened = opened_in(tmp_path, Asked(data=raw, groups=table, space="quick", weights="none", views=64))
    assert (np.asarray(opened.store.group) >= 0).any()
    again = open_study("tiny", opened.url, Asked(data=opened.store.root))  # as a worker is told where the data are
    assert again.store.content_hash == opened.store.content_hash
    assert open_study("tiny", opened.url, Asked(data=raw)).store.content_hash == opened.store.content_hash
    table.unlink()  # another machine has it elsewhere
    with pytest.raises(
        DataError, match=r"made with --groups .*wsi.csv, which is not here; .*prepare .* --out PACK --groups CSV"
    ):
        open_study("tiny", opened.url, Asked(data=raw))


def test_an_edited_space_is_not_taken_for_the_one_that_the_study_began_with(tmp_path: Path, easy_pack: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "base: {backbone: test_resnet}\nparameters: {lr: {float: [1.0e-3, 1.0e-2], log: true}}\n"
    file.write_text(text)
    mine = Asked(data=easy_pack, space=str(file), weights="none", views=64)
    url = opened_in(tmp_path, mine).url
    file.write_text("# a remark\n" + text)
    open_study("tiny", url, mine)
    file.rename(tmp_path / "moved.yaml")
    open_study("tiny", url, mine)
    file.write_text(text.replace("1.0e-2", "2.0e-2"))
    with pytest.raises(StudyError, match=r"mine.yaml as it is now"):
        open_study("tiny", url, mine)


def test_one_failing_trial_does_not_stop_the_search(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, calls = objective_module.start_training, []

    def once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a cosmic ray")
        return build(*args, **options)

    monkeypatch.setattr(objective_module, "start_training", once)
    opened = opened_in(tmp_path, replace(asked, views=64))
    assert search(opened, 2) == SearchEnd(2, "done")
    assert [t.state == TrialState.FAIL for t in opened.study.get_trials()] == [True, False, False]


def test_a_diverged_training_ends_as_pruned_with_its_reason(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object, **__: object) -> None:
        raise TrainingDiverged("the training loss became nan")

    monkeypatch.setattr(objective_module, "fit", diverged)
    opened = opened_in(tmp_path, asked)
    search(opened, 1)
    (trial,) = opened.study.get_trials()
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"] == "diverged: the training loss became nan"


def memory_was_short_once(monkeypatch: pytest.MonkeyPatch, fault: Exception, n_steps: int = 1) -> None:
    """The first training halves its micro-batch to 4, takes steps with it and ends by the fault."""
    go_on, calls = objective_module.fit, []

    def once(training: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            training.micro_batch, training.n_steps = 4, n_steps
            training.micro_batches.append((0, 4))
            raise fault
        return go_on(training, *args, **options)

    monkeypatch.setattr(objective_module, "fit", once)


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (optuna.TrialPruned("pruned at rung 1 of 3"), TrialState.PRUNED),
        (TrainingDiverged("the training loss became nan"), TrialState.PRUNED),
        (RuntimeError("a cosmic ray"), TrialState.FAIL),
    ],
)
def test_what_fitted_into_memory_is_remembered_however_the_trial_ends(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, fault: Exception, state: TrialState
) -> None:
    memory_was_short_once(monkeypatch, fault)
    opened = opened_in(tmp_path, replace(asked, views=64))
    search(opened, 1)
    trial = opened.study.get_trials()[0]
    assert trial.state == state
    assert str(fault) in trial.user_attrs["reason"]
    recipe = build_recipe(json.loads(trial.user_attrs["recipe"]))
    assert opened.quick_speed_book.compute_for(recipe, CPU).micro_batch == 4


def test_what_no_step_was_taken_with_is_not_remembered(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halved down to pairs that did not fit either: every later training of the network would take pairs."""
    memory_was_short_once(monkeypatch, RuntimeError("not enough memory"), n_steps=0)
    opened = opened_in(tmp_path, replace(asked, views=64))
    search(opened, 1)
    recipe = build_recipe(json.loads(opened.study.get_trials()[0].user_attrs["recipe"]))
    assert opened.quick_speed_book.compute_for(recipe, CPU).micro_batch is None


@pytest.mark.parametrize("broken", [WriteError("no space left"), RuntimeError("CUDA error"), OSError(5, "I/O error")])
def test_a_note_that_cannot_be_made_does_not_hide_how_the_trial_ended(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    memory_was_short_once(monkeypatch, TrainingDiverged("the training loss became nan"))
    opened = opened_in(tmp_path, replace(asked, views=64))
    tried: list[int] = []

    def note(book: object, recipe: object, device: object, micro_batch: int) -> None:
        tried.append(micro_batch)
        raise broken

    monkeypatch.setattr(speed_module.SpeedBook, "note_micro_batch", note)
    assert search(opened, 1) == SearchEnd(1, "done")
    (trial,) = opened.study.get_trials()
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.PRUNED, "diverged: the training loss became nan")
    assert tried == [4]


def test_a_timeout_starts_no_further_trial(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, views=64))
    end = search(opened, 50, timeout_s=1e-9)
    assert end == SearchEnd(0, "timeout")


def test_bad_trials_are_pruned_before_the_last_rung(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, views=144))
    search(opened, 9)
    states = [t.state for t in opened.study.get_trials()]
    assert states.count(TrialState.PRUNED) >= 3
    assert TrialState.COMPLETE in states
    pruned = next(t for t in opened.study.get_trials() if t.state == TrialState.PRUNED)
    assert pruned.user_attrs["reason"].startswith("pruned at rung")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "--seed is 3, the study has 0"),
        ({"holdout": 0.2}, r"--holdout is 0\.2, the study has 0\.0"),
        ({"views": 5000}, "--views is 5000, the study has 64"),
        ({"weights": "hub"}, "--weights is 'hub', the study has 'none'"),
        ({"pins": {"crop_size": 64}}, "--set crop_size is 64, the study has 32"),
        ({"pins": {"dropout": 0.5}}, r"--set dropout is 0\.5, the study has 0\.\d+;"),
        ({"pins": {"input_size": 96}}, "--set input_size is 96, the study has None"),
        ({"pins": {"batch_size": None}}, "--set batch_size must be"),
        ({"pins": {"crop_size": 33, "lr": 0.01}}, r"--set crop_size must be even, got 33 \(did you mean 34\?\)$"),
        (
            {"pins": {"lr": 0.01}},
            r"--set lr is 0\.01, the study has no fixed value: the study searches it in \{'float'",
        ),
        ({"pins": {"backbone": "resnet118"}}, r"--set backbone must be a timm model name, got 'resnet118' \(did you"),
        ({"space": "quick"}, "--space is 'quick', the study has"),
        ({"sampler": "random"}, "--sampler is 'random', the study has 'tpe'"),
    ],
)
def test_contradictions_name_both_values(small: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((StudyError, RecipeError), match=message):
        opened_in(small, replace(Asked(), **change))


def test_a_pin_that_says_what_the_study_does_is_no_contradiction(small: Path) -> None:
    assert opened_in(small, Asked(pins={"crop_size": 32, "input_size": None, "batch_size": 16})).name == "tiny"


def test_what_needs_no_network_is_judged_before_the_hub_is_asked(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[str] = []

    def decide(text: str) -> Any:
        asked_for.append(text)
        raise InputError("the hub was asked")

    monkeypatch.setattr(asking_module, "decide_weights", decide)
    monkeypatch.delenv("PCAM_AUTOML_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.yaml").write_text("parameters: {backbone: {choice: [resnet118]}, droput: {choice: [0.1]}}")
    for change, message in (
        ({"data": None}, "no data"),
        ({"pins": {"backbone": "resnet118"}}, "--set backbone must be a timm model name"),
        ({"space": "odd.yaml"}, r"droput.*odd\.yaml\.parameters\.backbone\.choice must be a timm model name"),
    ):
        with pytest.raises(InputError, match=message):
            opened_in(tmp_path, replace(asked, **change))
    assert asked_for == []
    assert not (tmp_path / "studies").exists()
    with pytest.raises(InputError, match="the hub was asked"):
        opened_in(tmp_path, asked)


def test_only_backbones_that_had_to_be_timed_are_named(tmp_path: Path, asked: Asked) -> None:
    said: list[str] = []
    for name in ("one", "two"):
        create_or_open_study(name, url_in(tmp_path), replace(asked, views=64), say=said.append)
    timed = [line.split(":")[0] for line in said if line.startswith("timed ")]
    assert timed == ["timed test_resnet"]  # once, and only the one that the search starts with


def test_a_pack_that_changed_since_the_study_began_is_refused_with_both_hashes(
    tmp_path: Path, asked: Asked, easy_raw: Path
) -> None:
    opened = opened_in(tmp_path, replace(asked, views=64))
    other = write_easy_set(tmp_path / "other", n_train=80, seed=5)
    with pytest.raises(
        DataError,
        match=rf"the data changed since the study began: pack \w{{12}} .*the study has {opened.store.content_hash[:12]}",
    ):
        opened_in(tmp_path, Asked(data=other))
    assert opened_in(tmp_path, Asked(data=easy_raw)).store.content_hash == opened.store.content_hash


def test_the_holdout_is_in_no_trial(tmp_path: Path, asked: Asked) -> None:
    opened = opened_in(tmp_path, replace(asked, views=64, holdout=0.2))
    holdout = set(opened.split.holdout_rows().tolist())
    objective = Objective(opened, CPU)
    assert holdout
    assert not holdout & set(objective._train_rows.tolist())
    assert not holdout & set(objective._score_rows.tolist())


def test_a_trial_trains_on_no_patch_slide_or_pixels_that_it_is_scored_on(small: Path) -> None:
    opened = opened_in(small, Asked())
    objective, store, fold = Objective(opened, CPU), opened.store, opened.split.fold
    assert set(objective._train_rows.tolist()) == set(np.flatnonzero(fold > VALIDATION_FOLD).tolist())
    assert set(objective._score_rows.tolist()) <= set(np.flatnonzero(fold == VALIDATION_FOLD).tolist())
    recipe = build_recipe({"backbone": TINY, "pretrained": False, "crop_size": 32, "batch_size": 16, "views": 64})
    training, rows = objective.build(recipe, Compute("cpu"))
    assert set(rows.train.tolist()) == set(objective._train_rows.tolist())
    assert set(rows.score.tolist()) == set(objective._score_rows.tolist()) != set()
    assert np.array_equal(training.task.data.score_rows, rows.score)
    assert (store.group[rows.train] >= 0).all()
    assert not set(store.group[rows.train].tolist()) & set(store.group[rows.score].tolist())
    train, score = ({digest.tobytes() for digest in store.digest[part]} for part in (rows.train, rows.score))
    assert not train & score


def test_slow_backbones_get_fewer_views_and_hopeless_ones_are_left_out(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcam_automl.search import plan
    from pcam_automl.training.speed import SpeedBook

    rates = {"test_resnet": 1000.0, "test_vit": 20.0}
    monkeypatch.setattr(SpeedBook, "images_per_s", lambda self, recipe, device: rates[recipe.backbone])
    monkeypatch.setattr(SpeedBook, "knows", lambda self, recipe, device: True)
    opened = opened_in(tmp_path / "a", replace(asked, views=None))
    assert opened.settings.rungs[-1][0] == 20 * opened.settings.plan["n_train"] == plan.LEAST_VIEWS
    assert opened.settings.cap_s == 60.0
    assert opened.settings.plan["estimated"] == []
    objective = Objective(opened, CPU)
    assert objective._share(build_recipe({"backbone": "test_resnet"})) == 1.0
    assert objective._share(build_recipe({"backbone": "test_vit"})) < 1.0
    rates["test_vit"] = 0.01
    opened = opened_in(tmp_path / "b", replace(asked, views=None))
    assert opened.space.choices("backbone") == ("test_resnet",)
    assert "test_vit" in opened.settings.plan["dropped"]


@pytest.mark.parametrize(("times", "dropped"), [(1.5, False), (2.5, True)])
def test_only_the_first_backbone_is_timed_and_a_doubtful_estimate_drops_none(
    times: float, dropped: bool, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcam_automl.search import plan
    from pcam_automl.training.speed import SpeedBook

    timed: list[str] = []

    def images_per_s(self: SpeedBook, recipe: Recipe, device: torch.device) -> float:
        timed.append(recipe.backbone)
        return 1000.0

    monkeypatch.setattr(SpeedBook, "images_per_s", images_per_s)
    monkeypatch.setattr(plan, "training_cost", lambda recipe: cost[recipe.backbone])
    cost = {"test_resnet": 1.0, "test_vit": 4.0}
    opened = opened_in(tmp_path / "a", replace(asked, views=None))
    assert set(timed) == {"test_resnet"}
    settings = opened.settings
    assert settings.plan["images_per_s"] == {"test_resnet": 1000.0, "test_vit": 250.0}
    assert settings.plan["estimated"] == ["test_vit"]
    seconds = plan.trial_seconds(opened.start, opened.rungs, settings.n_score, 1000.0)
    cost["test_vit"] = times * plan.CAP_S / (seconds * plan.SLOWEST_SHARE)  # so many times the limit
    other = opened_in(tmp_path / "b", replace(asked, views=None))
    assert ("test_vit" in other.settings.plan["dropped"]) == dropped


@pytest.mark.parametrize(("slowness", "dropped"), [(0.9, {"test_vit"}), (1.1, {"test_resnet"})])
@pytest.mark.parametrize("start", ["test_resnet", "resnet10t"])
def test_under_a_budget_the_start_keeps_its_network_where_others_as_slow_are_left_out(
    start: str, slowness: float, dropped: set[str], asked: Asked
) -> None:
    """It is left out, too, where it could see less than a fifth of the views. Of networks that are all too slow the quickest stays: a budget
    is spent as well as it can be. The recipe's own network may be missing from the space, for want of weights.
    """
    from pcam_automl.search import plan

    space, default = load_space(str(asked.space)), build_recipe({"backbone": start, "crop_size": 32})
    rate, trial_s = 1e-3, 3.0  # the fewest views are planned, whatever the rate
    speed: Any = SimpleNamespace(
        images_per_s=lambda recipe, _: rate * (1.0 if recipe.backbone == "test_resnet" else 1.01),
        knows=lambda *_: True,
        deterministic=False,
    )
    made = partial(plan.make_plan, space, default, n_train=2000, n_valid=500, device=CPU, speed=speed)
    rungs = plan.build_rungs(plan.LEAST_VIEWS, 2000)
    whole_s = plan.trial_seconds(default, rungs, 500, 1.0)
    rate = whole_s * plan.SLOWEST_SHARE / (2 * trial_s) / slowness
    assert set(made(trial_s=trial_s, cap_s=2.0 * trial_s).dropped) == dropped


def test_without_a_budget_networks_that_are_all_too_slow_are_an_error(asked: Asked) -> None:
    from pcam_automl.search import plan

    space, default = load_space(str(asked.space)), build_recipe({"backbone": "test_resnet", "crop_size": 32})
    speed: Any = SimpleNamespace(images_per_s=lambda *_: 1.0, knows=lambda *_: True, deterministic=False)
    with pytest.raises(RecipeError, match="every backbone of the space is too slow here"):
        plan.make_plan(space, default, n_train=2000, n_valid=500, device=CPU, speed=speed)


@pytest.mark.parametrize("field", ["epochs", "views"])
def test_how_long_a_trial_trains_cannot_be_searched(asked: Asked, field: str) -> None:
    from pcam_automl.search import plan
    from pcam_automl.search.space import parse_space

    space = parse_space(f"parameters: {{{field}: {{choice: [1, 100]}}}}", "s")
    default, speed = build_recipe({"backbone": "test_resnet", "crop_size": 32}), SimpleNamespace()
    with pytest.raises(RecipeError, match=f"{field} cannot be searched: the rungs decide"):
        plan.make_plan(space, default, n_train=2000, n_valid=500, device=CPU, speed=speed)  # type: ignore[arg-type]


def test_a_backbone_without_weights_is_left_out_by_name(tmp_path: Path, asked: Asked) -> None:
    import timm
    from safetensors.torch import save_file

    folder = tmp_path / "w"
    folder.mkdir()
    save_file(timm.create_model("test_resnet").state_dict(), folder / "test_resnet.safetensors")
    said: list[str] = []
    create_or_open_study("w", url_in(tmp_path), replace(asked, views=64, weights=str(folder)), say=said.append)
    assert any("left out, no weights in" in line and "test_vit" in line for line in said)
    with pytest.raises(RecipeError, match="no backbone of the space has weights"):
        create_or_open_study(
            "x", url_in(tmp_path), replace(asked, weights=str(folder), pins={"backbone": "resnet18"}), say=said.append
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pins": {"backbone": "resnet118"}}, RecipeError, "did you mean 'resnet18'"),
        ({"device": "tpu"}, InputError, "--device must be"),
        ({"sampler": "tpee"}, RecipeError, "tpe"),
        ({"pruner": "asho"}, RecipeError, "asha"),
        ({"space": "defualt"}, RecipeError, "did you mean 'default'"),
        ({"holdout": 0.9}, DataError, "holdout must be in"),
        ({"weights": "nowhere"}, RecipeError, "an existing folder"),
        ({"deterministic": True, "views": None}, RecipeError, "--deterministic needs --views"),
        ({"pins": {"views": 10}}, RecipeError, "--views 192 and --set views both name the budget; keep one"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_study(
    tmp_path: Path, asked: Asked, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as fault:
        opened_in(tmp_path, replace(asked, **change))
    assert "\n" not in str(fault.value)
    database = tmp_path / "studies" / "s.db"  # options are judged before it is made
    assert not database.exists() or optuna.get_all_study_names(url_in(tmp_path)) == []


def test_deterministic_studies_repeat_to_the_last_bit_whatever_is_measured(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: Path, step_s: float, channels_last: bool) -> tuple[list[float], str]:
        measured = Compute("cpu", "fp32", channels_last, step_s)
        monkeypatch.setattr(speed_module, "measure_fitting", lambda *_, **__: measured)
        opened = opened_in(folder, replace(asked, deterministic=True))
        search(opened, 2)
        torch.use_deterministic_algorithms(False)
        best = finalize(opened, epochs=1.0, device=CPU)
        weights = sha256_of_file(best.out / "model" / "model.safetensors")
        return [v for t in opened.study.trials for v in t.intermediate_values.values()], weights

    assert trained(tmp_path / "a", 0.01, True) == trained(tmp_path / "b", 9.0, False)


def test_an_absent_study_is_named_with_the_nearest(small: Path) -> None:
    with pytest.raises(StudyError, match=r"there is no study 'tinny' .*did you mean 'tiny'"):
        open_study("tinny", url_in(small))


def test_a_foreign_study_is_refused(tmp_path: Path, asked: Asked) -> None:
    opened_in(tmp_path, replace(asked, views=64))
    optuna.create_study(study_name="plain", storage=url_in(tmp_path))
    with pytest.raises(StudyError, match="was not made by pcam-automl search"):
        open_study("plain", url_in(tmp_path))


STARTS = {
    "default": "default",
    "quick": "default",
    "lr_only": "resnet152v2_transfer",
    "cnn": "keras_cnn_1",
    "dense": "unet_timm",
}


@pytest.mark.parametrize("name", list_configs("recipes"))
def test_trial_0_of_a_search_around_a_recipe_is_that_recipe(name: str) -> None:
    asked = Asked(recipe=name)
    space = around_recipe(load_space(default_space(asked)), asked).pinned({"pretrained": False})
    start = start_recipe(name, False)
    trial = optuna.trial.FixedTrial(space.params_of(start))
    recipe = space.suggest(trial, start.model_dump(), smallest_input=smallest_input)
    assert recipe == start
    check_runs(recipe)


def test_a_holdout_whose_masks_hold_no_tumour_is_refused_before_any_trial(tmp_path: Path) -> None:
    raw = tmp_path / "pairs"
    for number in range(30):
        mask = np.zeros((32, 32), np.uint8)
        mask[:8] = 255 * (number == 0)  # one image with tumour: it cannot be on both sides
        image = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        for folder, pixels in (("images", image), ("masks", mask)):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(raw / folder / f"{number}.png")
    asked = Asked(data=raw, recipe="unet_timm", pins={"tile_size": 32}, weights="none", views=8, device="cpu")
    with pytest.raises(
        DataError, match=r"masks of the validation fold's .* images hold no tumour; choose another --seed"
    ):
        opened_in(tmp_path, asked, "dense")


def test_a_field_that_a_backbone_does_not_have_is_refused_before_any_trial() -> None:
    mixed = "parameters:\n  backbone: {choice: [keras_cnn_1, test_resnet]}\n  cnn_convs: {int: [1, 3]%s}\n"
    start = start_recipe("default", False)
    with pytest.raises(RecipeError, match=r"cnn_convs is no option of backbone test_resnet.* needs `when: {backbone:"):
        check_networks(parse_space(mixed % "", "mixed"), start)
    check_networks(parse_space(mixed % ", when: {backbone: [keras_cnn_1]}", "mixed"), start)


def test_every_shipped_space_has_a_start_here() -> None:
    assert set(STARTS) == set(list_configs("space"))


@pytest.mark.parametrize("name", sorted(STARTS))
def test_shipped_space_gives_recipes_that_run(name: str) -> None:
    space, start = load_space(name, pins={"pretrained": False}), start_recipe(STARTS[name], False)
    for backbone in space.choices("backbone"):
        check_backbone(str(backbone))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(3):
        recipe = space.suggest(study.ask(), {**start.model_dump(), "epochs": None}, smallest_input=smallest_input)
        check_runs(recipe)
        assert recipe.task == start.task
    fixed = optuna.trial.FixedTrial(space.params_of(start))
    if name != "cnn":  # its start is one of its choices, whatever they are
        first = space.suggest(fixed, {**start.model_dump(), "epochs": None}, smallest_input=smallest_input)
        assert first.backbone == start.backbone


@pytest.mark.parametrize("name", list_configs("recipes"))
def test_every_recipe_can_start_a_search(name: str) -> None:
    start = start_recipe(name, pretrained=False)
    own = load_recipe(find_config("recipes", name))
    assert start.schedule == ("wsd" if own.schedule == "one_cycle" and not own.stages else own.schedule)
    check_runs(start)


def test_a_search_starts_from_the_recipe_it_is_given(tmp_path: Path, asked: Asked) -> None:
    (tmp_path / "narrow.yaml").write_text("parameters:\n  weight_decay: {float: [1.0e-6, 1.0e-2], log: true}\n")
    pins = {"crop_size": 64, "batch_size": 16}
    asked = replace(asked, recipe="keras_cnn_1", space=str(tmp_path / "narrow.yaml"), pins=pins, views=64)
    opened = opened_in(tmp_path, asked)
    assert search(opened, 1) == SearchEnd(1, "done")
    recipe = json.loads(opened.study.trials[0].user_attrs["recipe"])
    assert (recipe["backbone"], recipe["optimizer"], recipe["lr"]) == ("keras_cnn_1", "adam", 1e-4)
    assert (recipe["crop_size"], recipe["eps"]) == (64, 1e-7)
    with pytest.raises(StudyError, match="--recipe is 'default', the study has 'keras_cnn_1'"):
        opened_in(tmp_path, replace(asked, recipe="default"))


def test_patience_gives_a_trial_a_rung_an_epoch(tmp_path: Path, asked: Asked) -> None:
    pins = {**(asked.pins or {}), "patience": 2, "schedule": "constant", "epochs": 3}
    opened = opened_in(tmp_path, replace(asked, pins=pins, pruner="none", views=None))
    n_train = opened.settings.plan["n_train"]
    assert [views for views, _ in opened.settings.rungs] == [n_train, 2 * n_train, 3 * n_train]
    search(opened, 1)
    trial = opened.study.trials[0]
    assert trial.value == max(trial.intermediate_values.values())


def test_a_recipe_keeps_its_network_where_no_space_is_given(tmp_path: Path, asked: Asked) -> None:
    asked = replace(
        asked, recipe="keras_cnn_1", space=None, pins={"crop_size": 64, "input_size": 64, "batch_size": 16}, views=64
    )
    opened = opened_in(tmp_path, asked)
    assert opened.space.base["backbone"] == "keras_cnn_1"
    assert opened.space.base["pretrained"] is False


def test_stages_fix_their_rates_for_a_search_too(tmp_path: Path, asked: Asked) -> None:
    said: list[str] = []
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = replace(asked, recipe="densenet169_onecycle", space="default", pins=pins, views=64)
    opened = create_or_open_study("staged", url_in(tmp_path), asked, say=said.append)
    assert any("not searched, since the recipe's stages fix them: lr" in line for line in said)
    assert "lr" not in opened.space.parameters
    with pytest.raises(RecipeError, match="--set lr: the recipe's stages fix it"):
        create_or_open_study("other", url_in(tmp_path), replace(asked, pins={**pins, "lr": 0.1}), say=said.append)


def test_a_dense_study_searches_and_finalizes(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", n_patches=100, n_slides=10, seed=5)
    with (tmp_path / "set" / "sample_submission.csv").open("a") as sample:
        sample.write("f" * 40 + ",0\n")  # no image: a dense study writes maps of those that there are
    asked = Asked(
        data=tmp_path / "set",
        recipe="unet_timm",
        weights="none",
        views=16,
        pins={"tile_size": 32, "batch_size": 4, "backbone": "test_resnet"},
        device="cpu",
        holdout=0.2,
    )
    opened = opened_in(tmp_path, asked, "dense")
    assert search(opened, 1) == SearchEnd(1, "done")
    recipe = json.loads(opened.study.trials[0].user_attrs["recipe"])
    assert (recipe["task"], recipe["decoder"], recipe["tile_size"]) == ("dense", "unet", 32)
    final = finalize(opened, epochs=0.2, device=CPU)
    assert final.maps is not None
    assert opened.store.missing_test_ids == ("f" * 40,)
    test = opened.store.test_rows()
    assert len(list(final.maps.glob("*.png"))) == len(test)
    assert final.on_test == {}  # a Kaggle folder keeps the truth of its test patches to itself
    card = json.loads((final.out / "submission.json").read_text())
    assert card["dice"] >= 0.0
    assert final.auc_95 is not None
    assert final.auc_95[0] <= final.auc <= final.auc_95[1], "over images, whose pixels are not independent"
    assert card["auc_95"] == list(final.auc_95)
