"""`replay`, `export-prior` and `search --prior` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from pcam_automl.search.priors import load_prior

SPACE = """\
base: {batch_size: 8, crop_size: 32}
parameters:
  backbone: {choice: [test_resnet]}
  lr: {float: [1.0e-3, 1.0e-2], log: true}
"""


@pytest.fixture
def run(command_line: Any, in_tmp: Path) -> Any:
    """A command line beside a small space of its own."""
    (in_tmp / "tiny.yaml").write_text(SPACE)
    return command_line


def test_a_trial_is_replayed_exported_and_started_from(run: Any, easy_pack: Path, in_tmp: Path) -> None:
    options = ("--data", easy_pack, "--space", "tiny.yaml", "--weights", "none", "--views", 64)
    code, _, err = run("search", *options, "--trials", 1, "--deterministic")
    assert code == 0, err
    assert "first: recipe default" in err

    code, out, err = run("replay", 0)
    assert code == 0, err
    assert out.strip().splitlines()[-1] == "bit for bit: AUC, log-loss and training loss of every rung are equal"
    code, out, _ = run("replay", "best", "--json")
    said = json.loads(out)
    assert (code, said["verdict"], len(said["rungs"])) == (0, "bit for bit", 3)
    assert said["rungs"][-1]["stored"] == said["rungs"][-1]["replayed"]

    code, out, err = run("export-prior", "--out", "mine.yaml", "--data-name", "easy")
    assert (code, out.strip()) == (0, "mine.yaml"), err
    prior = load_prior("mine.yaml")
    assert prior.command.startswith("pcam-automl search --data ")
    assert prior.export == "pcam-automl export-prior --out mine.yaml --data-name easy"
    assert (prior.data, prior.recipes[0].trial) == ("easy", 0)
    code, _, err = run("export-prior", "--out", "mine.yaml")
    assert (code, "--out mine.yaml exists" in err) == (2, True)

    study = optuna.load_study(study_name="pcam", storage="sqlite:///studies/pcam.db")
    trial = study.trials[0]
    rungs = [{**rung, "auc": rung["auc"] - 0.5} for rung in trial.user_attrs["rungs"]]
    study.add_trial(
        optuna.trial.create_trial(value=0.1, user_attrs={**trial.user_attrs, "rungs": rungs, "lineage": "changed"})
    )
    code, out, _ = run("replay", 1)
    assert code == 1
    assert out.strip().splitlines()[-1].startswith("differs: the last rung's AUC is off by 0.5, the band is ")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("replay", "0"), "there are no studies in"),
        (("export-prior", "--out", "x.json"), "--out must end in .yaml, got x.json"),
        (("export-prior", "--out", "x.yaml"), "--study pcam: there are no studies in"),
        (("search", "--trials", "1", "--data", ".", "--prior", "nothing"), "no prior named 'nothing'"),
    ],
)
def test_faults_are_one_line(run: Any, words: tuple[str, ...], part: str) -> None:
    code, _, err = run(*words)
    line = err.strip().splitlines()[-1]
    assert (code, line.startswith("error: ")) == (2, True), err
    assert part in line
