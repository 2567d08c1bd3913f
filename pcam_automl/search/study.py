"""Creating and opening studies: data, split, space and settings that every worker shares. Runs no trial."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from pcam_automl.config import StudySettings, check_unchanged, find_data, storage_url, studies_folder
from pcam_automl.configs_folder import Kind, find_config, list_configs
from pcam_automl.data.domains import with_domains
from pcam_automl.data.pack import names_by_row
from pcam_automl.data.packs import PackCall, find_pack
from pcam_automl.data.sources import is_ambiguous
from pcam_automl.data.splits import Split, load_split, make_split, write_split
from pcam_automl.data.store import PatchStore, is_pack, open_store
from pcam_automl.data.tables import read_names
from pcam_automl.errors import DataError, RecipeError, StudyError, first_few
from pcam_automl.files import sha256_of_json
from pcam_automl.models.factory import backbone_fault
from pcam_automl.models.weights import Weights, parse_weights
from pcam_automl.recipe import PINS, Recipe, build_recipe, key_of
from pcam_automl.recipe_files import load_recipe, merge_fields
from pcam_automl.search.cost import TrialSeconds, ViewsShare, share_of_views
from pcam_automl.search.dimension import checked_value
from pcam_automl.search.domains import DOMAINS, ESTIMATE, kept_domains
from pcam_automl.search.mirror import Mirror, find_mirror
from pcam_automl.search.plan import PIXELS, SLOWEST_SHARE, trial_seconds
from pcam_automl.search.reading import load_study
from pcam_automl.search.space import SearchSpace, parse_space
from pcam_automl.search.storage_url import safe_url
from pcam_automl.search.warm_start import pack_of
from pcam_automl.search.whose_folder import claim
from pcam_automl.training.engine import Rung
from pcam_automl.training.speed import SpeedBook
from pcam_automl.yaml_text import parse_yaml, read_config_text

VALIDATION_FOLD = 0
DEFAULT_SPACE = "default"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """Options of ``search`` as the user gave them; None is "not given".

    ``n_workers`` train on this machine side by side, ``n_planned`` anywhere: on a Ray cluster those are others.
    """

    data: Path | None = None
    groups: Path | None = None
    domains: Path | None = None
    recipe: str | None = None
    space: str | None = None
    pins: dict[str, Any] | None = None
    weights: str | None = None
    holdout: float | None = None
    seed: int | None = None
    sampler: str | None = None
    pruner: str | None = None
    rungs: int | None = None
    views: int | None = None
    device: str = "auto"
    deterministic: bool = False
    n_workers: int = 1
    n_planned: int | None = None
    n_trials: int | None = None
    budget_s: float | None = None
    objective: str | None = None
    split_by: str | None = None
    estimate_domains: bool = False
    warm_start: str | None = None
    prior: str | None = None
    command: str = ""
    cost_aware: bool = False
    probe: str | None = None
    grace_s: float | None = None
    artifacts: str | None = None


@dataclass(frozen=True)
class OpenStudy:
    """A study with everything a worker needs.

    Attributes:
        study: Optuna's.
        settings: what it remembers.
        space: parsed from the settings.
        store: the pack; its content hash is the study's.
        split: folds and orders; its hash is the study's.
        folder: ``studies/<name>``.
        url: the storage's URL, password included; never print it.
        mirror: the bucket where workers without a shared disk keep what they need of each other, if it has one.
    """

    study: optuna.Study
    settings: StudySettings
    space: SearchSpace
    store: PatchStore
    split: Split
    folder: Path
    url: str
    mirror: Mirror | None = None

    @property
    def checkpoints(self) -> Path:
        """Where lineages leave theirs: ``<lineage>/<rung>/``."""
        return self.folder / "checkpoints"

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def weights(self) -> Weights:
        return parse_weights(self.settings.weights)

    @property
    def start(self) -> Recipe:
        """The recipe that the search started from."""
        return build_recipe(self.settings.start, where="start")

    @property
    def rungs(self) -> tuple[Rung, ...]:
        return tuple(Rung(views, subset) for views, subset in self.settings.rungs)

    @property
    def speed_book(self) -> SpeedBook:
        """For trainings of minutes; a trial of seconds takes :attr:`quick_speed_book`."""
        return SpeedBook(self.folder.parent / "speed.json", deterministic=self.settings.deterministic)

    @property
    def quick_speed_book(self) -> SpeedBook:
        return SpeedBook(self.folder.parent / "speed.json", deterministic=self.settings.deterministic, quick=True)

    def trial_seconds(self) -> TrialSeconds:
        """Expected seconds of a trial by its parameters, from the plan's speeds."""
        settings, plan = self.settings, self.settings.plan
        return TrialSeconds(
            images_per_s=plan["images_per_s"],
            planned_px=plan["planned_px"],
            images=trial_seconds(self.start, self.rungs, settings.n_score, images_per_s=1.0),
            fields=merge_fields(settings.start, self.space.base),
            cap_s=settings.cap_s,
            side_power=plan.get("side_power", PIXELS),  # an earlier release's plan goes with the pixels
        )

    def views_share(self) -> ViewsShare | None:
        """The share of the planned views that a trial sees, by its parameters; None where no seconds limit it."""
        if self.settings.cap_s is None:
            return None
        return share_of_views(replace(self.trial_seconds(), cap_s=None), self.settings.cap_s, SLOWEST_SHARE, self.space)


