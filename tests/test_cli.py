"""The command line: every command once on an easy tiny set, exit codes, one line for every bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from easy_set import easy_patches, write_easy_set, write_table
from PIL import Image
from planted_study import study_with
from sklearn.metrics import log_loss

TINY_SPACE = """\
base: {batch_size: 16, crop_size: 32, augment: 0.2}
parameters:
  backbone: {choice: [test_resnet, test_vit]}
  lr: {float: [1.0e-3, 1.0e-2], log: true}
"""
TINY_RECIPE = "backbone: test_resnet\ncrop_size: 32\nbatch_size: 16\nlr: 3.0e-3\nepochs: 3\naugment: 0.2\n"


@pytest.fixture
def run(command_line: Any, in_tmp: Path) -> Any:
    """A command line beside a small space of its own."""
    (in_tmp / "tiny.yaml").write_text(TINY_SPACE)
    (in_tmp / "recipe.yaml").write_text(TINY_RECIPE)
    return command_line


def fails_with(result: tuple[int, str, str], *parts: str, code: int = 2) -> None:
    """One line on stderr that has the parts, the exit code, no traceback."""
    got, _, err = result
    line = err.strip().splitlines()[-1]
    assert got == code, err
    assert line.startswith("error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in line


def test_help_answers_fast_and_without_torch() -> None:
    code = "import sys, pcam_automl.cli; print([m for m in ('torch', 'optuna', 'pandas', 'numpy', 'timm') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    command = [sys.executable, "-m", "pcam_automl", "--help"]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - began)
    assert "finalize" in text
    # Half a second alone (benchmarks/startup); the other test worker, and a slow machine, take their share.
    assert min(seconds) < (5.0 if os.environ.get("PYTEST_XDIST_WORKER") else 0.5)


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import pcam_automl.cli as cli

    monkeypatch.setattr(cli.sys, "platform", "win32")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "WSL2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PCAM_AUTOML_PLAIN", "JPY_PARENT_PID"])
def test_a_notebook_and_an_environment_variable_make_the_output_plain(name: str) -> None:
    code = "from pcam_automl import terminal; print(terminal.PLAIN.on)"
    bare = {key: value for key, value in os.environ.items() if key not in ("PCAM_AUTOML_PLAIN", "JPY_PARENT_PID")}
    for environment, expected in ((bare, "False"), ({**bare, name: "1"}, "True")):
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == expected


def test_the_whole_path(run: Any, easy_raw: Path, in_tmp: Path) -> None:
    search = ("search", "--data", easy_raw, "--trials", 2, "--space", "tiny.yaml", "--weights", "none", "--views", 480)
    code, out, err = run(*search)
    assert code == 0, err
    assert "best: trial" in out
    assert "12 groups for 120 training patches" in err
    assert err.count("trial   ") == 2
    code, out, err = run(*search)
    assert "has its 2 finished trials already" in err

    code, out, _ = run("status", "--json")
    status = json.loads(out)
    assert status["finished"] == 2
    assert status["final"] is None
    assert status["best"]["recipe"]["crop_size"] == 32
    code, out, _ = run("status")
    assert "best: trial" in out

    code, out, err = run("finalize", "--threshold", 0.5, "--json")
    assert code == 0, err
    final = json.loads(out)
    submission = pd.read_csv(final["submission"], dtype={"id": str})
    sample = pd.read_csv(easy_raw / "sample_submission.csv", dtype={"id": str})
    assert submission["id"].tolist() == sample["id"].tolist()
    assert submission["label"].between(0, 1).all()
    labels = pd.read_csv(Path(final["out"]) / "submission_labels.csv")
    assert (labels["label"] == (submission["label"] >= 0.5)).all()
    assert json.loads((Path(final["out"]) / "submission.json").read_text())["trial"] == final["trial"]
    assert json.loads(run("status", "--json")[1])["final"] == {
        "model": str(Path(final["out"]) / "model"),
        "trials": [final["trial"]],
        **{name: final[name] for name in ("trial", "auc", "auc_on", "auc_95")},
    }
    assert f"of trial {final['trial']}: AUC {final['auc']:.4f}" in run("status")[1]
    assert "Grad-CAM" in (Path(final["out"]) / "report.html").read_text()

    code, out, _ = run("score", final["submission"], "--labels", easy_raw / "test_labels.csv", "--json")
    assert json.loads(out)["auc"] > 0.9
    assert run("check-submission", final["submission"], "--sample", easy_raw / "sample_submission.csv")[0] == 0

    model = Path(final["out"]) / "model"
    code, out, err = run(
        "predict", "--model", model, "--input", easy_raw / "test", "--out", "p.csv", "--threshold", 0.5
    )
    assert code == 0, err
    predicted = pd.read_csv("p.csv", dtype={"id": str}).set_index("id")
    assert list(predicted.columns) == ["label", "predicted"]
    np.testing.assert_allclose(predicted.loc[submission["id"], "label"], submission["label"], atol=2e-3)
    assert run("score", "p.csv", "--labels", easy_raw / "test_labels.csv")[0] == 0

    card = json.loads((model / "bundle.json").read_text())
    card["provenance"]["compute"]["device"] = "cuda:7"  # as if trained elsewhere: the device given predicts
    (model / "bundle.json").write_text(json.dumps(card))
    before = (model / "bundle.json").stat().st_mtime_ns
    assert run("finalize", "--no-report")[0] == 0
    assert (model / "bundle.json").stat().st_mtime_ns == before, "a finished training was repeated"


def test_train_gives_a_bundle_and_the_json_that_scripts_want(run: Any, easy_pack: Path) -> None:
    code, out, err = run("train", "recipe.yaml", "--data", easy_pack, "--out", "m", "--set", "epochs=4", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["auc"] > 0.9
    assert result["images_per_s"] > 0
    assert result["wall_s"] > 0
    assert result["recipe"]["epochs"] == 4
    files = ["bundle.json", "model.safetensors", "report", "report.html", "scores.csv"]
    assert sorted(f.name for f in Path("m").iterdir()) == files
    assert err.count("epoch ") == 4
    assert not list(Path().glob(".m.checkpoints"))


def test_prepare_twice_and_verify(run: Any, easy_raw: Path, in_tmp: Path) -> None:
    code, out, err = run("prepare", easy_raw, "--out", "pack", "--json")
    assert code == 0, err
    first = json.loads(out)
    assert first["patches"] == 150
    assert "already holds this source" in run("prepare", easy_raw, "--out", "pack")[2]
    code, _, err = run("prepare", easy_raw, "--out", "pack", "--verify")
    assert "all 150 patches equal the source" in err
    ids = pd.read_csv(easy_raw / "train_labels.csv", dtype=str)["id"]
    pd.DataFrame({"id": ids, "group": "one"}).to_csv("groups.csv", index=False)
    told = "holds these patches with other slides or scanners (--groups, --domains)"
    fails_with(run("prepare", easy_raw, "--out", "pack", "--groups", "groups.csv"), told)


def test_prepare_with_the_other_choice_of_outliers_is_refused(run: Any, in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=40, n_test=4)
    assert run("prepare", raw, "--out", "pack")[0] == 0
    fails_with(run("prepare", raw, "--out", "pack", "--keep-outliers"), "without --keep-outliers", "another folder")
    assert run("prepare", raw, "--out", "kept", "--keep-outliers")[0] == 0
    fails_with(run("prepare", raw, "--out", "kept"), "packed with --keep-outliers")
    assert "already holds this source" in run("prepare", raw, "--out", "kept", "--keep-outliers")[2]


def test_training_never_replaces_a_folder_of_another_hand(run: Any, easy_pack: Path, in_tmp: Path) -> None:
    train = ("train", "recipe.yaml", "--data", easy_pack, "--no-report")
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "thesis.txt").write_text("years")
    fails_with(run(*train, "--out", "mine"), "--out mine is not empty and holds no bundle.json", "another folder")
    assert (in_tmp / "mine" / "thesis.txt").read_text() == "years"
    fails_with(run(*train, "--out", "recipe.yaml"), "is a file; a bundle is a folder")
    stages = "stages=[{share: 0.5, lr: 0.01, trainable: 0.0}, {share: 0.5, lr: 0.001, lr_low: 0.0001}]"
    (in_tmp / "s-stage1").mkdir()
    (in_tmp / "s-stage1" / "thesis.txt").write_text("years")
    fails_with(run(*train, "--out", "s", "--set", stages), "s-stage1 is not empty")
    assert not Path("s").exists()


def test_finalize_never_replaces_a_folder_of_another_hand(run: Any, easy_raw: Path, in_tmp: Path) -> None:
    search = ("search", "--data", easy_raw, "--trials", 1, "--space", "tiny.yaml", "--weights", "none", "--views", 64)
    assert run(*search)[0] == 0
    (in_tmp / "o" / "model").mkdir(parents=True)
    (in_tmp / "o" / "model" / "thesis.txt").write_text("years")
    fails_with(run("finalize", "--out", "o"), "model is not empty and holds no bundle.json")


def test_score_of_something_else_than_a_submission_is_one_line(run: Any, easy_raw: Path, in_tmp: Path) -> None:
    labels = ("--labels", easy_raw / "test_labels.csv")
    fails_with(run("score", "nofile.csv", *labels), "nofile.csv does not exist")
    (in_tmp / "other.csv").write_text("name,label\na,0.5\n")
    fails_with(run("score", "other.csv", *labels), "no column 'id'")


def test_explanations_never_replace_the_images(run: Any, bundle: Path, easy_raw: Path, in_tmp: Path) -> None:
    folder = in_tmp / "images"
    folder.mkdir()
    image = folder / "a.png"
    Image.open(sorted((easy_raw / "test").iterdir())[0]).save(image)
    before = image.read_bytes()
    predict = ("predict", "--model", bundle, "--input", folder)
    fails_with(
        run(*predict, "--out", "p.csv", "--explain", folder), "would replace the images (a.png)", "another folder"
    )
    fails_with(run(*predict, "--out", image), "one of the images")
    sample, other = folder.parent / "sample.csv", image.with_name("b.png")
    sample.write_text("id,label\na,0\n")
    other.write_bytes(before)
    fails_with(run(*predict, "--sample", sample, "--out", sample), "is the --sample itself")
    fails_with(run(*predict, "--sample", sample, "--out", other), "one of the images")
    assert (sample.read_text(), other.read_bytes()) == ("id,label\na,0\n", before)
    other.unlink()
    fails_with(run(*predict, "--out", "e/explanations.csv", "--explain", "e"), "would replace --out")
    fails_with(run(*predict, "--out", "p.csv", "--explain", "tiny.yaml"), "is a file")
    fails_with(run(*predict, "--out", "both", "--explain", "both"), "would replace --out")
    fails_with(run(*predict, "--out", folder), "is a folder", "predictions.csv")
    assert image.read_bytes() == before
    assert not Path("p.csv").exists()


def test_predict_takes_the_side_of_patches_that_training_took(
    run: Any, bundle: Path, easy_raw: Path, in_tmp: Path
) -> None:
    import shutil

    shutil.copytree(bundle, in_tmp / "m")
    edit_card(in_tmp / "m", "provenance", {"patch_px": 48})
    full = Image.open(sorted((easy_raw / "test").iterdir())[0]).convert("RGB")
    full.resize((48, 48)).save(in_tmp / "small.png")
    full.save(in_tmp / "full.png")
    code, _, err = run(
        "predict", "--model", "m", "--input", "small.png", "--out", "p.csv", "--explain", "e", "full.png"
    )
    assert code == 0, err
    assert "left out 1 of 2 files: full.png" in err
    assert pd.read_csv("p.csv")["id"].tolist() == ["small"]
    assert (in_tmp / "e" / "small.png").is_file()


def test_a_fault_in_the_report_leaves_the_result_and_a_signal_ends_the_command(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pcam_automl.commands.report as command
    from pcam_automl.errors import Interrupted

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no pixels")

    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("interrupted by SIGINT; all is lost", signal.SIGINT)

    train = ("train", "recipe.yaml", "--data", easy_pack, "--out", "m", "--set", "epochs=1")
    monkeypatch.setattr(command, "write_report", fails)
    code, out, err = run(*train)
    assert code == 0, err
    assert "validation AUC" in out
    assert "the report could not be written: ZeroDivisionError: no pixels; `pcam-automl report --model m --data " in err
    monkeypatch.setattr(command, "write_report", stopped)
    code, _, err = run(*train)
    assert code == 130
    assert "the training's results are written, `pcam-automl report --model m --data" in err


def test_the_report_of_a_bundle_goes_where_it_is_told_and_shows_the_training(run: Any, easy_pack: Path) -> None:
    train = ("train", "recipe.yaml", "--data", easy_pack, "--out", "m", "--set", "epochs=1", "--no-report")
    assert run(*train)[0] == 0
    code, _, err = run("report", "--model", "m", "--data", easy_pack, "--out", "r")
    assert code == 0, err
    assert not Path("m/report.html").exists()
    assert "pcam-automl train recipe.yaml" in Path("r/report.html").read_text()
    assert "pcam-automl report" not in Path("r/report.html").read_text()


def test_the_commands_of_a_study_make_its_like(run: Any, easy_raw: Path) -> None:
    from pcam_automl.commands.report import study_commands
    from pcam_automl.search.reading import load_study

    options = ["--space", "tiny.yaml", "--set", "beta1=0.85", "--weights", "none", "--holdout", "0.25", "--views", "64"]
    options += ["--sampler", "random", "--pruner", "none", "--rungs", "2", "--seed", "3"]
    assert run("search", "--data", easy_raw, "--trials", 1, "--study", "s", *options)[0] == 0
    study, settings = load_study("s")
    assert [views for views, _ in settings.rungs] == [21, 64]
    code, _, err = run("search", "--trials", 1, "--study", "s", "--rungs", 3)
    assert code == 2
    assert "--rungs is 3, the study has 2" in err
    search, finalize = study_commands("s", None, settings, study.trials)
    words = ["pcam-automl", "search", "--data", settings.data, "--trials", "1", *options, "--study", "s"]
    assert sorted(shlex.split(search)) == sorted(words)
    assert finalize == "pcam-automl finalize --study s"
    unfinished = study_commands(
        "s", None, settings, []
    )  # `--trials 0` is not allowed, and there is nothing to finalize
    assert shlex.split(unfinished[0]) == shlex.split(search)
    assert unfinished[1:] == ("# no trial is complete yet; once one is:", finalize)
    budgeted, _ = study_commands("s", None, settings.model_copy(update={"prior": "p.yaml"}), study.trials, 360.0)
    words[words.index("--trials") : words.index("--trials") + 2] = ["--budget", "360s"]
    assert sorted(shlex.split(budgeted)) == sorted([*words, "--prior", "p.yaml"])
    both, _ = study_commands("s", None, settings, study.trials, 360.0, total=5)
    assert sorted(shlex.split(both)) == sorted([*words, "--trials", "5"])
    other = ("search", "--data", easy_raw, "--trials", 1, "--study", "t", "--weights", "none")
    assert (
        "patience of 1 ends them, and each epoch is a rung"
        in run(*other, "--rungs", 2, "--set", "patience=1", "--set", "schedule=constant")[2]
    )
    few = run(*other, "--rungs", 4, "--set", "epochs=0.1")[2]
    assert "views of a whole trial are too few for 4 rungs; give --views 64 or more" in few


def test_verify_names_a_patch_that_changed(run: Any, in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=40, n_test=4)
    assert run("prepare", raw, "--out", "pack")[0] == 0
    victim = sorted((raw / "train").iterdir())[3]
    data = bytearray(victim.read_bytes())
    data[-1000] ^= 255
    victim.write_bytes(data)
    fails_with(run("prepare", raw, "--out", "pack", "--verify"), victim.stem)


def test_holdout_is_scored_by_finalize(run: Any, easy_raw: Path) -> None:
    assert (
        run(
            "search",
            "--data",
            easy_raw,
            "--trials",
            1,
            "--space",
            "tiny.yaml",
            "--weights",
            "none",
            "--views",
            480,
            "--holdout",
            0.25,
        )[0]
        == 0
    )
    code, out, err = run("finalize", "--epochs", 4, "--no-report", "--json")
    assert code == 0, err
    final = json.loads(out)
    held = pd.read_csv(Path(final["out"]) / "scores.csv", comment="#")
    assert final["log_loss"] == pytest.approx(log_loss(held["label"], held["prob"]), abs=1e-4)
    by_domain = ", ".join(f"{name} {value:.4f}" for name, value in final["domain_aucs"].items())
    assert sorted(final["domain_aucs"]) == ["scanner0", "scanner1"]
    assert list(final["domain_aucs"].values()) == sorted(final["domain_aucs"].values())
    again = run("finalize", "--epochs", 4, "--no-report")[2]
    assert f"  log-loss {final['log_loss']:.4f}; AUC by domain, the worst first: {by_domain}" in again
    assert final["auc_on"].startswith("holdout of")
    assert final["auc_95"][0] <= final["auc"] <= final["auc_95"][1]
    assert run("report", "--out", "r")[0] == 0
    page = Path("r/report.html").read_text()
    assert f"<dd>{final['auc']:.4f}</dd>" in page
    assert f"AUC on {final['auc_on']}" in page
    assert run("report", "--model", Path(final["out"]), "--data", easy_raw, "--out", "r2")[0] == 0
    assert f"AUC on {final['auc_on']}" in Path("r2/report.html").read_text()
    page = Path(final["out"]) / "report.html"
    page.write_text("of before")
    assert "is of the network that was here before" not in run("finalize", "--epochs", 4, "--no-report")[2]
    shorter = run("finalize", "--epochs", 0.5, "--no-report")[2]
    assert re.search(
        r"held a network that has seen \d+ images; this one will have seen \d+ and takes its place", shorter
    )
    assert f"{page} is of the network that was here before" in shorter


def test_a_search_of_the_log_loss_over_domains_is_finalized_at_its_knee(run: Any, easy_raw: Path) -> None:
    search = ("search", "--data", easy_raw, "--trials", 2, "--space", "tiny.yaml", "--weights", "none", "--views", 64)
    code, out, err = run(*search, "--objective", "log_loss", "--split", "domains", "--pruner", "none")
    assert code == 0, err
    assert "folds are domains: 0 scanner0 (60), 1 scanner1 (60)" in err
    assert "validation log-loss (nats)" in out
    code, out, err = run("finalize", "--pick", "knee", "--confirm", 0, "--epochs", 0.5, "--no-report", "--json")
    assert code == 0, err
    assert "picked the knee, trial" in err
    card = json.loads((Path(json.loads(out)["out"]) / "submission.json").read_text())
    assert (card["pick"], card["objective"], card["trial_auc"]) == ("knee", "log_loss", card["auc"])
    assert run("report", "--out", "r")[0] == 0
    page = Path("r/report.html").read_text()
    assert "Quality against cost" in page
    assert "best validation log-loss (nats)" in page


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("search", "--trials", 1, "--data", "nowhere"), ("does not exist", "quickstart")),
        (("search", "--trials", 1), ("no data", "kaggle competitions download")),
        (("serch",), ("no such command 'serch'. Did you mean 'search'", "(pcam-automl --help shows")),
        (("search", "--foo", 3), ("no such option: --foo (pcam-automl search --help shows what there is)",)),
        (("search", "--trials", "abc"), ("invalid value for '--trials'", "a valid integer")),
        (("search", "--trials", 1, "--data", ".", "--no-thaw"), ("--no-thaw goes with --budget",)),
        (("search", "--trials"), ("option '--trials' requires an argument",)),
        (("search", "--trials", 1, "--data", ".", "--sampler", "foo"), ("--sampler must be one of tpe,", "'foo'")),
        (("search", "--trials", 1, "--set", "cropsize=3"), ("not a field of a recipe", "crop_size")),
        (("search", "--trials", 1, "--timeout", "soon"), ("duration must be positive", "'soon'")),
        (("search", "--trials", 1, "--study", "a/b"), ("--study must be", "'a/b'")),
        (("search", "--trials", 1, "--storage", "studies.db"), ("sqlite:///",)),
        (("search", "--trials", 1, "--storage", "postgresql://me:secret@127.0.0.1:1/x"), ("127.0.0.1",)),
        (("status",), ("no",)),
        (("finalize",), ("no",)),
        (("predict", "--model", "m", "--input", ".", "--out", "p.csv"), ("not a model bundle",)),
        (
            ("predict", "--model", "m", "--input", ".", "--out", "p.csv", "--threshold", 2),
            ("--threshold must be in [0, 1], got 2",),
        ),
        (("train", "resnet", "--data", ".", "--out", "m"), ("default",)),
        (("train", "default", "--data", ".", "--out", "m"), ("train_labels.csv",)),
        (("prepare", "nowhere", "--out", "p"), ("nowhere",)),
        (("dashboard", "--port", 99999), ("--port must be in [1, 65535], got 99999",)),
        (("synth", "s", "--patches", 3), ("patches",)),
        (("synth", "."), ("is the folder you are in", "name a folder inside it")),
        (("score", "nofile.csv", "--labels", "nolabels.csv"), ("nolabels.csv",)),
        (("check-submission", "nofile.csv", "--sample", "nosample.csv"), ("nosample.csv",)),
        (("report", "--groups", "g.csv"), ("--groups goes with --model",)),
        (("search", "--trials", 1, "--data", ".", "--objective", "auroc"), ("--objective must be one of", "'auroc'")),
        (
            ("search", "--trials", 1, "--data", ".", "--split", "scanner"),
            ("--split must be one of slides, domains", "'scanner'"),
        ),
        (("finalize", "--pick", "bend"), ("--pick must be one of best, knee, got 'bend'",)),
        (("finalize", "--pick", "knee", "--trial", 3), ("--pick knee and --trial 3 both name a trial",)),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Any, words: tuple[object, ...], parts: tuple[str, ...]) -> None:
    if words[0] in ("finalize", "report") and len(words) > 1:  # whose options are looked at after their study
        study_with([], "sqlite:///studies/pcam.db")
    result = run(*words)
    fails_with(result, *parts)
    assert "secret" not in result[1] + result[2]


@pytest.mark.parametrize(
    "words",
    [
        ("search", "--trials", "1", "--study", "a/b"),
        ("search", "--trials", "1", "--storage", "redis://host/0"),
        ("submit", "--trials", "1", "--study", "a/b"),
        ("search", "--trials", "1", "--data", "nowhere"),
        ("search", "--trials", "1"),
        ("submit", "--trials", "1"),
        ("worker", "--study", "a/b"),
        ("worker",),
        ("serve", "--port", "99999"),
        ("replay", "3"),
        ("finalize",),
        ("report",),
    ],
    ids=" ".join,
)
def test_what_needs_no_torch_to_be_refused_is_refused_before_its_seconds(words: tuple[str, ...], in_tmp: Path) -> None:
    code = (
        "import sys; from pcam_automl.cli import main\n"
        f"sys.argv = ['pcam-automl', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "2 False"
    assert ran.stderr.startswith("error: ")


def _ended(words: list[str], before: str = "", **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line in a process of its own, after some code."""
    code = f"import sys; from pcam_automl import cli\n{before}\nsys.argv = ['pcam-automl', *{words!r}]\ncli.run()"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_without_a_command_the_help_is_shown_with_and_without_rich(in_tmp: Path) -> None:
    for environment in ({}, {"TYPER_USE_RICH": "0"}):
        code, out, err = _ended([], **environment)
        assert code == 2
        assert "finalize" in out + err
        assert len((out + err).splitlines()) > 20
        assert "error:" not in out + err


