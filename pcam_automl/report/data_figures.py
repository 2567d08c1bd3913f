"""The section on the data: classes, samples, augmentation, what the network sees, findings, slides. Scores nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcam_automl.augment import augment, augment_spec, draw
from pcam_automl.counter import key_of
from pcam_automl.data.quality import findings
from pcam_automl.data.splits import HOLDOUT, Split
from pcam_automl.data.store import TEST, TRAIN, VALID, Flag, PatchStore, channel_moments
from pcam_automl.explain import with_centre_box
from pcam_automl.models.factory import Normalisation, normalisation_of
from pcam_automl.recipe import PATCH_PX, Recipe
from pcam_automl.report.blocks import Block, Facts, Picture, Section, Table, Text, left_out
from pcam_automl.report.content import IMAGE, PATCH, Noun, ReportContent
from pcam_automl.report.domain_figure import domain_blocks
from pcam_automl.report.patch_sheets import Pixels, patch_of, sheet, with_mask_outline
from pcam_automl.report.style import GREY, NORMAL, TUMOUR, add_axes, add_row, dress, legend, new_figure, picture
from pcam_automl.report.style import shortened as short

N_SAMPLES, N_VIEWS, N_BATCH, N_FINDINGS = 10, 10, 10, 10
_CLASSES = ((0, "no tumour", NORMAL), (1, "tumour", TUMOUR))
_PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_MOST_BARS = 60


def data_section(content: ReportContent) -> Section:
    """Everything about the patches; a sentence where there are none."""
    store = content.store
    if store is None:
        return Section("data", "The data", (left_out("no pack was given to this report."),))
    recipe = content.trained
    noun = content.of_store
    blocks: list[Block] = [_facts(store, noun), class_histogram(store, noun), brightness_figure(store, noun)]
    blocks += sample_sheets(store, noun)
    if recipe is None:
        blocks.append(left_out("augmentation and batch, since there is no recipe that says how a patch is changed."))
    elif recipe.task == "dense":
        blocks.append(left_out("augmented images, since a dense recipe trains on tiles of them."))
    else:
        blocks += [augmented_sheet(store, recipe), batch_sheet(store, recipe, content)]
    blocks += [*finding_blocks(store, noun), *group_blocks(store, content.split, noun)]
    return Section("data", "The data", tuple(blocks))


def _facts(store: PatchStore, noun: Noun) -> Facts:
    side = "×".join(str(px) for px in store.patches.shape[2:0:-1])
    facts = [(f"{len(store):,}", f"{noun.many} of {side} px"), (f"{len(store.development_rows()):,}", "to learn from")]
    if n_test := len(store.test_rows()):
        facts.append((f"{n_test:,}", f"test {noun.many}"))
    if store.group_names:
        facts.append((f"{len(store.group_names):,}", "slides"))
    if store.domain_names:
        facts.append((f"{len(store.domain_names):,}", "scanners or centres"))
    return Facts(tuple(facts))


def class_histogram(store: PatchStore, noun: Noun = PATCH) -> Picture:
    """Patches or images by part and label."""
    figure = new_figure(6.4, 3.0)
    axes = add_axes(figure, x=noun.many, grid="x")
    part, label = np.asarray(store.part), np.asarray(store.label)
    parts = [
        (code, name)
        for code, name in ((TRAIN, "training"), (VALID, "official validation"), (TEST, "test"))
        if (part == code).any()
    ]
    kinds = [*_CLASSES, (-1, "no label", GREY)]
    words = []
    for place, (code, name) in enumerate(reversed(parts)):
        start = 0
        for value, word, colour in kinds:
            n = int(((part == code) & (label == value)).sum())
            if n:
                axes.barh(place, n, left=start, color=colour, height=0.55)
                axes.text(start + n / 2, place, f"{n:,}", ha="center", va="center", color="white", fontsize=9)
                words.append(f"{name}: {n:,} {word}")
                start += n
    axes.set_yticks(range(len(parts)), [name for _, name in reversed(parts)])
    for value, word, colour in kinds:
        if (label == value).any():
            axes.barh(0, 0, color=colour, label=word)
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3)
    return picture(
        figure,
        "classes.png",
        alt=f"Bars of {noun.many} by part and label. " + "; ".join(words),
        caption=f"How many {noun.many} of each class there are. If one class is much rarer, accuracy flatters a network that "
        "never calls it; the AUC does not."
        + (" The network itself is taught every pixel by the masks, not by these labels." if noun == IMAGE else ""),
    )


def spread_rows(store: PatchStore, rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """At most ``n`` of ``rows``, the same ones every time, from as many slides as possible."""
    order = np.random.default_rng(0).permutation(len(rows))
    group = np.asarray(store.group)[rows[order]].astype(np.int64)
    group[group < 0] = -np.arange(1, (group < 0).sum() + 1)  # a patch of unknown slide is a slide of its own
    rank = np.empty(len(group), np.int64)  # how many of its slide stand before it
    by_group = np.argsort(group, kind="stable")
    first = np.r_[True, np.diff(group[by_group]) != 0]
    rank[by_group] = np.arange(len(group)) - np.maximum.accumulate(np.where(first, np.arange(len(group)), 0))
    return np.asarray(rows[order[np.argsort(rank, kind="stable")[:n]]])


def boxed(store: PatchStore, row: int, noun: Noun = PATCH) -> Pixels:
    """The patch with its centre box where the centre decides, and with its mask's border where it has a mask."""
    patch = patch_of(store, row)
    if store.masks is not None:
        patch = with_mask_outline(patch, np.asarray(store.masks[row]))
    return with_centre_box(patch) if noun == PATCH and patch.shape[:2] == (PATCH_PX, PATCH_PX) else patch