def start_recipe(name: str, pretrained: bool) -> Recipe:
    """A shipped or own recipe as a search starts from it: its trial 0, and what the space leaves open.

    Raises:
        RecipeError: no such recipe, or faults in it.
    """
    return as_searched(load_recipe(find_config("recipes", name), overrides={"pretrained": pretrained}))


def as_searched(recipe: Recipe) -> Recipe:
    """The recipe with the schedule that a search gives it.

    One cycle over everything becomes warm-up, stable, decay, so that every rung has the score of a finished training;
    stages and early ends need their own schedule and keep it.
    """
    planned = {"schedule": "wsd"} if recipe.schedule == "one_cycle" and not recipe.stages else {}
    return recipe.model_copy(update=planned)


def open_study(
    name: str,
    url: str | None,
    asked: Asked | None = None,
    *,
    say: Say = lambda text: None,
    pack_call: PackCall | None = None,
) -> OpenStudy:
    """Open an existing study with its data; what is asked must agree with what it remembers.

    Raises:
        StudyError, DataError: no such study, a contradiction, or data that changed.
    """
    asked = asked or Asked()
    study, settings = load_study(name, url)
    _check_asked(settings, asked, name)
    folder = studies_folder(storage_url(url)) / name
    claim(study, folder, storage_url(url))
    store = _open_store(settings, asked, folder, say, pack_call)
    if settings.domains_hash is not None:
        kept = kept_domains(store, folder / DOMAINS, seed=settings.seed, expected=settings.domains_hash)
        store = with_domains(store, kept)
    split_file = folder / "split.npz"
    split = load_split(split_file) if split_file.is_file() else split_as(store, settings)
    if split.hash != settings.split_hash:
        raise StudyError(
            f"the split of study {name!r} changed: {split.hash[:12]} here, {settings.split_hash[:12]} in the study; restore {split_file}"
        )
    if not split_file.is_file():
        write_split(split, split_file)
    mirror = find_mirror(settings.artifacts, name, folder, say)
    return OpenStudy(study, settings, parse_space(settings.space, name), store, split, folder, storage_url(url), mirror)


def own_files(asked: Asked) -> dict[str, str]:
    """Hashes of what the user's own YAML files say, by the option that names them (space, recipe); none of shipped ones."""
    found = {}
    kinds: tuple[tuple[str, Kind, str | None], ...] = (
        ("space", "space", asked.space),
        ("recipe", "recipes", asked.recipe),
    )
    for option, kind, name in kinds:
        if name is not None and name not in list_configs(kind):
            file = find_config(kind, name)
            found[option] = sha256_of_json(parse_yaml(read_config_text(file), file.name))
    return found


def _edited_files(settings: StudySettings, asked: Asked) -> list[str]:
    """Options whose file says something else than when the study was made; a file that has gone changes nothing."""
    held = settings.plan.get("files", {})
    edited = []
    for option in held:
        name = getattr(asked, option)
        if name is not None and Path(name).expanduser().is_file():
            now = own_files(Asked(**{option: name}))
            edited += [option] if now.get(option) not in (None, held[option]) else []
    return edited


def split_as(store: PatchStore, settings: StudySettings) -> Split:
    """The split of a study, over a store under the study's domains."""
    return make_split(
        store, seed=settings.seed, holdout=settings.holdout, by=settings.split_by, domains=settings.domains_hash or ""
    )


def _check_asked(settings: StudySettings, asked: Asked, name: str) -> None:
    remembered = settings.model_dump()
    given = {key: getattr(asked, key) for key in ("holdout", "seed", "sampler", "pruner", "objective", "artifacts")}
    given["grace"], remembered["grace"] = asked.grace_s, settings.grace_s
    given["split"], remembered["split"] = asked.split_by, settings.split_by
    if asked.estimate_domains:
        given["domains"], remembered["domains"] = ESTIMATE, settings.domains_hash and ESTIMATE
    if asked.views is not None:
        given["views"], remembered["views"] = asked.views, settings.rungs[-1][0]
    if asked.rungs is not None:
        given["rungs"], remembered["rungs"] = asked.rungs, len(settings.rungs)
    if asked.weights not in (None, "auto"):
        given["weights"] = (
            asked.weights if asked.weights in ("hub", "none") else str(Path(str(asked.weights)).expanduser().resolve())
        )
    for field, value in check_pins(asked.pins or {}).items():
        key = f"set {field}"
        given[key], remembered[key] = _Shown(repr(value)), _held(settings, field, name)
    if asked.deterministic:
        given["deterministic"] = True
    if asked.cost_aware:
        given["cost-aware"], remembered["cost-aware"] = True, settings.cost_aware
    if asked.probe is not None:
        given["probe"], remembered["probe"] = asked.probe, settings.plan.get("probe_mode", "off")
    if asked.recipe is not None:
        given["recipe"], remembered["recipe"] = asked.recipe, settings.plan["recipe_name"]
    if asked.warm_start is not None:
        given["warm-start"], remembered["warm-start"] = (
            safe_url(asked.warm_start),
            settings.warm_start and safe_url(settings.warm_start),
        )
    if asked.prior is not None:
        given["prior"], remembered["prior"] = asked.prior, settings.prior or "none"
    if asked.space is not None:
        given["space"], remembered["space"] = asked.space, settings.plan["space_name"]
    for option in _edited_files(settings, asked):
        file = getattr(asked, option)
        if file == remembered.get(option):
            given[option], remembered[option] = _Shown(f"{file} as it is now"), _Shown(f"{file} as it was then")
    check_unchanged(remembered, given, name)


