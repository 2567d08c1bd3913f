"""The ending of a patch task: holdout and test predicted, figures, tables, the checked submission. Trains nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial

from pcam_automl.batches import Patches, open_patches
from pcam_automl.bundle import CARD, ModelBundle, load_bundle, write_calibration
from pcam_automl.calibration import calibrate, changes, probs_at
from pcam_automl.data.split_groups import slides_caveat, trained_caveat
from pcam_automl.data.store import Flag, PatchStore
from pcam_automl.ensemble import member_folder, open_judge
from pcam_automl.errors import first_few
from pcam_automl.files import write_json, write_text
from pcam_automl.finalizing.compare import Step, steps_of
from pcam_automl.finalizing.decision import Decision
from pcam_automl.finalizing.kept_back import FinalRows
from pcam_automl.finalizing.result import FinalResult, FinalWatch
from pcam_automl.metrics import auc, auc_interval, domain_aucs, log_loss
from pcam_automl.operating import Operating, operate
from pcam_automl.predict import Judge, Predictor, build_predictor
from pcam_automl.scores import FILE as SCORES
from pcam_automl.scores import Scores, write_scores
from pcam_automl.search.reading import auc_of as trial_auc
from pcam_automl.search.study import OpenStudy
from pcam_automl.submission import LABELS_FILE as SUBMISSION_LABELS
from pcam_automl.submission import SUBMISSION_FILE as SUBMISSION
from pcam_automl.submission import write_submission
from pcam_automl.training.scoring import Averaging
from pcam_automl.training.start import without_excluded

RAW = "model-raw"
"""Bundle of the first member's weights before averaging, kept where a holdout can say what the average was worth."""
OOF = "oof.csv"
THRESHOLDS, REJECTS = "thresholds.csv", "reject.csv"


@dataclass
class _Ending:
    """What is at hand at the end: the judge, its networks, and the patches on the device."""

    opened: OpenStudy
    out: Path
    judge: Judge
    networks: tuple[Predictor, ...]
    patches: Patches
    watch: FinalWatch
    found: dict[str, np.ndarray] = field(default_factory=dict)

    def logits(self, rows: np.ndarray, what: str, judge: Judge | None = None) -> np.ndarray:
        """Logits (n,) float64, not calibrated, with a bar; those of all networks together are found once for each ``what``."""
        alone = judge is None or (len(self.networks) == 1 and judge is self.networks[0])
        if alone and what in self.found:
            return self.found[what]
        asked = judge or self.judge
        n_networks = len(self.networks) if judge is None else 1
        self.watch.predicting(len(rows) * n_networks, what)
        stop, progress = self.watch.train.stop, self.watch.predicted
        found = asked.row_logits(self.patches, rows, stop=stop, progress=progress).astype(np.float64)
        if alone:
            self.found[what] = found
        return found


