"""Whole-file writes, checksums, locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pcam_automl import files
from pcam_automl.errors import DataError, WriteError
from pcam_automl.files import (
    check_can_write,
    folder_written_whole,
    locked,
    own_name,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_text,
    written_whole,
)


def fails(writing: AbstractContextManager[Path], content: str) -> bool:
    """Write something, then raise inside the block; True if the exception came through."""
    try:
        with writing as partial:
            (partial / content).write_text("2") if partial.is_dir() else partial.write_text(content)
            raise KeyError(content)
    except KeyError:
        return True


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    assert fails(written_whole(target), "half")
    assert target.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_failed_folder_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "box"
    with folder_written_whole(target) as partial:
        (partial / "x").write_text("1")
    assert fails(folder_written_whole(target), "x")
    assert (target / "x").read_text() == "1"
    with folder_written_whole(target) as partial:
        (partial / "y").write_text("3")
    assert [f.name for f in target.iterdir()] == ["y"]
    assert [f.name for f in tmp_path.iterdir()] == ["box"]


DYING = (
    "import os, signal, sys; from pathlib import Path; from pcam_automl.files import folder_written_whole\n"
    "with folder_written_whole(Path(sys.argv[1])) as partial:\n"
    "    (partial / 'deep').mkdir(); (partial / 'deep' / 'half').write_bytes(bytes(1000))\n"
    "    print('ready', flush=True)\n"
    "    sys.stdin.read() if sys.argv[2] == 'live' else os.kill(os.getpid(), signal.SIGKILL)\n"
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["box", "other"])
def test_what_a_killed_writer_left_is_gone_after_the_next_write(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", DYING, str(tmp_path / "box"), "die"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    (left,) = names_in(tmp_path)
    # its pid has been given to a living process: the lock tells, not the number
    (tmp_path / left).rename(tmp_path / f".box.{os.getppid()}.partial")
    with folder_written_whole(tmp_path / name) as partial:
        assert names_in(tmp_path) == [partial.name]
        (partial / "x").write_text("1")
    assert names_in(tmp_path) == [name]
    assert names_in(tmp_path / name) == ["x"]


def test_a_living_writers_folder_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING, str(tmp_path / "box"), "live"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        (half,) = tmp_path.glob(f".box.{other.pid}-*.partial")
        with folder_written_whole(tmp_path / "box") as partial:
            (partial / "x").write_text("1")
        assert (half / "deep" / "half").is_file()
        other.communicate("")
    assert other.returncode == 0
    assert names_in(tmp_path) == ["box"]
    assert names_in(tmp_path / "box") == ["deep"]


def test_a_second_writer_of_the_same_process_is_refused(tmp_path: Path) -> None:
    with folder_written_whole(tmp_path / "box") as partial:
        (partial / "x").write_text("1")
        with (
            pytest.raises(DataError, match="another process is writing"),
            folder_written_whole(tmp_path / "box"),
        ):
            pass
    assert names_in(tmp_path / "box") == ["x"]


def test_processes_of_equal_numbers_write_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two containers that share a folder."""
    with written_whole(tmp_path / "one") as mine, folder_written_whole(tmp_path / "box") as my_box:
        monkeypatch.setattr(files, "_TOKEN", "another")
        with written_whole(tmp_path / "one") as theirs, folder_written_whole(tmp_path / "box") as their_box:
            assert mine != theirs
            mine.write_text("mine")
            theirs.write_text("theirs")
            (their_box / "x").write_text("theirs")
        assert (tmp_path / "one").read_text() == "theirs"
        (my_box / "x").write_text("mine")
    assert names_in(tmp_path) == ["box", "one"]
    assert (tmp_path / "one").read_text() == (tmp_path / "box" / "x").read_text() == "mine"


def test_a_folder_without_a_name_of_its_own_is_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_name(Path()) == own_name(tmp_path / "link") == own_name(Path("../real/.")).resolve() == tmp_path / "real"
    assert own_name(Path("..")) == tmp_path
    assert own_name(Path("~/pack")) == tmp_path / "pack"
    assert own_name(Path("new")) == Path("new"), "as the user named it"


def dead_pid() -> int:
    return int(
        subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True).stdout
    )


def test_folders_without_a_lock_go_by_their_pid_and_foreign_names_stay(tmp_path: Path) -> None:
    dead = dead_pid()
    gone, stays = [f".box.{dead}.partial"], [f".box.{os.getppid()}.partial", f".other.{dead}.partial", ".box.x.partial"]
    for name in gone + stays:
        (tmp_path / name).mkdir()
    with folder_written_whole(tmp_path / "box"):
        pass
    assert names_in(tmp_path) == sorted([*stays, "box"])


def test_an_older_folder_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    old = tmp_path / f".box.{dead_pid()}.old"
    old.mkdir()
    (old / "x").write_text("old")
    assert fails(folder_written_whole(tmp_path / "box"), "y")
    assert (tmp_path / "box" / "x").read_text() == "old"
    assert names_in(tmp_path) == ["box"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_one_line_with_a_remedy(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match=r"no space left to write .*free some"), written_whole(tmp_path / "a"):
        raise OSError(number, "No space left on device")


def test_file_size_limit_ends_in_a_clear_line_and_no_half_file(tmp_path: Path) -> None:
    """A real write beyond RLIMIT_FSIZE: the nearest thing to a full disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from pcam_automl.files import write_text;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "write_text(Path(sys.argv[1]), 'x' * 5000)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.txt")], capture_output=True, text=True, check=False
    )
    assert "no space left to write" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_read_only_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written .*choose another folder"), written_whole(tmp_path / "a"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_equal_values_have_equal_hashes() -> None:
    assert sha256_of_json({"b": 1, "a": [1.0, 2]}) == sha256_of_json({"a": [1.0, 2], "b": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"auc": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_lock_refuses_the_second_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    lock = tmp_path / "l"
    with locked(lock, busy="taken"), pytest.raises(DataError, match="taken"), locked(lock, busy="taken"):
        pass
    with locked(lock, busy="taken"):
        pass


def test_who_waits_for_a_lock_is_told_and_gets_it(tmp_path: Path) -> None:
    lock, told, got = tmp_path / "l", threading.Event(), threading.Event()

    def second() -> None:
        with locked(lock, busy="taken", waits=lambda busy: told.set()):
            got.set()

    waiter = threading.Thread(target=second)
    with locked(lock, busy="taken"):
        waiter.start()
        assert told.wait(30)
        assert not got.is_set()
    waiter.join(30)
    assert got.is_set()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc on this system")
def test_a_folder_that_cannot_be_made_is_one_line_before_the_work(tmp_path: Path) -> None:
    for make in (lambda: check_can_write(Path("/proc/none/deep")), lambda: write_json(Path("/proc/none/x.json"), {})):
        with pytest.raises(WriteError, match=r"/proc/none\S* cannot be made \(No such file or directory: /proc\S*\)"):
            make()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be made"):
        check_can_write(tmp_path / "file" / "below")
    with pytest.raises(WriteError, match="/proc takes no files"):
        check_can_write(Path("/proc"))
    check_can_write(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_a_missing_file_that_is_read_meanwhile_is_not_called_the_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "a" / "out.txt"):
        (tmp_path / "elsewhere").read_text()
