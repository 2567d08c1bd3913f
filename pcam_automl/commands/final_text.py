"""What `finalize` says: confirmations, the decision, figures of the final network. Computes nothing."""

from __future__ import annotations

import math
from typing import Any

from pcam_automl import terminal
from pcam_automl.finalize import FinalResult
from pcam_automl.finalizing.compare import Step
from pcam_automl.finalizing.decision import Decision
from pcam_automl.goals import Goal
from pcam_automl.operating import Operating, threshold_text
from pcam_automl.paired import Gain
from pcam_automl.search.confirmations import Confirmation


def say_confirmed(one: Confirmation) -> None:
    """A confirmation that has ended, or was there already."""
    if one.auc is None:
        terminal.say(f"trial {one.trial} on fold {one.fold}: diverged with a fresh seed ({one.diverged})")
        return
    terminal.say(f"trial {one.trial} on fold {one.fold}: AUC {one.auc:.4f}, {terminal.duration(one.seconds)}")


def say_decision(decision: Decision, goal: Goal) -> None:
    """Which trials are retrained and why; nothing where the search was taken by its word."""
    if not decision.confirmed:
        return
    for one in decision.confirmed:
        search = "none" if one.search is None else f"{one.search:.4f}"
        drop = "" if one.drop is None or math.isnan(one.drop) else f", a drop of {one.drop:.4f}"
        confirmed = "diverged with a fresh seed" if math.isnan(one.mean) else f"{one.mean:.4f} confirmed"
        terminal.say(f"  trial {one.trial}: {goal.short} {search} in the search, {confirmed}{drop}")
    best = decision.confirmed[0]
    drop = "" if decision.drop is None or math.isnan(decision.drop) else f"; the mean drop is {decision.drop:.4f}"
    if math.isnan(best.mean):
        terminal.say(
            f"no confirmation came to an end: trial {decision.members[0].trial.number} is taken by the search's word"
        )
    else:
        terminal.say(f"confirmed best: trial {best.trial}, {goal.short} {best.mean:.4f}{drop}")
    if decision.tie is not None:
        terminal.say(f"trial {decision.members[0].trial.number} is taken: {decision.tie}")
    if decision.blend is not None:
        terminal.say(f"ensemble {'used' if decision.blend.used else 'not used'}: {decision.blend.why}")
    if len(decision.members) > 1:
        parts = zip(decision.weights, decision.members, strict=True)
        terminal.say("  " + " + ".join(f"{weight:.2f} x trial {member.trial.number}" for weight, member in parts))
    if (fitted := decision.calibration) is not None:
        (loss, loss_after), (error, error_after) = fitted.log_loss, fitted.error
        terminal.say(
            f"temperature {fitted.temperature:.2f}: log-loss {loss:.4f} -> {loss_after:.4f}, calibration error "
            f"{100 * error:.1f} % -> {100 * error_after:.1f} % on {fitted.on}"
        )


def print_final(final: FinalResult, as_json: bool) -> None:
    """The figures and, on stdout, where the result lies."""
    if as_json:
        terminal.print_json(_as_json(final))
        return
    interval = f" (95 % {final.auc_95[0]:.4f} to {final.auc_95[1]:.4f})" if final.auc_95 else ""
    terminal.say(
        f"AUC {final.auc:.4f}{interval} on the {final.auc_on}; finalize took {terminal.duration(final.seconds)}"
    )
    if dense := final.dense:
        terminal.say(
            f"  Dice {dense['dice']:.4f}, pixel accuracy {dense['accuracy']:.4f} (always negative: {dense['always_negative_accuracy']:.4f})"
        )
    if final.log_loss is not None:
        by_domain = ", ".join(f"{name} {value:.4f}" for name, value in final.domain_aucs.items())
        worst = f"; AUC by domain, the worst first: {by_domain}" if by_domain else ""
        fitted = " (its temperature was fitted to these patches)" if final.log_loss_fitted else ""
        terminal.say(f"  log-loss {final.log_loss:.4f}{fitted}{worst}")
    if test := final.on_test:
        terminal.say(
            f"{test['n']:,} test images with masks: Dice {test['dice']:.4f}, pixel accuracy {test['accuracy']:.4f} (always "
            f"negative: {test['always_negative_accuracy']:.4f}), pixel AUC {test['auc']:.4f}"
        )
    if final.operating:
        _say_thresholds(final.operating[-1])
    if final.steps:
        header = ("with", "AUC", "gain (95 %)", "log-loss", "saved (95 %)")
        terminal.table(
            "what each ingredient was worth on slides that the network has not seen",
            header,
            [_step_cells(s) for s in final.steps],
        )
    made = final.submission or final.maps
    several = final.decision is not None and len(final.decision.members) > 1
    network = final.out if several else final.out / "model"  # `predict` takes all of an ensemble by its folder
    terminal.result(str(made) if made else f"{network} (no test patches are predicted, so no submission)")


def _as_json(final: FinalResult) -> dict[str, Any]:
    return {
        "out": str(final.out),
        "submission": None if final.submission is None else str(final.submission),
        "maps": None if final.maps is None else str(final.maps),
        "trial": final.trial,
        "auc": final.auc,
        "auc_on": final.auc_on,
        "auc_95": final.auc_95,
        "log_loss": final.log_loss,
        "log_loss_fitted": final.log_loss_fitted,
        "domain_aucs": dict(final.domain_aucs),
        "dense": final.dense or None,
        "test": final.on_test or dict(final.labelled_test) or None,
        "seconds": round(final.seconds, 1),
        **({} if final.decision is None else final.decision.to_json()),
        "compare": [step.to_json() for step in final.steps],
    }


def _say_thresholds(operating: Operating) -> None:
    """One line a rule."""
    same = operating.chosen_on == operating.on
    terminal.say(
        f"thresholds, chosen and judged on {operating.on}:"
        if same
        else f"thresholds, chosen on {operating.chosen_on}, judged on {operating.on}:"
    )
    for point in operating.points:
        terminal.say(
            f"  {threshold_text(point.threshold)} ({point.rule}): {100 * point.sensitivity:.1f} % of tumour found, "
            f"{100 * point.specificity:.1f} % of normal left alone"
        )


def _step_cells(step: Step) -> tuple[str, ...]:
    return (step.name, f"{step.auc:.4f}", gain_text(step.auc_gain), f"{step.log_loss:.4f}", gain_text(step.loss_gain))


def gain_text(gain: Gain | None) -> str:
    """``+0.0012 (-0.0003 to +0.0030)``; empty for the first step."""
    if gain is None:
        return ""
    interval = "" if gain.interval is None else f" ({gain.interval[0]:+.4f} to {gain.interval[1]:+.4f})"
    return f"{gain.value:+.4f}{interval}"
