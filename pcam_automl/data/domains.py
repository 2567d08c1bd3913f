"""Domains (scanners, laboratories) estimated from the stains, where no table names them. Looks at no label, draws nothing."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcam_automl.data.stains import stain_table
from pcam_automl.data.store import PatchStore
from pcam_automl.errors import DataError
from pcam_automl.files import written_whole

MOST_DOMAINS = 4
LEAST_UNITS = 8
"""Slides (or patches) below which nothing is clustered."""
CLEAR_SILHOUETTE = 0.5
"""From here on a structure is "reasonable", below "weak and could be artificial" (Kaufman & Rousseeuw, Finding Groups in
Data, 1990, chapter 2)."""
CLEAR_BIC = 10.0
"""A drop that is "very strong" evidence (Kass & Raftery, J Am Stat Assoc 90, 1995)."""
SMALLEST_SHARE = 0.05
"""Of the slides, and two at least: a single odd slide is no domain."""
_MOST_FITTED = 2_000  # silhouettes compare every pair; the other units are assigned
_FORMAT = "pcam_automl.domains.1"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Domains:
    """Domains estimated for a study.

    Attributes:
        code: (N,) over all rows of the store: 0 and up, the largest domain first; -1 for rows that nothing learns from.
        names: of the domains.
        silhouette: mean silhouette of the clustering in [-1, 1]; 0 where all is one domain.
        of_slides: whether slides were clustered; else patches.
        hash: 64 hex digits over codes and names; not over the silhouette, whose last digit is the machine's.
    """

    code: NDArray[np.int32]
    names: tuple[str, ...]
    silhouette: float
    of_slides: bool
    hash: str

    def line(self) -> str:
        """What was found, in one line."""
        what = f"domains estimated from the stains of the {'slides' if self.of_slides else 'patches'}"
        if len(self.names) == 1:
            return f"{what}: one, nothing separates"
        sizes = np.bincount(self.code[self.code >= 0], minlength=len(self.names)).tolist()
        held = ", ".join(f"{name} with {n:,} patches" for name, n in zip(self.names, sizes, strict=True))
        return f"{what}: {held} (silhouette {self.silhouette:.2f})"


def estimate_domains(store: PatchStore, *, seed: int = 0) -> Domains:
    """One to four domains by the stains of the slides; of the patches where fewer than eight slides are known.

    The same patches in another order, and under other ids, give the same domains. See :func:`cluster_stains`.

    Args:
        store: the pixels of some of its development patches are read; no label is.
        seed: of the clustering's starts.

    Raises:
        DataError: there is no development patch.
    """
    rows = store.development_rows()
    if not len(rows):
        raise DataError("domains cannot be estimated: no labelled patch is there that is not left out")
    slide = np.asarray(store.group)[rows]
    of_slides = len(np.unique(slide[slide >= 0])) >= LEAST_UNITS
    table = stain_table(store, rows, by_slide=of_slides)
    fitted = table.is_slide if of_slides else np.ones(len(table.shares), bool)
    code, silhouette = cluster_stains(table.shares, fitted, seed=seed)
    found = code[table.unit]
    if not of_slides:  # the patches of one of those few slides are of one domain, most of them
        for known in np.unique(slide[slide >= 0]):
            found[slide == known] = np.bincount(found[slide == known]).argmax()
    found = np.unique(found, return_inverse=True)[1]
    size = np.bincount(found)
    rank = np.empty(len(size), np.int32)
    rank[np.argsort(-size, kind="stable")] = np.arange(len(size))
    of_row = np.full(len(store), -1, np.int32)
    of_row[rows] = rank[found]
    silhouette = silhouette if len(size) > 1 else 0.0
    return _sealed(of_row, tuple(f"stain {n}" for n in range(1, len(size) + 1)), silhouette, of_slides)


def cluster_stains(shares: Floats, fitted: NDArray[np.bool_], *, seed: int = 0) -> tuple[Ints, float]:
    """A code from 0 for each unit, ordered by the share of red, and the silhouette of that clustering; all 0 where it is one.

    Gaussian mixtures of two to four components with a common covariance. Taken is the number of components with the largest
    mean silhouette (Rousseeuw, J Comput Appl Math 20, 1987) among those that are above 0.5, have no tiny component, and
    beat a single Gaussian by 10 in BIC (Schwarz, Ann Stat 6, 1978): silhouettes alone know no single cluster, and BIC alone
    splits one that is not Gaussian.

    Args:
        shares: (u, 2) from :class:`~pcam_automl.data.stains.StainTable`.
        fitted: (u,) units that the mixture is fitted to, at least one; the others are assigned to its components.
        seed: of the mixtures' starts.
    """
    from sklearn.mixture import GaussianMixture

    one = np.zeros(len(shares), np.int64), 0.0
    points = shares[fitted]
    points = points[np.lexsort(points.T)]  # a mixture's start follows the order of its points: not that of the rows
    points = points[np.linspace(0, len(points) - 1, min(len(points), _MOST_FITTED)).round().astype(np.int64)]
    if len(points) < LEAST_UNITS or not np.ptp(points, axis=0).all():
        return one
    unit = points.std(axis=0)  # scikit-learn's floor under a covariance is absolute

    def mixture(n: int) -> GaussianMixture:
        made = GaussianMixture(n, covariance_type="tied", n_init=5, random_state=seed % 2**32)
        return made.fit(points / unit)

    single = float(mixture(1).bic(points / unit))
    best, silhouette = None, CLEAR_SILHOUETTE
    for n in range(2, MOST_DOMAINS + 1):
        found = mixture(n)
        value = _silhouette(points, found.predict(points / unit), n)
        if value > silhouette and single - float(found.bic(points / unit)) >= CLEAR_BIC:
            best, silhouette = found, value
    if best is None:
        return one
    by_red = np.argsort(np.argsort(best.means_[:, 0]))
    return by_red[best.predict(shares / unit)].astype(np.int64), silhouette


def _silhouette(points: Floats, code: Ints, n: int) -> float:
    """The mean silhouette; -1 where a component is tiny."""
    from sklearn.metrics import silhouette_score

    least = max(2, SMALLEST_SHARE * len(points))
    return float(silhouette_score(points, code)) if np.bincount(code, minlength=n).min() >= least else -1.0


def with_domains(store: PatchStore, domains: Domains) -> PatchStore:
    """The store under these domains instead of its own; its content hash stays the pack's.

    Raises:
        DataError: they are of another store.
    """
    if domains.code.shape != (len(store),):
        raise DataError(f"the estimated domains are of {len(domains.code):,} patches, the pack has {len(store):,}")
    return replace(store, domain=domains.code, domain_names=domains.names)


def knows_domains(store: PatchStore) -> bool:
    """Whether the data name at least two domains among the patches to learn from."""
    code = np.asarray(store.domain)[store.development_rows()]
    return len(np.unique(code[code >= 0])) >= 2


def write_domains(domains: Domains, path: Path) -> None:
    """Write them as ``.npz``, whole or not at all; nothing in it is pickled."""
    about = json.dumps([list(domains.names), domains.silhouette, domains.of_slides])
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, format=np.array(_FORMAT), code=domains.code, about=np.array(about), hash=np.array(domains.hash))


def load_domains(path: Path) -> Domains:
    """Read what :func:`write_domains` wrote and check its hash.

    Raises:
        DataError: missing, not of this version, or changed since it was written.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            if str(stored["format"]) != _FORMAT:
                raise DataError(f"{path} must be domains of format {_FORMAT}, got {str(stored['format'])!r}")
            code, expected = stored["code"], str(stored["hash"])
            names, silhouette, of_slides = json.loads(str(stored["about"]))
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(
            f"{path} cannot be read as estimated domains ({fault}); remove it, and they are made anew"
        ) from None
    domains = _sealed(code, tuple(names), float(silhouette), bool(of_slides))
    if domains.hash != expected or code.dtype != np.int32:
        raise DataError(
            f"{path} is corrupt: its contents do not give its hash; remove it, and the domains are made anew"
        )
    return domains


def _sealed(code: NDArray[np.int32], names: tuple[str, ...], silhouette: float, of_slides: bool) -> Domains:
    """The domains with their hash, the array read-only."""
    digest = hashlib.sha256(json.dumps([_FORMAT, names, of_slides, code.shape]).encode())
    digest.update(np.ascontiguousarray(code).tobytes())
    code.setflags(write=False)
    return Domains(code, names, silhouette, of_slides, digest.hexdigest())
