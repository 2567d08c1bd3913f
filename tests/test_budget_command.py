"""`search --budget` and the `finalize` that spends the rest, as a user types them."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

import pcam_automl.finalize as finalize_module
import pcam_automl.search.budget as budget_module
import pcam_automl.search.create as create_module
import pcam_automl.search.plan as plan_module
from pcam_automl.commands import models
from pcam_automl.commands.search import Work, _budget
from pcam_automl.errors import Interrupted, NoStudyError
from pcam_automl.files import sha256_of_file
from pcam_automl.report import rehearsal
from pcam_automl.search.budget import budget_of, set_budget
from pcam_automl.search.ledger import Ledger, intervals_of, spent_parts, spent_s
from pcam_automl.search.lineages import lineages_of
from pcam_automl.search.objective import Objective
from pcam_automl.search.overview import overview
from pcam_automl.search.reading import CLOCK_KEY, load_study
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import open_study
from pcam_automl.terminal import duration
from pcam_automl.training.pace import N_PARTS, Pace

SPACE = """\
base: {batch_size: 16, crop_size: 32}
parameters:
  backbone: {choice: [test_resnet, test_vit]}
  lr: {float: [1.0e-3, 1.0e-2], log: true}
"""


@pytest.fixture
def run(command_line: Any, in_tmp: Path) -> Any:
    """A command line beside a small space of its own."""
    (in_tmp / "tiny.yaml").write_text(SPACE)
    return command_line


def beside(err: str) -> dict[str, list[str]]:
    """The last table of what was planned and what was: row to its cells."""
    lines = err.splitlines()
    last = max(number for number, line in enumerate(lines) if line.split() == ["planned", "was"])
    ends = [match.end() for match in re.finditer(r"\S+", lines[last])]
    found = {}
    for line in lines[last + 1 :]:
        name, *cells = re.split(r"\s{2,}", line.strip())
        if not line.startswith("  ") or len(cells) < 2:
            break
        assert [line[end - 1] != " " for end in ends] == [True, True], "columns end beneath their heads"
        found[name] = cells
    return found


def test_a_search_and_its_finalize_share_a_budget(run: Any, easy_pack: Path) -> None:
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none")
    code, out, err = run("search", *options, "--budget", "24s")
    assert code == 0, err
    assert re.search(r"budget 24 s, [0-9.]+ s of it spent: search", err)
    planned = re.search(r"planned: about (.+) trials reach rungs 1 to 3, a whole trial takes about (.+)", err)
    search = re.search(r"spent: search (.+) \(start-up", err)
    assert planned
    assert search
    assert "the search's part of the budget is over" in err
    table = beside(err)
    assert list(table) == ["search", "trials at rungs 1 to 3", "a whole trial"]
    assert [cells[0] for cells in table.values()] == [search[1], planned[1], planned[2]]
    reached = re.search(r"(\d+ -> \d+ -> \d+) reached rungs 1 to 3", err)
    assert reached
    assert table["trials at rungs 1 to 3"][1] == reached[1]
    study, _ = load_study("pcam")
    assert table["search"][1] == duration(spent_s(study))
    assert budget_of(study) == 24.0
    (searched,) = intervals_of(study)
    assert searched.command == "search"
    assert 1.0 < searched.seconds < 24.0
    n = len(lineages_of(study.get_trials()))

    code, _, err = run("search", *options, "--budget", "24s")  # its part is over: nothing more is begun
    assert code == 0, err
    assert len(lineages_of(load_study("pcam")[0].get_trials())) == n
    assert run("search", *options, "--budget", "10s")[2].strip().splitlines()[-1].endswith("another --study name")

    before = spent_s(load_study("pcam")[0])
    code, out, err = run("finalize", "--no-report", "--json")
    assert code == 0, err
    assert "of the budget of 24 s are left for finalize" in err
    assert "as many epochs as fit the budget" in err
    assert "part  20 of 20" in err
    assert Path(json.loads(out)["submission"]).is_file()
    study, _ = load_study("pcam")
    assert [one.command for one in intervals_of(study)] == ["search", "finalize"], (
        "the second search found nothing to do"
    )
    assert spent_s(study) > before
    table = beside(err)
    assert [name for name in table if name != "confirmations"] == [
        *("search", "final training, prediction", "in all", "trials at rungs 1 to 3", "a whole trial")
    ]
    assert table["in all"][0] == "24 s"
    assert re.fullmatch(r"[+-]\d+\.\d%", table["in all"][2])
    assert table["search"] == [search[1], duration(before)]
    card = json.loads((Path(json.loads(out)["out"]) / "model" / "bundle.json").read_text())
    assert card["provenance"]["views_seen"] == card["metrics"]["epochs"][-1]["views"]
    assert len(card["metrics"]["epochs"]) == 20

    whole = spent_s(study)
    code, _, err = run("search", *options, "--budget", "24s", "--finalize")
    assert code == 0, err
    study, _ = load_study("pcam")
    assert spent_s(study) == whole, "a repetition trains nothing and is free"


def short_search(monkeypatch: pytest.MonkeyPatch, pack: Path, *, least_views: int) -> tuple[object, ...]:
    """Options of a search of two whole trials, for which a busy machine has time enough, too."""
    monkeypatch.setattr(budget_module, "MOST_FINAL_EPOCHS", 1e6)  # a tiny set's final training would have enough
    for name, value in {"LEAST_TRIAL_S": 0.5, "SHORT_SHARE": 0.8, "ROW_S": 6.0}.items():
        monkeypatch.setattr(budget_module, name, value)
    monkeypatch.setattr(plan_module, "LEAST_VIEWS", least_views)
    return ("--data", pack, "--set", "backbone=test_resnet", "--weights", "none", "--budget", "18s")


def test_a_budget_too_short_to_search_in_goes_to_the_final_training(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = short_search(monkeypatch, easy_pack, least_views=90)
    code, _, err = run("search", *options)
    assert code == 0, err
    assert "too little time to search in: 2 whole trials" in err
    assert "final training and prediction" in err
    assert "confirmation" not in err
    assert "planned: a whole trial takes about " in err
    assert "2 trials, 2 complete, 0 went on after a pause" in err
    assert beside(err)["whole trials"] == ["2", "2"]
    assert beside(err)["search"][0].startswith("at most ")
    assert "first: recipe default; recipe default at 96 px shown at 64\n" in err
    study, _ = load_study("pcam")
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert [(trial.params["crop_size"], trial.params["upscale"]) for trial in trials] == [(64, 1.0), (96, 0.67)]
    assert [trial.params["batch_size"] for trial in trials] == [32, 32]
    (line,) = overview(engine_of(study))
    assert (line.total, line.wants_workers) == (2, False)
    assert run("search", *options)[0] == 0
    assert len(load_study("pcam")[0].get_trials()) == 2, "its trials are made"
    code, _, err = run("search", "--data", easy_pack, "--trials", 2)
    assert (code, "made for a short budget: its trials have one rung" in err) == (0, True)
    code, out, _ = run("audit")
    assert (code, "a trial has one rung here" in out, "regret" in out) == (0, True, False)

    code, out, err = run("finalize", "--no-report", "--json")
    assert code == 0, err
    assert "is not confirmed: its seconds go to the final training" in err
    assert beside(err)["final training, prediction"][0].startswith("at least ")
    assert "confirmations" not in beside(err)
    assert "part  20 of 20" in err
    assert Path(json.loads(out)["submission"]).is_file()


def test_the_second_of_two_whole_trials_sees_what_is_left_at_the_first_one_s_pace(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off by the clock it could not be compared: so it was in two of three runs of three minutes."""
    options = short_search(
        monkeypatch, easy_pack, least_views=600
    )  # the cap on seconds shall not bind at 96 px on a busy machine
    pace = Objective._pace
    monkeypatch.setattr(Objective, "_pace", lambda self: 1e9)
    assert run("search", *options)[0] == 0
    first, second = load_study("pcam")[0].get_trials()
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.COMPLETE)
    assert second.user_attrs["views_share"] == pytest.approx(plan_module.SLOWEST_SHARE, abs=0.01)
    assert first.user_attrs["views_share"] > 0.3

    objective = Objective(open_study("pcam", None), torch.device("cpu"))
    paces = []
    for rate in (100.0, 200.0):
        objective._speed = SimpleNamespace(images_per_s=lambda recipe, device, rate=rate: rate)  # type: ignore[assignment]
        paces.append(pace(objective))
    assert paces[1] == pytest.approx(2 * paces[0])
    took = [sum(rung["seconds"] for rung in row.user_attrs["rungs"]) for row in (first, second)]
    views = [row.user_attrs["rung_plan"][-1][0] for row in (first, second)]
    assert 0.0 < paces[0] < sum(took) * 100.0 / sum(views), "more is expected than the last rung's views"


