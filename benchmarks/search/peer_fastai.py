"""fastai: lr_find, one cycle, test-time augmentation; as many epochs as fit, the network as large as eight of them allow.

From given weights the head trains for an epoch before the rest (discriminative rates); from scratch everything trains at once.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    Normalize,
    RandomSplitter,
    RocAucBinary,
    aug_transforms,
    imagenet_stats,
    set_seed,
    vision_learner,
)

from benchmarks.search.peer import N_CORES, VALID_SHARE, Task, read_table, read_task, write_answer
from benchmarks.search.peer_training import LOADED_SHARE, images_per_s

SIZES = ("resnet34d", "resnet18d", "resnet10t")
"""From scratch, the largest first; stems of three 3x3 convolutions as in fastai's own xresnets."""
LEAST_EPOCHS, MOST_EPOCHS = 8, 30
LR_STEPS = 40
BATCH = 64
TEST_VIEWS = 4
FORWARD_SPEEDUP = 2.5


class TimeIsUp(Callback):  # type: ignore[misc, unused-ignore]
    """Ends the training at a time; one cycle is planned to be over before."""

    def __init__(self, until: float) -> None:
        self.until = until

    def after_batch(self) -> None:
        """Look at the clock."""
        if self.training and time.time() >= self.until:
            raise CancelFitException


def build_loaders(task: Task) -> Any:
    """Fastai's DataLoaders over the files: random 80/20, flips, turns, zoom, light."""
    labels = read_table(task.data / "train_labels.csv")
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=lambda name: task.data / "train" / f"{name}.tif",
        get_y=lambda name: str(labels[name]),
        splitter=RandomSplitter(VALID_SHARE, seed=task.seed),
        batch_tfms=[*aug_transforms(flip_vert=True, max_warp=0.0)]
        + ([Normalize.from_stats(*imagenet_stats)] if task.weights is None else []),
    )
    return block.dataloaders(list(labels), bs=BATCH, num_workers=N_CORES, device=torch.device("cpu"))


def choose_network(task: Task, n_train: int) -> str:
    """The given weights' network, or the largest one that eight epochs of fit into the time."""
    if task.weights is not None:
        return task.backbones[0]
    for name in SIZES[:-1]:
        rate = LOADED_SHARE * images_per_s({"backbone": name, "crop": 96, "batch_size": BATCH}, n_steps=2)
        if LEAST_EPOCHS * n_train / rate < 0.7 * task.left_s:
            return name
    return SIZES[-1]


def found_rate(learner: Any) -> tuple[float, float]:
    """The valley of a short learning-rate range test, and images a second in it."""
    began = time.time()
    lr = float(learner.lr_find(start_lr=1e-5, end_lr=1.0, num_it=LR_STEPS, show_plot=False).valley)
    return lr, len(learner.recorder.lrs) * BATCH / (time.time() - began)


def epochs_that_fit(left_s: float, rate: float, n_train: int, n_valid: int, n_test: int) -> int:
    """Whole epochs (validation included) that leave time for the test views; at least one."""
    test_s = (TEST_VIEWS + 1) * n_test / (FORWARD_SPEEDUP * rate)
    epoch_s = n_train / rate + n_valid / (FORWARD_SPEEDUP * rate)
    return max(1, min(MOST_EPOCHS, int((0.97 * left_s - 1.1 * test_s) / epoch_s)))


def main() -> None:
    """Find the rate, train, predict."""
    warnings.filterwarnings("ignore")
    task = read_task()
    torch.set_num_threads(N_CORES)
    set_seed(task.seed)
    loaders = build_loaders(task)
    sizes = len(loaders.train_ds), len(loaders.valid_ds), len(read_table(task.data / "sample_submission.csv"))
    name = choose_network(task, sizes[0])
    local = (
        {} if task.weights is None else {"pretrained_cfg_overlay": {"file": str(task.weights / f"{name}.safetensors")}}
    )
    learner = vision_learner(
        loaders, name, pretrained=task.weights is not None, metrics=RocAucBinary(), path=task.out, **local
    )
    with learner.no_bar(), learner.no_logging():
        if task.weights is not None:
            lr, _ = found_rate(learner)
            learner.fit_one_cycle(1, slice(lr), pct_start=0.99)
        learner.unfreeze()
        lr, rate = found_rate(learner)
        n_epochs = epochs_that_fit(task.left_s, rate, *sizes)
        test_s = (TEST_VIEWS + 1) * sizes[2] / (FORWARD_SPEEDUP * rate)
        rates = slice(lr / 100, lr) if task.weights is not None else lr
        learner.fit_one_cycle(n_epochs, rates, cbs=TimeIsUp(task.until - 1.1 * test_s - 3.0))
        printed = float(learner.validate()[1])
        ids = list(read_table(task.data / "sample_submission.csv"))
        files = [task.data / "test" / f"{one}.tif" for one in ids]
        loader = loaders.test_dl(files, num_workers=N_CORES)
        n_views = min(TEST_VIEWS, int(task.left_s * FORWARD_SPEEDUP * rate / sizes[2]) - 1)
        probs, _ = learner.tta(dl=loader, n=n_views) if n_views > 0 else learner.get_preds(dl=loader)
    details = {
        "network": name,
        "epochs": n_epochs,
        "lr": lr,
        "images_per_s": round(rate, 1),
        "views": max(0, n_views) + 1,
    }
    tumour = list(loaders.vocab).index("1")
    answer = np.asarray(probs[:, tumour].numpy())
    write_answer(task, ids, answer, printed_auc=printed, details=details, package="fastai")


if __name__ == "__main__":
    main()
