"""`--warm-start`: the diverse best of another study, and whether using them leaks this study's holdout. Runs no trial."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from pcam_automl.config import Enqueued, StudySettings, storage_url, studies_folder
from pcam_automl.data.splits import HOLDOUT, UNUSED, Split, load_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError, StudyError, first_few
from pcam_automl.models.factory import smallest_input
from pcam_automl.recipe import Recipe, build_recipe
from pcam_automl.search.diversity import pick_diverse
from pcam_automl.search.lineages import FINISHED, current_rows, has_diverged, sign_of
from pcam_automl.search.reading import load_study
from pcam_automl.search.space import SearchSpace, in_one_stage
from pcam_automl.search.storage import open_storage
from pcam_automl.search.storage_url import safe_url
from pcam_automl.training.engine import RungResult
from pcam_automl.training.fit import best_result

MOST = 5
"""Entries that a warm start, or a prior, has at most."""
TOP_SHARE = 0.25
"""Of the other study's finished lineages that are good enough to be chosen among for their diversity."""


@dataclass(frozen=True)
class Tried:
    """A recipe that another study has tried: its trial's number, validation AUC and whether that is a whole trial's."""

    number: int
    auc: float
    complete: bool
    recipe: Recipe


@dataclass(frozen=True)
class Source:
    """Another study as a warm start reads it.

    Attributes:
        shown: its name, or URL#name without a password.
        settings: what it remembers.
        folder: where it keeps its files.
        tried: its finished lineages, the best first: complete ones, then paused ones by how far they came.
    """

    shown: str
    settings: StudySettings
    folder: Path
    tried: tuple[Tried, ...]


def open_source_study(text: str, own_url: str | None, option: str = "--warm-start") -> Source:
    """The study that ``option`` names: a name in this storage, ``URL#name``, or the URL of a storage with one study.

    Raises:
        StudyError: no such storage or study, several studies and no name, or no finished trial.
    """
    url, name = _place(text, own_url, option)
    try:
        study, settings = load_study(name, url)
    except StudyError as fault:
        raise StudyError(f"{option} {safe_url(text)}: {fault}") from None
    tried = tried_in(study)
    if not tried:
        raise StudyError(f"{option} {safe_url(text)}: study {name!r} has no finished trial to start from")
    shown = name if "://" not in text else f"{safe_url(url)}#{name}"
    return Source(shown, settings, studies_folder(url) / name, tuple(tried))


def _place(text: str, own_url: str | None, option: str) -> tuple[str, str]:
    """Storage and study name."""
    if "://" not in text:
        return storage_url(own_url), text
    url, sign, name = text.rpartition("#")
    if sign:
        return storage_url(url), name
    try:
        names = sorted(optuna.get_all_study_names(open_storage(storage_url(text), create=False)))
    except StudyError as fault:
        raise StudyError(f"{option} {safe_url(text)}: {fault}") from None
    if len(names) != 1:
        held = f"holds {len(names)} studies ({first_few(names)})" if names else "holds no study"
        raise StudyError(f"{option} {safe_url(text)} {held}; name one: {safe_url(text)}#NAME")
    return storage_url(text), names[0]


def tried_in(study: optuna.Study) -> list[Tried]:
    """What a study has tried, a lineage once, the best first; diverged trainings are left out.

    Complete trials stand before pruned ones, which were ended because they looked worse, and those that came farther
    before those that ended sooner.
    """
    sign = sign_of(study)
    found = []
    for row in current_rows(study.get_trials(deepcopy=False)):
        value = _last_value(row)
        if row.state in FINISHED and value is not None and math.isfinite(value) and "recipe" in row.user_attrs:
            complete = row.state == TrialState.COMPLETE
            order = (not complete, 0 if complete else -(row.last_step or 0), -sign * value, row.number)
            recipe = build_recipe(json.loads(row.user_attrs["recipe"]), where=f"trial {row.number}")
            auc = best_result([RungResult(**rung) for rung in row.user_attrs["rungs"]], recipe).auc
            assert auc is not None
            found.append((order, Tried(row.number, auc, complete, recipe)))
    return [tried for _, tried in sorted(found, key=lambda pair: pair[0])]


def _last_value(row: FrozenTrial) -> float | None:
    if has_diverged(row):
        return None
    if row.state == TrialState.COMPLETE:
        return row.value
    return None if row.last_step is None else row.intermediate_values[row.last_step]


