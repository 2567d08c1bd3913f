"""Intervals: how often the 95 % interval of an AUC holds the true one, beside plain quantiles of the same bootstrap draws.

    python -m benchmarks intervals           # 150 draws of slides a row; PCAM_BENCH_REPEATS

Every draw is a set of new slides: each slide shifts the scores of its patches, and those of label 1 once more. In some rows few of the
slides hold label 1 at all. The true AUC is that of 3,000 slides. Writes results/intervals.json.
"""

from __future__ import annotations

import numpy as np

from pcam_automl.metrics import auc, auc_draws, auc_interval, percentile_interval

CASES = (
    (4, 50, 3.0, 0.7, 1.0),
    (6, 40, 4.0, 0.7, 1.0),
    (10, 30, 3.0, 0.7, 1.0),
    (10, 30, 5.0, 0.5, 1.0),
    (36, 8, 4.0, 0.5, 1.0),
    (36, 8, 2.0, 1.0, 1.0),
    (74, 7, 3.0, 0.5, 1.0),
    (200, 20, 3.0, 0.5, 1.0),
    (20, 30, 3.0, 1.0, 0.1),
    (20, 30, 3.0, 1.0, 0.25),
    (74, 7, 3.0, 1.0, 0.1),
)
"""Slides, patches of each, separation of the labels, spread of a slide's shifts, in standard deviations of a patch's noise; share of the
slides that hold label 1."""

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


def slides(rng: np.random.Generator, n: int, per_slide: int, separation: float, spread: float, share: float) -> Drawn:
    """Labels, scores and slides of ``n`` new slides, (n * per_slide,) each."""
    slide, label = np.repeat(np.arange(n), per_slide), (rng.random(n * per_slide) < 0.5).astype(np.int64)
    label[slide >= round(share * n)] = 0
    shift, more = rng.normal(0, spread, (2, n))
    return label, separation * label + rng.normal(0, 1, len(label)) + shift[slide] + more[slide] * label, slide


def coverage(
    case: tuple[int, int, float, float, float], n_repeats: int, n_draws: int = 400
) -> tuple[float, float, float]:
    """The true AUC, and in which share of the repeats our interval and plain quantiles hold it."""
    n, per_slide, separation, spread, share = case
    rng = np.random.default_rng(0)
    label, score, _ = slides(rng, 3000, per_slide, separation, spread, share)
    true = auc(label, score)
    ours = plain = 0
    for _ in range(n_repeats):
        label, score, slide = slides(rng, n, per_slide, separation, spread, share)
        low, high = auc_interval(label, score, slide, n=n_draws)
        ours += low <= true <= high
        low, high = percentile_interval(auc_draws(label, score[None], slide, n=n_draws)[:, 0])
        plain += low <= true <= high
    return true, ours / n_repeats, plain / n_repeats


def main() -> None:
    """Measure, print, write ``benchmarks/results/intervals.json``."""
    from benchmarks.settings import RESULTS, setting, write_result

    n_repeats, rows = setting("REPEATS", 150), []
    print(
        f"intervals: {n_repeats} draws of new slides a row; asked 95 %\n  slides  (of label 1) patches      true AUC   ours  quantiles"
    )
    for case in CASES:
        true, ours, plain = coverage(case, n_repeats)
        print(
            f"  {case[0]:>6}  {round(case[0] * case[4]):>12} {case[0] * case[1]:>7} {true:>13.4f} {ours:>6.1%} {plain:>10.1%}",
            flush=True,
        )
        rows.append({"case": case, "true": true, "ours": ours, "quantiles": plain})
    write_result(RESULTS / "intervals.json", {"repeats": n_repeats, "rows": rows})


if __name__ == "__main__":
    main()
