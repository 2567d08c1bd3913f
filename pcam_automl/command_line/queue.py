"""`submit` and `worker`: studies in a queue, and who serves them. Imported at every start: nothing slow at the top."""

from __future__ import annotations

from typing import Annotated

import typer

from pcam_automl.command_line.options import (
    DEFAULT_QUOTA,
    CheckpointQuota,
    Data,
    Deterministic,
    Device,
    Groups,
    MaxRetries,
    Plain,
    Sets,
    Storage,
    StudyName,
    Timeout,
    WeightsFrom,
    Workers,
    WorkersPerDevice,
    checked_name,
    storage_can_be,
    storage_is_there,
    study_is_there,
)
from pcam_automl.command_line.study_options import (
    Artifacts,
    Budget,
    CostAware,
    DomainsOrEstimate,
    Grace,
    Holdout,
    Objective,
    Prior,
    Probe,
    Pruner,
    Recipe,
    Rungs,
    Sampler,
    Seed,
    Space,
    Split,
    Trials,
    Views,
    WarmStart,
    asked_of,
)
from pcam_automl.defaults import MAX_RETRIES
from pcam_automl.errors import InputError


def submit(
    priority: Annotated[
        int, typer.Option("--priority", help="Higher ones are served first; of equal ones the older.", metavar="P")
    ] = 0,
    trials: Trials = None,
    budget: Budget = None,
    data: Data = None,
    study: StudyName = "pcam",
    storage: Storage = None,
    recipe: Recipe = None,
    space: Space = None,
    set_: Sets = None,
    weights: WeightsFrom = None,
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
    deterministic: Deterministic = False,
    probe: Probe = None,
    grace: Grace = None,
    artifacts: Artifacts = None,
) -> None:
    """Put a study into the queue of a storage and return; `worker` processes anywhere run its trials."""
    options = dict(locals())
    storage_can_be(storage)
    asked = asked_of("submit", options)
    from pcam_automl.commands.queue import run_submit

    run_submit(study, storage, asked, n_trials=trials, priority=priority)


def worker(
    study: Annotated[
        str | None,
        typer.Option(
            "--study",
            help="The one to join; without it whatever studies have work left.",
            metavar="NAME",
            callback=checked_name,
        ),
    ] = None,
    storage: Storage = None,
    data: Data = None,
    device: Device = "auto",
    workers: Workers = None,
    workers_per_device: WorkersPerDevice = None,
    timeout: Timeout = None,
    checkpoint_quota: CheckpointQuota = DEFAULT_QUOTA,
    max_retries: MaxRetries = MAX_RETRIES,
    plain: Plain = False,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="Without --study: end once no study has work left.")
    ] = False,
) -> None:
    """Work on a study, or on the queue, from any machine: all but the data's place comes from the storage."""
    from pcam_automl.config import parse_bytes, parse_duration

    timeout_s, quota_bytes = None if timeout is None else parse_duration(timeout), parse_bytes(checkpoint_quota)
    if study is not None and until_idle:
        raise InputError("--until-idle is for a worker without --study; one with it ends when its study is complete")
    if study is None:
        storage_is_there(storage)
    else:
        study_is_there(study, storage)
    from pcam_automl.commands.join import run_worker_command

    run_worker_command(
        study,
        storage,
        data=data,
        device=device,
        n_workers=workers,
        per_device=workers_per_device,
        timeout_s=timeout_s,
        quota_bytes=quota_bytes,
        max_retries=max_retries,
        until_idle=until_idle,
    )


def serve(
    storage: Storage = None,
    data: Data = None,
    device: Device = "auto",
    workers: Workers = None,
    workers_per_device: WorkersPerDevice = None,
    host: Annotated[str, typer.Option("--host", help="Address to bind; nothing here has a login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port of /healthz and /metrics.")] = 8081,
    dashboard_port: Annotated[
        int, typer.Option("--dashboard-port", min=0, help="Port of optuna-dashboard; 0 goes without one.")
    ] = 8080,
) -> None:
    """One long-running command: workers for the queue, the dashboard, /healthz and /metrics, kept alive until Ctrl-C."""
    from pcam_automl.dashboard import check_ports

    check_ports(host, port, dashboard_port)
    storage_can_be(storage)
    from pcam_automl.commands.serve import run_serve

    run_serve(
        storage,
        data=data,
        device=device,
        n_workers=workers,
        per_device=workers_per_device,
        host=host,
        port=port,
        dashboard_port=dashboard_port,
    )