def finish_patches(
    opened: OpenStudy,
    trial: FrozenTrial,
    decision: Decision,
    rows: FinalRows,
    out: Path,
    *,
    threshold: float | None,
    compare: bool,
    device: torch.device,
    watch: FinalWatch,
    averaging: Averaging | None = None,
    asked: Mapping[str, str] | None = None,
) -> FinalResult:
    """Predict with what lies in ``out``; write scores, tables, submission and provenance.

    Args:
        opened: the study with its data.
        trial: of the first member.
        decision: what was chosen, and its out-of-fold probabilities.
        rows: what was trained on, what judges and what is predicted.
        out: with ``model`` and, for several networks, ``ensemble.json``.
        threshold: also write 0/1 labels at this probability.
        compare: whether the holdout, or the slides kept back, shall say what each ingredient was worth.
        device: where to predict.
        watch: progress.
        averaging: of views, in place of the recipes' own.
        asked: what `finalize` was asked, to be kept beside the figures.
    """
    judge, networks = open_judge(out, device, averaging=averaging)
    end = _Ending(
        opened, out, judge, networks, open_patches(opened.store, torch.device(networks[0].compute.device)), watch
    )
    store, bundle = opened.store, networks[0].bundle
    rows = replace(rows, held=without_excluded(store, bundle.recipe, rows.held))
    if rows.kept_back and decision.calibration is None:
        decision = _calibrated(end, decision, rows)
        judge, networks = open_judge(out, device, averaging=averaging)  # with its temperature
        end = replace(end, judge=judge, networks=networks)
    figures, scores, steps = _on_held(end, trial, decision, rows, compare)
    figures |= _more_figures(opened, scores or decision.oof)
    operating = _operating(decision, scores)
    _write_tables(out, operating)
    if decision.oof is not None:
        write_scores(out / OOF, decision.oof, store.ids)
    else:
        (out / OOF).unlink(missing_ok=True)  # of an earlier decision
    test = rows.test
    notes = unreadable_notes(store, test)
    provenance: dict[str, Any] = {
        **bundle.provenance,
        **(asked or {}),
        **figures,
        **decision.to_json(),
        "compare": [step.to_json() for step in steps],
        "operating": [one.to_json() for one in operating],
        "n_held": 0 if scores is None else len(scores.rows),
        "threshold": threshold,
        "notes": list(notes),
        "recipe": bundle.recipe.model_dump(mode="json"),
        "n_test": len(test),
        "test_time_views": len(networks[0].views),
        "test_time_averaging": networks[0].views.averaging,
    }
    written = None
    if len(test):
        probs = probs_at(end.logits(test, "test"), judge.temperature)
        # nothing to see: the share of positives
        probs[_unreadable(store, test)] = float((store.label[opened.split.order] == 1).mean())
        if known := _on_labelled_test(store, test, probs, rows.train):
            provenance["labelled_test"] = known
            low, high = known["auc_95"]
            notes = (
                *notes,
                f"test AUC {known['auc']:.4f} (95 % {low:.4f} to {high:.4f}) on the {known['n']:,} test patches whose labels the data hold"
                + known["caveat"],
            )
        written = write_submission(out, store.ids[test].tolist(), probs, provenance, threshold=threshold)
    else:
        for name in (SUBMISSION, SUBMISSION_LABELS):
            (out / name).unlink(missing_ok=True)  # of an earlier network
        write_json(out / "submission.json", provenance)
    score, on, interval = figures["auc"], figures["auc_on"], figures["auc_95"]
    return FinalResult(
        out,
        written,
        trial.number,
        score,
        on,
        interval,
        0.0,
        notes,
        scores,
        decision=decision,
        operating=operating,
        steps=steps,
        labelled_test=provenance.get("labelled_test", {}),
        log_loss=figures["log_loss"],
        log_loss_fitted=decision.calibration is not None and (decision.oof is None or scores is None),
        domain_aucs=figures["domain_aucs"],
    )


def _more_figures(opened: OpenStudy, judged: Scores | None) -> dict[str, Any]:
    """``log_loss`` and, where two domains or more can be scored, ``domain_aucs`` by name, the worst first: of the patches that the AUC is of."""
    if judged is None:
        return {"log_loss": None, "domain_aucs": {}}
    store = opened.store
    found = domain_aucs(judged.label, judged.prob, np.asarray(store.domain)[judged.rows].astype(np.int64))
    named = {store.domain_names[code]: value for code, value in sorted(found.items(), key=lambda pair: pair[1])}
    return {"log_loss": log_loss(judged.label, judged.prob), "domain_aucs": named if len(named) > 1 else {}}


def _on_labelled_test(
    store: PatchStore, test: np.ndarray, probs: np.ndarray, trained: np.ndarray
) -> dict[str, Any] | None:
    """AUC on the test patches whose labels came with the data (PCam's HDF5 files have them); None without both labels."""
    known = np.asarray(store.label)[test] >= 0
    label = np.asarray(store.label)[test][known].astype(np.int64)
    if len(np.unique(label)) < 2:
        return None
    group = np.asarray(store.group)[test][known].astype(np.int64)
    interval = list(auc_interval(label, probs[known], group))
    official = store.source.get("kind") == "h5"  # PCam's own split keeps slides apart, whether they are named or not
    caveat = "" if official else slides_caveat(group)
    caveat += trained_caveat(store.group, store.digest, test[known], trained)
    return {"n": len(label), "auc": auc(label, probs[known]), "auc_95": interval, "caveat": caveat}