def sample_sheets(store: PatchStore, noun: Noun = PATCH) -> Iterator[Picture]:
    """A sheet a class."""
    usable = (np.asarray(store.part) != TEST) & ((np.asarray(store.flags) & Flag.LEFT_OUT) == 0)
    notes = []
    if noun == PATCH and store.patches.shape[1:3] == (PATCH_PX, PATCH_PX):
        notes.append(
            "In PatchCamelyon only the small box in the centre (32×32 px) decides the label: tumour outside of it does not count."
        )
    if store.masks is not None:
        notes.append("The green line is the border of the tumour in its mask.")
    for value, word, _ in (*_CLASSES, (-1, "without a label", GREY)):
        rows = np.flatnonzero(usable & (np.asarray(store.label) == value)).astype(np.int64)
        if not len(rows):
            continue
        chosen = spread_rows(store, rows, N_SAMPLES)
        own = list(notes)
        if noun == IMAGE and value == 0 and store.masks is not None and np.asarray(store.masks[np.sort(chosen)]).any():
            own.append(
                "The label speaks of the centre alone; the network learns the masks, which may hold tumour nonetheless."
            )
        yield sheet(
            [boxed(store, row, noun) for row in chosen.tolist()],
            f"samples_{word.replace(' ', '_')}.png",
            alt=f"{len(chosen)} {noun.many} of the class {word}",
            caption=" ".join(
                [f"{noun.many.capitalize()} of the class “{word}”, from as many slides as possible.", *own]
            ),
            texts=[short(str(store.ids[row]), 19) for row in chosen.tolist()],
        )


def _levels(view: Tensor) -> list[Pixels]:
    """Views (B, 3, P, P) in [0, 1] as pictures."""
    levels = (view * 255.0).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return list(levels)


def _views(store: PatchStore, recipe: Recipe, rows: NDArray[np.int64], norm: Normalisation) -> Tensor:
    spec = augment_spec(recipe)
    images = torch.from_numpy(np.stack([patch_of(store, row) for row in rows.tolist()])).permute(0, 3, 1, 2)
    draws = draw(spec, key_of(recipe.seed, "report"), np.arange(len(rows)))
    return augment(images, draws, spec, norm.mean, norm.std, dtype=torch.float32)


def _first_row(store: PatchStore) -> int:
    """A patch to show: tumour where there is one."""
    rows = store.development_rows()
    tumour = rows[np.asarray(store.label)[rows] == 1]
    return int(spread_rows(store, tumour if len(tumour) else rows, 1)[0])


def augmented_sheet(store: PatchStore, recipe: Recipe) -> Picture | Text:
    """One patch under many draws of the recipe's augmentation."""
    if not len(store.development_rows()):
        return left_out("augmented patches, since no labelled patch can be trained on.")
    row = _first_row(store)
    views = _levels(_views(store, recipe, np.full(N_VIEWS - 1, row), _PLAIN))
    original = np.asarray(boxed(store, row))
    if all(np.array_equal(view, views[0]) for view in views):  # nine copies of one picture say less than one
        return sheet(
            [original, views[0]],
            "augmented.png",
            alt=f"Patch {store.ids[row]} and the one view of it that training shows",
            caption=f"The recipe changes nothing (augment: {recipe.augment:g}): every time it is shown, the patch looks the same, "
            f"cut to its centre {recipe.crop_size} px.",
            texts=["original", "every view"],
        )
    return sheet(
        [original, *views],
        "augmented.png",
        alt=f"Patch {store.ids[row]} and {len(views)} augmented views of it",
        caption=f"First the patch as it is, then {len(views)} ways in which training may show it: turned, mirrored, shifted, "
        f"stained otherwise. Strength {recipe.augment:.2g} of 1. Every view should still be a believable picture of the same tissue, its centre inside.",
        texts=["original", *[f"view {n}" for n in range(1, len(views) + 1)]],
    )


