"""`export-prior`: the diverse best trials of a study as a YAML file for other searches."""

from __future__ import annotations

from pathlib import Path

from pcam_automl import terminal
from pcam_automl.errors import InputError
from pcam_automl.files import written_whole
from pcam_automl.search.priors import Prior, parse_prior, prior_of
from pcam_automl.search.space import parse_space
from pcam_automl.search.warm_start import open_source_study


def run_export_prior(
    name: str, url: str | None, out: Path, *, data: str | None, command: str | None, k: int, as_json: bool
) -> Prior:
    """Write the prior; its first line says what it is."""
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out must end in .yaml, got {out}")
    if out.exists():
        raise InputError(f"--out {out} exists; choose another name, or remove it")
    source = open_source_study(name, url, "--study")
    recorded = command or source.settings.command
    if not recorded:
        raise InputError(f"study {name!r} does not say which command made it; give --command '...'")
    prior = prior_of(
        source,
        parse_space(source.settings.space, name),
        data=data or Path(source.settings.data).name,
        command=recorded,
        export=terminal.this_command(),
        k=k,
    )
    best = prior.recipes[0]
    text = (
        f"# {len(prior.recipes)} recipes of {prior.n_trials} trials on {prior.data}, the best with validation AUC {best.auc:.4f}\n"
        + prior.to_yaml()
    )
    parse_prior(text, str(out))  # what cannot be read back is not written
    with written_whole(out) as partial:
        partial.write_text(text, encoding="utf-8")
    if as_json:
        terminal.print_json(prior.model_dump(mode="json"))
    else:
        for entry in prior.recipes:
            terminal.say(f"trial {entry.trial}: {entry.recipe.backbone}, validation AUC {entry.auc:.4f}")
        terminal.result(str(out))
    return prior
