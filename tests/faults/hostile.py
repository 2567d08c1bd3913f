"""Genuine files of every kind that is read, mutated; what reading them does is told as a line each. Runs as a process of its own.

`python hostile.py FOLDER SEED N` reads N mutants and prints one JSON line each: kind, number, outcome (`ok`, `named`, or the
traceback's last line), seconds; at the end how far the memory rose above that of reading the genuine files.
"""

from __future__ import annotations

import datetime
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 10
HEAD = 400
"""Of a file, where headers and lengths stand: half of all changes fall here."""


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to six changes: bytes flipped, replaced by extremes, cut out, doubled, or the end cut off."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        if not data:
            break
        at = rng.randrange(min(len(data), HEAD) if rng.random() < 0.5 else len(data))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                data[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80")
                )
            case 3:
                del data[at : at + rng.randint(1, 64)]
            case 4:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case 5:
                del data[at:]
            case _:
                data[at:at] = rng.choice(WORDS)
    return bytes(data)


WORDS = [
    b"\x00", b"\n", b"\r\n", b",", b'"', b"../../etc/passwd", b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 400, b"-1", b"nan", b"1e999", b"{", b"[" * 200,
    b"&a [*a, *a]", b"!!python/object/apply:os.system ['true']", b"&x", b"<script>", b"%00", b"\xf0\x9f\x92\xa9", b"null", b"id,label\n", b": ",
]  # fmt: skip


class Hang(Exception):
    """Longer than LIMIT_S."""