def diverse_best(tried: Sequence[Tried], space: SearchSpace, k: int = MOST) -> list[Tried]:
    """The best one, then of the best quarter those that are most unlike what is chosen already, as the space sees them.

    Args:
        tried: the best first.
        space: whose dimensions count; a recipe with a backbone that is no choice of it is passed over.
        k: at most so many.
    """
    usable = [one for one in tried if fits_space(one.recipe, space)]
    top = usable[: math.ceil(TOP_SHARE * len(usable))]
    params = [space.params_of(in_one_stage(one.recipe), smallest_input) for one in top]
    return [top[index] for index in pick_diverse(params, space.parameters, k)]


def fits_space(recipe: Recipe, space: SearchSpace) -> bool:
    """Whether the space can take the recipe's task and backbone; a fixed backbone takes the values of any other's."""
    same_task = recipe.task in (space.choices("task") or ("patch",))
    return same_task and ("backbone" not in space.parameters or recipe.backbone in space.choices("backbone"))


def warm_entries(source: Source, space: SearchSpace) -> list[Enqueued]:
    """The source's diverse best as entries of the space.

    Raises:
        StudyError: none of its trials has a task and a backbone of the space.
    """
    chosen = diverse_best(source.tried, space)
    if not chosen:
        names = sorted({one.recipe.backbone for one in source.tried})
        raise StudyError(
            f"--warm-start {source.shown}: none of its {len(source.tried)} trials fits this search space (its backbones: "
            f"{first_few(names)}; here: {first_few(space.choices('backbone'))}); choose a --space that holds one of them"
        )
    return [
        Enqueued(
            origin=f"warm start {source.shown}, trial {one.number}",
            params=space.params_of(in_one_stage(one.recipe), smallest_input),
        )
        for one in chosen
    ]


def weights_warning(source: str, *, pretrained: bool, here: bool) -> str | None:
    """What to say where recipes for pretrained weights start a search from scratch, or the reverse; None where all is well."""
    if pretrained == here:
        return None
    mode = {True: "with pretrained weights", False: "from scratch"}
    return f"warning: {source} was searched {mode[pretrained]}, this study trains {mode[here]}: its learning rates may not carry over"


def check_holdout(store: PatchStore, split: Split, source: Source) -> str | None:
    """Refuse recipes that were chosen on patches of this study's holdout; say what else the user should know.

    The other study chose its best by their scores on its validation fold and trained on its other folds. If patches of
    this study's holdout are among those, the holdout has had a say in what is scored on it, and its score flatters.

    Returns:
        What to say; None where nothing is shared.

    Raises:
        DataError: patches of the holdout had a say in the other study, or it cannot be ruled out.
    """
    other, what = source.settings, f"--warm-start {source.shown}"
    same_data = other.pack_hash == store.content_hash
    holdout = split.holdout_rows()
    if len(holdout) and other.split_hash != split.hash:
        n_shared = _n_shared(store, holdout, source)
        remedy = f"take that study's split (--seed {other.seed} --holdout {other.holdout:g}), or do without"
        if n_shared:
            raise DataError(
                f"{what} was searched on {n_shared:,} of the {len(holdout):,} patches that are set aside here, so their score "
                f"would flatter; {remedy}"
            )
        if n_shared is None and same_data:
            raise DataError(
                f"{what} has the same data in another split, and its split file is not {source.folder / 'split.npz'}, so "
                f"that it may have been searched on the holdout; {remedy}"
            )
        if n_shared is None:
            return f"warning: {what}: its data are not at hand, so nobody can say whether it has seen the holdout's patches"
    if same_data:
        return (
            f"{what} was searched on the same data: validation scores of its recipes flatter, since they were chosen by "
            + ("the same fold" if other.split_hash == split.hash else "folds that share patches with this one")
        )
    return None


def pack_of(settings: StudySettings) -> PatchStore | None:
    """The patches of a study, if they are where they were and can be read; None else."""
    folder = Path(settings.pack)
    try:
        store = open_store(folder) if folder.is_dir() else None
    except DataError:  # an earlier version's, or damaged
        return None
    return store if store is not None and store.content_hash == settings.pack_hash else None


def _n_shared(store: PatchStore, holdout: np.ndarray, source: Source) -> int | None:
    """How many holdout patches the other study trained or validated on, by their pixels; None where its files are gone, or are another study's."""
    split_file = source.folder / "split.npz"
    theirs = store if source.settings.pack_hash == store.content_hash else pack_of(source.settings)
    if theirs is None or not split_file.is_file():
        return None
    their_split = load_split(split_file)
    if their_split.hash != source.settings.split_hash:  # of another storage's study of that name
        return None
    fold = their_split.fold
    used = np.asarray(theirs.digest)[(fold != HOLDOUT) & (fold != UNUSED)]
    seen = {row.tobytes() for row in used if row.any()}
    return sum(row.tobytes() in seen for row in np.asarray(store.digest)[holdout])
