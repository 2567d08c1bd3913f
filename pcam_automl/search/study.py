"""Creating and opening studies: data, split, space and settings that every worker shares. Runs no trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from pcam_automl.config import StudySettings, check_study_name, check_unchanged, find_data, storage_url, studies_folder
from pcam_automl.configs_folder import find_config
from pcam_automl.data.packs import PackCall, find_pack
from pcam_automl.data.splits import Split, load_split, make_split, write_split
from pcam_automl.data.store import PatchStore, open_store
from pcam_automl.errors import DataError, RecipeError, StudyError, first_few
from pcam_automl.files import write_json
from pcam_automl.models.factory import backbone_fault
from pcam_automl.models.weights import Weights, decide_weights, parse_weights
from pcam_automl.recipe import PINS, Recipe, key_of, load_recipe, merge_fields
from pcam_automl.search.dimension import checked_value
from pcam_automl.search.plan import make_plan
from pcam_automl.search.pruner import build_pruner
from pcam_automl.search.reading import SETTINGS_KEY, load_study
from pcam_automl.search.sampler import build_sampler
from pcam_automl.search.slots import Slots
from pcam_automl.search.space import SearchSpace, load_space, parse_space
from pcam_automl.search.storage import engine_of, open_storage, quiet_experimental
from pcam_automl.search.storage_url import normalised_url, sqlite_path
from pcam_automl.training.compute import choose_device, use_cores
from pcam_automl.training.engine import Rung
from pcam_automl.training.speed import SpeedBook
from pcam_automl.versions import versions

VALIDATION_FOLD = 0
LARGEST_HOLDOUT = 0.5
DEFAULT_SPACE = "default"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """Options of ``search`` as the user gave them; None is "not given"."""

    data: Path | None = None
    groups: Path | None = None
    domains: Path | None = None
    space: str | None = None
    pins: dict[str, Any] | None = None
    weights: str | None = None
    holdout: float | None = None
    seed: int | None = None
    sampler: str | None = None
    pruner: str | None = None
    views: int | None = None
    device: str = "auto"


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
    """

    study: optuna.Study
    settings: StudySettings
    space: SearchSpace
    store: PatchStore
    split: Split
    folder: Path
    url: str

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def weights(self) -> Weights:
        return parse_weights(self.settings.weights)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        return tuple(Rung(views, subset) for views, subset in self.settings.rungs)

    @property
    def speed_book(self) -> SpeedBook:
        return SpeedBook(self.folder.parent / "speed.json")


def default_recipe(pretrained: bool) -> Recipe:
    """The known-good recipe ``default`` in the schedule of a search."""
    return load_recipe(find_config("recipes", "default"), overrides={"schedule": "wsd", "pretrained": pretrained})


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
    store = _open_store(settings, asked, folder, say, pack_call)
    split_file = folder / "split.npz"
    split = (
        load_split(split_file)
        if split_file.is_file()
        else make_split(store, seed=settings.seed, holdout=settings.holdout)
    )
    if split.hash != settings.split_hash:
        raise StudyError(
            f"the split of study {name!r} changed: {split.hash[:12]} here, {settings.split_hash[:12]} in the study; restore {split_file}"
        )
    if not split_file.is_file():
        write_split(split, split_file)
    return OpenStudy(study, settings, parse_space(settings.space, name), store, split, folder, storage_url(url))


def _check_asked(settings: StudySettings, asked: Asked, name: str) -> None:
    remembered = settings.model_dump()
    given = {key: getattr(asked, key) for key in ("holdout", "seed", "sampler", "pruner")}
    if asked.views is not None:
        given["views"], remembered["views"] = asked.views, settings.rungs[-1][0]
    if asked.weights not in (None, "auto"):
        given["weights"] = (
            asked.weights if asked.weights in ("hub", "none") else str(Path(str(asked.weights)).expanduser().resolve())
        )
    for field, value in _check_pins(asked.pins or {}).items():
        key = f"set {field}"
        given[key], remembered[key] = _Shown(repr(value)), _held(settings, field, name)
    if asked.space is not None:
        given["space"], remembered["space"] = asked.space, settings.plan["space_name"]
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
    fields = merge_fields(default_recipe(bool(space.base["pretrained"])).model_dump(), space.base)
    if field == "views" and not {"views", "epochs"} & set(space.base):
        fields["views"] = settings.rungs[-1][0]
    return _Shown(repr(fields.get(field)))


def _check_pins(pins: Mapping[str, Any]) -> dict[str, Any]:
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


def _open_store(
    settings: StudySettings, asked: Asked, folder: Path, say: Say, pack_call: PackCall | None
) -> PatchStore:
    """The study's pack: where it was, or packed again from the raw data, or the one that was asked for."""
    remembered = Path(settings.pack)
    if asked.data is None and asked.groups is None and asked.domains is None and remembered.is_dir():
        store = open_store(remembered)
    else:
        path = find_data(asked.data, settings.data)
        store = find_pack(
            path, folder.parent / "packs", groups=asked.groups, domains=asked.domains, say=say, call=pack_call
        )
    if store.content_hash != settings.pack_hash:
        raise DataError(
            f"the data changed since the study began: pack {store.content_hash[:12]} at {store.root}, the study has {settings.pack_hash[:12]}; "
            "give the data it began with, or take another --study name"
        )
    return store