def test_a_second_whole_trial_that_was_cut_off_sees_what_is_left_when_it_goes_on(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = short_search(monkeypatch, easy_pack, least_views=600)
    check = Objective._check

    def cut_off(self: Objective) -> None:
        if self.number == 1:
            raise Interrupted("enough", 15)
        check(self)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "_check", cut_off)
        assert run("search", *options)[0] != 0
    monkeypatch.setattr(Objective, "_pace", lambda self: 1e9)  # as if hardly any time were left
    assert run("search", *options)[0] == 0
    first, cut, second = load_study("pcam")[0].get_trials()
    assert [row.state for row in (first, cut, second)] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert second.user_attrs["lineage"] == cut.user_attrs["lineage"]
    assert second.params == cut.params
    assert cut.user_attrs["views_share"] > 0.3
    assert second.user_attrs["views_share"] == pytest.approx(plan_module.SLOWEST_SHARE, abs=0.01)


def test_whoever_says_how_to_search_gets_a_search(run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "MOST_FINAL_EPOCHS", 1e6)
    monkeypatch.setattr(budget_module, "LEAST_TRIAL_S", 0.5)
    monkeypatch.setattr(plan_module, "LEAST_VIEWS", 90)
    options = ("--data", easy_pack, "--set", "backbone=test_resnet", "--weights", "none", "--budget", "60s")
    code, _, err = run("search", *options, "--sampler", "random", "--trials", 1)
    assert code == 0, err
    assert "too little time to search in" not in err
    assert "confirmation 6.0 s" in err


