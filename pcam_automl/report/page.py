"""The page: sections in order, one HTML file with everything inside, the PNGs beside it. Draws nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from pcam_automl import __version__
from pcam_automl.errors import DataError, first_few
from pcam_automl.files import folder_written_whole, write_text
from pcam_automl.predict import Predictor
from pcam_automl.report.blocks import Block, Code, Facts, Picture, Section, Text, left_out
from pcam_automl.report.content import ReportContent, both_labels

PAGE, PICTURES = "report.html", "report"
MARKER = ".pcam-automl-report"
"""A file in the folder of pictures that says whose it is: a new report takes the place of the whole folder."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """Where a report lies.

    Attributes:
        page: the HTML file.
        pictures: the PNGs in the order of the page.
    """

    page: Path
    pictures: tuple[Path, ...]


def write_report(
    content: ReportContent,
    out: Path,
    *,
    predictor: Predictor | None = None,
    progress: Progress = lambda text: None,
) -> Written:
    """Write ``out/report.html``, self-contained, and its pictures as ``out/report/*.png``; each whole or not at all.

    Args:
        content: what to show; what is missing is left out with a sentence.
        out: a folder, made where it is missing.
        predictor: the trained network, for Grad-CAM; None leaves that out.
        progress: told which part is being drawn.

    Raises:
        DataError: ``out/report`` holds something else, the disk is full, the folder is read-only, or a strip is no PNG.
    """
    check_pictures_folder(out / PICTURES)
    sections = build_sections(content, predictor=predictor, progress=progress)
    pictures = [block for section in sections for block in section.blocks if isinstance(block, Picture)]
    names = [picture.name for picture in pictures]
    assert len(set(names)) == len(names), f"two pictures have one name: {names}"
    with folder_written_whole(out / PICTURES) as folder:
        for picture in pictures:
            (folder / picture.name).write_bytes(picture.png)
        (folder / MARKER).touch()
    write_text(out / PAGE, render(content.title, summary(content), sections))
    return Written(out / PAGE, tuple(out / PICTURES / name for name in names))


def check_pictures_folder(folder: Path) -> None:
    """The pictures replace their folder as a whole: refuse one that another hand has made or filled.

    Raises:
        DataError: it is a file, or holds anything but the pictures of an earlier report.
    """
    if not folder.exists():
        return
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else [folder.name]
    strange = [name for name in names if name != MARKER and not (name.endswith(".png") and MARKER in names)]
    if strange:
        raise DataError(
            f"{folder} is where a report's pictures go, but holds what no report put there ({first_few(strange)}); "
            "rename it, or choose another --out"
        )


def build_sections(
    content: ReportContent, *, predictor: Predictor | None = None, progress: Progress = lambda text: None
) -> list[Section]:
    """The sections in reading order."""
    from pcam_automl.report.data_figures import data_section  # matplotlib and optuna only once a report is wanted
    from pcam_automl.report.examples import example_section
    from pcam_automl.report.network_table import network_section
    from pcam_automl.report.score_figures import score_section
    from pcam_automl.report.search_figures import search_section
    from pcam_automl.report.training_figures import training_section

    sections = []
    for part, build in (
        ("scores", score_section),
        ("examples", lambda c: example_section(c, predictor, progress)),
        ("data", data_section),
        ("search", search_section),
        ("network", network_section),
        ("training", training_section),
        ("recipe", recipe_section),
    ):
        progress(f"report: {part}")
        sections.append(build(content))
    return sections


def recipe_section(content: ReportContent) -> Section:
    """The recipe as YAML and the commands that repeat the run."""
    recipe, blocks = content.trained, list[Block]()
    if content.reproduce:
        blocks += [Text("How to reproduce it", style="heading"), Code("\n".join(content.reproduce))]
    else:
        blocks.append(left_out("how to reproduce it, since no commands were given to this report."))
    if recipe is not None:
        blocks += [
            Text("The recipe", style="heading"),
            Text(
                f"Every choice of the training; its SHA-256 begins with {recipe.hash[:12]}. Saved as a file it trains again."
                + _ended_by_the_clock(content)
            ),
            Code(recipe.to_yaml()),
        ]
    else:
        blocks.append(left_out("the recipe, since this report is of no training."))
    blocks.append(Text("Where it comes from", style="heading"))
    lines = [f"pcam-automl {__version__}"]
    if content.store is not None:
        lines.append(f"data {content.store.content_hash[:12]}, {len(content.store):,} {content.of_store.many}")
    if content.split is not None:
        lines.append(f"split {content.split.hash[:12]}, seed {content.split.seed}")
    if content.bundle is not None:
        known = content.bundle.provenance
        lines += [
            f"{name.replace('_', ' ')} {known[name]}"
            for name in ("device", "train_s", "peak_memory_bytes")
            if name in known
        ]
        lines += [f"{name} {version}" for name, version in dict(known.get("versions", {})).items()]
    return Section("recipe", "Recipe and reproduction", (*blocks, Code("\n".join(lines))))


def _ended_by_the_clock(content: ReportContent) -> str:
    if not content.by_clock or content.bundle is None:
        return ""
    seen = int(content.bundle.provenance["views_seen"])
    return f" It was trained for the time that its budget left, {seen:,} images, whatever the recipe says of epochs."


def summary(content: ReportContent) -> Facts:
    """The few figures that a hurried reader wants."""
    from pcam_automl.metrics import accuracy, auc
    from pcam_automl.search.reading import n_finished_in

    facts, scores, recipe = [], content.scores, content.trained
    if scores is not None and len(scores.rows):
        if both_labels(scores):
            facts.append(
                (f"{auc(scores.label, scores.prob):.4f}", f"{'pixel ' if content.dense else ''}AUC on {scores.on}")
            )
        if (maps := content.on_maps) is not None:
            facts += maps.facts(content.threshold)
        else:
            right = 100 * accuracy(scores.label, scores.prob, content.threshold)
            facts.append((f"{right:.1f} %", f"called rightly at {content.threshold:g}"))
    if content.store is not None:
        facts.append((f"{len(content.store):,}", content.of_store.many))
    if recipe is not None:
        shown = f"tiles of {recipe.tile_size} px" if recipe.task == "dense" else f"the centre {recipe.crop_size} px"
        resized = f", resized to {recipe.network_px}" if recipe.input_size not in (None, recipe.crop_size) else ""
        facts.append((recipe.backbone, f"sees {shown}{resized}"))
    if content.study is not None:
        n_trials = n_finished_in(content.study.get_trials(deepcopy=False))
        facts.append((f"{n_trials}", "trial of the search" if n_trials == 1 else "trials of the search"))
    return Facts(tuple(facts))


def render(title: str, facts: Facts, sections: list[Section]) -> str:
    """The HTML text; everything from outside is escaped."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("pcam_automl.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page.from_string(source).render(title=title, facts=facts, sections=sections, made=made, version=__version__)
