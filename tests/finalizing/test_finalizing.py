"""finalize as a whole on a tiny study with a holdout: confirmed, blended, calibrated, compared; options that do not go together."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

import pcam_automl.finalize as finalize_module
from pcam_automl.batches import open_patches
from pcam_automl.bundle import load_bundle
from pcam_automl.calibration import calibrate, logits_of, probs_at
from pcam_automl.ensemble import open_judge
from pcam_automl.errors import InputError, Interrupted
from pcam_automl.finalize import FinalOptions, FinalResult, FinalWatch, finalize
from pcam_automl.finalizing import decision as decision_module
from pcam_automl.finalizing.blending import Blend, choose_blend
from pcam_automl.finalizing.decision import Decision, decide
from pcam_automl.finalizing.result import check_options, typed
from pcam_automl.goals import goal_of
from pcam_automl.metrics import auc, log_loss, worst_domain_auc
from pcam_automl.predict import build_predictor, row_probs
from pcam_automl.scores import Scores
from pcam_automl.search.confirmations import Candidate, Confirmation, auc_of, top_candidates, value_of_goal
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.objective import Objective
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker
from pcam_automl.train import TrainWatch
from pcam_automl.training.compute import Compute

CPU = torch.device("cpu")
SPACE = "base: {batch_size: 16, crop_size: 32, ema: 0.9}\nparameters:\n  lr: {float: [1.0e-3, 1.0e-2], log: true}\n"


def halves(logits: np.ndarray, label: np.ndarray, group: np.ndarray, **options: Any) -> Blend:
    """Whatever is true: a blend of the two, three to one."""
    found = choose_blend(logits, label, group, **options)
    weights = (0.75, 0.25)
    return replace(found, weights=weights, found=weights, used=True, logits=np.array(weights) @ logits)


@pytest.fixture(scope="module")
def opened(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenStudy:
    """A study with a holdout and two complete trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finalizing")
    (root / "tiny.yaml").write_text(SPACE)
    asked = Asked(
        data=easy_pack,
        space=str(root / "tiny.yaml"),
        weights="none",
        views=96,
        pins={"backbone": "test_resnet"},
        pruner="none",
        holdout=0.25,
        device="cpu",
    )
    study = create_or_open_study("pcam", f"sqlite:///{root / 'pcam.db'}", asked, say=lambda text: None)
    run_worker(Objective(study, CPU), Limits(2))
    return study