def batch_sheet(store: PatchStore, recipe: Recipe, content: ReportContent) -> Picture | Text:
    """The start of a batch behind augmentation and normalisation, as colours."""
    rows = store.development_rows()
    if content.split is not None:
        rows = np.asarray(content.split.order)
    if not len(rows):
        return left_out("a batch, since no labelled patch can be trained on.")
    chosen = rows[:N_BATCH]
    norm = (
        content.bundle.normalisation
        if content.bundle
        else normalisation_of(recipe, *channel_moments(np.asarray(store.stats[rows])))
    )
    view = _views(store, recipe, chosen, norm)
    low, high = float(view.min()), float(view.max())
    mean, std = float(view.mean()), float(view.std())
    label = np.asarray(store.label)[chosen]
    return sheet(
        _levels((view - low) / max(high - low, 1e-6)),
        "batch.png",
        alt=f"{len(chosen)} training images after augmentation and normalisation",
        caption=f"A batch as the network sees it: {recipe.network_px}×{recipe.network_px} numbers a channel, cut from the centre "
        f"{recipe.crop_size}×{recipe.crop_size} px, mean {mean:.2f}, deviation {std:.2f}, from {low:.2f} to {high:.2f} (shown "
        "as colours from the smallest to the largest number). Frames mark tumour. Odd colours are expected, lost structure is not.",
        marked=[bool(value == 1) for value in label],
        texts=["tumour" if value == 1 else "no tumour" for value in label],
    )


def brightness_figure(store: PatchStore, noun: Noun = PATCH) -> Picture:
    """Mean brightness and colour spread by class: what a network could cheat with."""
    figure = new_figure(6.4, 3.0)
    seen = (np.asarray(store.flags) & (Flag.UNREADABLE | Flag.WRONG_SHAPE)) == 0  # the others' zeros measure nothing
    stats, label = np.asarray(store.stats)[seen], np.asarray(store.label)[seen]
    measures = (
        (stats[:, :3].mean(1), "mean brightness (0 black, 1 white)"),
        (stats[:, 3:].mean(1), "contrast (standard deviation)"),
    )
    for axes, (values, name) in zip(add_row(figure, 2), measures, strict=True):
        dress(axes, x=name, y="share of the class (%)" if axes.get_subplotspec().is_first_col() else "", grid="y")  # type: ignore[union-attr]
        bins = np.linspace(float(values.min()), float(values.max()) + 1e-6, 41).tolist()
        for value, word, colour in _CLASSES:
            own = values[label == value]
            if len(own):
                weights = np.full(len(own), 100.0 / len(own))
                axes.hist(own, bins=bins, weights=weights, color=colour, alpha=0.35)
                axes.hist(own, bins=bins, weights=weights, color=colour, histtype="step", linewidth=1.6, label=word)
    legend(figure.axes[0], loc="upper left")
    return picture(
        figure,
        "brightness.png",
        alt=f"Histograms of the {noun.many}' mean brightness and contrast, by class",
        caption="Where the two classes differ in brightness or contrast alone, a network can score well without having "
        f"looked at cells. Lonely bars at 0 or 1 are black or white {noun.many}.",
    )


def finding_blocks(store: PatchStore, noun: Noun = PATCH) -> Iterator[Block]:
    """What the quality checks found, and pictures of the worst."""
    found = findings(store)
    yield Text("Quality findings", style="heading")
    if not found.by_flag:
        yield Text(f"The checks found nothing: no black, white, blurred, unreadable or duplicate {noun.one}.")
        return
    rows = tuple(
        (name.replace("_", " "), short(found.by_flag[name][0], 44), f"{n:,}", f"{found.n_test[name]:,}")
        for name, n in found.counts.items()
    )
    yield Table(("finding", "for instance", noun.many, "of them test"), rows, "What the checks marked.", n_left=2)
    flags = np.asarray(store.flags)
    worth = [*found.rows.tolist(), *_blurriest(store)]
    shown = list(dict.fromkeys(worth))[:N_FINDINGS]
    left_out = "Unreadable" if store.source.get("keep_outliers") else "Black, white and unreadable"
    if shown:
        yield sheet(
            [boxed(store, row, noun) for row in shown],
            "findings.png",
            alt=f"{len(shown)} marked {noun.many}",
            caption=f"The most conspicuous {noun.many}. {left_out} ones are left out of training; blurred ones and duplicates are only "
            "reported.",
            texts=[f"{short(str(store.ids[row]), 19)}\n{_flag_words(int(flags[row]))}" for row in shown],
        )


