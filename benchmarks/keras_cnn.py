"""keras_cnn_1 and keras_cnn_2 beside the same networks in Keras: equal logits, then training speed. CPU only.

    uv pip install -e '.[benchmark]'
    python -m benchmarks keras-cnn           # batch 256, 64 px, 5 rounds of 8 steps, 2 threads
    PCAM_BENCH_ROUNDS=9 PCAM_BENCH_STEPS=4 python -m benchmarks keras-cnn

Our weights are copied over; logits must agree to 1e-4. Both sides then train on the same images held in memory, with Adam 1e-4 and
binary cross-entropy, in turn: every round runs each variant once. Warm-up and compilation are not timed. Neither side augments.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.settings import RESULTS, setting, write_result
from pcam_automl.models.cnn import NETWORKS
from pcam_automl.models.factory import build_network
from pcam_automl.models.weights import Weights
from pcam_automl.recipe import build_recipe

PX, BATCH, LR, KERAS_EPS = 64, 256, 1e-4, 1e-7
N_ROUNDS = setting("ROUNDS", 5)
N_STEPS = setting("STEPS", 8)
N_THREADS = setting("THREADS", 2)
TOLERANCE = 1e-4
Side = Callable[[], None]


def load_keras() -> Any:
    """Keras on TensorFlow, the notebooks' own backend, held to ``N_THREADS``; its logits in float32."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import keras
        import tensorflow as tf
    except ImportError as fault:
        sys.exit(f"keras-cnn needs Keras and TensorFlow ({fault}); install them: uv pip install -e '.[benchmark]'")
    tf.config.threading.set_intra_op_parallelism_threads(N_THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(N_THREADS)
    return keras


def keras_network(keras: Any, name: str) -> Any:
    """The notebook's network as its Keras code has it, one logit without the sigmoid."""
    blocks, layers = NETWORKS[name][0], keras.layers
    model = keras.Sequential([keras.Input((PX, PX, 3))])
    for width in blocks.filters:
        for _ in range(blocks.convs):
            model.add(layers.Conv2D(width, blocks.kernel, activation="relu"))
            if blocks.norm == "each":
                model.add(layers.BatchNormalization())
                model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    for width in blocks.dense:
        model.add(layers.Dense(width, activation="relu"))
    model.add(layers.Dense(1))
    return model


def copy_weights(network: nn.Module, model: Any) -> None:
    """Our weights into Keras' layers, which come in the same order."""
    ours = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    theirs = [layer for layer in model.layers if layer.weights]
    for module, layer in zip(ours, theirs, strict=True):
        arrays = [module.weight, module.bias]
        if isinstance(module, nn.Conv2d):
            arrays[0] = module.weight.permute(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
        elif isinstance(module, nn.Linear):
            arrays[0] = module.weight.T
        else:
            arrays += [module.running_mean, module.running_var]
        layer.set_weights([tensor.detach().numpy() for tensor in arrays if tensor is not None])


def largest_difference(network: nn.Module, model: Any, images: np.ndarray) -> float:
    """Largest difference of logits in evaluation mode, after both saw the same non-trivial batch statistics."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    copy_weights(network, model)
    with torch.inference_mode():
        ours = network.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    return float(np.abs(ours - np.asarray(model(images, training=False))).max())


def our_side(name: str, images: np.ndarray, labels: np.ndarray, *, channels_last: bool, bf16: bool) -> Side:
    """``N_STEPS`` training steps of ours."""
    network = build_network(build_recipe({"backbone": name, "input_size": PX}), Weights("none"), seed=0).train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    y = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, eps=KERAS_EPS, fused=True)

    def steps() -> None:
        for part, target in zip(x.split(BATCH), y.split(BATCH), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = network(part)
            F.binary_cross_entropy_with_logits(logits.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def keras_side(keras: Any, name: str, images: np.ndarray, labels: np.ndarray, *, jit: bool, bf16: bool = False) -> Side:
    """``N_STEPS`` training steps of Keras' ``fit``."""
    keras.config.set_dtype_policy("mixed_bfloat16" if bf16 else "float32")
    model = keras_network(keras, name)
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(LR, epsilon=KERAS_EPS), loss=loss, jit_compile=jit)
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH).cache().prefetch(2)
    return lambda: model.fit(batches, epochs=1, verbose=0, shuffle=False)