@pytest.fixture(scope="module")
def blended(opened: OpenStudy) -> FinalResult:
    """An ensemble of both trials with everything that finalize can say of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decision_module, "choose_blend", halves)
        return finalize(opened, epochs=1.0, device=CPU, options=FinalOptions(confirm=2, ensemble=2, compare=True))


def test_an_ensembles_submission_is_the_calibrated_mean_of_its_members_logits(
    opened: OpenStudy, blended: FinalResult
) -> None:
    card = json.loads((blended.out / "ensemble.json").read_text())
    assert [(m["folder"], m["weight"]) for m in card["members"]] in (
        [("model", 0.75), ("model-2", 0.25)],
        [("model", 0.25), ("model-2", 0.75)],
    )
    test, patches = opened.store.test_rows(), open_patches(opened.store, CPU)
    parts = [build_predictor(load_bundle(blended.out / m["folder"]), Compute("cpu")) for m in card["members"]]
    logits = sum(m["weight"] * p.row_logits(patches, test) for m, p in zip(card["members"], parts, strict=True))
    expected = probs_at(logits, card["calibration"]["temperature"])
    assert blended.submission is not None
    with blended.submission.open() as file:
        written = {line["id"]: float(line["label"]) for line in csv.DictReader(file)}
    assert np.allclose([written[i] for i in opened.store.ids[test]], expected, atol=2e-3)  # bf16 may have predicted
    judge, networks = open_judge(blended.out, CPU)
    assert len(networks) == 2
    assert np.allclose(row_probs(judge, patches, test), [written[i] for i in opened.store.ids[test]], atol=1e-6)
    first = open_judge(blended.out / "model", CPU)[0]
    assert first.temperature == load_bundle(blended.out / "model").calibration.temperature  # type: ignore[union-attr]


def test_what_each_ingredient_was_worth_is_measured_on_the_holdout(opened: OpenStudy, blended: FinalResult) -> None:
    names = [step.name for step in blended.steps]
    assert names == ["one view, last weights", "weight average", "8 views", "temperature", "ensemble of 2"]
    holdout, patches = opened.split.holdout_rows(), open_patches(opened.store, CPU)
    label = np.asarray(opened.store.label)[holdout]
    (_, (model, *_)) = open_judge(blended.out, CPU)
    for step, folder, averaging in zip(
        blended.steps[:3], ("model-raw", "model", "model"), ("none", "none", None), strict=True
    ):
        network = build_predictor(load_bundle(blended.out / folder), model.compute, averaging=averaging)
        assert step.auc == pytest.approx(auc(label, network.row_logits(patches, holdout)))
    by_name = dict(zip(names, blended.steps, strict=True))
    assert by_name["temperature"].auc == pytest.approx(by_name["8 views"].auc, abs=1e-9)
    assert by_name["ensemble of 2"].auc == pytest.approx(blended.auc)
    assert blended.steps[0].auc_gain is None
    raw, kept = (load_bundle(blended.out / name).state for name in ("model-raw", "model"))
    assert any(not torch.equal(raw[name], kept[name]) for name in raw), "the averaged weights are others"


def test_what_was_found_is_written_for_people_and_programs(blended: FinalResult) -> None:
    card = json.loads((blended.out / "submission.json").read_text())
    assert [len(one["values"]) for one in card["confirmed"]] == [1, 1]
    assert card["mean_drop"] == pytest.approx(np.mean([one["search"] - one["mean"] for one in card["confirmed"]]))
    assert card["ensemble"]["used"]
    assert [one["chosen_on"] for one in card["operating"]] == [card["operating"][0]["on"]] * 2
    assert set(card["calibration_on_holdout"]) == {"log_loss", "error"}
    assert len(card["compare"]) == 5
    with (blended.out / "thresholds.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10
    assert {line["rule"] for line in lines} == {
        "sensitivity 0.90",
        "sensitivity 0.95",
        "sensitivity 0.99",
        "Youden",
        "0.5",
    }
    with (blended.out / "reject.csv").open() as file:
        assert [float(line["coverage"]) for line in csv.DictReader(file)][:3] == [1.0, 0.95, 0.9]
    assert blended.auc_on.startswith("holdout of")


def test_a_later_single_network_leaves_no_ensemble_behind_and_is_not_trained_again(
    opened: OpenStudy, blended: FinalResult
) -> None:
    weights = blended.out / "model" / "model.safetensors"
    trained = weights.stat().st_mtime_ns

    def stop() -> None:
        raise Interrupted("enough", signal.SIGTERM)

    with pytest.raises(Interrupted):  # in a training of another length
        finalize(
            opened,
            which=str(blended.trial),
            epochs=2.0,
            device=CPU,
            options=FinalOptions(confirm=0),
            watch=FinalWatch(train=TrainWatch(stop=stop)),
        )
    assert len(open_judge(blended.out, CPU)[1]) == 2, "what was there is whole"
    again = finalize(
        opened, which=str(blended.trial), epochs=1.0, device=CPU, options=FinalOptions(confirm=1, compare=True)
    )
    assert weights.stat().st_mtime_ns == trained
    assert not (again.out / "ensemble.json").exists()
    assert not (again.out / "model-2").exists()
    assert [step.name for step in again.steps] == ["one view, last weights", "weight average", "8 views", "temperature"]
    plain = finalize(opened, which=str(blended.trial), epochs=1.0, device=CPU, options=FinalOptions(confirm=0))
    assert load_bundle(plain.out / "model").calibration is None
    assert json.loads((plain.out / "submission.json").read_text())["confirmed"] == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (12.0, "12"), (0.9999999, "0.9999999"), (123.4567, "123.4567"), (1e-9, "1e-09")]
)
def test_a_number_of_the_command_is_typed_with_all_of_its_digits(value: float, text: str) -> None:
    assert typed(value) == text
    assert float(text) == value


@pytest.mark.parametrize(
    ("options", "which", "dense", "n_holdout", "fault"),
    [
        (
            FinalOptions(compare=True),
            "best",
            False,
            0,
            "--compare needs slides that the final network has not seen.*--holdout 0.1",
        ),
        (FinalOptions(ensemble=4), "best", False, 9, "--ensemble must be at most --confirm, got 4 and 3"),
        (
            FinalOptions(ensemble=2),
            "7",
            False,
            9,
            r"goes with --trial best and --pick best, not with a single trial \(here 7\)",
        ),
        (FinalOptions(ensemble=2), "best", True, 9, "--ensemble 2 belongs to task patch"),
        (FinalOptions(compare=True), "best", True, 9, "--compare belongs to task patch"),
        (FinalOptions(confirm=-1), "best", False, 9, "--confirm must be 0 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_training(
    options: FinalOptions, which: str, dense: bool, n_holdout: int, fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        check_options(options, which=which, dense=dense, n_holdout=n_holdout)


class Slides:
    """As much of a store as a decision reads."""

    def __init__(self, n: int) -> None:
        self.group = np.arange(n) // 2 % 20
        self.group_names = tuple(map(str, range(20)))


def confirmation(trial: int, prob: np.ndarray | None, label: np.ndarray, rows: np.ndarray) -> Confirmation:
    scores = None if prob is None else Scores(rows, label, prob, "fold 1")
    value = None if prob is None else auc(label, prob)
    parts = (str(trial), trial, 1, "", 0.9, value, value, len(rows), 10, 10, 1.0, 1.0)
    return Confirmation(*parts, diverged="NaN" if prob is None else None, one_view=scores, scores=scores)


def candidates(n: int) -> list[Candidate]:
    return [Candidate(str(k), optuna.create_trial(value=0.9)) for k in range(n)]


def predictions(n: int, noises: tuple[float, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    rng, label = np.random.default_rng(0), np.arange(n) % 2
    return label, [1 / (1 + np.exp(-(2.0 * label - 1 + rng.normal(0, noise, n)) * 3)) for noise in noises]


def test_the_confirmed_best_wins_and_its_probabilities_are_calibrated() -> None:
    label, probs = predictions(800, (2.0, 1.0))
    found = [confirmation(k, prob, label, np.arange(800)) for k, prob in enumerate(probs)]
    made = decide(candidates(2), found, Slides(800))  # type: ignore[arg-type]
    assert [member.lineage for member in made.members] == ["1"]
    assert made.weights == (1.0,)
    assert made.calibration is not None
    assert made.calibrations == (made.calibration,)
    assert made.calibration.log_loss[1] < made.calibration.log_loss[0]
    assert made.oof is not None
    expected = probs_at(logits_of(probs[1]), made.calibration.temperature)
    assert np.allclose(made.oof.prob, expected)
    assert made.blend is None


def test_where_one_view_is_predicted_it_is_one_view_that_is_calibrated() -> None:
    label, (views, plain) = predictions(800, (1.0, 2.0))
    (found,) = [confirmation(0, views, label, np.arange(800))]
    found = replace(found, one_view=Scores(np.arange(800), label, plain, "fold 1"))
    made = decide(candidates(1), [found], Slides(800), one_view=True)  # type: ignore[arg-type]
    assert made.one_view
    assert made.oof is not None
    assert made.calibration is not None
    assert made.oof_auc == pytest.approx(auc(label, plain))
    assert np.allclose(made.oof.prob, probs_at(logits_of(plain), made.calibration.temperature))


def test_of_confirmed_trials_that_tie_speed_counts_on_one_machine_only() -> None:
    label, (prob,) = predictions(800, (1.0,))
    pair = [confirmation(k, prob, label, np.arange(800)) for k in (0, 1)]
    device = "x86_64 CPU, 2 threads"
    slow, quick = (
        replace(one, images_per_s=rate, device=device, cpu="a") for one, rate in zip(pair, (100.0, 300.0), strict=True)
    )
    for cpu, expected in (("a", "1"), ("b", "0")):
        made = decide(candidates(2), [slow, replace(quick, cpu=cpu)], Slides(800))  # type: ignore[arg-type]
        assert made.members[0].lineage == expected


def test_members_are_those_that_help_the_confirmed_best_first() -> None:
    label, probs = predictions(2000, (2.0, 1.9, 30.0))
    found = [confirmation(k, prob, label, np.arange(2000)) for k, prob in enumerate(probs)]
    made = decide(candidates(3), found, Slides(2000), most_members=2)  # type: ignore[arg-type]
    assert made.blend is not None
    assert made.blend.used
    assert {member.lineage for member in made.members} == {"0", "1"}
    assert made.members[0].lineage == made.confirmed[0].lineage
    assert len(made.calibrations) == 2
    assert json.dumps(made.to_json(), allow_nan=False)


def test_each_member_has_the_weight_and_the_temperature_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranked they are 1, 2, 0, and the candidates come in another order."""
    label, probs = predictions(2000, (1.4, 1.0, 1.2))
    found = [confirmation(k, prob, label, np.arange(2000)) for k, prob in enumerate(probs)]
    weights, singles = (0.2, 0.3, 0.5), list[int]()
    logits = [logits_of(probs[k]) for k in (1, 2, 0)]

    def of_all_three(logits: np.ndarray, *words: Any, single: int, **options: Any) -> Blend:
        singles.append(single)
        blend = choose_blend(logits, *words, single=single, **options)
        return replace(blend, weights=weights, used=True, logits=np.array(weights) @ logits)

    monkeypatch.setattr(decision_module, "choose_blend", of_all_three)
    made = decide(candidates(3), found, Slides(2000), most_members=3)  # type: ignore[arg-type]
    assert singles == [0]
    assert [one.lineage for one in made.confirmed] == ["1", "2", "0"]
    assert [member.lineage for member in made.members] == ["1", "0", "2"], "the best, then by weight"
    assert made.weights == (0.2, 0.5, 0.3)
    assert made.calibration is not None
    own = [calibrate(logits[k], label, made.calibration.on) for k in (0, 2, 1)]
    assert made.calibrations == tuple(own)
    assert len({one.temperature for one in own}) == 3
    assert made.calibration == calibrate(np.array(weights) @ np.stack(logits), label, made.calibration.on)