def test_a_fault_that_the_parser_turns_into_its_own_end_is_still_named(in_tmp: Path) -> None:
    """Typer makes an EOFError, of a codec or a pipe, an Abort without a word."""
    breaks = "def broken(): raise EOFError('the stream ended')\ncli.app.command('broken')(broken)"
    code, _, err = _ended(["broken"], breaks)
    assert code == 1
    assert "error: unexpected EOFError: the stream ended" in err
    code, _, err = _ended(["--debug", "broken"], breaks)
    assert code == 1
    assert "Traceback" in err
    assert "the stream ended" in err


def test_an_exit_code_and_an_interruption_reach_the_shell(in_tmp: Path) -> None:
    breaks = (
        "import typer\ndef seven(): raise typer.Exit(7)\ndef stopped(): raise KeyboardInterrupt\n"
        "cli.app.command('seven')(seven); cli.app.command('stopped')(stopped)"
    )
    assert _ended(["seven"], breaks)[0] == 7
    assert _ended(["stopped"], breaks)[0] == 130
    assert _ended(["--version"])[0] == 0


def test_the_process_ends_as_python_would_end_it_but_for_the_search_for_cycles(in_tmp: Path) -> None:
    code = (
        "import atexit, sys, threading, time; from pcam_automl import cli\n"
        "class Slow:\n    def __del__(self): print('collected')\n"
        "slow = Slow(); slow.own = slow\n"
        "atexit.register(print, 'registered')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
        "sys.argv = ['pcam-automl', 'status', '--storage', 'nonsense']\n"
        "cli.run()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.split()) == (2, ["thread", "registered"])
    assert ran.stderr.startswith("error: storage must be a database URL")


def test_a_search_leaves_its_study_whole_in_one_file(run: Any, easy_pack: Path, in_tmp: Path) -> None:
    """Who copies `pcam.db` to another machine takes all trials along; the power switch loses none that has ended."""
    words = [
        *("search", "--data", easy_pack, "--space", "tiny.yaml", "--weights", "none"),
        "--trials",
        2,
        "--views",
        64,
    ]
    command = [sys.executable, "-m", "pcam_automl", *map(str, words)]
    subprocess.run(command, capture_output=True, check=True)
    held = in_tmp / "studies" / "pcam.db"
    assert [file.name for file in held.parent.glob("pcam.db*")] == ["pcam.db"]
    (in_tmp / "elsewhere").mkdir()
    shutil.copy(held, in_tmp / "elsewhere")
    code, out, err = run("status", "--json", "--storage", f"sqlite:///{in_tmp}/elsewhere/pcam.db")
    assert code == 0, err
    assert sum(json.loads(out)["states"].values()) == 2


def test_a_reader_that_goes_away_is_no_fault(in_tmp: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m pcam_automl --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] in ("0", "1")  # click's word for it
    assert ran.stderr == ""


def test_usage_errors_exit_2(run: Any) -> None:
    assert run("search")[0] == 2
    assert run("serach")[0] == 2
    assert run("search", "--trials", 0)[0] == 2


def test_a_study_without_a_complete_trial_cannot_be_finalized(run: Any, easy_raw: Path) -> None:
    run(
        "search",
        "--data",
        easy_raw,
        "--trials",
        1,
        "--space",
        "tiny.yaml",
        "--weights",
        "none",
        "--views",
        64,
        "--timeout",
        "0.000001s",
    )
    fails_with(run("finalize"), "no complete trial yet")
    fails_with(run("finalize", "--trial", "7"), "has no trial 7")
    fails_with(run("finalize", "--trial", "bets"), "--trial must be best, highest or a trial's number, got 'bets'")


def test_an_incomplete_test_folder_is_said_before_training(run: Any, in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=60, n_test=4)
    sample = raw / "sample_submission.csv"
    sample.write_text(sample.read_text() + "f" * 40 + ",0\n")
    assert (
        run("search", "--data", raw, "--trials", 1, "--space", "tiny.yaml", "--weights", "none", "--views", 64)[0] == 0
    )
    assert run("prepare", raw, "--out", "pack")[0] == 0
    of_pack = ("search", "--data", "pack", "--study", "p", "--trials", 1, "--space", "tiny.yaml", "--weights", "none")
    code, _, err = run(*of_pack, "--views", 64)
    assert code == 0, err
    assert "warning: 1 ids of the sample submission have no image in test/" in err
    fails_with(run("finalize"), "1 ids of the sample submission have no test image", "f" * 40, "--no-submission")
    alone = ("finalize", "--no-submission", "--confirm", 0, "--epochs", 0.5, "--no-report", "--json")
    code, out, err = run(*alone)
    assert code == 0, err
    final = json.loads(out)
    assert final["submission"] is None
    assert not (Path(final["out"]) / "submission.csv").exists()
    assert (Path(final["out"]) / "model" / "bundle.json").is_file()


def test_other_slides_for_a_study_are_refused_before_anything_is_packed(run: Any, in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=60, n_test=4)
    groups = (raw / "train_groups.csv").read_text()
    (raw / "train_groups.csv").unlink()
    search = ("search", "--data", raw, "--space", "tiny.yaml", "--weights", "none", "--views", 64, "--trials")
    code, _, err = run(*search, 1)
    assert code == 0, err
    (in_tmp / "slides.csv").write_text(groups)
    n_packs = len(list((in_tmp / "studies" / "packs").iterdir()))
    fails_with(
        run(*search, 2, "--groups", "slides.csv"),
        "names other groups than the study was made with, for 60 of 64",
        "--study NAME",
    )
    assert len(list((in_tmp / "studies" / "packs").iterdir())) == n_packs
    code, _, err = run(*search, 2, "--study", "again", "--groups", "slides.csv")
    assert code == 0, err
    assert run("search", "--study", "again", "--trials", 2, "--groups", "slides.csv")[0] == 0, "the same slides"


def test_where_slides_are_unknown_every_printed_auc_says_so(run: Any, in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=60, n_test=4)
    (raw / "train_groups.csv").unlink()
    search = ("search", "--data", raw, "--trials", 2, "--space", "tiny.yaml", "--weights", "none", "--views", 64)
    code, out, err = run(*search)
    assert code == 0, err
    assert "no slides are known" in out
    assert "no slides are known" in run("status")[1]
    loss = run(*search[:4], 1, *search[5:], "--objective", "log_loss", "--study", "loss")
    assert "no slides are known" in loss[1], loss[2]
    said = run("finalize", "--study", "loss", "--confirm", 1, "--epochs", 0.5, "--no-report")[2]
    assert re.search(r"trial 0: log-loss \d\.\d{4} in the search, \d\.\d{4} confirmed", said), said
    for n_confirmed in (2, 0):
        code, out, err = run("finalize", "--confirm", n_confirmed, "--epochs", 0.5, "--no-report", "--json")
        assert code == 0, err
        final = json.loads(out)
        assert "whose slides are unknown and may have been trained on: likely too high" in final["auc_on"]
        # Those of an earlier decision are no longer beside a network that was chosen otherwise.
        assert (Path(final["out"]) / "oof.csv").exists() is (n_confirmed > 0)


def test_epochs_that_cannot_be_are_refused_before_the_confirmations(run: Any, easy_pack: Path) -> None:
    assert (
        run("search", "--data", easy_pack, "--trials", 1, "--space", "tiny.yaml", "--weights", "none", "--views", 64)[0]
        == 0
    )
    for epochs in (-1, 0, "nan"):
        code, _, err = run("finalize", "--epochs", epochs)
        assert (code, err.strip().splitlines()[-1].split(", got")[0]) == (2, "error: --epochs must be greater than 0")
        assert "confirm" not in err


def test_a_sample_of_other_images_is_refused_and_unknown_slides_are_said_when_groups_can_still_be_given(
    run: Any, in_tmp: Path
) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=60, n_test=4)
    fails_with(
        run("prepare", raw, "--out", "pack", "--sample", raw / "train_labels.csv"), "none of the 60 ids of", "in test/"
    )
    assert not (in_tmp / "pack").exists()
    (raw / "train_groups.csv").unlink(missing_ok=True)
    code, _, err = run("prepare", raw, "--out", "pack")
    assert code == 0
    assert "no slides are known" in err