def measure(keras: Any, name: str) -> dict[str, Any]:
    """Difference of logits and images a second of every variant, round by round."""
    rng = np.random.default_rng(0)
    images = rng.random((N_STEPS * BATCH, PX, PX, 3), np.float32)
    labels = rng.integers(0, 2, (len(images), 1)).astype(np.float32)
    network = build_network(build_recipe({"backbone": name, "input_size": PX}), Weights("none"), seed=0)
    difference = largest_difference(network, keras_network(keras, name), images[:64])
    assert difference <= TOLERANCE, f"{name}: logits differ by {difference:g}, more than {TOLERANCE:g}"
    sides: dict[str, Side] = {
        "ours, fp32": our_side(name, images, labels, channels_last=False, bf16=False),
        "ours, fp32 channels_last": our_side(name, images, labels, channels_last=True, bf16=False),
        "ours, bf16 channels_last": our_side(name, images, labels, channels_last=True, bf16=True),
        "Keras, fp32": keras_side(keras, name, images, labels, jit=False),
        "Keras, fp32 XLA": keras_side(keras, name, images, labels, jit=True),
        "Keras, mixed bf16": keras_side(keras, name, images, labels, jit=False, bf16=True),
    }
    for side in sides.values():
        side()  # compilation, oneDNN's own caches
    speeds: dict[str, list[float]] = {label: [] for label in sides}
    for _ in range(N_ROUNDS):
        for label, side in sides.items():
            began = time.perf_counter()
            side()
            speeds[label].append(len(images) / (time.perf_counter() - began))
    return {"largest_difference": difference, "images_per_s": speeds}


def ratios(speeds: dict[str, list[float]], ours: str, theirs: str) -> list[float]:
    """Ours over Keras', round by round."""
    return [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]


def report(name: str, found: dict[str, Any]) -> None:
    """Print one network's table and add its ratios: plain fp32 on both sides, and the best variant of each."""
    speeds = found["images_per_s"]
    middle = {label: statistics.median(values) for label, values in speeds.items()}
    print(f"{name}: logits differ by {found['largest_difference']:.1e} at most")
    for label, values in speeds.items():
        print(f"  {label:<26} median {middle[label]:8,.0f} images/s ({min(values):,.0f} to {max(values):,.0f})")

    def best(side: str, precision: str = "") -> str:
        return max((label for label in middle if label.startswith(side) and precision in label), key=middle.__getitem__)

    pairs = {
        "fp32, best layout or compiler of each": (best("ours", "fp32"), best("Keras", "fp32")),
        "best variant of each": (best("ours"), best("Keras")),
    }
    found["ratios"] = {}
    for what, (ours, theirs) in pairs.items():
        values = ratios(speeds, ours, theirs)
        found["ratios"][what] = {"ours": ours, "keras": theirs, "rounds": values, "median": statistics.median(values)}
        print(f"  {what}: {statistics.median(values):.2f} times Keras ({min(values):.2f} to {max(values):.2f})")


def main() -> None:
    """Measure, print, write ``benchmarks/results/keras_cnn.json``."""
    keras = load_keras()
    torch.set_num_threads(N_THREADS)
    print(f"keras-cnn: Keras {keras.__version__} on {keras.backend.backend()}, torch {torch.__version__}; ", end="")
    print(f"batch {BATCH}, {PX} px, {N_THREADS} threads, {N_ROUNDS} rounds of {N_STEPS} steps, CPU")
    found = {}
    for name in ("keras_cnn_1", "keras_cnn_2"):
        found[name] = measure(keras, name)
        report(name, found[name])
    write_result(
        RESULTS / "keras_cnn.json",
        {"batch": BATCH, "px": PX, "threads": N_THREADS, "steps": N_STEPS, "networks": found},
    )


if __name__ == "__main__":
    main()
