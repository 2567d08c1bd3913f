"""Pictures in Optuna's artifact store and the note that shows them."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from report_content import study_of

from pcam_automl.errors import StudyError
from pcam_automl.report.artifacts import attach
from pcam_automl.search.pictures import Pictures


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return study_of(f"sqlite:///{tmp_path / 's.db'}")


def pngs(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    return [folder / name for name in names]


def test_pictures_are_attached_to_the_finished_trial_and_shown_in_its_note(study: optuna.Study, tmp_path: Path) -> None:
    from optuna_dashboard import get_note
    from optuna_dashboard.artifact._backend import list_trial_artifacts

    attached = attach(study, 2, pngs(tmp_path, "roc.png", "slides.png"), Pictures(tmp_path / "artifacts"))
    again = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 's.db'}")
    trial = again.trials[2]
    metas = get_all_artifact_meta(again)
    assert {(m.filename, m.mimetype) for m in metas} == {("roc.png", "image/png"), ("slides.png", "image/png")}
    for meta in metas:
        assert (tmp_path / "artifacts" / meta.artifact_id).read_bytes() == (tmp_path / meta.filename).read_bytes()
    attrs = again._storage.get_study_system_attrs(again._study_id)
    listed = list_trial_artifacts(attrs, {}, trial)  # what the dashboard shows on the trial's page
    assert {meta["artifact_id"] for meta in listed} == {one.artifact_id for one in attached}
    assert list_trial_artifacts(attrs, {}, again.trials[1]) == []
    note = get_note(optuna.Trial(again, trial._trial_id))
    for one in attached:
        assert f"![{Path(one.name).stem}](/artifacts/{again._study_id}/{trial._trial_id}/{one.artifact_id})" in note


def test_pictures_of_a_running_trial_are_its_own(study: optuna.Study, tmp_path: Path) -> None:
    number = study.ask().number
    attach(study, number, pngs(tmp_path, "roc.png"), Pictures(tmp_path / "artifacts"))
    metas = get_all_artifact_meta(study.trials[number], storage=study._storage)
    assert [meta.filename for meta in metas] == ["roc.png"]
    assert not get_all_artifact_meta(study)


def test_the_same_pictures_are_stored_once_and_changed_ones_anew(study: optuna.Study, tmp_path: Path) -> None:
    files = pngs(tmp_path, "roc.png", "slides.png")
    first = attach(study, 0, files, Pictures(tmp_path / "artifacts"))
    files[0].write_bytes(b"\x89PNG\r\n\x1a\nanother")
    second = attach(study, 0, files, Pictures(tmp_path / "artifacts"))
    assert [one.new for one in first] == [True, True]
    assert [one.new for one in second] == [True, False]
    assert second[1].artifact_id == first[1].artifact_id


def test_unknown_trial_is_named(study: optuna.Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has no trial 99"):
        attach(study, 99, [], Pictures(tmp_path / "artifacts"))