def test_an_empty_recipe_is_no_recipe(run: Any, easy_pack: Path, in_tmp: Path) -> None:
    (in_tmp / "nothing.yaml").write_text("# nothing\n")
    fails_with(run("train", "nothing.yaml", "--data", easy_pack, "--out", "t"), "nothing.yaml is empty", "backbone")


def test_the_original_benchmark_files_go_the_whole_path(run: Any, in_tmp: Path) -> None:
    """PCam HDF5: official validation is what the search validates on, the official test is predicted."""
    import h5py

    raw = in_tmp / "pcam"
    raw.mkdir()
    for seed, (part, n) in enumerate({"train": 96, "valid": 24, "test": 20}.items()):
        images, label = easy_patches(n, seed)
        prefix = raw / f"camelyonpatch_level_2_split_{part}"
        for name, values in (("x", images), ("y", label.reshape(-1, 1, 1, 1).astype(np.uint8))):
            with h5py.File(f"{prefix}_{name}.h5", "w") as file:
                file[name] = values
        # Eight of the test patches come from a slide of the training part, which PCam's own files never do.
        rows = [(i, f"{'train' if part == 'test' and i < 8 else part}_slide{i // 8}") for i in range(n)]
        write_table(Path(f"{prefix}_meta.csv"), "row,wsi", rows)
    search = ("search", "--data", raw, "--trials", 1, "--space", "tiny.yaml", "--weights", "none", "--views", 480)
    code, _, err = run(*search)
    assert code == 0, err
    assert "96 patches train, 24 validate" in err
    code, out, err = run("finalize", "--epochs", 3, "--no-report", "--json")
    assert code == 0, err
    final = json.loads(out)
    assert len(pd.read_csv(final["submission"])) == 20
    found = json.loads((Path(final["out"]) / "submission.json").read_text())["labelled_test"]
    assert final["test"] == found
    assert f"test AUC {found['auc']:.4f}" in err
    assert found["n"] == 20
    assert found["auc"] > 0.9
    assert found["caveat"] == ", of which 8 are of slides that were trained on: too high"
    assert "the 20 test patches whose labels the data hold, of which 8 are of slides" in err