def _on_held(
    end: _Ending, trial: FrozenTrial, decision: Decision, rows: FinalRows, compare: bool
) -> tuple[dict[str, Any], Scores | None, tuple[Step, ...]]:
    """The figures to print, the scores of ``rows.held``, and the steps; without such rows the figures are out of fold, or the trial's."""
    store, held = end.opened.store, rows.held
    if not len(held):
        (end.out / SCORES).unlink(missing_ok=True)  # of an earlier network, on slides that this one has seen
        if decision.oof is not None and decision.oof_auc is not None:
            on = decision.oof.on + (_fewer_views(end) if decision.one_view else "")
            on += _chosen_there(decision) + _shorter(decision, end.networks[0])
            return {"auc": decision.oof_auc, "auc_on": on, "auc_95": decision.oof_auc_95}, None, ()
        value = trial_auc(trial, end.opened.settings.goal)
        on = f"validation fold, trial {trial.number}"
        on += slides_caveat(np.asarray(store.group)[end.opened.split.order])
        return {"auc": value, "auc_on": on, "auc_95": None}, None, ()
    label, group = np.asarray(store.label)[held].astype(np.int64), np.asarray(store.group)[held].astype(np.int64)
    logits = end.logits(held, rows.name)
    on = f"{_kept_back(held, group)} from its training" if rows.kept_back else f"holdout of {len(held):,} patches"
    on += _fewer_views(end) + slides_caveat(group)
    probs = probs_at(logits, end.judge.temperature)
    scores = Scores(held, label, probs, on)
    write_scores(end.out / SCORES, scores, store.ids)
    figures: dict[str, Any] = {"auc": auc(label, probs), "auc_on": on, "auc_95": auc_interval(label, probs, group)}
    if decision.calibration is not None and decision.oof is not None:  # else it was fitted to these very patches
        losses, errors = changes(logits, label, end.judge.temperature)
        figures["calibration_on_holdout"] = {"log_loss": losses, "error": errors}
    scorings = _scorings(end, held, rows.name, probs, tempered=decision.oof is not None) if compare else []
    steps = steps_of(label, group, scorings) if compare else ()
    return figures, scores, steps


def _calibrated(end: _Ending, decision: Decision, rows: FinalRows) -> Decision:
    """The decision with a temperature that is fitted to the slides kept back, where nothing was predicted out of fold."""
    label = np.asarray(end.opened.store.label)[rows.held].astype(np.int64)
    on = _kept_back(rows.held, np.asarray(end.opened.store.group)[rows.held])
    fitted = calibrate(end.logits(rows.held, rows.name), label, on)
    write_calibration(member_folder(end.out, 0), fitted)
    return replace(decision, calibrations=(fitted,), calibration=fitted)


def _fewer_views(end: _Ending) -> str:
    """What must be said of a figure whose patches were seen once, since a budget left no time for the recipe's views; empty else."""
    network = end.networks[0]
    return ", in one view each" if len(network.views) < network.bundle.recipe.n_test_views else ""


def _chosen_there(decision: Decision) -> str:
    """What must be said of a figure that was the best of several on its own patches; empty where it is of one."""
    n = len(decision.confirmed)
    return f", which chose among {n} confirmed trials: a little too high" if n > 1 else ""


def _kept_back(held: np.ndarray, group: np.ndarray) -> str:
    return f"{len(held):,} patches{'' if (group < 0).all() else ' of slides'} kept back"


