"""The database server away in the middle of a search, for a minute and by kill -9: nothing that was reported is lost.

    python -m benchmarks.soak outage                             # stop for 60 s, then SIGKILL of the server and 10 s
    python -m benchmarks.soak outage --away 20

A PostgreSQL server of its own (initdb must be installed) serves `search --workers 2`. tests/faults has the same with seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from optuna.trial import TrialState

from benchmarks.settings import write_result
from benchmarks.soak.common import OUT, arguments, recorded_workers, tiny_study
from pcam_automl.interrupt import stop_signal
from pcam_automl.search.processes import Heard, WorkerTask, run_workers
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.settling import settle_lost
from pcam_automl.search.slots import Slots
from pcam_automl.search.soundness import check_study
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked
from pcam_automl.search.turns import Limits

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "faults"))
from own_postgres import find_bindir, own_postgres


def main() -> None:
    """Run, print, write ``results/soak/outage.json``."""
    asked = arguments(storages=("postgresql",), trials=24, workers=2, views=768, away=60.0, killed=10.0)
    bindir = find_bindir()
    if bindir is None:
        print("outage: skipped, no PostgreSQL programs (initdb) on this machine")
        return
    told: list[tuple[int, int, float]] = []  # trial, step, value
    events: list[dict[str, float | str]] = []
    with own_postgres(bindir) as server:
        os.environ["PCAM_TEST_POSTGRES_URL"] = server.url
        began = time.monotonic()
        with tiny_study("postgresql", views=asked.views, n_workers=asked.workers) as opened, recorded_workers():
            slots, steps = Slots(engine_of(opened.study), opened.name), [views for views, _ in opened.settings.rungs]

            def settle() -> str:
                trials = opened.study.get_trials(deepcopy=False)
                settle_lost(opened.study, slots, trials, checkpoints=opened.checkpoints)
                return ""

            def away(how: str, seconds: float) -> None:
                getattr(server, how)()
                time.sleep(seconds)
                server.start()
                events.append({"how": how, "seconds": seconds})
                print(f"  server {how} for {seconds:.0f} s", flush=True)

            threads: list[threading.Thread] = []

            def heard(said: Heard) -> None:
                if said.kind == "rung":
                    number, value, rung, _ = said.values
                    told.append((number, steps[rung - 1], value))
                    plan = {8: ("stop", asked.away), 20: ("kill", asked.killed)}
                    if (what := plan.get(len(told))) is not None:
                        threads.append(threading.Thread(target=away, args=what))
                        threads[-1].start()
                elif said.kind == "note" and said.values[0]:
                    print(f"  {said.values[0]}", flush=True)

            task = WorkerTask(
                opened.name, opened.url, Asked(data=opened.store.root), Limits(asked.trials), asked.workers
            )
            with stop_signal("") as stop, stop.deferred():
                end = run_workers(task, ["cpu"] * asked.workers, stop=stop, heard=heard, settle=settle)
            for thread in threads:
                thread.join()
            trials = opened.study.get_trials(deepcopy=False)
            sound = check_study(trials, slots.all(), opened.checkpoints, total=asked.trials)
            missing = [one for one in told if trials[one[0]].intermediate_values.get(one[1]) != one[2]]
            reasons = [str(trial.user_attrs.get("reason")) for trial in trials if trial.state == TrialState.FAIL]
            finished, failed = n_finished_of(opened.study), sum(trial.state == TrialState.FAIL for trial in trials)
    seconds = time.monotonic() - began
    passed = finished == asked.trials and not missing and not sound.faults and len(events) == 2
    print(
        f"outage: {finished} of {asked.trials} finished, {failed} rows failed, {len(missing)} of {len(told)} reports lost, {len(sound.faults)} faults, {end.why}; "
        f"{seconds:.0f} s: {'passed' if passed else 'FAILED'}"
    )
    for fault in (*sound.faults, *reasons):
        print(f"  {fault[:300]}")
    write_result(
        OUT / "outage.json",
        {
            "events": events, "asked": vars(asked), "finished": finished, "failed_rows": failed, "reports": len(told), "reports_lost": len(missing),
            "faults": list(sound.faults), "seconds": round(seconds, 1), "passed": passed,
        },
    )  # fmt: skip
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
