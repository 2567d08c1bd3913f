"""Checkpoints and scores in an S3 bucket: what one machine leaves, another goes on from. Against moto's server."""

from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import optuna
import pytest
import torch
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import TrialState

from pcam_automl.errors import InputError, Interrupted, StudyError
from pcam_automl.search import pictures as pictures_module
from pcam_automl.search.create import create_or_open_study
from pcam_automl.search.mirror import Mirror, open_mirror, parse_s3
from pcam_automl.search.objective import Objective, Watch
from pcam_automl.search.paused_folders import is_held
from pcam_automl.search.pictures import Pictures, mirrors_of, pictures_of
from pcam_automl.search.reading import n_finished_of
from pcam_automl.search.study import Asked, open_study
from pcam_automl.search.turns import Limits
from pcam_automl.search.worker import run_worker
from pcam_automl.training.checkpoint import read_checkpoint, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
BUCKET = "patches"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def _listed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_automl.search.mirror.LISTED_S", 0.0)


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


def keys(client: Any) -> list[str]:
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ())]


def checkpoint(folder: Path, lineage: str, rung: int, value: float) -> Path:
    path = folder / "checkpoints" / lineage / str(rung)
    write_checkpoint(path, parts={"model": {"w": torch.full((3,), value)}}, state={"rung": rung})
    return path


def test_what_one_machine_leaves_another_has(client: Any, tmp_path: Path) -> None:
    here, there = (open_mirror(f"s3://{BUCKET}/team", "study", tmp_path / name) for name in ("here", "there"))
    here.push_checkpoint(checkpoint(tmp_path / "here", "7", 0, 0.0))
    here.push_checkpoint(checkpoint(tmp_path / "here", "7", 1, 1.0))
    assert keys(client) == [f"team/study/checkpoints/7/1/{name}" for name in ("model.safetensors", "state.json")]
    assert there.lineages() == frozenset({"7"})
    there.pull_checkpoint("7")
    parts, state = read_checkpoint(tmp_path / "there" / "checkpoints" / "7" / "1")
    assert (parts["model"]["w"].tolist(), state["rung"]) == ([1.0] * 3, 1)
    newer = checkpoint(tmp_path / "there", "7", 2, 2.0)
    there.pull_checkpoint("7")
    assert sorted(f.name for f in newer.parent.iterdir() if f.name.isdigit()) == ["1", "2"], "nothing older comes again"
    there.pull_checkpoint("8")
    there.drop_checkpoints("7")
    assert keys(client) == []
    assert there.lineages() == frozenset(), "though the list is of half a minute ago"


def test_what_a_deleted_study_of_that_name_left_does_not_hide_ours(client: Any, tmp_path: Path) -> None:
    older, ours = (open_mirror(f"s3://{BUCKET}", "study", tmp_path / name) for name in ("older", "ours"))
    older.push_checkpoint(checkpoint(tmp_path / "older", "0", 1, 1.0))
    ours.push_checkpoint(checkpoint(tmp_path / "ours", "0", 0, 0.0))
    assert keys(client) == [f"study/checkpoints/0/0/{name}" for name in ("model.safetensors", "state.json")]


def test_an_upload_that_was_cut_off_is_not_seen(client: Any, tmp_path: Path) -> None:
    mirror = open_mirror(f"s3://{BUCKET}", "study", tmp_path)
    client.put_object(Bucket=BUCKET, Key="study/checkpoints/7/2/model.safetensors", Body=b"half")
    assert mirror.lineages() == frozenset()
    mirror.pull_checkpoint("7")
    assert not (tmp_path / "checkpoints").exists()


