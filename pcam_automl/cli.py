"""The command line: names, options and help. Bodies live in commands/ and are imported when they run.

Importing this module must stay quick: no torch, optuna, pandas or numpy at the top.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pcam_automl import (
    __version__,
    clock,  # noqa: F401 - first: a budget counts from here
)
from pcam_automl.errors import Interrupted, PcamError
from pcam_automl.waiting import choose_waiting

app = typer.Typer(
    name="pcam-automl",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="AutoML for PatchCamelyon / Histopathologic Cancer Detection: search, inspect, finalize.\n\n"
    "Start: [bold]pcam-automl quickstart[/bold] (no data needed), or "
    "[bold]pcam-automl search --data FOLDER --trials 50[/bold], then [bold]dashboard[/bold], then [bold]finalize[/bold].",
)

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Raw folder or prepared pack. Else PCAM_AUTOML_DATA, the study's own, ./data/pack or ./histopathologic-cancer-detection.",
        metavar="PATH",
    ),
]
Groups = Annotated[
    Path | None,
    typer.Option(
        "--groups",
        help="CSV id,group: the slide of each patch. train_groups.csv beside the labels is used unasked.",
        metavar="CSV",
    ),
]
Domains = Annotated[
    Path | None, typer.Option("--domains", help="CSV id,domain: the scanner or centre of each patch.", metavar="CSV")
]
StudyName = Annotated[str, typer.Option("--study", help="Name of the study.", metavar="NAME")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="sqlite:///FILE, postgresql://... or mysql://... Else PCAM_AUTOML_STORAGE, else sqlite:///studies/pcam.db.",
        metavar="URL",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="Same seed, same device, same weights: no measurement decides, some speed is lost."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Pin a recipe field, e.g. --set crop_size=64; repeatable.", metavar="FIELD=VALUE"),
]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Also write 0/1 labels at this probability.", metavar="T")
]
WeightsFrom = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="auto (timm's hub where it answers, else from scratch), hub, none, or a folder of safetensors named after the timm model.",
        metavar="auto|hub|none|DIR",
    ),
]

WithReport = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")]
RecipeName = Annotated[str, typer.Argument(help="Name of a shipped recipe (`recipes` lists them), or a YAML file.")]
Fold = Annotated[
    int, typer.Option("--fold", min=0, max=4, help="Validation fold, for recipes without a valid_share.", metavar="F")
]
SplitSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the split; the training's is --set seed=N.", metavar="N")
]


def _checked_pins(recipe: str, sets: list[str] | None) -> dict[str, Any]:
    """``--set`` as fields, the recipe judged with them before anything slow is imported.

    Raises:
        RecipeError: no such recipe, or faults in it or in a field.
    """
    from pcam_automl.configs_folder import find_config
    from pcam_automl.recipe import load_recipe, parse_assignments

    pins = parse_assignments(sets or [])
    load_recipe(find_config("recipes", recipe), overrides=pins)
    return pins


def _version(asked: bool) -> None:
    if asked:
        print(f"pcam-automl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of faults.")] = False,
) -> None:
    if debug:
        os.environ["PCAM_AUTOML_DEBUG"] = "1"


@app.command()
def prepare(
    raw: Annotated[Path, typer.Argument(help="Kaggle folder, class folders (0/, 1/) or PCam HDF5 folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pack.", metavar="DIR")],
    groups: Groups = None,
    domains: Domains = None,
    sample: Annotated[
        Path | None, typer.Option("--sample", help="Sample submission of another name or place.", metavar="CSV")
    ] = None,
    keep_outliers: Annotated[
        bool, typer.Option("--keep-outliers", help="Train on all-dark and all-bright patches, too.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read the source and compare every patch.")] = False,
    json: Json = False,
) -> None:
    """Check a raw source and pack it into memory-mapped arrays."""
    from pcam_automl.commands.data import run_prepare

    run_prepare(
        raw, out, groups=groups, domains=domains, sample=sample, keep_outliers=keep_outliers, check=verify, as_json=json
    )


@app.command()
def search(
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            "-n",
            min=1,
            help="Total of finished trials (complete and pruned); the same command again does only what is missing.",
            metavar="N",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Wall clock for the search and finalize together: 30m, 2h. Give it, or --trials, or both.",
            metavar="TIME",
        ),
    ] = None,
    data: Data = None,
    study: StudyName = "pcam",
    storage: Storage = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Recipe to start from: trial 0, and what the space leaves open; default by default.",
            metavar="NAME",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space", help="Search space: default, quick, cnn, lr_only, dense, or a YAML file.", metavar="FILE"
        ),
    ] = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", help="No new trial starts after this time: 90s, 30m, 1h30m.", metavar="TIME"),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            "--holdout", help="Share of the slides that nothing reads before finalize, in [0, 0.5].", metavar="F"
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            "--views",
            min=64,
            help="Training images of a whole trial; by default the device's speed decides.",
            metavar="N",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="auc (default), worst_domain_auc or log_loss, on the validation fold."),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            "--warm-start",
            help="The first trials take the diverse best of another study: its name, or URL#NAME of another storage.",
            metavar="STUDY|URL",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            "--prior",
            help="The first trials take the recipes of a prior (`export-prior` makes one): a shipped name, a YAML file, or none.",
            metavar="NAME|FILE",
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="tpe, tpe-qmc, gp, cmaes, qmc or random.")] = None,
    pruner: Annotated[str | None, typer.Option("--pruner", help="asha, hyperband, median, wilcoxon or none.")] = None,
    cost_aware: Annotated[
        bool, typer.Option("--cost-aware", help="Judge proposals by expected improvement per second.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of split, sampler and trainings.", metavar="N")
    ] = None,
    groups: Groups = None,
    domains: Annotated[
        str | None,
        typer.Option(
            "--domains",
            help="CSV id,domain: the scanner or centre of each patch; or estimate, by the stains of the slides.",
            metavar="CSV|estimate",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="slides (default): five folds of whole slides; domains: leave one domain out."),
    ] = None,
    device: Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=64, help="Worker processes on this machine; 1 by default.", metavar="N"),
    ] = None,
    workers_per_device: Annotated[
        str | None,
        typer.Option(
            "--workers-per-device",
            help="Workers on each GPU (or the CPU): a number, or auto to measure what fits and pays.",
            metavar="N",
        ),
    ] = None,
    deterministic: Deterministic = False,
    probe: Annotated[
        str | None,
        typer.Option(
            "--probe",
            help="Rank backbones and crops by a classifier on frozen pretrained features first (20 s): auto, on or off.",
        ),
    ] = None,
    checkpoint_quota: Annotated[
        str,
        typer.Option(
            "--checkpoint-quota",
            help="What paused trials' checkpoints may take; the least promising go first.",
            metavar="SIZE",
        ),
    ] = "5GB",
    no_thaw: Annotated[
        bool, typer.Option("--no-thaw", help="With --budget: what is pruned stays ended; for comparisons.")
    ] = False,
    finalize_: Annotated[
        bool, typer.Option("--finalize", help="Run finalize right after the search, with its defaults.")
    ] = False,
    json: Json = False,
) -> None:
    """Search training recipes with Optuna; every result is stored as it comes."""
    from pcam_automl.config import parse_bytes, parse_duration
    from pcam_automl.errors import InputError
    from pcam_automl.recipe import parse_assignments

    pins = parse_assignments(set_ or [])
    timeout_s = None if timeout is None else parse_duration(timeout)
    budget_s = None if budget is None else parse_duration(budget)
    quota_bytes = parse_bytes(checkpoint_quota)
    if trials is None and budget_s is None:
        raise InputError("search needs --trials N or --budget TIME, e.g. --trials 50 or --budget 30m")
    from pcam_automl.commands.search import run_search
    from pcam_automl.search.study import Asked

    asked = Asked(
        data=data,
        groups=groups,
        domains=None if domains in (None, "estimate") else Path(domains),
        estimate_domains=domains == "estimate",
        split_by=split,
        recipe=recipe,
        space=space,
        pins=pins,
        weights=weights,
        holdout=holdout,
        seed=seed,
        sampler=sampler,
        pruner=pruner,
        views=views,
        device=device,
        deterministic=deterministic,
        budget_s=budget_s,
        objective=objective,
        warm_start=warm_start,
        prior=prior,
        cost_aware=cost_aware,
        probe=probe,
    )
    run_search(
        study,
        storage,
        asked,
        n_trials=trials,
        timeout_s=timeout_s,
        as_json=json and not finalize_,
        n_workers=workers,
        per_device=workers_per_device,
        quota_bytes=quota_bytes,
        thaws=not no_thaw,
    )
    if finalize_:
        finalize(study=study, storage=storage, device=device, json=json)


@app.command()
def status(study: StudyName = "pcam", storage: Storage = None, json: Json = False) -> None:
    """Trials by state, the best trial, its interval and its equals, what mattered, seconds spent."""
    from pcam_automl.commands.search import run_status

    run_status(study, storage, as_json=json)


@app.command()
def audit(study: StudyName = "pcam", storage: Storage = None, json: Json = False) -> None:
    """Whether small rungs mislead: how far each rung's order of the trials holds at the next, and what pruning cost."""
    from pcam_automl.commands.audit import run_audit

    run_audit(study, storage, as_json=json)