def test_json_of_a_search_that_finalizes_is_one_object(
    run: Any, easy_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def finalize(**options: Any) -> None:
        asked.update(options)
        print('{"finalized": true}')

    monkeypatch.setattr("pcam_automl.command_line.search.finalize", finalize)
    search = ("search", "--data", easy_pack, "--trials", 1, "--space", "tiny.yaml", "--weights", "none", "--views", 64)
    code, out, err = run(*search, "--finalize", "--json")
    assert code == 0, err
    assert json.loads(out) == {"finalized": True}
    assert asked == {"study": "pcam", "data": easy_pack, "storage": None, "device": "auto", "json": True}


def test_class_folders_go_the_whole_path(run: Any, in_tmp: Path) -> None:
    images, label = easy_patches(60, seed=1)
    for number, (image, positive) in enumerate(zip(images, label, strict=True)):
        folder = in_tmp / "raw" / str(positive)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"p{number}.png")
    search = ("search", "--data", "raw", "--trials", 1, "--space", "tiny.yaml", "--weights", "none", "--views", 320)
    code, _, err = run(*search)
    assert code == 0, err
    assert "validation will be optimistic" in err
    code, out, _ = run("finalize", "--epochs", 2, "--no-report", "--json")
    assert code == 0
    assert json.loads(out)["submission"] is None