def test_a_study_of_the_log_loss_takes_the_least_though_another_has_the_higher_auc() -> None:
    label, (sure, noisy) = predictions(800, (2.0, 2.5))
    humble = probs_at(logits_of(noisy), 8.0)
    found = [confirmation(k, prob, label, np.arange(800)) for k, prob in enumerate((sure, humble))]
    assert auc(label, sure) > auc(label, humble)
    assert log_loss(label, sure) > log_loss(label, humble)
    value_of = value_of_goal(goal_of("log_loss"), np.zeros(800, np.int32))
    made = decide(candidates(2), found, Slides(800), value_of=value_of, maximise=False)  # type: ignore[arg-type]
    assert made.members[0].lineage == "1"
    assert [one.values for one in made.confirmed] == [(log_loss(label, humble),), (log_loss(label, sure),)]
    assert decide(candidates(2), found, Slides(800)).members[0].lineage == "0"  # type: ignore[arg-type]


def test_a_confirmations_value_is_the_studys_figure_in_the_plain_view() -> None:
    label, (prob, averaged) = predictions(400, (1.0, 0.5))
    rows, domain = np.arange(100, 500), np.random.default_rng(1).integers(0, 2, 600)
    one = confirmation(0, prob, label, rows)
    assert one.one_view is not None
    one = replace(one, scores=replace(one.one_view, prob=averaged), auc_views=auc(label, averaged))
    values = {name: value_of_goal(goal_of(name), domain) for name in ("auc", "log_loss", "worst_domain_auc")}
    assert values["auc"] is auc_of, "by which decide knows that speed may settle ties"
    assert values["auc"](one) == auc(label, prob)
    assert values["log_loss"](one) == log_loss(label, prob)
    assert values["worst_domain_auc"](one) == worst_domain_auc(label, prob, domain[rows]) != auc(label, prob)
    assert np.isnan(value_of_goal(goal_of("worst_domain_auc"), np.zeros(600, np.int32))(one)), (
        "of one domain none is worst"
    )
    assert all(np.isnan(value_of(confirmation(1, None, label, rows))) for value_of in values.values())