def create_or_open_study(
    name: str, url: str | None, asked: Asked, *, say: Say, pack_call: PackCall | None = None
) -> OpenStudy:
    """Open the study, or create it from what is asked and the defaults.

    Raises:
        StudyError, DataError, RecipeError, InputError: anything at fault, before a trial starts.
    """
    url = storage_url(url)
    check_study_name(name)
    check_options(asked)  # whatever is wrong is said before the hub is asked or the data packed
    database = sqlite_path(normalised_url(url))
    if database is not None and not database.exists():  # a new study for certain: no fault shall leave a database
        _load_asked_space(asked)
        find_data(asked.data)
    storage = open_storage(url)
    if name in optuna.get_all_study_names(storage):
        return open_study(name, url, asked, say=say, pack_call=pack_call)
    folder = studies_folder(url) / name
    settings, split = _decide(name, asked, folder, say, pack_call)
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError:  # another process was quicker: its settings hold
        return open_study(name, url, asked, say=say, pack_call=pack_call)
    study.set_user_attr(f"{SETTINGS_KEY}:creating", True)
    Slots(engine_of(study), name).clear()  # a deleted study of this name may have left its slots
    with quiet_experimental():
        study.set_metric_names(["validation ROC AUC"])
    write_split(split, folder / "split.npz")
    write_json(folder / "settings.json", settings.model_dump(mode="json"))
    study.set_user_attr(SETTINGS_KEY, settings.model_dump_json())
    return open_study(name, url, say=say, pack_call=pack_call)


def _decide(name: str, asked: Asked, folder: Path, say: Say, pack_call: PackCall | None) -> tuple[StudySettings, Split]:
    """Everything a new study remembers."""
    use_cores()
    device = choose_device(asked.device)
    pins = dict(asked.pins or {})
    space = _load_asked_space(asked)
    path = find_data(asked.data)
    weights, text = decide_weights(asked.weights or "auto")  # asks the network, up to 10 s: after what needs none
    say(text)
    space = space.pinned({"pretrained": pins.get("pretrained", weights.pretrained)})
    space = drop_backbones_without_weights(space, weights, say)
    store = find_pack(
        path, folder.parent / "packs", groups=asked.groups, domains=asked.domains, say=say, call=pack_call
    )
    seed = asked.seed if asked.seed is not None else 0
    split = make_split(store, seed=seed, holdout=asked.holdout or 0.0)
    for note in split.notes:
        say(note)
    default = default_recipe(bool(space.base["pretrained"]))
    n_train = len(split.train_order(VALIDATION_FOLD))
    n_valid = len(split.order) - n_train
    plan = make_plan(
        space,
        default,
        n_train=n_train,
        n_valid=n_valid,
        device=device,
        views=asked.views,
        speed=SpeedBook(folder.parent / "speed.json"),
        progress=say,
    )
    if plan.dropped:
        space = space.without_choices("backbone", list(plan.dropped))
    rungs = tuple((rung.views, rung.subset) for rung in plan.rungs)
    build_pruner(asked.pruner or "asha", rungs=[views for views, _ in rungs])
    settings = StudySettings(
        data=str(path),
        pack=str(store.root.resolve()),
        pack_hash=store.content_hash,
        split_hash=split.hash,
        seed=seed,
        holdout=asked.holdout or 0.0,
        weights=str(weights),
        space=space.to_yaml(),
        pins=pins,
        sampler=asked.sampler or "tpe",
        pruner=asked.pruner or "asha",
        rungs=rungs,
        n_score=plan.n_score,
        cap_s=plan.cap_s,
        plan={
            **plan.to_json(),
            "device": str(device),
            "space_name": asked.space or DEFAULT_SPACE,
            "n_train": n_train,
            "n_valid": n_valid,
        },
        versions=versions(),
    )
    return settings, split


def _load_asked_space(asked: Asked) -> SearchSpace:
    """The space that is asked for, with ``--set`` applied and every backbone's name looked up in timm."""
    return load_space(asked.space or DEFAULT_SPACE, pins=asked.pins, backbone_fault=backbone_fault)


def check_options(asked: Asked) -> None:
    """Options that can be judged without data.

    Raises:
        RecipeError, DataError, InputError: an unknown device, sampler or pruner, a value of ``--set`` that no recipe
            can have, a holdout out of range, or two budgets.
    """
    choose_device(asked.device)
    build_sampler(asked.sampler or "tpe", 0)
    build_pruner(asked.pruner or "asha", rungs=[1, 2])
    if asked.holdout is not None and not 0.0 <= asked.holdout <= LARGEST_HOLDOUT:
        raise DataError(f"--holdout must be in [0, {LARGEST_HOLDOUT}], got {asked.holdout}")
    if asked.views is not None and (named := {"views", "epochs"} & set(asked.pins or {})):
        raise RecipeError(f"--views {asked.views} and --set {', '.join(sorted(named))} both name the budget; keep one")
    _check_pins(asked.pins or {})


def drop_backbones_without_weights(space: SearchSpace, weights: Weights, say: Say) -> SearchSpace:
    """Leave out, by name, the backbones that the weights folder or hub does not have.

    Raises:
        RecipeError: none is left.
    """
    names = space.choices("backbone")
    if not space.base["pretrained"]:
        return space
    missing = [name for name in names if not weights.has(name)]
    if missing and len(missing) == len(names):
        raise RecipeError(
            f"no backbone of the space has weights in {weights} (it wants {first_few(names)}); "
            "name one with --set backbone=NAME, or give --weights none"
        )
    if missing:
        say(f"left out, no weights in {weights}: {', '.join(missing)}")
        return space.without_choices("backbone", missing)
    return space
