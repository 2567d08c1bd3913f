"""The section of single patches: most wrong, most right, random, each with its Grad-CAM. Computes no score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.store import PatchStore
from pcam_automl.errors import InputError
from pcam_automl.explain import Explanation, explain_patches
from pcam_automl.predict import Predictor
from pcam_automl.recipe import CENTRE_PX, Recipe
from pcam_automl.report.blocks import Block, Picture, Section, Table, Text, left_out
from pcam_automl.report.content import ReportContent, losses
from pcam_automl.report.data_figures import boxed
from pcam_automl.report.patch_sheets import patch_of, sheet
from pcam_automl.report.style import shortened
from pcam_automl.scores import Scores

N_SHOWN = 6
_MARGIN = 0.05
"""Shares of attention this near to the area's are called chance."""

_TRAINED_SINCE = (
    " Probabilities and losses are those of the trial, which had not seen these patches; the maps are the final network's, "
    "which has since trained on them, and show what speaks for the trial's call."
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def example_section(content: ReportContent, predictor: Predictor | None, progress: Callable[[str], None]) -> Section:
    """Patches with predicted, actual, loss, probability and attention; a sentence for what is missing."""
    title, scores, store = (
        f"{content.of_store.one} by {content.of_store.one}".capitalize(),
        content.scores,
        content.store,
    )
    if scores is None or store is None or not len(scores.rows):
        return Section("examples", title, (left_out("without a pack and scored patches there is nothing to show."),))
    if content.dense:
        why = "a dense network judges pixels; its probability maps say themselves where the tumour is."
        return Section("examples", title, (left_out(why),))
    blocks: list[Block] = []
    sheets = chosen(scores, content.threshold)
    maps: dict[str, list[Explanation]] = {}
    recipe = predictor.bundle.recipe if predictor is not None else None
    if predictor is None or recipe is None:
        blocks.append(left_out("Grad-CAM, since no trained network was given to this report."))
    else:
        explain = _explainer(predictor, store, content.threshold)
        try:
            for name, heading, _, places in sheets:
                progress(f"report: {heading.lower()}")
                maps[name] = explain(scores.rows[places], scores.prob[places])
            blocks.append(
                Text(_how_to_read(recipe, content.threshold) + (_TRAINED_SINCE if content.scores_before else ""))
            )
        except InputError as fault:  # a network without a map of positions: the patches are worth a look all the same
            maps.clear()
            blocks.append(left_out(f"{fault}."))
    for name, heading, note, places in sheets:
        found = maps.get(name)
        blocks.append(Text(heading, style="heading"))
        blocks.append(example_sheet(store, scores, places, found, content.threshold, name=name, note=note))
        blocks.append(example_table(store, scores, places, found, content.threshold))
        if name == "random" and found and recipe:
            blocks.append(Text(summary(found, recipe)))
    return Section("examples", title, tuple(blocks))


def chosen(scores: Scores, threshold: float) -> list[tuple[str, str, str, Ints]]:
    """(name, heading, what it is, places in the scores) of the three sheets; a small set may repeat a patch."""
    order = np.argsort(-losses(scores), kind="stable").astype(np.int64)
    drawn = np.random.default_rng(0).permutation(len(order))[:N_SHOWN].astype(np.int64)
    return [
        (
            "most_wrong",
            "Most wrong",
            "The patches with the largest loss: is the label wrong, the tissue odd, or the network?",
            order[:N_SHOWN],
        ),
        (
            "most_right",
            "Most right",
            "The patches with the smallest loss: what the network takes for typical.",
            order[::-1][:N_SHOWN],
        ),
        ("random", "Random", "Drawn by chance: what is usual.", drawn),
    ]


def _explainer(
    predictor: Predictor, store: PatchStore, threshold: float
) -> Callable[[Ints, Floats], list[Explanation]]:
    """Maps for or against tumour as the scores' probabilities call it, which need not be this network's."""

    def explain(rows: Ints, probs: Floats) -> list[Explanation]:
        patches = np.stack([patch_of(store, row) for row in rows.tolist()])
        return explain_patches(predictor, patches, probs=np.asarray(probs, np.float64), threshold=threshold)

    return explain


def _how_to_read(recipe: Recipe, threshold: float) -> str:
    area = 100 * (CENTRE_PX / recipe.crop_size) ** 2
    crop = (
        f" Pale borders lie outside of the {recipe.crop_size}×{recipe.crop_size} px that it was shown."
        if recipe.crop_size < 96
        else ""
    )
    return (
        "Left the patch, right the same with the network's attention (Grad-CAM): yellow is what speaks most for its call; below a "
        f"probability of {threshold:g} that call is “no tumour”, so yellow speaks against tumour.{crop} The box is the centre 32×32 px that "
        f"alone decides the label in PatchCamelyon; attention spread evenly would put {area:.0f} % of itself there. The maps are coarse: they name a "
        "region, not a cell."
    )


def _word(tumour: bool) -> str:
    return "tumour" if tumour else "no tumour"


def example_sheet(
    store: PatchStore,
    scores: Scores,
    places: Ints,
    found: list[Explanation] | None,
    threshold: float,
    *,
    name: str,
    note: str,
) -> Picture:
    """Patches, beside their maps where there are any, with truth, call, probability, loss and centre share."""
    tiles, texts, loss = [], [], losses(scores)
    for number, place in enumerate(places.tolist()):
        tile, prob = boxed(store, int(scores.rows[place])), float(scores.prob[place])
        lines = f"{_word(scores.label[place] == 1)}, called {_word(prob >= threshold)}\np {prob:.3f}, loss {loss[place]:.2f}"
        if found:
            gap = np.full((len(tile), 3, 3), 255, np.uint8)
            tile = np.concatenate([tile, gap, found[number].overlay], axis=1)
            lines += f", {centre_text(found[number].centre_share)}"
        texts.append(lines)
        tiles.append(tile)
    return sheet(
        tiles,
        f"{name}.png",
        alt=f"{len(tiles)} patches, {name.replace('_', ' ')}" + (", each beside its Grad-CAM overlay" if found else ""),
        caption=f"{note} Under each: truth, call, p = probability of tumour, loss"
        + (", share of attention in the centre." if found else "."),
        texts=texts,
        columns=2 if found else 3,
    )


def centre_text(share: float) -> str:
    """The share for a sheet, whose font has no dash."""
    return "no map" if np.isnan(share) else f"centre {share_text(share)}"


def share_text(share: float) -> str:
    """A share in [0, 1] as a percentage, a dash for NaN."""
    return "–" if np.isnan(share) else f"{100 * share:.0f} %"


def example_table(
    store: PatchStore, scores: Scores, places: Ints, found: list[Explanation] | None, threshold: float
) -> Table:
    """The same patches by id."""
    loss, rows = losses(scores), []
    for number, place in enumerate(places.tolist()):
        prob = float(scores.prob[place])
        share = (share_text(found[number].centre_share),) if found else ()
        cells = (_word(prob >= threshold), _word(scores.label[place] == 1), f"{loss[place]:.4f}", f"{prob:.4f}", *share)
        rows.append((shortened(str(store.ids[scores.rows[place]]), 44), *cells))
    header = ("patch", "predicted", "actual", "loss", "probability", *(("attention in the centre",) if found else ()))
    return Table(header, tuple(rows), "The same patches as a table.", n_left=3, folded=True)


def summary(found: list[Explanation], recipe: Recipe) -> str:
    """What the centre shares of random patches say."""
    shares = np.array([e.centre_share for e in found if not np.isnan(e.centre_share)])
    area = (CENTRE_PX / recipe.crop_size) ** 2
    if not len(shares):
        return "None of the random patches has a map."
    mean = float(shares.mean())
    verdict = (
        "about as much as chance"
        if abs(mean - area) < _MARGIN
        else "more than chance"
        if mean > area
        else "less than chance"
    )
    return (
        f"On these {len(shares)} random patches {100 * mean:.0f} % of the attention lies in the centre, {verdict} "
        f"(its area is {100 * area:.0f} % of what the network sees)."
    )
