"""Storage URLs: the installed driver, and passwords kept out of every message. Connects to nothing."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from pcam_automl.errors import NoStudyError, StudyError, did_you_mean

if TYPE_CHECKING:  # imported where it is used: `status` on an SQLite file does without these 0.5 s
    import sqlalchemy as sa

# The drivers in order of preference: as a URL names them, their module, and what to install.
_SERVERS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "postgresql": (("psycopg", "psycopg", "psycopg[binary]"), ("psycopg2", "psycopg2", "psycopg2-binary")),
    "mysql": (("pymysql", "pymysql", "pymysql"), ("mysqldb", "MySQLdb", "mysqlclient")),
}
_ALIASES = {"postgres": "postgresql", "mariadb": "mysql"}
CONNECT_TIMEOUT_S, BUSY_TIMEOUT_S = 10, 60
"""Seconds that a server has to answer, and that an SQLite file may be held by another process."""
_USUAL_DRIVER = re.compile(r"^(postgresql(?=\+psycopg:)|mysql(?=\+pymysql:))\+[a-z]+")
_PLAIN = re.compile(
    r"[a-z0-9+]+://(?:[^:/@?#\s]*(?::[^/@?#\s]*)?@)?[^:/@?#\s]*(?::\d*)?(?:/[^?#@:\s]*)?(?:\?(?:(?!://)[^@\s])*)?"
)
_SECRET_KEYS = ("password", "passwd", "pwd", "sslpassword", "passfile", "token")


def safe_url(url: str) -> str:
    """``url`` with its password (also one among the query's options) as ``***`` and without a driver that goes without saying; any
    text is accepted.
    """
    url = _USUAL_DRIVER.sub(r"\1", url)
    start = r"//[^:/?#]*:" if "://" in url else r"^[^:/]*:"
    found: list[str] = []

    def hidden(match: re.Match[str]) -> str:
        found.extend(match[2].split("@"))
        return f"{match[1]}***{match[3]}"

    shown = re.sub(rf"({start})(.*)(@)", hidden, url, flags=re.DOTALL)
    shown = re.sub(r"(:)(?!\*\*\*@)([^@/]+)(@)", hidden, shown)  # wherever else one may stand in what is hardly a URL
    keys = "|".join(_SECRET_KEYS)
    shown = re.sub(rf"([?&](?:{keys})=)([^&]*)()", hidden, shown, flags=re.IGNORECASE)
    if not _PLAIN.fullmatch(
        url
    ):  # there it may stand anywhere; in a plain one it may well be the user's or the database's name
        for secret in sorted(
            (part for text in found for part in re.split(r"[:/?#&=\s]+", text) if len(part) >= 4), key=len, reverse=True
        ):
            shown = shown.replace(secret, "***")
    return shown


def _secrets(url: str) -> list[str]:
    """Every spelling of the URL's passwords, longest first."""
    import sqlalchemy as sa

    found = set(re.findall(r"//[^:/?#]*:(.*)@", url))
    found |= set(re.findall(rf"[?&](?:{'|'.join(_SECRET_KEYS)})=([^&]*)", url, flags=re.IGNORECASE))
    with suppress(sa.exc.ArgumentError, ValueError):  # an unreadable URL has no further secrets
        found.add(sa.make_url(url).password or "")
    spellings = found | {quote(text, safe="") for text in found} | {quote_plus(text) for text in found}
    return sorted((text for text in spellings if text), key=len, reverse=True)


def scrubbed(message: object, url: str) -> str:
    """The message on one line, without a password and without SQLAlchemy's links and statements."""
    text = str(message).split("\n[SQL:")[0].split("(Background on this error")[0]
    for secret in _secrets(url):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def check_scheme(url: str) -> None:
    """Whether it begins as a URL of a database does; what comes after is not looked at.

    Raises:
        StudyError: not a URL, or a scheme that is not a database of ours.
    """
    if "://" not in url:
        hint = f"sqlite:///{url}" if url and ":" not in url else "sqlite:///studies/pcam.db"
        raise StudyError(f"storage must be a database URL, got {safe_url(url)!r} (did you mean {hint!r}?)")
    begin = re.match(r"([A-Za-z]\w*)(\+\w+)?://", url)
    if begin is None:
        raise _not_valid(url)
    scheme, known = begin[1], ["sqlite", *_SERVERS]
    if _ALIASES.get(scheme, scheme) not in known:
        raise StudyError(
            f"storage scheme must be one of {', '.join(known)}, got {scheme!r}{did_you_mean(scheme, known)}"
        )


def _not_valid(url: str) -> StudyError:
    return StudyError(
        f"storage URL {safe_url(url)!r} is not valid; write scheme://user:password@host:port/database, "
        "with special characters of the password percent-encoded"
    )


def check_there(url: str) -> None:
    """For those who make no studies: that a file with some is there. A server is not asked.

    Raises:
        StudyError: an SQLite file that does not exist.
    """
    path = plain_sqlite_path(url)
    if path is not None:
        check_file(path)


def check_file(path: Path) -> None:
    """As :func:`check_there`, of a file."""
    if not path.exists():
        raise no_studies(path)


def no_studies(where: object) -> NoStudyError:
    """What is said where none could be."""
    return NoStudyError(
        f"there are no studies in {where}; start one with `pcam-automl search`, or name another --storage"
    )


def normalised_url(url: str) -> str:
    """The URL with an installed driver named: ``postgresql://`` becomes ``postgresql+psycopg://``.

    Raises:
        StudyError: not a URL, a scheme that is not a database of ours, a missing driver, an SQLite URL without a file.
    """
    import sqlalchemy as sa

    check_scheme(url)
    try:
        parsed = sa.make_url(url)
        if url.partition("?")[0].count("@") > 1:
            raise ValueError
    except (sa.exc.ArgumentError, ValueError):
        raise _not_valid(url) from None
    scheme, plus, driver = parsed.drivername.partition("+")
    backend = _ALIASES.get(scheme, scheme)
    if backend == "sqlite":
        if driver not in ("", "pysqlite"):
            raise StudyError(f"storage sqlite takes no driver {driver!r}; write sqlite:///FILE")
        return _checked_sqlite(parsed, url)
    if not parsed.database:
        raise StudyError(f"storage URL {safe_url(url)!r} names no database; add /NAME at its end")
    driver = driver if plus else _installed_driver(backend)
    return parsed.set(drivername=f"{backend}+{driver}").render_as_string(hide_password=False)


def _checked_sqlite(parsed: sa.URL, url: str) -> str:
    if parsed.host:
        path = f"{parsed.host}/{parsed.database or ''}"
        raise StudyError(f"an SQLite URL has three slashes before a relative path (did you mean 'sqlite:///{path}'?)")
    if not parsed.database or parsed.database == ":memory:" or "mode=memory" in url:
        raise StudyError(
            "storage sqlite in memory cannot be resumed or shared; give a file, e.g. sqlite:///studies/pcam.db"
        )
    return url


def _installed_driver(backend: str) -> str:
    for driver, module, _ in _SERVERS[backend]:
        if importlib.util.find_spec(module) is not None:
            return driver
    _, module, requirement = _SERVERS[backend][0]
    raise StudyError(f"storage {backend} needs the package {module}; run: pip install '{requirement}'")


def driver_module(scheme: str) -> str | None:
    """The Python package that reads a server's URLs of this scheme: the one that it names, else the first that is installed.

    None for SQLite, for what is no database of ours, and where none is installed.
    """
    name, plus, driver = scheme.partition("+")
    drivers = _SERVERS.get(_ALIASES.get(name, name), ())
    wanted = [module for own, module, _ in drivers if not plus or own == driver]
    return next((module for module in wanted if importlib.util.find_spec(module) is not None), None)


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL, None for a server or for SQLite's own ``file:`` addresses."""
    import sqlalchemy as sa

    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database.startswith("file:"):
        return None
    return Path(parsed.database)


def plain_sqlite_path(url: str) -> Path | None:
    """The file of ``sqlite:///FILE`` without options and escapes; None for every other URL, for SQLAlchemy to read."""
    file = url.removeprefix("sqlite:///")
    odd = file == url or not file or "?" in file or "%" in file or file.startswith((":memory:", "file:"))
    return None if odd else Path(file)


def driver_remedy(url: str) -> str:
    """What to do where the driver that a server's URL names is not installed."""
    scheme, _, driver = url.partition("://")[0].partition("+")
    drivers = _SERVERS[_ALIASES.get(scheme, scheme)]
    for own, _, requirement in drivers:
        if own == driver:
            return f"run: pip install '{requirement}'"
    return f"write {scheme}://... without it, and run: pip install '{drivers[0][2]}'"
