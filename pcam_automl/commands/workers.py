"""`search --workers`: how many, where, and what people see of them. Runs no trial itself (see search/processes.py)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import joblib
import torch

from pcam_automl import terminal
from pcam_automl.batches import can_share
from pcam_automl.config import find_data, storage_url, studies_folder
from pcam_automl.configs_folder import find_config
from pcam_automl.errors import DataError
from pcam_automl.interrupt import StopSignal
from pcam_automl.models.cost import weight_bytes
from pcam_automl.recipe import Recipe
from pcam_automl.recipe_files import load_recipe
from pcam_automl.search.patience import patient
from pcam_automl.search.placement import n_for_cpu, n_for_gpu, shared_packs, worker_devices
from pcam_automl.search.processes import Heard, WorkerTask, run_workers
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.settling import Settled, settle_lost
from pcam_automl.search.slots import Slots
from pcam_automl.search.sqlite_place import check_few
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked, OpenStudy
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import SearchEnd
from pcam_automl.training.compute import use_cores
from pcam_automl.training.speed import SpeedBook
from pcam_automl.workers_board import Board

_STATE_COPIES = 11
"""Of the weights in float32, beside themselves: AdamW's two, their average, and four each for a branch and for a checkpoint."""
_PACK_BYTES_UNKNOWN = 6_100_000_000
"""Kaggle's training set, where the size of the data is not known before they are packed."""


def devices_for(
    asked: Asked, n_workers: int | None, per_device: str | None, url: str | None, *, shares: bool = True
) -> list[str]:
    """The device of each worker, one a GPU unless told otherwise; ``auto`` measures the recipe that the search starts from.

    Args:
        asked: for the device, the data and the recipe.
        n_workers: workers in all.
        per_device: workers on each, or ``auto``.
        url: of the storage, beside whose studies speeds are kept.
        shares: whether the workers of one GPU share one copy of the patches: those of one command do.

    Raises:
        InputError: see :func:`~pcam_automl.search.placement.worker_devices`.
        StudyError: more than the storage takes.
    """
    studies = studies_folder(storage_url(url))

    def fitting(device: torch.device) -> int:
        recipe = load_recipe(find_config("recipes", asked.recipe or "default"), overrides={"pretrained": False})
        recipe = recipe.model_copy(update={"pretrained": False})
        return _n_on_cpu(recipe, studies) if device.type == "cpu" else _n_on_gpu(recipe, device, asked, studies, shares)

    devices = worker_devices(asked.device, n_workers, per_device, fitting=fitting)
    check_few(storage_url(url), len(devices))
    if n_workers is None and per_device is None and len(devices) == 1:
        return [asked.device]
    terminal.say(f"{len(devices)} worker{'s' * (len(devices) > 1)} on {', '.join(sorted(set(devices)))}")
    return devices


def _n_on_cpu(recipe: Recipe, studies: Path) -> int:
    book, cpu = SpeedBook(studies / "speed.json"), torch.device("cpu")

    def rate_of(threads: int) -> float:
        torch.set_num_threads(threads)
        return book.images_per_s(recipe, cpu)

    n = n_for_cpu(rate_of)
    use_cores(n)
    return n