def test_one_class_only_is_one_line(run: Any, in_tmp: Path) -> None:
    raw = write_easy_set(in_tmp / "raw", n_train=40, n_test=4)
    ids = [line.split(",")[0] for line in (raw / "train_labels.csv").read_text().splitlines()[1:]]
    write_table(raw / "train_labels.csv", "id,label", [(name, 0) for name in ids])
    fails_with(run("search", "--data", raw, "--trials", 1, "--weights", "none"), "only 40 patches of label 0")


def test_unreadable_files_are_named_and_left_out_of_a_prediction(
    run: Any, easy_raw: Path, easy_pack: Path, in_tmp: Path
) -> None:
    assert run("train", "recipe.yaml", "--data", easy_pack, "--out", "m", "--set", "epochs=1", "--no-report")[0] == 0
    folder = in_tmp / "images"
    folder.mkdir()
    good = sorted((easy_raw / "test").iterdir())[0]
    (folder / good.name).write_bytes(good.read_bytes())
    (folder / "empty.tif").write_bytes(b"")
    (folder / "page.tif").write_text("<html>404</html>")
    (folder / "half.tif").write_bytes(good.read_bytes()[:9000])
    latin = Path(os.fsdecode(bytes(folder) + b"/caf\xe9.tif"))
    latin.write_bytes(good.read_bytes())
    code, _, err = run("predict", "--model", "m", "--input", folder, "--out", "p.csv")
    assert code == 0, err
    assert "left out 3 of 4 files" in err
    assert "1 files have unprintable names and are left out (caf\\udce9.tif)" in err
    fails_with(run("predict", "--model", "m", "--input", latin, "--out", "p.csv"), "unprintable names", "rename them")
    latin.unlink()
    for name in ("empty.tif", "page.tif", "half.tif"):
        assert name in err
    assert pd.read_csv("p.csv", dtype={"id": str})["id"].tolist() == [good.stem]
    sample = in_tmp / "sample.csv"
    sample.write_text(f"id,label\nhalf,0\n{good.stem},0\n")
    code, _, err = run("predict", "--model", "m", "--input", folder, "--out", "s.csv", "--sample", sample)
    assert code == 0, err
    assert "2 images are not in" in err
    assert "1 of them are in the sample: they have the mean probability of the others" in err
    written = pd.read_csv("s.csv", dtype={"id": str})
    assert written["id"].tolist() == ["half", good.stem], "in the sample's order"
    assert written["label"][0] == written["label"][1] == pd.read_csv("p.csv")["label"][0]
    assert run("check-submission", "s.csv", "--sample", sample)[0] == 0
    sample.write_text(f"id,label\nabsent,0\n{good.stem},0\n")
    fails_with(
        run("predict", "--model", "m", "--input", folder, "--out", "s.csv", "--sample", sample),
        "1 of its 2 ids have no image in --input (absent)",
    )
    both = ("--sample", sample, "--threshold", 0.5)
    fails_with(run("predict", "--model", "m", "--input", folder, "--out", "s.csv", *both), "leave one out")
    good_copy = folder / good.name
    good_copy.unlink()
    fails_with(
        run("predict", "--model", "m", "--input", folder, "--out", "q.csv"), "none of the 3 files is a readable patch"
    )
    assert not Path("q.csv").exists()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda m: (m / "model.safetensors").write_bytes(b"x"), "has changed since the bundle was written"),
        (lambda m: (m / "bundle.json").write_text("{}"), "has format None"),
        (lambda m: (m / "bundle.json").write_text("{"), "not a complete model bundle"),
        (lambda m: (m / "bundle.json").write_text("[" * 100000), "not a complete model bundle"),
        (lambda m: (m / "model.safetensors").unlink(), "not a complete model bundle"),
        (lambda m: edit_card(m, "recipe", {"backbone": "test_vit"}), "weights do not fit test_vit"),
        (lambda m: edit_card(m, "recipe", {"backbonee": "x"}), "backbonee is not a known field"),
        (lambda m: edit_card(m, "normalisation", {"mean": [0, 0, 0], "std": [0, 0, 0]}), "three positive deviations"),
    ],
)
def test_a_corrupt_or_foreign_bundle_is_one_line(
    run: Any, bundle: Path, easy_raw: Path, in_tmp: Path, damage: Any, part: str
) -> None:
    import shutil

    shutil.copytree(bundle, in_tmp / "m")
    damage(in_tmp / "m")
    fails_with(run("predict", "--model", "m", "--input", easy_raw / "test", "--out", "p.csv"), part)


