"""Workers on a local Ray cluster of three nodes, one of which is killed in the middle of the search: totals stay exact."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest
import torch

from pcam_automl.errors import InputError
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.ray_launcher import RayTask, _check_resources, run_on_ray
from pcam_automl.search.reading import TRIALS_KEY, n_finished_of
from pcam_automl.search.slots import Slots
from pcam_automl.search.soundness import check_study
from pcam_automl.search.storage import engine_of
from pcam_automl.search.study import Asked

pytestmark = pytest.mark.filterwarnings("ignore")
N = 8


def test_a_worker_that_no_node_can_hold_is_refused() -> None:
    task = RayTask([], "url", 2, n_gpus=1.0, n_cpus=1.0)
    with pytest.raises(InputError, match="a worker needs 1 GPU, the cluster has 0 in all"):
        _check_resources({"CPU": 4.0}, task)
    _check_resources({"CPU": 4.0, "GPU": 1.0}, task)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_node_costs_no_trial(easy_pack: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'pcam-automl[ray]')")
    from ray.cluster_utils import Cluster

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=768, pins=pins, device="cpu")
    opened = create_or_open_study("cluster", f"sqlite:///{tmp_path}/studies/s.db", asked, say=lambda text: None)
    opened.study.set_user_attr(TRIALS_KEY, N)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    said: list[str] = []

    def kill_one() -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until and n_finished_of(opened.study) < 2:
            time.sleep(0.5)
        cluster.remove_node(others[0], allow_graceful=False)
        said.append("killed")

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        words = ["worker", "--study", "cluster", "--device", "cpu", "--plain", "--data", str(opened.store.root)]
        task = RayTask(words, opened.url, 3, 0.0, 1.0, cluster.address)
        run_on_ray(task, lambda: None, said.append)
    finally:
        killer.join()
        ray.shutdown()
        cluster.shutdown()
    assert "killed" in said
    assert said[0] == "3 workers on a Ray cluster of 3 nodes"
    assert n_finished_of(opened.study) == N
    slots = Slots(engine_of(opened.study), "cluster")
    assert slots.counts() == {"claimed": 0, "done": N, "open": 0}
    assert check_study(opened.study.get_trials(), slots.all(), opened.checkpoints, total=N).faults == ()