def test_where_every_fresh_training_diverges_the_search_has_its_way() -> None:
    label = np.arange(10) % 2
    made = decide(candidates(2), [confirmation(1, None, label, np.arange(10))], Slides(10))  # type: ignore[arg-type]
    assert [member.lineage for member in made.members] == ["0"]
    assert made.calibration is None
    assert decide(candidates(2), [], Slides(10)).confirmed == ()  # type: ignore[arg-type]


def test_networks_that_were_scored_on_other_rows_are_not_blended() -> None:
    label, probs = predictions(800, (1.0, 1.1))
    found = [confirmation(0, probs[0], label, np.arange(800)), confirmation(1, probs[1], label, np.arange(2, 802))]
    made = decide(candidates(2), found, Slides(802), most_members=2)  # type: ignore[arg-type]
    assert [member.lineage for member in made.members] == ["0"]


@pytest.mark.parametrize(
    ("gap", "speeds", "taken"), [(0.0, (1.0, 3.0), "1"), (0.0, (3.0, 1.0), "0"), (1.0, (1.0, 3.0), "0")]
)
def test_of_confirmed_trials_that_tie_the_cheapest_is_taken(
    gap: float, speeds: tuple[float, float], taken: str
) -> None:
    label, (prob,) = predictions(800, (0.7,))
    other = prob - gap * prob * (np.arange(800) % 3 == 0)
    found = [
        replace(confirmation(k, one, label, np.arange(800)), images_per_s=speed)
        for k, (one, speed) in enumerate(zip((prob, other), speeds, strict=True))
    ]
    made = decide(candidates(2), found, Slides(800))  # type: ignore[arg-type]
    assert [member.lineage for member in made.members] == [taken]
    assert made.confirmed[0].lineage == "0"
    assert (made.tie is None) == (taken == "0")
    assert made.tie is None or "takes 3.0 times as long" in made.tie
    assert made.to_json()["tie"] == made.tie
    untimed = decide(candidates(2), found, Slides(800), timed=False)  # type: ignore[arg-type]
    assert (untimed.members[0].lineage, untimed.tie) == ("0", None), "in a deterministic study no measurement decides"
    on_two = [replace(one, fold=fold) for one in found for fold in (1, 2)]
    assert decide(candidates(2), on_two, Slides(800)).members[0].lineage == "0"  # type: ignore[arg-type]