@app.command()
def replay(
    trial: Annotated[str, typer.Argument(help="A trial's number, or best.", metavar="TRIAL")],
    study: StudyName = "pcam",
    storage: Storage = None,
    data: Data = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a stored trial again from its database row alone and compare every rung."""
    from pcam_automl.commands.replay import run_replay

    if not run_replay(trial, study, storage, data=data, device=device, as_json=json):
        raise typer.Exit(1)


@app.command("export-prior")
def export_prior(
    out: Annotated[Path, typer.Option("--out", help="YAML file to make.", metavar="FILE")],
    study: StudyName = "pcam",
    storage: Storage = None,
    name: Annotated[
        str | None,
        typer.Option("--data-name", help="What to call the data; their folder's name by default.", metavar="NAME"),
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", help="That made the study, where the study does not say.", metavar="TEXT")
    ] = None,
    most: Annotated[int, typer.Option("--most", min=1, max=12, help="Recipes at most.", metavar="K")] = 5,
    json: Json = False,
) -> None:
    """Write the diverse best recipes of a study for `search --prior`, with where they come from."""
    from pcam_automl.commands.prior import run_export_prior

    run_export_prior(study, storage, out, data=name, command=command, k=most, as_json=json)


@app.command()
def dashboard(
    storage: Storage = None,
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8080,
    host: Annotated[str, typer.Option("--host", help="Address to bind; the dashboard has no login.")] = "127.0.0.1",
) -> None:
    """optuna-dashboard over the same storage, on this machine only unless told otherwise."""
    from pcam_automl.commands.search import run_dashboard

    run_dashboard(storage, host=host, port=port)


@app.command()
def finalize(
    study: StudyName = "pcam",
    trial: Annotated[
        str,
        typer.Option(
            "--trial",
            help="best (of those as good as the highest the cheapest), highest, or a trial's number.",
            metavar="best|highest|N",
        ),
    ] = "best",
    pick: Annotated[
        str,
        typer.Option(
            "--pick",
            help="What best means: the best value, or the knee of value against latency.",
            metavar="best|knee",
        ),
    ] = "best",
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for model/, submission.csv and submission.json; studies/<study>/final by default.",
            metavar="DIR",
        ),
    ] = None,
    threshold: Threshold = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs", help="Passes over the training patches; by default four times a trial's views, 3 to 20 epochs."
        ),
    ] = None,
    confirm: Annotated[
        int,
        typer.Option(
            "--confirm",
            min=0,
            help="Train so many of the best trials anew first, with fresh seeds and on another fold; 0 takes the search's word.",
            metavar="K",
        ),
    ] = 3,
    confirm_folds: Annotated[
        int, typer.Option("--confirm-folds", min=1, max=4, help="On so many other folds each.", metavar="F")
    ] = 1,
    ensemble: Annotated[
        int,
        typer.Option(
            "--ensemble",
            min=1,
            help="At most so many of the confirmed trials judge together, if that helps out of fold.",
            metavar="K",
        ),
    ] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="What each ingredient was worth on the holdout (needs one).")
    ] = False,
    no_budget: Annotated[
        bool,
        typer.Option("--no-budget", help="Do not hold the final training within what the study's --budget has left."),
    ] = False,
    storage: Storage = None,
    report: WithReport = True,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Confirm the best trials, retrain the chosen one on all the data, write the checked submission."""
    from pcam_automl.commands.models import run_finalize
    from pcam_automl.finalizing.result import FinalOptions

    run_finalize(
        study,
        storage,
        which=trial,
        data=data,
        out=out,
        threshold=threshold,
        epochs=epochs,
        device=device,
        as_json=json,
        with_report=report,
        pick=pick,
        options=FinalOptions(confirm, confirm_folds, ensemble, compare),
        within_budget=not no_budget,
    )


@app.command()
def report(
    study: StudyName = "pcam",
    storage: Storage = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="Of this bundle instead of a study; give its --data (and --groups, --domains).",
            metavar="DIR",
        ),
    ] = None,
    data: Data = None,
    groups: Groups = None,
    domains: Domains = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of report.html; studies/<study>, or the bundle's own, by default.", metavar="DIR"
        ),
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Called tumour at this probability.")] = 0.5,
    device: Device = "auto",
) -> None:
    """One HTML page of pictures: data, search, network, training, scores, what the network looks at."""
    from pcam_automl.commands.report import run_report

    run_report(
        study,
        storage,
        model=model,
        data=data,
        groups=groups,
        domains=domains,
        out=out,
        threshold=threshold,
        device=device,
    )


