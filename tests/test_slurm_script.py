"""The SLURM script of docs/distributed.md, as it stands there, with stand-ins for `srun` and `scontrol`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pcam_automl.search.reading import TRIALS_KEY, load_study, n_finished_of
from pcam_automl.search.slots import Slots
from pcam_automl.search.soundness import check_study
from pcam_automl.search.storage import engine_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # three starts of torch and timm, half a minute
DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
PINS = ["backbone=test_resnet", "crop_size=32", "batch_size=16"]

SRUN = """\
#!{python}
# The command as a child; the first time it is preempted once a rung of its own is stored, as SLURM would.
import os, sqlite3, subprocess, sys, time
from pathlib import Path
def n_rungs():
    with sqlite3.connect(os.environ["PCAM_AUTOML_STORAGE"].removeprefix("sqlite:///")) as database:
        return database.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()[0]
before, first = n_rungs(), not Path("preempted").exists()
child = subprocess.Popen(sys.argv[1:])
while first and child.poll() is None:
    if n_rungs() > before:
        Path("preempted").touch()
        child.terminate()
        break
    time.sleep(0.02)
code = child.wait()
sys.exit(128 - code if code < 0 else code)
"""
SCONTROL = """\
#!/bin/sh
echo "$@" >> requeued
"""


def test_a_preempted_worker_is_queued_again_and_the_study_ends_with_its_total(easy_pack: Path, tmp_path: Path) -> None:
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCS.read_text(), re.DOTALL)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    own = f'#!/bin/sh\nexec {sys.executable} -m pcam_automl "$@"\n'
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL), ("pcam-automl", own)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "pack").symlink_to(easy_pack)
    url = f"sqlite:///{tmp_path}/studies/s.db"
    environ = {**os.environ, "PCAM_AUTOML_STORAGE": url, "SCRATCH": str(tmp_path), "SLURM_JOB_ID": "4711"}
    environ |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=200
        )

    pins = [word for pin in PINS for word in ("--set", pin)]
    made = run("pcam-automl", "search", "--study", "kaggle", "--data", f"{tmp_path}/pack", "--trials", "1", "--views", "6000", "--weights", "none", "--device", "cpu", *pins)  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    study, _ = load_study("kaggle", url)
    study.set_user_attr(TRIALS_KEY, 3)

    first = run("bash", "job.sh")
    assert first.returncode == 143, first.stderr[-2000:]
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert "interrupted" in [trial.user_attrs.get("reason") for trial in study.get_trials()]

    second = run("bash", "job.sh")
    assert second.returncode == 0, second.stderr[-2000:]
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "done: not once more"
    assert n_finished_of(study) == 3
    slots = Slots(engine_of(study), "kaggle")
    found = check_study(study.get_trials(), slots.all(), tmp_path / "studies" / "kaggle" / "checkpoints", total=3)
    assert found.faults == ()
    assert found.n_recomputed == 0
    engine_of(study).dispose()
