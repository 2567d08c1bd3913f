"""`predict`: probabilities, pictures and maps for image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pcam_automl import terminal
from pcam_automl.bundle import ModelBundle, load_bundle
from pcam_automl.commands.report import bundle_folder
from pcam_automl.data.images import PatchFault, read_patch
from pcam_automl.data.tables import is_id, read_ids
from pcam_automl.ensemble import open_judge
from pcam_automl.errors import DataError, InputError, first_few
from pcam_automl.explain import explain_image
from pcam_automl.files import check_can_write, write_png, written_whole
from pcam_automl.interrupt import stop_signal
from pcam_automl.predict import Predictor, compute_of, list_images, patch_side, predict_files
from pcam_automl.predict_dense import build_map_predictor, write_maps
from pcam_automl.submission import check_submission, check_threshold, write_probabilities
from pcam_automl.training.compute import use_device

EXPLANATIONS = "explanations.csv"


def run_predict(
    model: Path,
    inputs: list[Path],
    out: Path,
    *,
    threshold: float | None,
    device: str,
    all_views: bool,
    explain: Path | None = None,
    sample: Path | None = None,
) -> None:
    """Write ``id,label`` for image files; with ``explain`` also a Grad-CAM picture and a sentence for each.

    With ``sample`` what is written is a submission: its ids, all of them, in its order.
    """
    check_threshold(threshold)
    bundle = load_bundle(bundle_folder(model))
    given = files = _with_ids(list_images(inputs))
    wanted = None if sample is None else read_ids(sample).tolist()
    if wanted is not None:
        if threshold is not None:
            raise InputError(
                f"--threshold {threshold:g} adds a column of labels, which a submission (--sample) may not have; leave one out"
            )
        files = _images_of_sample(files, wanted, sample)
    place = use_device(device)
    if bundle.recipe.task == "dense":
        if explain is not None:
            raise InputError("--explain belongs to task patch; a dense bundle's map shows itself where the tumour is")
        if wanted is not None:
            raise InputError("--sample belongs to task patch; a dense bundle writes maps")
        _predict_maps(bundle, files, out, place, threshold=threshold, all_views=all_views)
        return
    _check_predict_targets(given, out, explain, sample)
    judge, networks = open_judge(model, place, averaging=None if all_views else "none")
    ids: list[str] = []
    probs: list[np.ndarray] = []
    left_out: list[str] = []
    with stop_signal("nothing was written; repeat the command"), terminal.Bars() as bars:
        task = bars.add("predicting", len(files))
        for names, values, faults in predict_files(judge, files, side_px=patch_side(bundle)):
            ids += names
            probs.append(values)
            left_out += faults
            bars.step(task, len(names) + len(faults))
    if not ids:
        raise DataError(f"none of the {len(files)} files is a readable patch ({first_few(left_out)})")
    known = dict(zip(ids, np.concatenate(probs).tolist(), strict=True))
    if left_out:
        terminal.say(f"left out {len(left_out)} of {len(files)} files: {first_few(left_out)}")
    if wanted is None:
        write_probabilities(out, ids, np.concatenate(probs), threshold=threshold)
    else:
        _write_submission(out, wanted, known)
    terminal.result(f"{out}: {len(wanted or ids):,} probabilities")
    if explain is not None:
        _explain(networks[0], [file for file in files if file.stem in known], known, explain)


def _with_ids(files: list[Path]) -> list[Path]:
    """Those whose names can be ids; the others, say of an archive from a machine with another encoding, are named and left out.

    Raises:
        InputError: none can.
    """
    named = [file for file in files if is_id(file.stem)]
    if others := [ascii(file.name)[1:-1] for file in files if not is_id(file.stem)]:
        text = f"{len(others)} files have unprintable names and are left out ({first_few(others)})"
        if not named:
            raise InputError(f"--input: {text}; rename them")
        terminal.say(text)
    return named


def _images_of_sample(files: list[Path], wanted: list[str], sample: Path | None) -> list[Path]:
    """The images of a sample submission's ids, in its order; others are not predicted.

    Raises:
        DataError: ids without an image.
    """
    by_id = {file.stem: file for file in files}
    if missing := [name for name in wanted if name not in by_id]:
        raise DataError(
            f"{sample}: {len(missing):,} of its {len(wanted):,} ids have no image in --input ({first_few(missing)}); give the folder that holds "
            "all of them"
        )
    if n_more := len(by_id) - len(set(wanted)):
        terminal.say(f"{n_more:,} images are not in {sample} and are left out")
    return [by_id[name] for name in wanted]


def _write_submission(out: Path, wanted: list[str], known: dict[str, float]) -> None:
    """All ids of the sample; those whose image could not be read have the mean of the others, which is said."""
    mean = float(np.mean(list(known.values())))
    if n := sum(name not in known for name in wanted):
        terminal.say(f"{n:,} of them are in the sample: they have the mean probability of the others, {mean:.4f}")
    write_probabilities(out, wanted, np.array([known.get(name, mean) for name in wanted]))
    check_submission(out, wanted)


def _check_predict_targets(files: list[Path], out: Path, explain: Path | None, sample: Path | None) -> None:
    """Nothing that predict writes may be one of the images or the sample that it reads, or the probabilities themselves."""
    inputs = {file.resolve() for file in files}
    if sample is not None and out.resolve() == sample.resolve():
        raise DataError(f"--out {out} is the --sample itself; choose another name")
    if out.resolve() in inputs:
        raise DataError(f"--out {out} is one of the images of --input; choose another name")
    if out.is_dir():
        raise DataError(f"--out {out} is a folder; probabilities go into a CSV: --out {out / 'predictions.csv'}")
    check_can_write(out.parent)
    if explain is None:
        return
    if explain.exists() and not explain.is_dir():
        raise DataError(f"--explain {explain} is a file; pictures are written into a folder, one PNG an image")
    names = [f"{file.stem}.png" for file in files]
    if own := [name for name in names if (explain / name).resolve() in inputs]:
        raise DataError(
            f"--explain {explain}: {len(own)} pictures would replace the images ({first_few(own)}); choose another folder"
        )
    if out.resolve() in {explain.resolve(), *((explain / name).resolve() for name in (*names, EXPLANATIONS))}:
        raise DataError(f"--explain {explain} would replace --out {out}; choose another folder")
    check_can_write(explain)


def _predict_maps(
    bundle: ModelBundle, files: list[Path], out: Path, device: torch.device, *, threshold: float | None, all_views: bool
) -> None:
    """One grey probability map an image into the folder ``out``."""
    predictor = build_map_predictor(bundle, compute_of(bundle, device), all_views=None if all_views else False)
    with stop_signal("maps that are written stay; repeat the command") as stop, terminal.Bars() as bars:
        task = bars.add("predicting maps", len(files))
        n_written, faults = write_maps(
            predictor, files, out, threshold=threshold, stop=stop.check, progress=lambda n: bars.step(task, n)
        )
    if not n_written:
        raise DataError(f"none of the {len(files)} files is a readable image ({first_few(faults)})")
    if faults:
        terminal.say(f"left out {len(faults)} of {len(files)} files: {first_few(faults)}")
    terminal.result(f"{out}: {n_written:,} probability maps")


def _explain(predictor: Predictor, files: list[Path], probs: dict[str, float], out: Path) -> None:
    """A picture ``<id>.png`` for each image, and ``explanations.csv`` with the sentences; of an ensemble its first network's maps."""
    with stop_signal("the probabilities are written; repeat the command for the pictures"), terminal.Bars() as bars:
        task = bars.add("explaining", len(files))
        rows = []
        for file in files:
            patch = read_patch(file)
            assert not isinstance(patch, PatchFault)  # it was read a moment ago
            picture, sentence = explain_image(predictor, patch, probs[file.stem])
            write_png(out / f"{file.stem}.png", picture)
            rows.append((file.stem, sentence))
            terminal.say(f"{file.stem}: {sentence}")
            bars.step(task)
    with written_whole(out / EXPLANATIONS) as partial:
        pd.DataFrame(rows, columns=["id", "explanation"]).to_csv(partial, index=False)
    terminal.result(f"{out}: {len(rows):,} pictures")
