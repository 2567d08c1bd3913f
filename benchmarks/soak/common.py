"""What the soak tests share: a tiny study in a storage of their own, workers that start in a tenth of a second."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa

from benchmarks.settings import RESULTS
from pcam_automl.data.pack import pack
from pcam_automl.data.sources import open_source
from pcam_automl.data.synthetic import write_synthetic
from pcam_automl.search import processes
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.storage_url import normalised_url
from pcam_automl.search.study import Asked, OpenStudy

PRELOADED = ["pcam_automl.search.processes", "pcam_automl.search.objective", "psycopg", "pymysql"]
OUT = RESULTS / "soak"
SERVERS = {
    "postgresql": ("PCAM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"),
    "mysql": ("PCAM_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/test"),
}


def arguments(*, storages: tuple[str, ...] = ("sqlite", "postgresql", "mysql"), **defaults: Any) -> argparse.Namespace:
    """``--storage``, the first by default, and a number for every default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--storage", choices=storages, default=storages[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args(sys.argv[1:])


@contextmanager
def storage_of(kind: str, folder: Path) -> Iterator[str]:
    """A fresh database: a file, or one of the server in PCAM_TEST_POSTGRES_URL or PCAM_TEST_MYSQL_URL (else the local one),
    dropped at the end.
    """
    if kind == "sqlite":
        yield f"sqlite:///{folder}/studies/soak.db"
        return
    variable, local = SERVERS[kind]
    server = sa.make_url(normalised_url(os.environ.get(variable, local)))
    name = f"soak_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name}" + " WITH (FORCE)" * (kind == "postgresql")))
        engine.dispose()


@contextmanager
def tiny_study(kind: str, *, views: int, n_workers: int) -> Iterator[OpenStudy]:
    """A study of trials of about a second, three rungs each, in a working directory of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_synthetic(folder / "raw", n_patches=200, n_slides=12, seed=0)
        pack(open_source(folder / "raw"), folder / "pack")
        os.chdir(folder)  # studies/ of a database server lie in the working directory
        try:
            with storage_of(kind, folder) as url:
                pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
                asked = Asked(
                    data=folder / "pack", weights="none", views=views, pins=pins, device="cpu", n_workers=n_workers
                )
                yield create_or_open_study("soak", url, asked, say=lambda text: None)
        finally:
            os.chdir(before)


class Recorded:
    """A multiprocessing whose processes are forked by a warm server, and are known by name here.

    A spawned worker takes seconds of imports; after 200 kills that would be an hour of imports on two cores.
    """

    def __init__(self) -> None:
        self.started: list[BaseProcess] = []
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._context = context

    def get_context(self, method: str) -> Recorded:
        return self

    def Pipe(self, *, duplex: bool) -> Any:  # noqa: N802 - multiprocessing's name
        return self._context.Pipe(duplex=duplex)

    def Process(self, **words: Any) -> BaseProcess:  # noqa: N802 - multiprocessing's name
        self.started.append(self._context.Process(**words))
        return self.started[-1]

    def alive(self) -> list[BaseProcess]:
        return [process for process in list(self.started) if process.pid is not None and process.is_alive()]


@contextmanager
def recorded_workers() -> Iterator[Recorded]:
    """Inside the block :func:`~pcam_automl.search.processes.run_workers` starts its workers so."""
    real = vars(processes)["multiprocessing"]
    recorded = Recorded()
    vars(processes)["multiprocessing"] = recorded
    try:
        yield recorded
    finally:
        vars(processes)["multiprocessing"] = real