def _n_on_gpu(recipe: Recipe, device: torch.device, asked: Asked, studies: Path, shares: bool) -> int:
    """Not run here yet: no GPU was at hand."""
    book = SpeedBook(studies / "speed.json")
    double = recipe.model_copy(update={"batch_size": 2 * recipe.batch_size})
    step_s, double_step_s = (one.batch_size / book.images_per_s(one, device) for one in (recipe, double))
    # The step that is measured has neither an optimizer's state, nor an average, nor copies of all that for a branch and a checkpoint.
    peak_bytes = book.peak_bytes(double, device) + _STATE_COPIES * weight_bytes(recipe)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return n_for_gpu(
        free_bytes=free_bytes,
        pack_bytes=_pack_bytes(asked),
        peak_bytes=peak_bytes,
        step_s=step_s,
        double_step_s=double_step_s,
        n_cores=max(1, int(joblib.cpu_count()) // torch.cuda.device_count()),  # whatever OMP_NUM_THREADS says
        shares=shares and can_share(device),
    )


def _pack_bytes(asked: Asked) -> int:
    """Bytes of the prepared pack that is named; of raw data, which are not packed yet, those of Kaggle's."""
    with contextlib.suppress(DataError):  # the search itself says what is wrong with the data
        file = find_data(asked.data) / "patches.npy"
        if file.is_file():
            return file.stat().st_size
    return _PACK_BYTES_UNKNOWN


def run_many(
    opened: OpenStudy,
    url: str | None,
    devices: Sequence[str],
    limits: Limits,
    *,
    stop: StopSignal,
    noted: Callable[[], None] = lambda: None,
) -> SearchEnd:
    """Run the workers under one table of them and a bar for the study; ``noted`` is called as trials begin, score and end."""
    # What is asked agrees with the study by now; a worker needs only where the data are.
    task = WorkerTask(opened.name, url, Asked(data=opened.store.root), limits, len(devices))
    with Board(devices, len(opened.settings.rungs), opened.settings.goal.short) as board:
        show = _WorkersShow(board, opened, limits, noted)
        slots = Slots(engine_of(opened.study), opened.name)

        def settle() -> str:
            trials = opened.study.get_trials(deepcopy=False)
            found = settle_lost(
                opened.study,
                slots,
                trials,
                checkpoints=opened.checkpoints,
                max_retries=limits.max_retries,
                mirror=opened.mirror,
            )
            return settled_text(found, limits)

        with stop.deferred(), patient():
            if any(device != "cpu" for device in devices):
                gc.collect()
                torch.cuda.empty_cache()  # what the probe of the study's creation held
            packs = shared_packs(opened.store, devices)
            return run_workers(task, devices, stop=stop, heard=show.heard, settle=settle, packs=packs)


def settled_text(found: Settled, limits: Limits) -> str:
    """What becomes of a dead worker's trial, for people."""
    if not found.ended:
        return "it had no trial in hand, or another worker has seen to it"
    parts = []
    for number in found.ended:
        gone = (
            f"is given up after {limits.max_retries} retries"
            if number in found.given_up
            else "goes on from its checkpoint"
        )
        parts.append(f"trial {number} {gone}")
    return ", ".join(parts)


class StudyBar:
    """The bar of the whole study: of trials, or of a budget's seconds."""

    def __init__(self, bars: terminal.Bars, limits: Limits, n_finished: int) -> None:
        self.bars, self.clock = bars, limits.clock
        if self.clock is None:
            self.bar = bars.add("trials", limits.n_trials)
        else:
            self.bar = bars.add("search, seconds", round(self.clock.total_s - self.clock.reserve_s))
        self.set(n_finished)

    def set(self, n_finished: int) -> None:
        """So many trials are finished."""
        if self.clock is None:
            self.bars.set(self.bar, done=n_finished)
        else:
            self.bars.set(self.bar, text=f"{n_finished} trials, search's seconds")
            self.tick()

    def tick(self) -> None:
        """Time has passed."""
        if self.clock is not None:
            whole = self.clock.total_s - self.clock.reserve_s
            self.bars.set(self.bar, total=round(whole), done=round(min(whole, whole - self.clock.left_s())))


class _WorkersShow:
    """One line a finished trial, above the table of the workers and the study's bar."""

    def __init__(self, board: Board, opened: OpenStudy, limits: Limits, noted: Callable[[], None]) -> None:
        self.board, self.noted, self.goal, self.clock = board, noted, opened.settings.goal, limits.clock
        self.total = StudyBar(board, limits, n_finished_of(opened.study))

    def heard(self, said: Heard) -> None:
        from pcam_automl.commands.status import finished_line

        row, values = self.board.rows[said.worker], said.values
        if said.kind in ("begins", "rung", "finished"):
            self.noted()  # what a budget has spent until here, should this process be killed
        if said.kind == "begins":
            row.begins(*values)
        elif said.kind == "views":
            row.views += values[0]
        elif said.kind == "rung":
            _, row.score, row.rung, row.images_per_s = values
        elif said.kind == "note":
            terminal.say(values[0])
        elif said.kind == "finished":
            trial, n_finished, best = values
            if self.clock is not None:
                self.clock.learn(best)  # as the workers do in their own processes
            self.total.set(n_finished)
            row.text = "between two trials"
            terminal.say(finished_line(trial, best, self.goal))
        self.total.tick()