@app.command()
def predict(
    model: Annotated[
        Path, typer.Option("--model", help="Bundle or ensemble folder that train or finalize wrote.", metavar="DIR")
    ],
    input: Annotated[list[Path], typer.Option("--input", help="Image folder or file; repeatable.", metavar="PATH")],
    out: Annotated[
        Path,
        typer.Option("--out", help="CSV to write: id,label; of a dense bundle a folder of maps.", metavar="CSV|DIR"),
    ],
    files: Annotated[list[Path] | None, typer.Argument(help="More image files.")] = None,
    threshold: Threshold = None,
    one_view: Annotated[
        bool,
        typer.Option("--one-view", help="The centre view only instead of the mean of the recipe's views (faster)."),
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", help="Folder for a Grad-CAM picture and a sentence for each image.", metavar="DIR"),
    ] = None,
    device: Device = "auto",
) -> None:
    """Probabilities, and labels if asked, for image files."""
    from pcam_automl.commands.predict import run_predict

    run_predict(
        model,
        [*input, *(files or [])],
        out,
        threshold=threshold,
        device=device,
        all_views=not one_view,
        explain=explain,
    )


@app.command()
def train(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", help="Folder of the model bundle.", metavar="DIR")],
    data: Data = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    groups: Groups = None,
    domains: Domains = None,
    fold: Fold = 0,
    seed: SplitSeed = 0,
    report: WithReport = True,
    device: Device = "auto",
    deterministic: Deterministic = False,
    json: Json = False,
) -> None:
    """Train one recipe, validated on the split, as a bundle."""
    pins = _checked_pins(recipe, set_)
    from pcam_automl.commands.models import run_train
    from pcam_automl.commands.setup import DataOptions

    run_train(
        recipe,
        pins,
        DataOptions(data, groups, domains, fold, seed),
        out=out,
        weights=weights,
        device=device,
        deterministic=deterministic,
        with_report=report,
        as_json=json,
    )