def _shorter(decision: Decision, network: Predictor) -> str:
    """What must be said of a figure whose networks saw fewer training images than the final one; empty where they did not."""
    confirmed = decision.members[0].recipe.views
    seen = network.bundle.provenance.get("views_seen")
    if not confirmed or not seen or seen <= 1.5 * confirmed:
        return ""
    return f"; they were trained on {confirmed:,} images, the final one saw {seen:,} and should do better, which --keep-back 0.1 or a holdout can show"


def _scorings(
    end: _Ending, rows: np.ndarray, name: str, final: np.ndarray, *, tempered: bool
) -> list[tuple[str, np.ndarray]]:
    """Probabilities of the first network with one ingredient more at a time, and those of all together at the end.

    ``tempered``: whether the temperature is one of them; fitted to these very patches it would be flattered.
    """
    first, found = end.networks[0], list[tuple[str, np.ndarray]]()

    def plain(network: Predictor) -> np.ndarray:
        return probs_at(end.logits(rows, f"{name}, one view", network), 1.0)

    averaged = first.views.averaging != "none"
    if (raw := _before_averaging(end)) is not None:
        found.append(("one view, last weights", plain(build_predictor(raw, first.compute, averaging="none"))))
    one_view = build_predictor(first.bundle, first.compute, averaging="none")
    found.append(("weight average" if found else "one view", plain(one_view)))
    logits = end.logits(rows, name, first) if averaged else None
    if logits is not None:
        found.append((f"{len(first.views)} views", probs_at(logits, 1.0)))
    if tempered and first.bundle.calibration is not None:
        own = logits if logits is not None else end.logits(rows, name, first)
        found.append(("temperature", probs_at(own, first.temperature)))
    if len(end.networks) > 1:
        found.append((f"ensemble of {len(end.networks)}", final))
    return found


def _before_averaging(end: _Ending) -> ModelBundle | None:
    """The first network's last weights; None where nothing was averaged, or an older run did not keep them, which is said."""
    bundle, folder = end.networks[0].bundle, end.out / RAW
    if bundle.recipe.ema == 0:
        return None
    raw = load_bundle(folder) if (folder / CARD).is_file() else None
    if raw is None or any(raw.provenance.get(key) != bundle.provenance.get(key) for key in ("data_key", "train_s")):
        end.watch.train.note(
            f"the run that trained {end.out / 'model'} did not keep its last weights, so the weight average is not compared; "
            "remove that folder and repeat the command to have them"
        )
        return None
    return raw


def _operating(decision: Decision, scores: Scores | None) -> tuple[Operating, ...]:
    """Out of fold, where the thresholds are chosen, then on the slides that no network saw, which did not choose them."""
    found: list[Operating] = []
    for one in (decision.oof, scores):
        if one is not None:
            found.append(operate(one.label, one.prob, one.on, found[0] if found else None))
    return tuple(found)


def _write_tables(out: Path, operating: Sequence[Operating]) -> None:
    """``thresholds.csv`` and ``reject.csv``; an empty cell is a figure that does not exist."""
    for name, what in ((THRESHOLDS, "points"), (REJECTS, "rejects")):
        lines = [{"on": one.on, **asdict(point)} for one in operating for point in getattr(one, what)]
        if not lines:
            (out / name).unlink(missing_ok=True)  # of an earlier run that had some
            continue
        text = io.StringIO()
        table = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        write_text(out / name, text.getvalue())


def _unreadable(store: PatchStore, rows: np.ndarray) -> np.ndarray:
    return np.asarray((store.flags[rows] & int(Flag.UNREADABLE | Flag.WRONG_SHAPE)) != 0)


def unreadable_notes(store: PatchStore, rows: np.ndarray) -> tuple[str, ...]:
    """One line on test patches that cannot be read; empty where all can."""
    ids = store.ids[rows[_unreadable(store, rows)]].tolist() if len(rows) else []
    text = (
        f"{len(ids)} test patches cannot be read and get the share of positives as their probability ({first_few(ids)})"
    )
    return (text,) if ids else ()