def test_a_used_up_budget_is_said_with_the_ways_out(run: Any, easy_pack: Path) -> None:
    code, _, err = run(
        *("search", "--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--trials", 1, "--views", 64)
    )
    assert code == 0, err
    study, _ = load_study("pcam")
    assert intervals_of(study) == [], "a study without a budget counts no seconds"
    set_budget(study, 3600.0)
    code, _, err = run("search", "--budget", "10m")
    assert code == 2
    assert "--budget is 10 min 00 s, study 'pcam' has 1 h 00 min" in err
    assert load_study("pcam")[0].user_attrs.get(CLOCK_KEY) is None, "workers that join are not told of what was refused"
    set_budget(study, 0.001)
    code, _, err = run("finalize", "--no-report")
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: study 'pcam' has used up its budget")
    assert "--epochs E, or --no-budget" in line
    assert run("finalize", "--no-report", "--epochs", 1, "--confirm", 0)[0] == 0
    n_booked = len(intervals_of(load_study("pcam")[0]))
    assert run("finalize", "--no-report", "--confirm", 0, "--no-budget")[0] == 0
    assert len(intervals_of(load_study("pcam")[0])) == n_booked, "what goes beyond a budget is not booked on it"
    assert optuna.load_study(study_name="pcam", storage="sqlite:///studies/pcam.db").user_attrs


