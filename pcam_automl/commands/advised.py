"""Commands that messages advise, as people can type them."""

from __future__ import annotations

import shlex

from pcam_automl.search.storage_url import safe_url


def command_options(name: str | None, url: str | None) -> str:
    """``--study`` and ``--storage`` as a following command needs them; a password is left out of it."""
    text = "" if name in (None, "pcam") else f" --study {shlex.quote(str(name))}"
    return text + (f" --storage {shlex.quote(safe_url(url))}" if url else "")