def test_a_tie_is_not_said_of_a_blend_that_does_without_the_tied_one(monkeypatch: pytest.MonkeyPatch) -> None:
    label, (prob,) = predictions(800, (0.7,))
    found = [
        replace(confirmation(k, prob, label, np.arange(800)), images_per_s=speed)
        for k, speed in enumerate((1.0, 3.0, 1.0))
    ]
    assert decide(candidates(3), found, Slides(800)).tie is not None  # type: ignore[arg-type]

    def without_the_cheap_one(logits: np.ndarray, *words: Any, **options: Any) -> Blend:
        return replace(choose_blend(logits, *words, **options), weights=(0.5, 0.0, 0.5), used=True)

    monkeypatch.setattr(decision_module, "choose_blend", without_the_cheap_one)
    made = decide(candidates(3), found, Slides(800), most_members=2)  # type: ignore[arg-type]
    assert [member.lineage for member in made.members] == ["0", "2"]
    assert made.tie is None


@pytest.mark.parametrize("n_confirmed", [0, 1])
def test_where_no_two_confirmations_fit_ties_are_settled_by_the_search(
    opened: OpenStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_confirmed: int
) -> None:
    """As `status` and the search's end have said: "without a confirmation finalize takes trial N"."""
    best = top_candidates(opened.study, 2)
    other = best[1].trial.number
    confirm = finalize_module.confirm
    monkeypatch.setattr(
        finalize_module, "confirm", lambda opened, found, **rest: confirm(opened, found[:n_confirmed], **rest)
    )

    def settled(opened: OpenStudy, which: str, note: Callable[[str], None]) -> str:
        note(f"trial {other} is taken: it is cheaper")
        return str(other)

    monkeypatch.setattr(finalize_module, "settle_ties", settled)
    decided: list[Decision] = []
    notes: list[str] = []
    watch = FinalWatch(TrainWatch(note=notes.append), decided=decided.append)
    options = FinalOptions(confirm=2, seconds=60.0)
    made = finalize(opened, epochs=1.0, device=CPU, options=options, out=tmp_path / "final", watch=watch)
    assert made.trial == other
    assert [one.trial for one in decided[0].confirmed] == [other] * n_confirmed, "its own is kept"
    assert (decided[0].calibration is not None) == (n_confirmed == 1)
    assert f"trial {other} is taken: it is cheaper" in notes


def test_two_confirmations_decide_whatever_the_search_says_of_ties(
    opened: OpenStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = top_candidates(opened.study, 2)[1].trial.number
    monkeypatch.setattr(finalize_module, "settle_ties", lambda opened, which, note: note("settled") or str(other))
    decided: list[Decision] = []
    notes: list[str] = []
    watch = FinalWatch(TrainWatch(note=notes.append), decided=decided.append)
    options = FinalOptions(confirm=2, seconds=600.0)
    finalize(opened, epochs=1.0, device=CPU, options=options, out=tmp_path / "final", watch=watch)
    assert len(decided[0].confirmed) == 2
    assert decided[0].tie is not None or decided[0].members[0].lineage == decided[0].confirmed[0].lineage
    assert "settled" not in notes


def test_a_blend_for_the_auc_is_no_answer_to_another_objective() -> None:
    options = FinalOptions(ensemble=2)
    check_options(options, which="best", dense=False, n_holdout=9)
    with pytest.raises(InputError, match="blends for the AUC over all patches, and this study's objective is log_loss"):
        check_options(options, which="best", dense=False, n_holdout=9, objective="log_loss")
