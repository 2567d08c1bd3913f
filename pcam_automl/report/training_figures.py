"""The section on the training: epoch table, curves, learning rate, strips of dense runs. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pcam_automl.errors import DataError
from pcam_automl.report.blocks import Block, Picture, Section, Table, Text, left_out
from pcam_automl.report.content import PATCH, Noun, RateCurve, ReportContent
from pcam_automl.report.patch_sheets import png_of
from pcam_automl.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    SKY,
    VERMILION,
    add_axes,
    add_row,
    dress,
    legend_below,
    new_figure,
    picture,
)
from pcam_automl.training.engine import RungResult

Column = tuple[str, Callable[[RungResult], float | None], str]
_COLUMNS: tuple[Column, ...] = (
    ("training loss", lambda e: e.train_loss, "{:.4f}"),
    ("validation loss", lambda e: e.loss, "{:.4f}"),
    ("training accuracy", lambda e: e.train_accuracy, "{:.4f}"),
    ("validation accuracy", lambda e: e.accuracy, "{:.4f}"),
    ("validation AUC", lambda e: e.auc, "{:.4f}"),
    ("Dice", lambda e: e.dice, "{:.4f}"),
    ("learning rate", lambda e: e.lr, "{:.2e}"),
    ("seconds", lambda e: e.seconds, "{:.1f}"),
    ("images/s", lambda e: e.images_per_s, "{:,.0f}"),
)


def training_section(content: ReportContent) -> Section:
    """Everything about one training; a sentence where there is none."""
    title, epochs = "The training", content.epochs
    if not epochs:
        return Section("training", title, (left_out("this report is of no training."),))
    each = "part" if content.by_clock else "epoch"
    blocks: list[Block] = [epoch_table(epochs, each)]
    if len(epochs) > 1:
        blocks.append(
            curves_figure(epochs, content.maps.always_negative if content.maps else None, content.of_store, each)
        )
    else:
        blocks.append(left_out("curves, since the training was scored only once."))
    if content.lr_curve is not None and len(content.lr_curve.views) > 1:
        blocks.append(lr_figure(content.lr_curve, epochs))
    elif len(epochs) > 1:
        blocks.append(
            lr_figure(RateCurve(np.array([e.views for e in epochs]), np.array([e.lr for e in epochs])), epochs)
        )
    else:
        blocks.append(left_out("the learning-rate schedule, since its curve was not given."))
    return Section("training", title, (*blocks, *strip_blocks(content)))


def epoch_table(epochs: tuple[RungResult, ...], each: str = "epoch") -> Table:
    """One line an epoch, or a part of a training by the clock; columns that none has a value for are left out."""
    columns = [column for column in _COLUMNS if any(column[1](e) is not None for e in epochs)]
    staged = any(e.stage for e in epochs)
    rows = []
    for e in epochs:
        cells = [form.format(value) if (value := read(e)) is not None else "–" for _, read, form in columns]
        rows.append((str(e.rung + 1), *([str(e.stage + 1)] if staged else []), f"{e.views:,}", *cells))
    header = (each, *(["stage"] if staged else []), "views", *(name for name, _, _ in columns))
    return Table(
        header, tuple(rows), "A view is one training image shown to the network. A loss is better the smaller it is."
    )


def _plot(
    axes: Axes,
    epochs: tuple[RungResult, ...],
    read: Callable[[RungResult], float | None],
    colour: str,
    name: str,
    style: str = "-",
) -> None:
    points = [(e.rung + 1, value) for e in epochs if (value := read(e)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linestyle=style, label=name)


def _stage_lines(axes: Axes, epochs: tuple[RungResult, ...]) -> None:
    for before, after in pairwise(epochs):
        if before.stage != after.stage:
            axes.axvline(after.rung + 0.5, color=GREY, linestyle=":", linewidth=1.2)


def curves_figure(
    epochs: tuple[RungResult, ...], always_negative: float | None = None, noun: Noun = PATCH, each: str = "epoch"
) -> Picture:
    """Losses on the left, accuracy, AUC and Dice on the right, beside the accuracy of never calling tumour where it is given."""
    figure = new_figure(8.4, 4.1)
    left, right = add_row(figure, 2)
    dress(left, title="loss", x=each, y="loss (nats, smaller is better)")
    _plot(left, epochs, lambda e: e.train_loss, VERMILION, "training", "--")
    _plot(left, epochs, lambda e: e.loss, BLUE, "validation")
    dress(right, title="quality", x=each, y="larger is better")
    _plot(right, epochs, lambda e: e.train_accuracy, VERMILION, "accuracy, training", "--")
    _plot(right, epochs, lambda e: e.accuracy, BLUE, "accuracy, validation")
    _plot(right, epochs, lambda e: e.auc, GREEN, "AUC, validation")
    _plot(right, epochs, lambda e: e.dice, SKY, "Dice, validation")
    if always_negative is not None and any(e.accuracy is not None for e in epochs):
        right.axhline(always_negative, color=INK, linestyle=":", linewidth=1.2, label="accuracy, never calling tumour")
    for axes in (left, right):
        _stage_lines(axes, epochs)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            legend_below(axes)
    stages = " Dotted lines part the stages." if any(e.stage for e in epochs) else ""
    drawn = picture(
        figure,
        "training_curves.png",
        alt=f"Loss and quality over {len(epochs)} {each}s; last training loss {epochs[-1].train_loss:.4f}",
        caption="A healthy training: both losses fall together. If the training loss goes on falling while the validation loss "
        f"rises, the network learns its training {noun.many} by heart.{stages}",
    )
    return replace(drawn, wide=True)


def lr_figure(curve: RateCurve, epochs: tuple[RungResult, ...]) -> Picture:
    """The learning rate over the views."""
    figure = new_figure(6.4, 2.6)
    scale, unit = (1, "") if np.max(curve.views) < 10_000 else (1000, " (thousands)")
    axes = add_axes(figure, x=f"training images seen{unit}", y="learning rate")
    axes.plot(np.asarray(curve.views) / scale, curve.lr, color=BLUE, linewidth=1.8)
    for before, after in pairwise(epochs):
        if before.stage != after.stage:
            axes.axvline(before.views / scale, color=GREY, linestyle=":", linewidth=1.2)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return picture(
        figure,
        "learning_rate.png",
        alt=f"Learning rate over the training, at most {float(np.max(curve.lr)):.2e}",
        caption="How large the steps were: usually a short rise, so that nothing breaks at the start, and a long fall to settle.",
    )


def strip_blocks(content: ReportContent) -> Iterator[Block]:
    """The strips of a dense run: original, truth, the decision after each epoch."""
    if content.strips:
        yield Text("One image, epoch by epoch", style="heading")
    for number, (caption, source) in enumerate(content.strips):
        name = f"strip_{number + 1}.png"
        yield Picture(name, _png(source), f"Strip of images: {caption}", caption, wide=True)


def _png(source: Path | np.ndarray) -> bytes:
    if isinstance(source, Path):
        data = source.read_bytes()
        if data[:8] != b"\x89PNG\r\n\x1a\n":
            raise DataError(f"strip {source} is not a PNG file")
        return data
    return png_of(source)
