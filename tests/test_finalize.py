"""Finalize: the chosen trial, resuming after a kill to the same weights, holdout, locks."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pytest
import torch
from easy_set import TINY, write_easy_set
from hypothesis import given
from hypothesis import strategies as st
from planted_study import probs_of, scored_trial, settings_of, study_with
from safetensors.torch import load_file
from warm_processes import run_warm

import pcam_automl.finalize as finalize_module
import pcam_automl.finalizing.seconds as seconds_module
import pcam_automl.search.budget as budget_module
from pcam_automl import cli
from pcam_automl.augment import augment_spec
from pcam_automl.bundle import check_bundle_target, load_bundle
from pcam_automl.calibration import logits_of
from pcam_automl.commands.final_card import final_card, holdout_scores
from pcam_automl.commands.report import study_commands
from pcam_automl.commands.status import final_of
from pcam_automl.data.splits import make_split
from pcam_automl.data.store import open_store
from pcam_automl.ensemble import member_folder
from pcam_automl.errors import DataError, Interrupted, StudyError, TrainingDiverged
from pcam_automl.files import locked
from pcam_automl.finalize import FinalOptions, FinalWatch, final_recipe, finalize
from pcam_automl.finalizing.choice import choose_trial, settle_ties
from pcam_automl.finalizing.recipe import augmented_for, recipe_by_clock, recipe_of_study
from pcam_automl.finalizing.result import words_of
from pcam_automl.metrics import auc, log_loss
from pcam_automl.recipe import Recipe
from pcam_automl.scores import Scores
from pcam_automl.search.budget import set_budget
from pcam_automl.search.confirmations import Confirmation, read_confirmation
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.whose_folder import ID_KEY
from pcam_automl.search.worker import run_worker
from pcam_automl.train import TrainWatch, checkpoints_beside, epoch_rungs, stage_ends
from pcam_automl.training.engine import RungResult
from pcam_automl.training.pace import Pace
from pcam_automl.training.schedule import rates_at

CPU = torch.device("cpu")
ONE = FinalOptions(confirm=0)
SPACE = "base: {batch_size: 16, crop_size: 32}\nparameters:\n  lr: {float: [1.0e-3, 1.0e-2], log: true}\n"


@pytest.fixture(scope="module")
def made(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with one finished trial of a tiny network, to be copied."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(SPACE)
    asked = Asked(
        data=easy_pack, space="tiny.yaml", weights="none", views=96, pins={"backbone": "test_resnet"}, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("PCAM_AUTOML_STORAGE", raising=False)
        study = create_or_open_study("pcam", None, asked, say=lambda text: None)
        run_worker(Objective(study, CPU), Limits(1))
        engine_of(study.study).dispose()
    return folder / "studies"


@pytest.fixture
def opened(made: Path, in_tmp: Path) -> OpenStudy:
    """A study with one finished trial, in the working folder."""
    torch.set_num_threads(1)
    shutil.copytree(made, in_tmp / "studies")
    return open_study("pcam", None)


def test_a_training_that_shows_every_patch_more_often_is_augmented_more() -> None:
    recipe = Recipe(augment=0.5, shift_px=8.0, hue=0.04)
    for epochs, strength in ((0.0, 0.5), (35.0, 0.5), (47.5, 0.75), (60.0, 1.0), (1e4, 1.0)):
        longer = augmented_for(recipe, epochs)
        spec, own = augment_spec(longer), augment_spec(recipe)
        assert longer.augment == strength
        assert spec.shift_px == pytest.approx(own.shift_px), "the centre decides the label"
        assert spec.hue == pytest.approx(2 * strength * own.hue)
        assert (spec.flips, spec.crop_size) == (own.flips, own.crop_size)
        assert augmented_for(longer, 35.0) == longer
    for own in (0.0, 0.9, 1.0):
        assert augmented_for(Recipe(augment=own), 1e4).augment == (0.0 if own == 0.0 else 1.0)


def test_a_final_training_by_the_clock_is_augmented_for_the_epochs_that_it_will_have(opened: OpenStudy) -> None:
    trial, rows = opened.study.trials[0], opened.split.order
    recipe, n = recipe_of_study(opened, trial, None, rows)
    rate = trial.user_attrs["images_per_s"]
    long = 60.0 * n

    def strength(opened: OpenStudy, views: float) -> float:
        return recipe_by_clock(opened, trial, recipe, n, views).augment

    assert recipe.augment > 0.0
    assert strength(opened, long) == min(1.0, 2 * recipe.augment)
    assert strength(opened, 35.0 * n) == recipe.augment, "by what is left, where nothing was planned"

    def planned(short: bool, epochs: float) -> OpenStudy:
        plan = {"total_s": 1000.0, "final_s": epochs * n / rate + 7.0, "predict_s": 7.0, "short": short}
        return replace(
            opened, settings=opened.settings.model_copy(update={"plan": {**opened.settings.plan, "budget": plan}})
        )

    set_budget(opened.study, 1000.0)
    assert strength(planned(True, 48.0), long) == pytest.approx(1.5 * recipe.augment)
    assert strength(planned(True, 30.0), long) == recipe.augment, (
        "more time is left than planned, which may be gone after a pause"
    )
    assert strength(planned(False, 1.0), long) == min(1.0, 2 * recipe.augment), (
        "of a search the winner's speed counts, not the start's"
    )
    for name in ("augment", "hue"):
        named = replace(opened, space=opened.space.pinned({name: getattr(recipe, name)}))
        assert strength(named, long) == recipe.augment, "somebody named it"


def test_what_was_trained_or_begun_keeps_its_augmentation(opened: OpenStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever seconds are left then: by them alone another recipe would be trained anew."""
    begun, own = list[Recipe](), json.loads(opened.study.trials[0].user_attrs["recipe"])["augment"]
    whole = finalize_module.train_to_bundle

    def train(recipe: Recipe, *args: Any, **options: Any) -> Any:
        begun.append(recipe)
        return whole(recipe, *args, **options)

    monkeypatch.setattr(finalize_module, "train_to_bundle", train)
    ends = iter((60.0, 20.0, 20.0))
    monkeypatch.setattr(
        finalize_module,
        "pace_of",
        lambda *_: Pace(time.monotonic() + next(ends), 1e5, 3, saved_every_s=0.0, most_views=96),
    )
    monkeypatch.setattr(Pace, "n_expected", lambda self: 6000.0 if self.left_s() > 30 else 96.0)
    options = FinalOptions(confirm=0, seconds=60.0)

    def cut_off(result: RungResult) -> None:
        if result.rung == 1:  # the checkpoint of the part before is on the disk
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        finalize(opened, options=options, device=CPU, watch=FinalWatch(train=TrainWatch(epoch=cut_off)))
    finalize(opened, options=options, device=CPU)
    assert [one.augment for one in begun] == [min(1.0, 2 * own)] * 2, "it goes on as it began"
    finalize(opened, options=options, device=CPU)
    assert len(begun) == 2, "it is there"