def _blurriest(store: PatchStore) -> list[int]:
    if store.sharpness is None:
        return []
    blurred = np.flatnonzero(np.asarray(store.flags) & Flag.BLURRED)
    return [int(row) for row in blurred[np.argsort(np.asarray(store.sharpness)[blurred], kind="stable")][:N_FINDINGS]]


def _flag_words(flags: int) -> str:
    return ", ".join(str(flag.name).lower().replace("_", " ") for flag in Flag(flags) & ~Flag.LEFT_OUT)[:22]


def group_blocks(store: PatchStore, split: Split | None, noun: Noun = PATCH) -> Iterator[Block]:
    """Sizes of slides, domains and folds."""
    yield Text("Slides, scanners and folds", style="heading")
    if store.group_names:
        yield slide_figure(store, noun)
    else:
        yield left_out(
            "slides: the data names none, so validation may share slides with training and flatter the network."
        )
    if store.domain_names:
        yield Table(
            *_counts(store, np.asarray(store.domain), list(enumerate(store.domain_names)), "scanner or centre", noun)
        )
    yield from domain_blocks(store, noun)
    if split is not None:
        named = [(f, f"fold {f}") for f in range(int(split.fold.max()) + 1)] + [(HOLDOUT, "holdout")]
        yield Table(*_counts(store, split.fold, named, "part of the split", noun))
        for note in split.notes:
            yield Text(note)


def slide_figure(store: PatchStore, noun: Noun = PATCH) -> Picture:
    """Patches of every slide, stacked by label, the largest first; in bins of slides where there are many."""
    group, label = np.asarray(store.group), np.asarray(store.label)
    known, n_groups = group >= 0, len(store.group_names)
    counts = {v: np.bincount(group[known & (label == v)], minlength=n_groups) for v in (0, 1, -1)}
    total = np.bincount(group[known], minlength=n_groups)
    order = np.lexsort((counts[1], -total))
    figure = new_figure(6.4, 3.0)
    axes = add_axes(figure, x=f"{n_groups} slides, the largest first", y=noun.many, grid="y")
    bottom, width = np.zeros(n_groups), 1.0 if n_groups > _MOST_BARS else 0.85
    for value, word, colour in (*_CLASSES, (-1, "no label", GREY)):
        if counts[value].any():
            axes.bar(np.arange(n_groups), counts[value][order], bottom=bottom, width=width, color=colour, label=word)
            bottom += counts[value][order]
    axes.set_xticks([])
    axes.set_xlim(-0.5, n_groups - 0.5)
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3)
    return picture(
        figure,
        "slides.png",
        alt=f"{noun.many.capitalize()} of each of {n_groups} slides; median {int(np.median(total))}, largest {int(total.max())}",
        caption=f"{noun.many.capitalize()} of one slide look alike, so each slide is kept whole in one fold. The median slide has "
        f"{int(np.median(total)):,} {noun.many}, the largest {int(total.max()):,}: a few large slides can rule the score.",
    )


def _counts(
    store: PatchStore, code: NDArray[np.generic], named: list[tuple[int, str]], what: str, noun: Noun
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """Header, rows and caption of a table of patches by code."""
    label, rows = np.asarray(store.label), []
    for value, name in named:
        own = code == value
        n, positive = int(own.sum()), int((own & (label == 1)).sum())
        if n:
            labelled = int((own & (label >= 0)).sum())
            share = f"{100 * positive / labelled:.1f} %" if labelled else "–"
            slides = len(np.unique(np.asarray(store.group)[own & (np.asarray(store.group) >= 0)]))
            rows.append((name, f"{n:,}", f"{positive:,}", share, f"{slides:,}" if store.group_names else "–"))
    return (what, noun.many, "tumour", "share of tumour", "slides"), tuple(rows), f"{noun.many.capitalize()} by {what}."