@app.command()
def recipes(json: Json = False) -> None:
    """The shipped recipes, a line each: `train NAME` trains one."""
    from pcam_automl import terminal
    from pcam_automl.configs_folder import find_config, first_line, list_configs

    lines = {name: first_line(find_config("recipes", name)) for name in list_configs("recipes")}
    if json:
        terminal.print_json(lines)
        return
    for name, line in lines.items():
        terminal.result(f"{name:<22} {line}")


@app.command("lr-find")
def lr_find(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", help="Folder for lr_find.png and lr_find.json.", metavar="DIR")],
    data: Data = None,
    weight_decay: Annotated[
        list[float] | None,
        typer.Option("--weight-decay", help="A curve each; 1e-2, 1e-4 and 1e-6 by default.", metavar="WD"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=10, help="Steps of a curve.", metavar="N")] = 600,
    stage: Annotated[int, typer.Option("--stage", min=1, help="Stage whose layers train, from 1.", metavar="N")] = 1,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Begin with this bundle's weights, e.g. OUT-stage1 of `train`.", metavar="DIR"),
    ] = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    groups: Groups = None,
    domains: Domains = None,
    fold: Fold = 0,
    seed: SplitSeed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Loss against a rising learning rate, for several weight decays in one plot."""
    pins = _checked_pins(recipe, set_)
    from pcam_automl.commands.recipes import run_lr_find
    from pcam_automl.commands.setup import DataOptions

    run_lr_find(
        recipe,
        pins,
        DataOptions(data, groups, domains, fold, seed),
        out=out,
        weights=weights,
        device=device,
        weight_decays=weight_decay or [1e-2, 1e-4, 1e-6],
        n_steps=steps,
        stage=stage - 1,
        start=start,
        as_json=json,
    )


@app.command("compare-backbones")
def compare_backbones(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; finished ones are kept.", metavar="DIR")],
    backbones: Annotated[
        list[str] | None,
        typer.Argument(
            help="timm names; by default mobilenetv2_100, resnetv2_152, inception_resnet_v2, densenet201, efficientnet_b2."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Everything but the backbone.", metavar="NAME")
    ] = "resnet152v2_transfer",
    data: Data = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    groups: Groups = None,
    domains: Domains = None,
    fold: Fold = 0,
    seed: SplitSeed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Rank backbones by their first and by their short-training validation loss and accuracy."""
    pins = _checked_pins(recipe, set_)
    from pcam_automl.commands.recipes import run_compare
    from pcam_automl.commands.setup import DataOptions
    from pcam_automl.compare import PUBLISHED

    run_compare(
        recipe,
        pins,
        DataOptions(data, groups, domains, fold, seed),
        out=out,
        backbones=backbones or list(PUBLISHED),
        weights=weights,
        device=device,
        as_json=json,
    )


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    patches: Annotated[
        int, typer.Option("--patches", help="Number of patches, train and test together.", metavar="N")
    ] = 6000,
    slides: Annotated[int, typer.Option("--slides", help="Number of slides.", metavar="S")] = 24,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write a synthetic set in the Kaggle layout, with groups, domains, masks and test labels."""
    from pcam_automl.commands.data import run_synth

    run_synth(out, n_patches=patches, n_slides=slides, seed=seed)


@app.command()
def quickstart(
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for everything it makes; an existing run in it goes on.", metavar="DIR"),
    ] = Path("studies/quickstart"),
    patches: Annotated[int, typer.Option("--patches", help="Number of synthetic patches.")] = 5000,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Number of trials.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    device: Device = "auto",
) -> None:
    """The whole path on a synthetic set: synth, prepare, search, finalize, score."""
    from pcam_automl.commands.quickstart import run_quickstart

    run_quickstart(out, n_patches=patches, n_trials=trials, seed=seed, device=device)


@app.command()
def score(
    submission: Annotated[Path, typer.Argument(help="CSV id,label with probabilities.")],
    labels: Annotated[Path, typer.Option("--labels", help="CSV id,label with the truth.", metavar="CSV")],
    groups: Groups = None,
    threshold: Annotated[float, typer.Option("--threshold", min=0.0, max=1.0, help="For the accuracy.")] = 0.5,
    json: Json = False,
) -> None:
    """AUC of a submission against true labels, with its interval."""
    from pcam_automl.commands.score import run_score

    run_score(submission, labels, groups=groups, threshold=threshold, as_json=json)


@app.command("check-submission")
def check_submission(
    submission: Annotated[Path, typer.Argument(help="CSV to check.")],
    sample: Annotated[
        Path, typer.Option("--sample", help="Sample submission with the ids that are wanted, in order.", metavar="CSV")
    ],
) -> None:
    """Check ids, order, NaN and range of a submission against the sample."""
    from pcam_automl.commands.score import run_check_submission

    run_check_submission(submission, sample)


def main() -> None:
    """Entry point: faults in one line; 0 done, 2 the user's input, 1 anything else, 130 / 143 after a signal."""
    choose_waiting()
    try:
        app()
    except Exception as fault:
        if os.environ.get("PCAM_AUTOML_DEBUG"):
            raise
        text, code = _in_one_line(fault)
        print(text, file=sys.stderr)
        sys.exit(code)


def _in_one_line(fault: Exception) -> tuple[str, int]:
    """What a person reads of a fault, and the exit code."""
    if isinstance(fault, Interrupted):
        return str(fault), fault.exit_code
    if isinstance(fault, PcamError):
        return f"error: {fault}", fault.exit_code
    first = (str(fault).strip().splitlines() or [""])[0][:300]
    return f"error: unexpected {type(fault).__name__}: {first} (--debug shows where; please report it)", 1


if __name__ == "__main__":
    main()