@dataclass(frozen=True)
class _Shown:
    """A value in a message of :func:`check_unchanged`; equal where it reads the same. Unlike None it counts as given."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _held(settings: StudySettings, field: str, name: str) -> _Shown:
    """What the study holds of a recipe field: the value that every trial has, or that it is searched, and where."""
    space = parse_space(settings.space, name)
    if field in space.parameters:
        return _Shown(f"no fixed value: the study searches it in {space.parameters[field].to_file()}")
    fields = merge_fields(settings.start, space.base)
    if field == "views" and not {"views", "epochs"} & set(space.base):
        fields["views"] = settings.rungs[-1][0]
    held = checked_value(field, fields.get(field), PINS, [])  # lists of the JSON as a recipe holds them
    return _Shown(repr(held))


def check_pins(pins: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``--set`` as a recipe holds them, backbones looked up in timm.

    Raises:
        RecipeError: every value at fault, whatever a study or a space says of the fields.
    """
    faults: list[str] = []
    checked = {field: checked_value(field, value, PINS, faults) for field, value in pins.items()}
    backbone = checked.get("backbone")
    if isinstance(backbone, str) and backbone and (fault := backbone_fault(backbone)) is not None:
        faults.append(f"{key_of(PINS, 'backbone')} {fault}")
    if faults:
        raise RecipeError("; ".join(faults))
    return checked


def _remembered_table(option: str, table: str | None, data: Path) -> Path | None:
    """The CSV that the study was made with.

    Raises:
        DataError: it is not on this machine.
    """
    if table is not None and not Path(table).is_file():
        raise DataError(
            f"the study was made with --{option} {table}, which is not here; make a pack with your copy of it (pcam-automl prepare {shlex.quote(str(data))} "
            f"--out PACK --{option} CSV) and give PACK as --data"
        )
    return None if table is None else Path(table)


def _check_names(settings: StudySettings, asked: Asked) -> None:
    """Whether a table that is given names the study's own slides and scanners, before anything is packed for it.

    Raises:
        StudyError: it does not; nothing is said where the study's pack is not at hand.
    """
    store = pack_of(settings) if asked.groups is not None or asked.domains is not None else None
    if store is None:
        return
    for option, csv, code, known in (
        ("groups", asked.groups, store.group, store.group_names),
        ("domains", asked.domains, store.domain, store.domain_names),
    ):
        if csv is None:
            continue
        given = dict(zip(*(array.tolist() for array in read_names(csv, option[:-1])), strict=True))
        held = names_by_row(code, known).tolist()
        unclear = is_ambiguous(store.ids, store.part).tolist()
        other = [
            f"{name}: {given.get(name) or 'none'!r} there, {own or 'none'!r} here"
            for name, own, skipped in zip(store.ids.tolist(), held, unclear, strict=True)
            if given.get(name, "") != own and not skipped
        ]
        if other:
            raise StudyError(
                f"--{option} {csv} names other {option} than the study was made with, for {len(other):,} of {len(held):,} patches "
                f"({first_few(other, 1)}); a study keeps its split: start another, --study NAME --{option} {csv}"
            )


def _open_store(
    settings: StudySettings, asked: Asked, folder: Path, say: Say, pack_call: PackCall | None
) -> PatchStore:
    """The study's pack: where it was, or packed again from the raw data, or the one that was asked for."""
    remembered = Path(settings.pack)
    _check_names(settings, asked)
    if asked.data is None and remembered.is_dir():
        store = open_store(remembered)
    else:
        path = find_data(asked.data, settings.data)
        groups, domains = asked.groups, asked.domains
        if not is_pack(path):  # a pack holds what it was made with; its hash is compared below
            groups = groups or _remembered_table("groups", settings.groups, path)
            domains = domains or _remembered_table("domains", settings.domains, path)
        store = find_pack(path, folder.parent / "packs", groups=groups, domains=domains, say=say, call=pack_call)
    if store.content_hash != settings.pack_hash:
        raise DataError(
            f"the data changed since the study began: pack {store.content_hash[:12]} at {store.root}, the study has {settings.pack_hash[:12]}; "
            "give the data it began with, or take another --study name"
        )
    return store