def test_what_was_trained_is_completed_though_the_budget_is_used_up(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the test patches are predicted: little of the budget is left, and start-up takes it."""
    code, _, err = run(
        *("search", "--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--trials", 1, "--views", 64)
    )
    assert code == 0, err
    study, _ = load_study("pcam")
    set_budget(study, 30.0)

    def cut_off(*_: object, **__: object) -> None:
        raise Interrupted("interrupted", 2)

    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "finish_patches", cut_off)
        patch.setattr(finalize_module, "pace_of", lambda *_: Pace(0.0, 1000.0))  # a step or two each part
        assert run("finalize", "--no-report")[0] == 130
    trained = sha256_of_file(Path("studies/pcam/final/model/model.safetensors"))
    set_budget(study, 0.001)
    code, _, err = run("finalize", "--no-report", "--keep-back", 0)
    assert (code, "has used up its budget" in err) == (2, True), "a network on other patches would be a new training"
    code, _, err = run("finalize", "--no-report")
    assert code == 0, err
    assert "the budget is used up: what an earlier finalize trained is completed" in err
    assert Path("studies/pcam/final/submission.csv").is_file()
    assert sha256_of_file(Path("studies/pcam/final/model/model.safetensors")) == trained
    set_budget(study, spent_s(study) + 30.0)
    card = Path("studies/pcam/final/model/bundle.json")
    card.write_text(re.sub(r'"views_seen": \d+', '"views_seen": 99999999', card.read_text()))
    code, _, err = run("finalize", "--no-report", "--keep-back", 0)
    assert (code, "holds a network of this study that has seen 99,999,999 images" in err) == (2, True), err
    set_budget(study, 0.001)
    shutil.rmtree("studies/pcam/final/model")
    assert run("finalize", "--no-report")[0] == 2, "nothing is left to complete"


def test_confirmations_are_told_from_the_final_training_across_an_interruption(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--views", 64)
    assert run("search", *options, "--trials", 2)[0] == 0
    study, _ = load_study("pcam")
    set_budget(study, 60.0)
    monkeypatch.setattr(finalize_module, "pace_of", lambda *_: Pace(0.0, 1000.0))  # a step or two each part

    def cut_off(*_: object) -> None:
        raise Interrupted("interrupted", 2)

    with monkeypatch.context() as patch:
        patch.setattr(models, "say_confirmed", cut_off)
        assert run("finalize", "--no-report")[0] == 130
    (cut,) = intervals_of(load_study("pcam")[0])
    took = [json.loads(file.read_text())["seconds"] for file in Path("studies/pcam/confirmations").rglob("*.json")]
    assert 0.0 < took[0] < cut.confirm_s < cut.seconds
    code, _, err = run("finalize", "--no-report")
    assert code == 0, err
    assert err.count("confirming trial") == 1, "the other one is stored"
    study, _ = load_study("pcam")
    went_on = intervals_of(study)[1]
    assert 0.0 < went_on.confirm_s < went_on.seconds
    table, parts = beside(err), spent_parts(intervals_of(study))
    assert parts.confirm_s == pytest.approx(cut.confirm_s + went_on.confirm_s)
    assert table["confirmations"] == ["6.0 s", duration(parts.confirm_s)]
    for row, seconds in (("final training, prediction", parts.final_s), ("in all", spent_s(study))):
        said = float(table[row][1].removesuffix(" s"))
        assert said == pytest.approx(seconds, abs=1.0), "all but the command's last moments"
    assert float(table["in all"][2].removesuffix("%")) == pytest.approx(100.0 * (spent_s(study) / 60.0 - 1.0), abs=2.0)
    assert "a whole trial" not in table, "it was planned without a budget"
    code, _, err = run("finalize", "--no-report")
    assert code == 0, err
    assert intervals_of(load_study("pcam")[0]) == intervals_of(study), "all is there: nothing is spent"
    assert run("finalize", "--no-report", "--threshold", 0.4)[0] == 0
    assert len(intervals_of(load_study("pcam")[0])) == 3, "other options are another prediction"
    shutil.rmtree("studies/pcam/final")
    assert run("finalize", "--no-report")[0] == 0
    assert intervals_of(load_study("pcam")[0])[3].confirm_s == 0.0, "the confirmations are stored"


def test_a_search_prints_its_plan_beside_what_happened_as_json_too(run: Any, easy_pack: Path) -> None:
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--trials", 1, "--views", 64, "--json")
    assert json.loads(run("search", *options)[1])["budget"] is None
    code, out, err = run("search", "--study", "paid", *options, "--budget", "10m")
    assert code == 0, err
    said, (searched,) = json.loads(out)["budget"], intervals_of(load_study("paid")[0])
    assert (said["total_s"], said["planned"]["confirm_s"]) == (600.0, pytest.approx(60.0, abs=0.5))
    assert sum(said["planned"][part] for part in ("search_s", "confirm_s", "final_s")) == pytest.approx(600.0, abs=0.01)
    assert said["was"]["search_s"] == searched.seconds
    assert said["was"]["reached"] == [1, 1, 1]
    assert said["was"]["whole_s"] > 0.0


def test_workers_of_a_cluster_are_planned_for_and_its_budget_is_said(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcam_automl.commands.ray.run_on_ray", lambda task, check, say: check())
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--budget", "1h", "--launcher", "ray")
    planned = {}
    for n in (1, 4):
        err = run("search", *options, "--workers", n, "--study", f"with{n}")[2]
        assert "budget 1 h" in err
        assert "trials reach rungs 1 to 3" in err
        planned[n] = load_study(f"with{n}")[1].plan["budget"]["n_started"]
    assert planned[4] == pytest.approx(4 * planned[1], rel=0.2)


def test_a_search_needs_a_number_of_trials_or_a_budget(run: Any, easy_pack: Path) -> None:
    code, _, err = run("search", "--data", easy_pack)
    assert (code, err.strip().splitlines()[-1]) == (
        2,
        "error: search needs --trials N or --budget TIME, e.g. --trials 50 or --budget 30m",
    )
    for option, value, said in (
        ("--budget", "soon", "a duration must be positive"),
        ("--checkpoint-quota", "much", "must be a size"),
    ):
        code, _, err = run("search", "--data", easy_pack, "--trials", 1, option, value)
        assert code == 2
        assert said in err.strip().splitlines()[-1]


def test_a_budget_that_start_up_uses_up_is_refused_with_a_longer_one(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create_module, "too_many_to_predict", lambda *_: None)  # on a busy machine they are
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none")
    code, _, err = run("search", *options, "--budget", "0.1s", "--finalize")
    assert code == 2
    assert "are spent before the first trial, which leaves it no time; give --budget 2m or more" in err
    with pytest.raises(NoStudyError):  # which `worker` and `serve` would take up
        load_study("pcam")


def test_a_finalize_that_is_cut_off_has_spent_its_seconds(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--budget", "20s")
    assert run("search", *options)[0] == 0
    before, noted, note = spent_s(load_study("pcam")[0]), list[float](), Ledger.note

    def counted(self: Ledger) -> None:
        note(self)
        noted.append(spent_s(load_study("pcam")[0]))

    def cut_off(*_: Any, **__: Any) -> None:
        assert len(noted) == 1 + N_PARTS, "its beginning and each part: a SIGKILL here loses none of them"
        assert noted == sorted(noted)
        raise Interrupted("interrupted", 2)

    monkeypatch.setattr(Ledger, "note", counted)
    monkeypatch.setattr(finalize_module, "finish_patches", cut_off)
    code, _, err = run("finalize", "--no-report", "--trial", "99")
    assert code == 2
    assert spent_s(load_study("pcam")[0]) == before, "a command that is refused has spent nothing"
    code, _, err = run("finalize", "--no-report", "--confirm", 0)
    assert code == 130, err
    study, _ = load_study("pcam")
    assert [one.command for one in intervals_of(study)] == ["search", "finalize"]
    assert spent_s(study) > before


def test_what_another_host_spent_during_our_start_up_counts_once(run: Any, easy_pack: Path) -> None:
    code, _, err = run(
        *("search", "--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--trials", 1, "--views", 64)
    )
    assert code == 0, err
    opened = open_study("pcam", None)
    set_budget(opened.study, 600.0)
    Ledger(opened.study, "search", since=time.monotonic() - 100.0).note()  # it has searched for 100 s, and goes on
    clock, _ = _budget(opened, Work(None, 600.0, since=time.monotonic() - 60.0))  # we have been packing for 60
    assert clock is not None
    assert 600.0 - clock.left_s() - clock.reserve_s == pytest.approx(100.0, abs=2.0)
    later, _ = _budget(opened, Work(None, 600.0, since=time.monotonic()))
    assert later is not None
    assert 600.0 - later.left_s() - later.reserve_s == pytest.approx(100.0, abs=2.0)
    Ledger(opened.study, "search", since=time.monotonic() - 250.0).note()  # a long rung of another one is over
    later.heed(opened.study)
    assert 600.0 - later.left_s() - later.reserve_s == pytest.approx(250.0, abs=2.0)


def test_what_the_report_will_take_is_not_the_final_training_s(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        run(
            *("search", "--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--trials", 1, "--views", 64)
        )[0]
        == 0
    )
    opened = open_study("pcam", None)
    set_budget(opened.study, 1e6)  # beside which this process' age is nothing
    monkeypatch.setattr(rehearsal, "expected_seconds", lambda: 4e5)
    without, with_report = (models._seconds_left(opened, drawn) for drawn in (False, True))
    assert without is not None
    assert with_report is not None
    assert without - with_report == pytest.approx(4e5, abs=60.0)
