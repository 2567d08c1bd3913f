from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
from data_builders import patch_id, tissue, write_csv, write_h5, write_kaggle
from PIL import Image

import pcam_automl.data.pack as pack_module
from pcam_automl.data import h5 as h5_module
from pcam_automl.data import pool
from pcam_automl.data.pack import pack, verify
from pcam_automl.data.sources import fingerprint, open_source
from pcam_automl.data.store import TEST, Flag, PatchStore, open_store
from pcam_automl.errors import DataError


def row_of(store: PatchStore, name: str) -> int:
    return store.ids.tolist().index(name)


def has(store: PatchStore, name: str, flag: Flag) -> bool:
    return bool(store.flags[row_of(store, name)] & flag)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pixels_labels_and_order_are_those_of_the_source(kaggle: Path, tmp_path: Path) -> None:
    write_csv(kaggle / "train_groups.csv", "id,group", [(patch_id(number), f"s{number % 3}") for number in range(7)])
    source = open_source(kaggle)
    store = pack(source, tmp_path / "pack")
    assert store.ids.tolist() == source.ids.tolist()
    for row, name in enumerate(source.files):
        assert np.array_equal(store.patches[row], tifffile.imread(kaggle / name))
    assert store.label.tolist() == source.label.tolist()
    assert store.group_names == ("s0", "s1", "s2")
    assert store.group[row_of(store, patch_id(4))] == 1
    assert store.group[row_of(store, patch_id(7))] == -1
    assert (store.domain == -1).all()
    assert store.test_rows().tolist() == [8, 9, 10, 11]
    assert store.source["fingerprint"]
    assert (tmp_path / "pack" / "table.csv").read_text().count("\n") == 13


def test_stats_are_those_of_the_pixels(kaggle: Path, tmp_path: Path) -> None:
    store = pack(open_source(kaggle), tmp_path / "pack")
    pixels = np.asarray(store.patches, np.float64) / 255
    assert np.allclose(store.stats[:, :3], pixels.mean(axis=(1, 2)), atol=1e-5)
    assert np.allclose(store.stats[:, 3:], pixels.std(axis=(1, 2)), atol=1e-5)
    train = pixels[store.development_rows()].reshape(-1, 3)
    assert np.allclose(store.channel_mean, train.mean(axis=0), atol=1e-5)
    assert np.allclose(store.channel_std, train.std(axis=0), atol=1e-5)


def test_same_input_same_hash_wherever_and_whenever(kaggle: Path, tmp_path: Path) -> None:
    first = pack(open_source(kaggle), tmp_path / "a").content_hash
    moved = tmp_path / "moved"
    shutil.copytree(kaggle, moved)
    assert pack(open_source(moved), tmp_path / "b").content_hash == first
    for name in (moved / "train").iterdir():  # the same pixels compressed
        tifffile.imwrite(name, tifffile.imread(name), photometric="rgb", compression="zlib")
    assert pack(open_source(moved), tmp_path / "c").content_hash == first