def readers(folder: Path) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """Kind to a genuine file and what reads one."""
    import h5py
    import numpy as np
    import tifffile

    from pcam_automl.bundle import ModelBundle, load_bundle, write_bundle
    from pcam_automl.configs_folder import find_config
    from pcam_automl.data.h5 import plain_h5, read_h5_labels, read_rows
    from pcam_automl.data.images import read_patch
    from pcam_automl.data.store import open_store
    from pcam_automl.data.tables import read_labels, read_names
    from pcam_automl.models.factory import Normalisation, build_network
    from pcam_automl.models.weights import Weights
    from pcam_automl.recipe import Recipe
    from pcam_automl.recipe_files import load_recipe
    from pcam_automl.search.connections import engine_options
    from pcam_automl.search.priors import Prior, PriorEntry, parse_prior
    from pcam_automl.search.space import load_space
    from pcam_automl.search.storage_url import normalised_url, safe_url, scrubbed, sqlite_path
    from pcam_automl.submission import check_submission
    from pcam_automl.training.checkpoint import read_checkpoint, write_checkpoint

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)

    def tiff(**options: object) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, pixels, photometric="rgb", **options)
        return buffer.getvalue()

    def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / name

        def call(raw: bytes) -> object:
            path.write_bytes(raw)
            return read(path)

        return call

    def patch(path: Path) -> object:
        found = read_patch(path, 96)
        if isinstance(found, Exception):  # an odd file is named and left out
            raise found
        return found

    ids = [f"{number:040x}" for number in range(50)]
    labels = "id,label\n" + "".join(f"{name},{number % 2}\n" for number, name in enumerate(ids))
    groups = "id,group\n" + "".join(f"{name},slide {number % 5}\n" for number, name in enumerate(ids))
    h5 = folder / "genuine.h5"
    with h5py.File(h5, "w") as file:
        file["x"] = rng.integers(0, 256, (6, 96, 96, 3), np.uint8)
        file["y"] = rng.integers(0, 2, (6, 1, 1, 1), np.uint8)

    def read_h5(path: Path) -> object:
        with plain_h5(path, folder) as plain:
            out = np.zeros((4, 96, 96, 3), np.uint8)
            read_rows(plain, "x", 1, out)
        return read_h5_labels({"x": path, "y": path}, "train")

    recipe = Recipe(backbone="test_resnet", crop_size=32)
    state = build_network(recipe, Weights("none"), seed=0).state_dict()
    bundle = folder / "bundle"
    write_bundle(
        bundle,
        ModelBundle(recipe, Normalisation((0.5,) * 3, (0.2,) * 3), state, {"auc": 0.9}, {"compute": {"device": "cpu"}}),
    )
    weights_file, card_file = (next(bundle.glob(pattern)) for pattern in ("*.safetensors", "bundle.json"))

    def read_bundle_part(path: Path) -> Callable[[bytes], object]:
        genuine = path.read_bytes()

        def call(raw: bytes) -> object:
            try:
                path.write_bytes(raw)
                return load_bundle(bundle).build()
            finally:
                path.write_bytes(genuine)

        return call

    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, parts={"model": dict(state)}, state={"views": 1, "recipe": recipe.hash})
    pack = Path(sys.argv[4])
    store_card = (pack / "store.json").read_bytes()
    copy = folder / "pack"
    copy.mkdir()
    for entry in pack.iterdir():
        (copy / entry.name).write_bytes(entry.read_bytes())

    def read_store(raw: bytes) -> object:
        (copy / "store.json").write_bytes(raw)
        return open_store(copy)

    def read_url(raw: bytes) -> object:
        text = raw.decode("utf-8", "replace")
        shown = safe_url(text)
        assert "s3cret" not in shown or b":s3cret@" not in raw, shown
        scrubbed(f"cannot connect to {text}", text)
        url = normalised_url(text)
        return engine_options(url), sqlite_path(url)

    prior = Prior(
        data="d", command="c", export="e", date=datetime.date(2026, 1, 1), weights="none", pack_hash="0" * 64, split_hash="1" * 64, seed=0,
        holdout=0.0, n_trials=3, versions={"torch": "2.15"}, recipes=(PriorEntry(trial=1, auc=0.9, fields={"lr": 1e-3}),),
    ).to_yaml()  # fmt: skip
    return {
        "tiff": (tiff(), in_file("a.tif", patch)),
        "tiff deflate": (tiff(compression="zlib"), in_file("b.tif", patch)),
        "tiff lzw tiles": (tiff(compression="lzw", tile=(32, 32)), in_file("c.tif", patch)),
        "tiff jpeg": (tiff(compression="jpeg"), in_file("d.tif", patch)),
        "labels csv": (labels.encode(), in_file("labels.csv", read_labels)),
        "groups csv": (groups.encode(), in_file("groups.csv", lambda path: read_names(path, "group"))),
        "submission csv": (labels.encode(), in_file("submission.csv", lambda path: check_submission(path, ids))),
        "recipe yaml": (find_config("recipes", "default").read_bytes(), in_file("recipe.yaml", load_recipe)),
        "space yaml": (find_config("space", "quick").read_bytes(), in_file("space.yaml", lambda path: load_space(str(path)))),
        "prior yaml": (prior.encode(), lambda raw: parse_prior(raw.decode("utf-8", "replace"), "prior")),
        "h5": (h5.read_bytes(), in_file("camelyonpatch_level_2_split_train_x.h5", read_h5)),
        "bundle weights": (weights_file.read_bytes(), read_bundle_part(weights_file)),
        "bundle card": (card_file.read_bytes(), read_bundle_part(card_file)),
        "checkpoint": ((checkpoint / "state.json").read_bytes(), in_file("checkpoint/state.json", lambda path: read_checkpoint(path.parent))),
        "pack card": (store_card, read_store),
        "url": (b"postgresql+psycopg://user:s3cret@db.example.org:5432/name?sslmode=require&connect_timeout=5", read_url),
    }  # fmt: skip


def main() -> None:
    """Read the genuine ones, then the mutants."""
    from pcam_automl.errors import PcamError

    folder, seed, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    kinds = readers(folder)
    for kind, (genuine, read) in kinds.items():
        try:
            read(genuine)
        except PcamError as fault:
            raise SystemExit(f"the genuine {kind} is refused: {fault}") from fault

    def too_long(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, too_long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, names = random.Random(seed), list(kinds)
    for number in range(n):
        kind = names[number % len(names)]
        genuine, read = kinds[kind]
        mutant = mutate(genuine, rng)
        began, outcome = time.monotonic(), "ok"
        signal.alarm(LIMIT_S)
        try:
            read(mutant)
        except PcamError as fault:
            outcome = (
                "named"
                if str(fault).strip() and "\n" not in str(fault).strip()
                else f"not one line: {str(fault)[:200]!r}"
            )
        except Hang:
            outcome = f"longer than {LIMIT_S} s"
        except BaseException:  # noqa: BLE001 - whatever it is, it is told
            outcome = traceback.format_exc()[-900:]
            (folder / f"mutant-{number}").write_bytes(mutant)
        finally:
            signal.alarm(0)
        print(
            json.dumps(
                {"kind": kind, "number": number, "outcome": outcome, "seconds": round(time.monotonic() - began, 3)}
            ),
            flush=True,
        )
    print(json.dumps({"rise_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}), flush=True)


if __name__ == "__main__":
    main()
