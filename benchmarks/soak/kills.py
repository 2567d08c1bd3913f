"""SIGKILL of random workers at random moments of a search of tiny trials: totals exact, nothing stuck, nothing lost.

    python -m benchmarks.soak kills                              # 200 kills, 60 trials, SQLite
    python -m benchmarks.soak kills --storage postgresql

A trial survives as many deaths as it takes (``--max-retries`` is as large as the number of kills). After the last kill the
search runs to its end undisturbed. Asked: exactly 60 finished trials, none RUNNING, `status --check` sound. If the search
ends before the last kill its trials are too short: give more --views.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from optuna.trial import TrialState

from benchmarks.settings import write_result
from benchmarks.soak.common import OUT, Recorded, arguments, recorded_workers, tiny_study
from pcam_automl.interrupt import stop_signal
from pcam_automl.search.processes import Heard, WorkerTask, run_workers
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.settling import settle_lost
from pcam_automl.search.slots import Slots
from pcam_automl.search.soundness import check_study
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked
from pcam_automl.search.turns import Limits


class Killer(threading.Thread):
    """Kills a living worker after a random pause, so often: of four kills three where one holds a slot, the fourth anywhere."""

    def __init__(self, recorded: Recorded, slots: Slots, n: int, mean_s: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.recorded, self.slots, self.n, self.mean_s, self.random = recorded, slots, n, mean_s, random.Random(seed)
        self.n_killed, self.n_in_trials, self.over = 0, 0, threading.Event()

    def run(self) -> None:
        while self.n_killed < self.n and not self.over.wait(self.random.expovariate(1.0 / self.mean_s)):
            alive = self.recorded.alive()
            claims = {int(slot.owner.split(":")[-2]) for slot in self.slots.claimed() if slot.owner}
            inside = [process for process in alive if process.pid in claims]
            if chosen := inside if inside and self.random.random() < 0.75 else alive:
                victim = self.random.choice(chosen)
                victim.kill()
                self.n_in_trials += victim in inside
                self.n_killed += 1
                if self.n_killed % 20 == 0:
                    print(f"  {self.n_killed} kills", flush=True)


def main() -> None:
    """Run, print, write ``results/soak/kills_<storage>.json``."""
    asked = arguments(kills=200, trials=60, workers=3, views=768, seed=0, mean=0.6)
    began = time.monotonic()
    with (
        tiny_study(asked.storage, views=asked.views, n_workers=asked.workers) as opened,
        recorded_workers() as recorded,
    ):
        slots = Slots(engine_of(opened.study), opened.name)
        limits = Limits(asked.trials, max_retries=asked.kills)
        killer = Killer(recorded, slots, asked.kills, asked.mean, asked.seed)

        def settle() -> str:
            trials = opened.study.get_trials(deepcopy=False)
            settle_lost(opened.study, slots, trials, checkpoints=opened.checkpoints, max_retries=asked.kills)
            return ""

        def heard(said: Heard) -> None:
            if said.kind == "note" and "ended by SIGKILL" not in said.values[0]:
                print(f"  {said.values[0]}", flush=True)

        task = WorkerTask(opened.name, opened.url, Asked(data=opened.store.root), limits, asked.workers)
        with stop_signal("") as stop, stop.deferred():
            killer.start()
            end = run_workers(task, ["cpu"] * asked.workers, stop=stop, heard=heard, settle=settle)
        killer.over.set()
        killer.join()
        trials = opened.study.get_trials(deepcopy=False)
        sound = check_study(trials, slots.all(), opened.checkpoints, total=asked.trials)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        lost = sum(trial.user_attrs.get("reason") == "worker lost" for trial in trials)
        finished = n_finished_of(opened.study)
        leftovers = sorted(p.name for p in Path(opened.checkpoints).rglob("*") if p.name.startswith("."))
    seconds = time.monotonic() - began
    passed = finished == asked.trials and running == 0 and not sound.faults and killer.n_killed == asked.kills
    print(
        f"kills ({asked.storage}): {killer.n_killed} of {asked.kills} kills, {killer.n_in_trials} of workers that held a slot, {len(trials)} rows, {finished} of {asked.trials} finished, {lost} ended as lost, "
        f"{running} running, {sound.n_recomputed} rungs trained twice, {len(sound.faults)} faults, {end.why}; {seconds:.0f} s: {'passed' if passed else 'FAILED'}"
    )
    for fault in sound.faults:
        print(f"  {fault}")
    write_result(
        OUT / f"kills_{asked.storage}.json",
        {
            "kills": killer.n_killed,
            "kills_in_trials": killer.n_in_trials, "asked": vars(asked), "rows": len(trials), "finished": finished, "lost": lost, "running": running,
            "recomputed_rungs": sound.n_recomputed, "faults": list(sound.faults), "leftovers": leftovers, "seconds": round(seconds, 1), "passed": passed,
        },
    )  # fmt: skip
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