def test_hash_follows_pixels_labels_and_groups(kaggle: Path, tmp_path: Path) -> None:
    hashes = [pack(open_source(kaggle), tmp_path / "0").content_hash]
    write_csv(kaggle / "train_groups.csv", "id,group", [(patch_id(0), "s")])
    hashes.append(pack(open_source(kaggle), tmp_path / "1").content_hash)
    write_csv(kaggle / "train_labels.csv", "id,label", [(patch_id(number), number // 4) for number in range(8)])
    hashes.append(pack(open_source(kaggle), tmp_path / "2").content_hash)
    tifffile.imwrite(kaggle / "train" / f"{patch_id(0)}.tif", tissue(77), photometric="rgb")
    hashes.append(pack(open_source(kaggle), tmp_path / "3").content_hash)
    assert len(set(hashes)) == 4


def test_two_workers_write_the_same_pack_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_automl.data.pack.CHUNK_PATCHES", 4)
    source = open_source(write_kaggle(tmp_path / "raw", n_train=30))
    (source.root / "train" / f"{patch_id(5)}.tif").write_bytes(b"<html>")
    calls: list[tuple[int, int]] = []
    alone = pack(source, tmp_path / "alone", workers=0)
    helped = pack(source, tmp_path / "helped", workers=2, progress=lambda done, total: calls.append((done, total)))
    for name in names_in(tmp_path / "alone"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "helped" / name).read_bytes(), name
    assert helped.content_hash == alone.content_hash
    assert calls[-1] == (34, 34)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert not multiprocessing.active_children()


def test_faulty_training_patches_are_left_out_and_named_test_patches_never(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "train" / f"{patch_id(0)}.tif").write_bytes(b"")
    tifffile.imwrite(kaggle / "train" / f"{patch_id(1)}.tif", tissue(1, 64), photometric="rgb")
    tifffile.imwrite(kaggle / "train" / f"{patch_id(2)}.tif", np.full((96, 96, 3), 255, np.uint8), photometric="rgb")
    tifffile.imwrite(kaggle / "train" / f"{patch_id(3)}.tif", np.zeros((96, 96, 3), np.uint8), photometric="rgb")
    (kaggle / "test" / f"{patch_id(1000)}.tif").write_bytes(b"II*\0")
    tifffile.imwrite(kaggle / "test" / f"{patch_id(1001)}.tif", np.zeros((96, 96, 3), np.uint8), photometric="rgb")
    store = pack(open_source(kaggle), tmp_path / "pack")
    expected = {0: Flag.UNREADABLE, 1: Flag.WRONG_SHAPE, 2: Flag.BRIGHT, 3: Flag.DARK}
    for number, flag in expected.items():
        assert has(store, patch_id(number), flag | Flag.LEFT_OUT)
        assert has(store, patch_id(number), Flag.LEFT_OUT)
    assert has(store, patch_id(1000), Flag.UNREADABLE)
    assert has(store, patch_id(1001), Flag.DARK)
    assert not (store.flags[store.test_rows()] & Flag.LEFT_OUT).any()
    assert len(store.test_rows()) == 4
    assert sorted(store.ids[store.development_rows()].tolist()) == sorted(patch_id(number) for number in range(4, 8))
    assert not store.patches[row_of(store, patch_id(1))].any()
    assert store.faults[row_of(store, patch_id(1))] == "64x64 px, want 96x96"
    with Image.open(tmp_path / "pack" / "findings.png") as sheet:
        assert sheet.size[0] > 500


def test_outliers_are_kept_when_asked_and_change_the_hash(kaggle: Path, tmp_path: Path) -> None:
    tifffile.imwrite(kaggle / "train" / f"{patch_id(3)}.tif", np.zeros((96, 96, 3), np.uint8), photometric="rgb")
    kept = pack(open_source(kaggle), tmp_path / "a", keep_outliers=True)
    assert row_of(kept, patch_id(3)) in kept.development_rows()
    assert kept.content_hash != pack(open_source(kaggle), tmp_path / "b").content_hash


def test_no_usable_training_patch_is_an_error_and_leaves_nothing(kaggle: Path, tmp_path: Path) -> None:
    for file in (kaggle / "train").iterdir():
        file.write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"none of the training patches .* can be used; the first: \w{40}: not a TIFF"):
        pack(open_source(kaggle), tmp_path / "out" / "pack")
    assert names_in(tmp_path / "out") == []


def test_other_patch_sizes_fit(tmp_path: Path) -> None:
    for label in (0, 1):
        (tmp_path / "raw" / str(label)).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(tissue(10 * label + number, 128)).save(
                tmp_path / "raw" / str(label) / f"p{label}{number}.png"
            )
    Image.fromarray(tissue(9)).save(tmp_path / "raw" / "0" / "small.png")
    store = pack(open_source(tmp_path / "raw"), tmp_path / "pack")
    assert store.patches.shape == (7, 128, 128, 3)
    assert has(store, "small", Flag.WRONG_SHAPE | Flag.LEFT_OUT)


class Stop(Exception):
    pass


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(kaggle)
    n_bytes = len(source) * 96 * 96 * 3
    for total, free, fits in ((10**9, n_bytes, True), (10**9, n_bytes - 1, False), (0, 0, True)):
        usage = SimpleNamespace(total=total, used=0, free=free)
        monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda folder, usage=usage: usage)
        if fits:
            assert len(pack(source, tmp_path / "p")) == len(source)
            continue
        with pytest.raises(
            DataError, match=r"the pack takes 0\.0 GB, and .* has 0\.0 GB free; .*prepare RAW --out PACK"
        ):
            pack(source, tmp_path / "q")
        assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_building_leaves_no_half_pack_and_keeps_the_old_one(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("pcam_automl.data.pack.CHUNK_PATCHES", 2)
    before = pack(open_source(kaggle), tmp_path / "out" / "pack").content_hash

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        pack(open_source(kaggle), tmp_path / "out" / "pack", workers=workers, progress=stop)
    assert names_in(tmp_path / "out") == ["pack"]
    assert open_store(tmp_path / "out" / "pack").content_hash == before
    assert not multiprocessing.active_children()


def test_ctrl_c_ends_the_workers_quietly_and_leaves_nothing(tmp_path: Path) -> None:
    raw = write_kaggle(tmp_path / "raw", n_train=40)
    (tmp_path / "out").mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            import pcam_automl.data.pack as packing
            from pcam_automl.data.sources import open_source
            packing.CHUNK_PATCHES = 2
            def interrupt(done, total):
                print(*(child.pid for child in __import__("multiprocessing").active_children()), flush=True)
                os.killpg(0, signal.SIGINT)
            try:
                packing.pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]), workers=2, progress=interrupt)
            except KeyboardInterrupt:
                sys.exit(130)
        """)
    )
    command = [sys.executable, str(script), str(raw), str(tmp_path / "out" / "pack")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert names_in(tmp_path / "out") == []
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_of_a_killed_parent_end_by_themselves(tmp_path: Path) -> None:
    raw = write_kaggle(tmp_path / "raw", n_train=20)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        if __name__ == "__main__":
            import pcam_automl.data.pack as packing
            from pcam_automl.data.sources import open_source
            packing.CHUNK_PATCHES = 2
            def die(done, total):
                os.kill(os.getpid(), signal.SIGKILL)
            packing.pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]), workers=1, progress=die)
        """)
    )
    command = [sys.executable, str(script), str(raw), str(tmp_path / "pack")]
    # The worker inherits the pipe: communicate() returns only once it has gone, too.
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name.endswith(".partial"))
    assert left.is_dir()
    pack(open_source(raw), tmp_path / "pack", workers=0)
    assert names_in(tmp_path) == ["pack", "raw", "script.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_a_process_with_threads_or_torch_never_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_HOLDS_LOCKS", frozenset({"absent"}))
    monkeypatch.setattr(pool.threading, "active_count", lambda: 1)
    assert pool._start_method() == "fork"
    monkeypatch.setattr(pool, "_HOLDS_LOCKS", frozenset({"absent", "numpy"}))
    assert pool._start_method() == "spawn"
    monkeypatch.setattr(pool, "_HOLDS_LOCKS", frozenset({"absent"}))
    monkeypatch.setattr(pool.threading, "active_count", lambda: 2)
    assert pool._start_method() == "spawn"


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_and_spawned_workers_write_the_same_pack(tmp_path: Path, method: str) -> None:
    raw = write_kaggle(tmp_path / "raw", n_train=20)
    expected = pack(open_source(raw), tmp_path / "expected", workers=0).content_hash
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        if __name__ == "__main__":
            import pcam_automl.data.pack as packing
            from pcam_automl.data import pool
            from pcam_automl.data.sources import open_source
            packing.CHUNK_PATCHES = 2
            if sys.argv[3] == "spawn":
                import h5py
            assert pool._start_method() == sys.argv[3]
            print(packing.pack(open_source(Path(sys.argv[1])), Path(sys.argv[2]), workers=2).content_hash)
        """)
    )
    command = [sys.executable, "-W", "error", str(script), str(raw), str(tmp_path / "pack"), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: object, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool.os, "pwrite", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="no space left to write"):
        pack(open_source(kaggle), tmp_path / "out" / "pack")
    assert names_in(tmp_path / "out") == []


def test_a_disk_that_fails_while_packing_fails_the_pack(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports a failed write to one fsync only: the thread that hears of it must pass it on."""
    failed: list[int] = []

    def fail_once(fd: int) -> None:
        failed.append(fd)
        if len(failed) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool, "_SYNC_EVERY_S", 0.0)
    monkeypatch.setattr("pcam_automl.data.pool.os.fsync", fail_once)
    monkeypatch.setattr("pcam_automl.data.pack.CHUNK_PATCHES", 2)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="no space left to write"):
        pack(open_source(kaggle), tmp_path / "out" / "pack", progress=lambda done, total: time.sleep(0.05))
    assert failed
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_has_its_sources_fingerprint(kaggle: Path, tmp_path: Path, workers: int) -> None:
    source = open_source(kaggle)
    assert pack(source, tmp_path / "pack", workers=workers).source["fingerprint"] == fingerprint(source)