def finalize_and_die(at: int, inside: bool) -> None:
    """`finalize` that is killed at its checkpoint number ``at``: before it, or between its first file and the second."""
    import pcam_automl.training.checkpoint as checkpoint
    from pcam_automl.training import fit

    write, calls = fit.write_checkpoint, []

    def die(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process went on")

    def dying(folder: Path, **options: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            if not inside:
                die()
            checkpoint.xxhash = SimpleNamespace(xxh3_128_hexdigest=die)
        write(folder, **options)

    fit.write_checkpoint = dying
    sys.argv = ["pcam-automl", "finalize", "--confirm", "0", "--epochs", "4", "--device", "cpu"]
    cli.main()


def finalize_on_a_full_disk() -> None:
    """RLIMIT_FSIZE below a checkpoint's size: every write of weights fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    sys.argv = ["pcam-automl", "finalize", "--confirm", "0", "--epochs", "2", "--device", "cpu"]
    cli.main()


@pytest.mark.parametrize(("at", "inside"), [(1, False), (3, False), (2, True)])
def test_killed_and_repeated_ends_in_the_weights_of_an_uninterrupted_run(
    opened: OpenStudy, in_tmp: Path, at: int, inside: bool
) -> None:
    whole = finalize(opened, out=in_tmp / "whole", epochs=4.0, device=CPU, options=ONE)
    code, errors = run_warm(in_tmp, finalize_and_die, at, inside)
    assert code == -signal.SIGKILL, errors
    assert not (opened.folder / "final" / "model").exists()
    again = finalize(opened, epochs=4.0, device=CPU, options=ONE)
    one, two = (load_file(result.out / "model" / "model.safetensors") for result in (whole, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert whole.submission is not None
    assert again.submission is not None
    assert whole.submission.read_bytes() == again.submission.read_bytes()
    assert not [f for f in (opened.folder / "final").iterdir() if f.name.endswith((".checkpoints", ".partial"))]


def test_a_second_finalize_into_one_folder_is_refused(opened: OpenStudy, in_tmp: Path) -> None:
    out = in_tmp / "out"
    out.mkdir()
    with locked(out / ".model.lock", busy="x"), pytest.raises(DataError, match="another process is training into"):
        finalize(opened, out=out, epochs=1.0, device=CPU, options=ONE)


def test_disk_full_while_finalizing_is_one_line_and_resumes(opened: OpenStudy, in_tmp: Path) -> None:
    code, errors = run_warm(in_tmp, finalize_on_a_full_disk)
    assert code == 2, errors
    assert "no space left to write" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert finalize(opened, epochs=2.0, device=CPU, options=ONE).submission is not None


def test_the_recipe_is_the_trials_for_the_whole_data(opened: OpenStudy) -> None:
    trial = choose_trial(opened.study, "best")
    recipe = final_recipe(trial, 96, None)
    assert recipe.schedule == "one_cycle"
    assert recipe.epochs == 4.0, "four times the 96 views of the trial, on 96 patches"
    assert recipe.views is None
    assert recipe.lr == trial.params["lr"]
    assert final_recipe(trial, 10_000, None).epochs == 3.0
    assert final_recipe(trial, 4, None).epochs == 20.0


def test_a_schedule_of_its_own_keeps_its_epochs(opened: OpenStudy) -> None:
    trial = choose_trial(opened.study, "best")
    recipe = json.loads(trial.user_attrs["recipe"]) | {"schedule": "constant", "subsample": 0.5}
    trial.user_attrs["recipe"] = json.dumps(recipe)
    final = final_recipe(trial, 10_000, None, own_epochs=10.0)
    assert (final.schedule, final.epochs, final.subsample) == ("constant", 10.0, 1.0)
    assert final_recipe(trial, 96, None, planned=False, own_epochs=10.0).epochs == 1.0
    assert final_recipe(trial, 10_000, None).epochs == 3.0


def test_after_an_early_end_the_epochs_up_to_the_kept_one_are_trained(opened: OpenStudy) -> None:
    trial = choose_trial(opened.study, "best")
    recipe = json.loads(trial.user_attrs["recipe"]) | {"schedule": "constant", "patience": 2, "monitor": "auc"}
    trial.user_attrs["recipe"] = json.dumps(recipe)
    first = trial.user_attrs["rungs"][0]
    trial.user_attrs["rungs"] = [
        {**first, "rung": n, "views": 50 * (n + 1), "subset": 50, "auc": auc}
        for n, auc in enumerate((0.6, 0.9, 0.8, 0.7))
    ]
    final = final_recipe(trial, 10_000, None)
    assert (final.epochs, final.patience) == (2.0, None)


def test_every_labelled_patch_less_the_holdout_is_trained_on(opened: OpenStudy) -> None:
    result = finalize(opened, epochs=1.0, device=CPU, options=ONE)
    card = json.loads((result.out / "model" / "bundle.json").read_text())
    assert card["provenance"]["n_train"] == len(opened.store.development_rows()) == 120
    assert card["provenance"]["pack_hash"] == opened.store.content_hash
    assert result.auc == opened.study.trials[0].value
    submission = json.loads((result.out / "submission.json").read_text())
    assert (submission["trial"], submission["n_test"], submission["test_time_views"]) == (0, 30, 8)


def test_only_finished_trials_can_be_chosen(opened: OpenStudy) -> None:
    opened.study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.FAIL))
    with pytest.raises(StudyError, match="trial 1 of study 'pcam' is FAIL"):
        choose_trial(opened.study, "1")


def test_epochs_become_rungs_that_end_at_the_views() -> None:
    assert [r.views for r in epoch_rungs(Recipe(epochs=2.5), 100)] == [100, 200, 250]
    assert [r.views for r in epoch_rungs(Recipe(views=30), 100)] == [30]
    assert [r.views for r in epoch_rungs(Recipe(epochs=3.0, schedule="wsd"), 100)] == [300]


def test_read_only_data_serves_a_whole_run(easy_pack: Path, in_tmp: Path) -> None:
    """A pack that nothing may write to: root ignores rights, so the files are watched instead."""
    before = {f: f.stat().st_mtime_ns for f in easy_pack.iterdir()}
    asked = Asked(
        data=easy_pack,
        weights="none",
        views=64,
        pins={"backbone": "test_resnet", "crop_size": 32, "batch_size": 16},
        device="cpu",
    )
    study = create_or_open_study("ro", None, asked, say=lambda text: None)
    run_worker(Objective(study, CPU), Limits(1))
    finalize(study, epochs=1.0, device=CPU, options=ONE)
    assert {f: f.stat().st_mtime_ns for f in easy_pack.iterdir()} == before
    assert np.isfinite(study.study.best_value)


def test_stages_end_at_rungs_of_their_own() -> None:
    stages = ({"share": 0.3, "lr": 1e-2}, {"share": 0.7, "lr": 1e-3})
    recipe = Recipe.model_validate({"epochs": 4, "stages": stages})
    assert stage_ends(recipe, 400) == (120, 400)
    assert [rung.views for rung in epoch_rungs(recipe, 100)] == [100, 120, 200, 300, 400]


@given(n=st.integers(2, 5000), share=st.floats(0.01, 0.99), epochs=st.floats(0.5, 9.0))
def test_the_first_step_of_a_stage_has_its_rates(n: int, share: float, epochs: float) -> None:
    stages = ({"share": share, "lr": 1e-2}, {"share": 1.0 - share, "lr": 1e-3})
    recipe = Recipe.model_validate({"epochs": epochs, "schedule": "constant", "warmup": 0.0, "stages": stages})
    end = recipe.n_views(n)
    first, _ = stage_ends(recipe, end)
    assert rates_at(recipe, first - 1, end=end, horizon=end).phase == 0
    if first < end:
        assert rates_at(recipe, first, end=end, horizon=end).phase == 1


def test_a_bundle_of_another_holdout_is_not_taken_for_done(opened: OpenStudy) -> None:
    """A deleted study made anew under its name: the same recipe, other patches set aside."""
    trained: list[int] = []
    watch = FinalWatch(train=TrainWatch(begins=lambda recipe, compute, views: trained.append(views)))
    finalize(opened, epochs=1.0, device=CPU, watch=watch, options=ONE)
    finalize(opened, epochs=1.0, device=CPU, watch=watch, options=ONE)
    assert len(trained) == 1
    again = make_split(opened.store, seed=0, holdout=0.3)
    assert len(again.holdout_rows())
    finalize(replace(opened, split=again), epochs=1.0, device=CPU, watch=watch, options=ONE)
    assert len(trained) == 2


def test_best_is_the_cheapest_trial_that_the_best_does_not_beat(easy_pack: Path, tmp_path: Path) -> None:
    store, said = open_store(easy_pack), list[str]()
    prob = probs_of(store, 0.1)
    trials = [scored_trial(store, tmp_path, 0, prob), scored_trial(store, tmp_path, 1, prob, images_per_s=300.0)]
    study = study_with(trials)
    opened = cast(OpenStudy, SimpleNamespace(study=study, settings=settings_of(store), folder=tmp_path, store=store))
    assert settle_ties(opened, "best", said.append) == "1"
    assert said[-1].startswith("trial 1 is taken: trial 0 scored the same and takes")
    assert settle_ties(opened, "highest", said.append) == "highest"
    assert choose_trial(study, "highest").number == choose_trial(study, "best").number == 0
    assert settle_ties(opened, "0", said.append) == "0"
    (tmp_path / "trials" / "0" / "scores.csv").unlink()
    assert settle_ties(opened, "best", said.append) == "best"
    assert said[-1].startswith("ties are not looked for: no interval can be drawn")


def test_a_longer_training_is_not_taken_for_done_and_a_shorter_one_is(opened: OpenStudy) -> None:
    """A larger budget, or none: recipe and patches are the same, and the network has seen too few images."""
    trained, notes = list[int](), list[str]()
    train = TrainWatch(begins=lambda recipe, compute, views: trained.append(views), note=notes.append)
    watch = FinalWatch(train=train)

    def within(seconds: float | None) -> None:
        options = FinalOptions(confirm=0, seconds=seconds, keep_back=0.0)
        finalize(opened, device=CPU, watch=watch, options=options)

    within(1.0)
    within(0.5)
    assert len(trained) == 1, "what is there has seen more than would fit now"
    within(20.0)
    assert len(trained) == 2
    assert any("are planned now: it is trained anew" in note for note in notes)
    within(None)
    within(0.5)
    assert len(trained) == 2, "the recipe's own epochs are fewer images than it has seen"


def test_scores_of_an_earlier_network_do_not_outlive_it(opened: OpenStudy) -> None:
    """They are of slides that the later one has seen."""
    first = finalize(opened, epochs=1.0, device=CPU, options=FinalOptions(confirm=0, keep_back=0.2))
    bundle = load_bundle(first.out / "model")
    assert holdout_scores(first.out / "model", final_card(first.out / "model", bundle), opened.store) is not None
    second = finalize(opened, epochs=1.0, device=CPU, options=FinalOptions(confirm=0))
    assert second.out == first.out
    assert not (second.out / "scores.csv").exists()
    card = final_card(second.out / "model", load_bundle(second.out / "model"))
    (second.out / "scores.csv").write_text("of an older version that left it")
    assert card["n_held"] == 0
    assert holdout_scores(second.out / "model", card, opened.store) is None


def test_slides_kept_back_are_predicted_once_though_they_calibrate_and_judge(opened: OpenStudy) -> None:
    """Of three minutes on a slow machine the second time took 3 %, which nobody had reserved."""
    told: list[str] = []
    watch = FinalWatch(predicting=lambda n, what: told.append(what))
    made = finalize(
        opened, epochs=1.0, device=CPU, watch=watch, options=FinalOptions(confirm=0, keep_back=0.2, compare=True)
    )
    assert told.count("slides kept back") == 1
    assert told.count("test") == 1
    assert load_bundle(made.out / "model").calibration is not None
    assert [step.name for step in made.steps][-1] == "8 views"
    assert made.steps[-1].auc == pytest.approx(made.auc, abs=1e-9)


def test_where_eight_views_take_too_much_of_a_budget_each_patch_is_shown_once(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_budget(opened.study, 60.0)
    monkeypatch.setattr(budget_module, "MOST_PREDICT_SHARE", 1e-9)
    notes: list[str] = []
    watch = FinalWatch(train=TrainWatch(note=notes.append))
    options = FinalOptions(confirm=0, seconds=2.0, keep_back=0.2)
    made = finalize(opened, device=CPU, watch=watch, options=options)
    card = json.loads((made.out / "submission.json").read_text())
    assert (card["test_time_views"], card["test_time_averaging"]) == (1, "none")
    assert card["auc_on"].endswith(", in one view each")
    assert load_bundle(made.out / "model").recipe.tta == "dihedral", "whoever has time for eight views has them"
    n = len(opened.store.test_rows()) + len(made.scores.rows if made.scores is not None else ())
    assert any(f"{n} patches are predicted in one view each" in note for note in notes)
    monkeypatch.undo()
    again = finalize(opened, device=CPU, options=options)
    assert json.loads((again.out / "submission.json").read_text())["test_time_views"] == 8


def test_how_many_views_a_budget_has_time_for_is_asked_once(opened: OpenStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured: a second answer may be another one, and the figures would be of other views than the test patches get."""
    set_budget(opened.study, 60.0)
    answers = iter((None, "none"))
    monkeypatch.setattr(finalize_module, "averaging_within", lambda *_: next(answers))
    made = finalize(opened, device=CPU, options=FinalOptions(confirm=1, seconds=20.0, keep_back=0.0))
    assert made.decision is not None
    assert made.decision.oof is not None
    card = json.loads((made.out / "submission.json").read_text())
    assert card["test_time_views"] == 8
    assert "in one view each" not in card["auc_on"]


def test_figures_of_confirmations_are_of_the_views_that_the_test_patches_get(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_budget(opened.study, 60.0)
    monkeypatch.setattr(budget_module, "MOST_PREDICT_SHARE", 1e-9)
    options = FinalOptions(confirm=1, seconds=20.0, keep_back=0.0)
    made = finalize(opened, device=CPU, options=options)
    assert made.decision is not None
    (folder,) = opened.folder.glob("confirmations/*/fold*")
    confirmed, fitted = read_confirmation(folder, opened.store), made.decision.calibration
    assert confirmed is not None
    assert confirmed.one_view is not None
    assert confirmed.scores is not None
    assert made.decision.oof is not None
    assert fitted is not None
    judged = logits_of(made.decision.oof.prob) * fitted.temperature
    assert np.allclose(judged, logits_of(confirmed.one_view.prob), atol=1e-4)
    assert not np.allclose(judged, logits_of(confirmed.scores.prob), atol=1e-4)
    card = json.loads((made.out / "submission.json").read_text())
    assert card["test_time_views"] == 1
    assert card["auc_on"].startswith(f"{made.decision.oof.on}, in one view each")


def test_a_final_training_that_diverges_names_the_way_out_and_leaves_nothing_to_go_on_from(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*args: object, **options: object) -> None:
        checkpoints_beside(member_folder((opened.folder / "final").resolve(), 0)).mkdir(parents=True)
        raise TrainingDiverged("the training loss became nan")

    monkeypatch.setattr(finalize_module, "train_to_bundle", diverges)
    with pytest.raises(StudyError, match=r"trial 0 diverged \(the training loss became nan\).*--trial N"):
        finalize(opened, epochs=1.0, device=CPU, options=ONE)
    assert not checkpoints_beside(member_folder((opened.folder / "final").resolve(), 0)).exists()


def test_the_report_s_commands_hold_what_finalize_was_asked(opened: OpenStudy) -> None:
    made = finalize(opened, epochs=1.0, threshold=0.4, device=CPU, options=FinalOptions(confirm=0, keep_back=0.2))
    words = "--threshold 0.4 --epochs 1 --confirm 0 --keep-back 0.2"
    assert json.loads((made.out / "submission.json").read_text())["finalize"] == words
    finalize(opened, epochs=1.0, device=CPU, options=FinalOptions(confirm=0, keep_back=0.2))  # the network stays
    assert json.loads((made.out / "submission.json").read_text())["finalize"] == words.removeprefix("--threshold 0.4 ")
    commands = study_commands("pcam", None, opened.settings, opened.study.get_trials(), None, str(words))
    assert commands[-1] == f"pcam-automl finalize {words}"
    plain = {"which": "best", "pick": "best", "threshold": None, "epochs": None}
    assert words_of(FinalOptions(), **plain, budget_s=None) == []  # type: ignore[arg-type]
    assert words_of(FinalOptions(seconds=9.0), **plain, budget_s=60.0) == []  # type: ignore[arg-type]
    assert words_of(FinalOptions(ensemble=2, submission=False), **plain, budget_s=60.0) == [  # type: ignore[arg-type]
        *("--no-budget", "--ensemble", "2", "--no-submission")
    ]


def test_an_older_network_s_figures_are_not_said_of_a_newer_one(
    opened: OpenStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    made = finalize(opened, epochs=1.0, device=CPU, options=ONE)
    own = opened.study.user_attrs[ID_KEY]
    found = final_of(opened.folder, own, "")
    assert found is not None
    assert found["auc"] == pytest.approx(made.auc)
    assert final_of(opened.folder, "of the study that took its name", "") is None
    assert "is of a deleted study of this name" in capsys.readouterr().err
    card = json.loads((made.out / "submission.json").read_text())
    (made.out / "submission.json").write_text(json.dumps({**card, "train_s": card["train_s"] + 1.0}))
    found = final_of(opened.folder, own, " --study tiny")
    assert found == {
        "model": str(opened.folder / "final" / "model"),
        "trial": 0,
        "trials": [0],
        "auc": None,
        "auc_on": None,
        "auc_95": None,
    }
    assert "is of an older network" in (said := capsys.readouterr().err.replace("\n", " "))
    assert "repeat `pcam-automl finalize --study tiny --epochs 1" in said


def test_a_cut_off_final_training_goes_on_and_no_other_trial_is_confirmed_meanwhile(
    opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was confirmed costs no time again, so that another would fit, might win, and take the training's place."""
    asked: list[dict[str, Any]] = []

    def confirmed(*args: object, **options: Any) -> list[object]:
        asked.append(options)
        return []

    monkeypatch.setattr(finalize_module, "confirm", confirmed)
    monkeypatch.setattr(seconds_module, "Pace", partial(Pace, saved_every_s=0.0))
    options = FinalOptions(confirm=1, seconds=4.0, keep_back=0.0)

    def part(result: RungResult) -> None:
        if result.rung == 2:
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        finalize(opened, device=CPU, watch=FinalWatch(train=TrainWatch(epoch=part)), options=options)
    finalize(opened, epochs=1.0, out=opened.folder / "other", device=CPU, options=options)
    notes: list[str] = []
    finalize(opened, device=CPU, watch=FinalWatch(train=TrainWatch(note=notes.append)), options=options)
    assert [one["stored_only"] for one in asked] == [False, False, True]
    assert asked[0]["seconds"] > 0.0
    assert any("no other trial is confirmed before that is done" in note for note in notes)


@pytest.mark.parametrize(("objective", "maximise"), [("log_loss", False), ("auc", True)])
def test_the_confirmed_are_compared_by_the_studys_objective(
    objective: str, maximise: bool, opened: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a study of the log-loss would end with its worst trial."""
    asked: list[dict[str, Any]] = []

    def decided(*args: object, **options: Any) -> None:
        asked.append(options)
        raise StudyError("it is decided")

    monkeypatch.setattr(finalize_module, "confirm", lambda *args, **options: [])
    monkeypatch.setattr(finalize_module, "decide", decided)
    settings = opened.settings.model_copy(update={"objective": objective})
    with pytest.raises(StudyError, match="it is decided"):
        finalize(replace(opened, settings=settings), epochs=1.0, device=CPU, options=FinalOptions(confirm=1))
    label, prob = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.9])
    value = auc(label, prob)
    parts = ("0", 0, 1, "", None, value, value, 4, 10, 10, 1.0, 1.0)
    one = Confirmation(*parts, one_view=Scores(np.arange(4), label, prob, "fold 1"))
    assert asked[0]["value_of"](one) == (value if objective == "auc" else log_loss(label, prob))
    assert asked[0]["maximise"] is maximise


def test_a_test_patch_that_cannot_be_read_gets_the_share_of_positives(in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_test=8)
    table = (raw / "train_labels.csv").read_text().splitlines()
    table[1:31] = [line[:-1] + "1" for line in table[1:31]]  # 75 of 120 positive, which no network says of a patch
    (raw / "train_labels.csv").write_text("\n".join(table) + "\n")
    broken = (raw / "sample_submission.csv").read_text().splitlines()[3].partition(",")[0]
    os.truncate(raw / "test" / f"{broken}.tif", 500)
    pins = {"backbone": TINY, "crop_size": 32, "batch_size": 16}
    asked = Asked(data=raw, weights="none", views=64, pins=pins, device="cpu")
    study = create_or_open_study("broken", None, asked, say=lambda text: None)
    run_worker(Objective(study, CPU), Limits(1))
    made = finalize(study, epochs=1.0, device=CPU, options=ONE)
    assert made.submission is not None
    with made.submission.open() as file:
        written = {line["id"]: float(line["label"]) for line in csv.DictReader(file)}
    assert len(written) == 8
    assert written.pop(broken) == 75 / 120
    assert 75 / 120 not in written.values()
    assert len({*written.values()}) == 7
    (note,) = (note for note in made.notes if "cannot be read" in note)
    assert broken in note
    assert note.startswith("1 test patches")
    assert not [name for name in written if name in note]


def test_a_folder_that_is_mounted_is_no_place_for_a_bundle() -> None:
    with pytest.raises(DataError, match=r"--out / is a mount point.*name a folder inside it"):
        check_bundle_target(Path("/"))
