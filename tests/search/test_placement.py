"""How many workers a machine takes."""

from __future__ import annotations

from pathlib import Path

import joblib
import pytest
import torch

from pcam_automl import batches
from pcam_automl.batches import load_shared
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import InputError
from pcam_automl.models.cost import weight_bytes
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import Recipe
from pcam_automl.search import placement
from pcam_automl.search.placement import n_for_cpu, n_for_gpu, shared_packs, worker_devices

GPU = {
    "free_bytes": 80_000_000_000,
    "pack_bytes": 6_000_000_000,
    "peak_bytes": 2_000_000_000,
    "step_s": 0.010,
    "double_step_s": 0.0125,
    "n_cores": 16,
}


def none_fits(device: torch.device) -> int:
    raise AssertionError("nothing is to be measured")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("text", "n", "per_device", "devices"),
    [
        ("auto", None, None, ["cuda:0", "cuda:1"]),
        ("auto", 3, None, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", 2, None, ["cuda:1", "cuda:1"]),
        ("auto", None, "2", ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]),
        ("cpu", 3, None, ["cpu"] * 3),
        ("cpu", None, "2", ["cpu"] * 2),
    ],
)
def test_workers_take_turns_over_the_devices(
    text: str, n: int | None, per_device: str | None, devices: list[str]
) -> None:
    assert worker_devices(text, n, per_device, fitting=none_fits) == devices


def test_auto_asks_each_device() -> None:
    assert worker_devices("cpu", None, "auto", fitting=lambda device: 3) == ["cpu"] * 3


@pytest.mark.parametrize(("n", "per_device"), [(2, "2"), (None, "0"), (None, "many"), (None, "9")])
def test_what_is_no_number_of_workers_is_refused(n: int | None, per_device: str) -> None:
    with pytest.raises(InputError, match="workers-per-device"):
        worker_devices("cpu", n, per_device, fitting=none_fits)


def test_a_cpu_is_shared_where_one_worker_cannot_use_all_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    assert n_for_cpu(lambda threads: 100.0 * threads) == 1  # it scales: one worker, and its trials end sooner
    assert n_for_cpu(lambda threads: 100.0 * threads**0.5) == 8
    assert n_for_cpu(lambda threads: 100.0 * min(threads, 4)) == 2


def test_a_gpu_takes_as_many_as_fit_and_find_it_idle() -> None:
    assert n_for_gpu(**GPU) == 4  # 2.5 ms of the 10 are its own
    assert n_for_gpu(**{**GPU, "double_step_s": 0.020}) == 1  # busy all the time
    assert (
        n_for_gpu(**{**GPU, "double_step_s": 0.0099, "free_bytes": 10**12, "n_cores": 64}) == 5
    )  # noise is no idle GPU
    assert n_for_gpu(**{**GPU, "free_bytes": 14_000_000_000}) == 3  # the pack once, then 2.5 GB each
    assert n_for_gpu(**{**GPU, "free_bytes": 8_000_000_000}) == 3  # the pack is streamed there
    assert n_for_gpu(**{**GPU, "free_bytes": 1_000_000_000}) == 1
    assert n_for_gpu(**{**GPU, "n_cores": 2}) == 2
    assert n_for_gpu(**{**GPU, "free_bytes": 14_000_000_000, "shares": False}) == 1  # the pack for each


def test_a_pack_is_shared_on_gpus_with_several_workers_only(monkeypatch: pytest.MonkeyPatch, easy_pack: Path) -> None:
    loaded = []

    def load(store: PatchStore, device: torch.device) -> torch.Tensor | None:
        loaded.append(str(device))
        return None if str(device) == "cuda:2" else torch.zeros(1)

    monkeypatch.setattr(placement, "load_shared", load)
    devices = ["cuda:0", "cuda:1", "cuda:0", "cuda:2", "cuda:2", "cpu", "cpu"]
    assert list(shared_packs(open_store(easy_pack), devices)) == ["cuda:0"]
    assert loaded == ["cuda:0", "cuda:2"]  # the latter streams


def test_on_a_cpu_the_mapped_file_is_what_all_share(easy_pack: Path) -> None:
    assert load_shared(open_store(easy_pack), torch.device("cpu")) is None


def test_where_the_allocator_cannot_share_each_worker_holds_its_own(
    monkeypatch: pytest.MonkeyPatch, easy_pack: Path
) -> None:
    def refuses(value: object) -> bytes:
        raise RuntimeError("Cannot share an expandable_segments allocation")

    tensor = torch.zeros(1, dtype=torch.uint8)
    monkeypatch.setattr(batches, "open_patches", lambda store, device: batches.ResidentPatches(tensor, device))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: tensor)  # no GPU is asked
    store, gpu = open_store(easy_pack), torch.device("cuda:0")
    assert load_shared(store, gpu) is tensor
    for name in (
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    ):  # sent without complaint, and refused to the receiver
        with monkeypatch.context() as told:
            told.setenv(name, "max_split_size_mb:64, expandable_segments: True")
            assert load_shared(store, gpu) is None
            told.setenv(name, "expandable_segments:False")
            assert load_shared(store, gpu) is tensor
    monkeypatch.setattr(batches.ForkingPickler, "dumps", refuses)
    assert load_shared(store, gpu) is None


def test_the_bytes_of_a_network_are_those_of_its_weights() -> None:
    recipe = Recipe(backbone="resnet10t", crop_size=64)
    network = build_network(recipe.model_copy(update={"pretrained": False}), Weights("none"), seed=0)
    assert weight_bytes(recipe) == sum(p.numel() * p.element_size() for p in network.parameters())