def test_a_file_that_changes_after_it_was_read_changes_the_fingerprint(kaggle: Path, tmp_path: Path) -> None:
    source = open_source(kaggle)

    def touch(done: int, total: int) -> None:
        os.utime(kaggle / str(source.files[0]), ns=(1, 1))

    store = pack(source, tmp_path / "pack", progress=touch)
    assert store.source["fingerprint"] != fingerprint(source)


def test_the_pack_never_takes_the_place_of_other_things(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(kaggle)
    (tmp_path / "file").write_text("x")
    for out, words in (
        (kaggle, "raw data lie there"),
        (tmp_path, "raw data lie there"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(DataError, match=words):
            pack(source, out)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda self: self == kaggle / "volume")
        with pytest.raises(DataError, match="is a mount point"):
            pack(source, kaggle / "volume")
    with monkeypatch.context() as patched:
        (tmp_path / "here").mkdir()
        patched.chdir(tmp_path / "here")
        with pytest.raises(DataError, match="is the folder you are in"):
            pack(source, Path.cwd())
    with pytest.raises(DataError, match="holds other things than a pack"):
        pack(source, kaggle / "train")
    assert len(list((kaggle / "train").iterdir())) == 8


def test_verify_names_what_differs(kaggle: Path, tmp_path: Path) -> None:
    source = open_source(kaggle)
    store = pack(source, tmp_path / "pack")
    assert verify(store, source) == 12
    tifffile.imwrite(kaggle / "train" / f"{patch_id(2)}.tif", tissue(99), photometric="rgb")
    with pytest.raises(DataError, match=f"1 patches of the source are not what was packed: {patch_id(2)}"):
        verify(store, open_source(kaggle))
    with (tmp_path / "pack" / "patches.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x05")
    with pytest.raises(DataError, match=f"1 patches in the pack are damaged: {patch_id(1000)}"):
        verify(open_store(tmp_path / "pack"), source)
    (kaggle / "train" / f"{patch_id(2)}.tif").unlink()
    with pytest.raises(DataError, match=f"other ids in the source \\({patch_id(2)}\\)"):
        verify(store, open_source(kaggle))


def test_verify_compares_the_slides_and_scanners_too(kaggle: Path, tmp_path: Path) -> None:
    table = kaggle / "train_groups.csv"
    rows = [(patch_id(number), f"s{number % 3}") for number in range(7)]
    write_csv(table, "id,group", rows)
    store = pack(open_source(kaggle), tmp_path / "pack")
    assert verify(store, open_source(kaggle)) == 12
    write_csv(table, "id,group", [*rows[:-1], (patch_id(6), "s1")])
    with pytest.raises(DataError, match="other slides in the source"):
        verify(store, open_source(kaggle))
    write_csv(tmp_path / "d.csv", "id,domain", [(patch_id(number), "scanner") for number in range(7)])
    write_csv(table, "id,group", rows)
    with pytest.raises(DataError, match="other domains in the source"):
        verify(store, open_source(kaggle, domains=tmp_path / "d.csv"))


def test_verifying_packed_h5_leaves_files_of_the_plain_name_alone(tmp_path: Path) -> None:
    raw = write_h5(tmp_path / "gz", {"train": 5}, packed=True)
    store = pack(open_source(raw), tmp_path / "here" / "pack")
    mine = tmp_path / "here" / "camelyonpatch_level_2_split_train_x.h5"
    mine.write_bytes(b"the user's own copy")
    assert verify(store, open_source(raw)) == 5
    assert mine.read_bytes() == b"the user's own copy"
    assert names_in(tmp_path / "here") == [mine.name, "pack"]


def test_verifying_h5_says_where_masks_came_or_went(tmp_path: Path) -> None:
    raw = write_h5(tmp_path / "raw", {"train": 5}, masks=True)
    mask = raw / "camelyonpatch_level_2_split_train_mask.h5"
    with_masks = pack(open_source(raw), tmp_path / "with")
    mask.rename(tmp_path / mask.name)
    with pytest.raises(DataError, match="the pack has masks, the source has none"):
        verify(with_masks, open_source(raw))
    without = pack(open_source(raw), tmp_path / "without")
    (tmp_path / mask.name).rename(mask)
    with pytest.raises(DataError, match="the source has masks, the pack has none"):
        verify(without, open_source(raw))


@pytest.mark.parametrize("tumour", [1, 255])
def test_h5_masks_have_two_values_which_become_0_and_1(tmp_path: Path, tumour: int) -> None:
    raw = write_h5(tmp_path / "raw", {"train": 5}, masks=True)
    with h5py.File(raw / "camelyonpatch_level_2_split_train_mask.h5", "r+") as file:
        file["mask"][...] = file["mask"][...] * tumour
        expected = file["mask"][..., 0] != 0
    store = pack(open_source(raw), tmp_path / "pack")
    assert store.masks is not None
    assert np.array_equal(store.masks, expected)
    with h5py.File(raw / "camelyonpatch_level_2_split_train_mask.h5", "r+") as file:
        file["mask"][3, 0, 0, 0], file["mask"][3, 0, 1, 0] = 7, 200
    with pytest.raises(DataError, match=r"train_000003: its mask has more than two values"):
        pack(open_source(raw), tmp_path / "other")


@pytest.mark.parametrize("packed", [False, True])
def test_h5_is_packed_with_its_masks_and_the_inflated_copies_go(tmp_path: Path, packed: bool) -> None:
    raw = write_h5(tmp_path / "raw", {"train": 5, "valid": 3, "test": 4}, masks=True)
    plain = pack(open_source(raw), tmp_path / "plain")
    if packed:
        raw = write_h5(tmp_path / "packed", {"train": 5, "valid": 3, "test": 4}, masks=True, packed=True)
    store = pack(open_source(raw), tmp_path / "out" / "pack")
    rng = np.random.default_rng(1)
    assert np.array_equal(store.patches[5:8], rng.integers(20, 230, (3, 96, 96, 3), np.uint8))
    rng.integers(0, 2, (3, 1, 1, 1), np.uint8)
    assert store.masks is not None
    assert np.array_equal(store.masks[5:8], rng.integers(0, 2, (3, 96, 96, 1), np.uint8)[..., 0])
    assert store.content_hash == plain.content_hash
    assert names_in(tmp_path / "out") == ["pack"]
    assert not [name for name in names_in(tmp_path / "out" / "pack") if name.endswith((".h5", ".gz"))]
    assert len(store.development_rows()) == 8
    assert set(store.label[store.part == TEST].tolist()) <= {0, 1}
    assert verify(store, open_source(raw)) == 12


def test_gzip_bomb_and_truncated_gzip_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_h5(tmp_path / "raw", {"train": 5}, packed=True)
    with monkeypatch.context() as patched:
        patched.setattr(h5_module, "MAX_INFLATED_BYTES", 1000)
        with pytest.raises(DataError, match="inflates to more than the limit of 1000"):
            pack(open_source(raw), tmp_path / "out" / "pack")
    x = raw / "camelyonpatch_level_2_split_train_x.h5.gz"
    x.write_bytes(x.read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be inflated"):
        pack(open_source(raw), tmp_path / "out" / "pack")
    assert names_in(tmp_path / "out") == []


def test_h5_of_another_length_or_kind_is_one_line(tmp_path: Path) -> None:
    raw = write_h5(tmp_path / "raw", {"train": 5})
    write_h5(tmp_path / "other", {"train": 4})
    name = "camelyonpatch_level_2_split_train_x.h5"
    shutil.copy(tmp_path / "other" / name, raw / name)
    with pytest.raises(DataError, match="4 rows of x, but 5 labels"):
        pack(open_source(raw), tmp_path / "pack")
    shutil.copy(raw / "camelyonpatch_level_2_split_train_y.h5", raw / name)
    with pytest.raises(DataError, match="has no dataset 'x', only y"):
        pack(open_source(raw), tmp_path / "pack")


def test_genuine_kaggle_files_are_packed(genuine_kaggle: Path, tmp_path: Path) -> None:
    sample = genuine_kaggle / "full_scale" / "sample_submission.csv"
    source = open_source(genuine_kaggle, sample=sample)
    store = pack(source, tmp_path / "pack")
    assert store.patches.shape == (130, 96, 96, 3)
    assert int((store.label == 0).sum()) == 112
    assert len(store.missing_test_ids) == 57_458 - int((store.part == TEST).sum())
    assert verify(store, source) == 130
    assert json.loads((tmp_path / "pack" / "store.json").read_text())["counts"]["left_out"] == 0