def test_scores_come_once_and_odd_keys_never(client: Any, tmp_path: Path) -> None:
    scores = tmp_path / "here" / "trials" / "3" / "scores.npz"
    scores.parent.mkdir(parents=True)
    scores.write_bytes(b"scores")
    open_mirror(f"s3://{BUCKET}/a/b", "study", tmp_path / "here").push_trial(3)
    for key in ("3/../../../outside", "x/scores.npz", "4/sub/scores.npz", "..//x"):
        client.put_object(Bucket=BUCKET, Key=f"a/b/study/trials/{key}", Body=b"odd")
    there = open_mirror(f"s3://{BUCKET}/a/b", "study", tmp_path / "there")
    assert (there.pull_trials(), there.pull_trials()) == (1, 0)
    assert [f.relative_to(tmp_path / "there") for f in (tmp_path / "there").rglob("*") if f.is_file()] == [
        Path("trials/3/scores.npz")
    ]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:/bucket", "must look like s3://BUCKET/PREFIX"),
        ("s3://user:s3cret@bucket/x", r"got 's3://\*\*\*@bucket/x'"),
        ("s3://UPPER/x", "must look like"),
        ("https://bucket.s3.amazonaws.com", "must look like"),
        ("s3://bucket/a b", "must look like"),
    ],
)
def test_a_wrong_url_is_named(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_s3(url)


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_trained(client: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bucket 'absent' cannot be reached .*AWS_ENDPOINT_URL and the credentials"):
        open_mirror("s3://absent/x", "study", tmp_path)


def test_a_new_study_does_not_take_another_one_s_files(client: Any, easy_pack: Path, tmp_path: Path) -> None:
    client.put_object(Bucket=BUCKET, Key="team/far-off/trials/5/scores.npz", Body=b"0")
    open_mirror(f"s3://{BUCKET}/team", "far", tmp_path).check_empty()  # another name that begins alike
    client.put_object(Bucket=BUCKET, Key="team/far/trials/5/scores.npz", Body=b"0")
    asked = Asked(data=easy_pack, weights="none", views=64, device="cpu", artifacts=f"s3://{BUCKET}/team")
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    with pytest.raises(StudyError, match=r"patches/team/far/ holds files of another study; take another --study"):
        create_or_open_study("far", url, asked, say=lambda text: None)
    assert keys(client) != []


def test_a_bucket_that_goes_away_costs_a_note(client: Any, tmp_path: Path) -> None:
    said: list[str] = []
    mirror = replace(open_mirror(f"s3://{BUCKET}", "study", tmp_path, said.append), bucket="gone-since")
    mirror.push_checkpoint(checkpoint(tmp_path, "7", 0, 0.0))
    assert mirror.lineages() == frozenset()
    assert mirror.pull_trials() == 0
    assert len(said) == 3
    assert said[0].startswith("the checkpoint of lineage 7 could not be copied to or from s3://gone-since (")


def test_a_trial_goes_on_on_a_machine_that_never_saw_it(client: Any, easy_pack: Path, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(
        data=easy_pack, weights="none", views=192, pins=pins, device="cpu", artifacts=f"s3://{BUCKET}/team", pruner="none"
    )  # fmt: skip
    url = f"sqlite:///{tmp_path / 'studies' / 's.db'}"
    opened = create_or_open_study("far", url, asked, say=lambda text: None)
    assert isinstance(opened.mirror, Mirror)
    scored: list[int] = []

    def stop() -> None:
        if len(scored) == 2:
            raise Interrupted("enough", signal.SIGTERM)

    first = Objective(opened, torch.device("cpu"), stop=stop, watch=Watch(rung=lambda n, result: scored.append(n)))
    with pytest.raises(Interrupted):
        run_worker(first, Limits(1))
    shutil.rmtree(opened.checkpoints)  # another machine has an empty disk
    again = open_study("far", url)
    run_worker(Objective(again, torch.device("cpu")), Limits(1))
    lost, resumed = again.study.get_trials()
    assert (lost.state, resumed.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert resumed.user_attrs["lineage"] == lost.user_attrs["lineage"]
    n_before = len(lost.user_attrs["rungs"])
    assert n_before == 2
    assert resumed.user_attrs["rungs"][:n_before] == lost.user_attrs["rungs"], "seconds, too: nothing was trained twice"
    assert n_finished_of(again.study) == 1
    assert [key for key in keys(client) if "checkpoints" in key] == [], "a finished trial leaves none"
    shutil.rmtree(opened.folder / "trials")
    assert again.mirror is not None
    assert again.mirror.pull_trials() == 1
    assert list((opened.folder / "trials" / str(resumed.number)).iterdir()) != []


def test_a_full_quota_of_the_disk_leaves_what_the_bucket_holds(client: Any, easy_pack: Path, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu", artifacts=f"s3://{BUCKET}/team")
    opened = create_or_open_study("full", f"sqlite:///{tmp_path / 'studies' / 's.db'}", asked, say=lambda text: None)
    run_worker(Objective(opened, torch.device("cpu")), Limits(6, quota_bytes=0))
    pruned = {t.user_attrs["lineage"] for t in opened.study.get_trials() if t.state == TrialState.PRUNED}
    assert pruned
    assert list(opened.checkpoints.iterdir()) == []
    assert isinstance(opened.mirror, Mirror)
    assert opened.mirror.lineages() == pruned
    one = min(pruned)
    opened.mirror.pull_checkpoint(one)
    assert is_held(opened.checkpoints, one), "here again, should it go on"


def test_pictures_of_one_machine_are_in_the_dashboard_of_another(client: Any, easy_pack: Path, tmp_path: Path) -> None:
    urls = {name: f"sqlite:///{tmp_path / name / 's.db'}" for name in ("a", "b")}
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu", artifacts=f"s3://{BUCKET}/team")
    here = create_or_open_study("study", urls["a"], asked, say=lambda text: None)
    own = pictures_of(here.study, tmp_path / "a" / "artifacts", here.mirror)
    own.write("1b4e28ba-2fa1", io.BytesIO(b"a picture"))
    assert keys(client) == ["team/study/artifacts/1b4e28ba-2fa1"]

    said: list[str] = []
    mirrors = mirrors_of(here.study._storage, tmp_path / "b", said.append)
    there = Pictures(tmp_path / "b" / "artifacts", mirrors)
    with there.open_reader("1b4e28ba-2fa1") as picture:
        assert picture.read() == b"a picture"
    for wrong in ("00000000-0000", "../s.db", "/etc/passwd", ""):
        with pytest.raises(ArtifactNotFound):
            there.open_reader(wrong)
    assert list((tmp_path / "b" / "artifacts").iterdir()) == [tmp_path / "b" / "artifacts" / "1b4e28ba-2fa1"]
    Pictures(tmp_path / "c" / "artifacts", mirrors).remove("1b4e28ba-2fa1")  # by a machine that never had it
    assert keys(client) == []
    with there.open_reader("1b4e28ba-2fa1") as picture:
        assert picture.read() == b"a picture", "it came once and stays"
    for store in (own, there):
        store.remove("1b4e28ba-2fa1")
        with pytest.raises(ArtifactNotFound):
            store.remove("1b4e28ba-2fa1")
    assert said == []


def test_of_several_buckets_all_are_read_and_none_is_written(client: Any, tmp_path: Path) -> None:
    one, two = (open_mirror(f"s3://{BUCKET}/{team}", "study", tmp_path / team) for team in ("one", "two"))
    Pictures(tmp_path / "two" / "artifacts", lambda: [two]).write("aaaa-1", io.BytesIO(b"of two"))
    both = Pictures(tmp_path / "here" / "artifacts", lambda: [one, two])
    with both.open_reader("aaaa-1") as picture:
        assert picture.read() == b"of two"
    both.write("aaaa-2", io.BytesIO(b"whose?"))
    assert keys(client) == ["two/study/artifacts/aaaa-1"]


def test_a_bucket_that_was_away_is_asked_again_later(
    client: Any, easy_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = {"backbone": "test_resnet", "crop_size": 32, "batch_size": 16}
    asked = Asked(data=easy_pack, weights="none", views=96, pins=pins, device="cpu", artifacts=f"s3://{BUCKET}/team")
    here = create_or_open_study("study", f"sqlite:///{tmp_path}/s.db", asked, say=lambda text: None)
    said: list[str] = []
    mirrors = mirrors_of(here.study._storage, tmp_path, said.append)
    real, asked_times = pictures_module.find_mirror, []

    def away_at_first(*words: Any, quick: bool) -> Any:
        asked_times.append(1)
        return None if len(asked_times) == 1 else real(*words, quick=quick)

    monkeypatch.setattr(pictures_module, "find_mirror", away_at_first)
    assert mirrors() == []
    assert mirrors() == [], "within the minute it is not asked again"
    assert len(asked_times) == 1
    monkeypatch.setattr(pictures_module, "AWAY_S", 0.0)
    assert len(mirrors()) == 1
    assert len(mirrors()) == 1
    assert len(asked_times) == 2, "and opened once"