def edit_card(model: Path, key: str, value: object) -> None:
    card = json.loads((model / "bundle.json").read_text())
    card[key] = {**card["recipe"], **value} if key == "recipe" and isinstance(value, dict) else value
    (model / "bundle.json").write_text(json.dumps(card))


@pytest.fixture(scope="session")
def bundle(easy_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained bundle."""
    from pcam_automl.bundle import ModelBundle, write_bundle
    from pcam_automl.models.factory import build_network, normalisation
    from pcam_automl.models.weights import Weights
    from pcam_automl.recipe import Recipe

    recipe = Recipe(backbone="test_resnet", crop_size=32)
    state = build_network(recipe, Weights("none"), seed=0).state_dict()
    out = tmp_path_factory.mktemp("bundle") / "m"
    write_bundle(out, ModelBundle(recipe, normalisation("test_resnet"), state, {}, {}))
    return out


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_leaves_the_study_consistent_and_says_how_to_go_on(
    easy_raw: Path, in_tmp: Path, signum: signal.Signals
) -> None:
    (in_tmp / "tiny.yaml").write_text(TINY_SPACE)
    command = [sys.executable, "-m", "pcam_automl", "search", "--data", str(easy_raw), "--trials", "500", "--space", "tiny.yaml",
               "--weights", "none", "--views", "300"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("trial   1"):
            process.send_signal(signum)
            break
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, "".join(seen) + rest
    assert "the same command goes on" in rest
    assert "Traceback" not in rest

    import optuna

    (study,) = optuna.get_all_study_summaries("sqlite:///studies/pcam.db")
    states = [t.state.name for t in optuna.load_study(study_name="pcam", storage="sqlite:///studies/pcam.db").trials]
    assert "RUNNING" not in states
    assert study.n_trials >= 2
