"""`search`, the command with the most options. Imported at every start: nothing slow at the top."""

from __future__ import annotations

from pcam_automl.command_line.options import (
    DEFAULT_QUOTA,
    CheckpointQuota,
    Data,
    Deterministic,
    Device,
    Groups,
    Json,
    MaxRetries,
    Plain,
    Sets,
    Storage,
    StudyName,
    Timeout,
    WeightsFrom,
    Workers,
    WorkersPerDevice,
    storage_can_be,
)
from pcam_automl.command_line.studies import finalize
from pcam_automl.command_line.study_options import (
    Artifacts,
    Budget,
    CostAware,
    DomainsOrEstimate,
    Grace,
    Holdout,
    Launcher,
    NoThaw,
    Objective,
    Prior,
    Probe,
    Pruner,
    RayAddress,
    Recipe,
    Rungs,
    Sampler,
    Seed,
    Space,
    Split,
    ThenFinalize,
    Trials,
    Views,
    WarmStart,
    asked_of,
    check_launcher,
)
from pcam_automl.defaults import MAX_RETRIES


def search(
    trials: Trials = None,
    budget: Budget = None,
    data: Data = None,
    study: StudyName = "pcam",
    storage: Storage = None,
    recipe: Recipe = None,
    space: Space = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
    timeout: Timeout = None,
    holdout: Holdout = None,
    views: Views = None,
    objective: Objective = None,
    warm_start: WarmStart = None,
    prior: Prior = None,
    sampler: Sampler = None,
    pruner: Pruner = None,
    rungs: Rungs = None,
    cost_aware: CostAware = False,
    seed: Seed = None,
    groups: Groups = None,
    domains: DomainsOrEstimate = None,
    split: Split = None,
    device: Device = "auto",
    workers: Workers = None,
    workers_per_device: WorkersPerDevice = None,
    deterministic: Deterministic = False,
    probe: Probe = None,
    checkpoint_quota: CheckpointQuota = DEFAULT_QUOTA,
    max_retries: MaxRetries = MAX_RETRIES,
    grace: Grace = None,
    artifacts: Artifacts = None,
    no_thaw: NoThaw = False,
    finalize_: ThenFinalize = False,
    launcher: Launcher = "here",
    ray_address: RayAddress = None,
    plain: Plain = False,
    json: Json = False,
) -> None:
    """Search training recipes with Optuna; every result is stored as it comes."""
    options = dict(locals())
    from pcam_automl.config import parse_bytes, parse_duration
    from pcam_automl.errors import InputError

    timeout_s = None if timeout is None else parse_duration(timeout)
    quota_bytes = parse_bytes(checkpoint_quota)
    storage_can_be(storage)
    asked = asked_of("search", options)
    if no_thaw and asked.budget_s is None:
        raise InputError("--no-thaw goes with --budget: without one no paused trial goes on")
    from pcam_automl.commands.search import run_search

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
        max_retries=max_retries,
        launcher=check_launcher(launcher, ray_address, per_device=workers_per_device, no_thaw=no_thaw),
        waits="all" if finalize_ else "far",  # finalize shall have the trials of another terminal, too
        shows_end=not (json and finalize_),  # standard output then holds finalize's object alone
    )
    if finalize_:
        finalize(study=study, data=data, storage=storage, device=device, json=json)
