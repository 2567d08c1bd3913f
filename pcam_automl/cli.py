"""The command line: every command by its name. Options and help live in command_line/, bodies in commands/.

Importing this module must stay quick: no torch, optuna, pandas or numpy at the top.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import Annotated, Any

import typer

from pcam_automl import (
    __version__,
    clock,  # noqa: F401 - first: a budget counts from here
)
from pcam_automl.collector import collect_rarely
from pcam_automl.command_line import data, networks, queue, search, studies
from pcam_automl.errors import Interrupted, PcamError
from pcam_automl.waiting import choose_waiting

collect_rarely()  # here and not in main(): a spawned worker imports this module, and then what it is to do

app = typer.Typer(
    name="pcam-automl",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="AutoML for PatchCamelyon / Histopathologic Cancer Detection: search, inspect, finalize.\n\n"
    "Start: [bold]pcam-automl quickstart[/bold] (no data needed), or "
    "[bold]pcam-automl search --data FOLDER --trials 50[/bold], then [bold]dashboard[/bold], then [bold]finalize[/bold].",
)


for _command in (
    data.prepare,
    search.search,
    queue.submit,
    queue.worker,
    queue.serve,
    studies.status,
    studies.audit,
    studies.replay,
    studies.export_prior,
    studies.dashboard,
    studies.finalize,
    studies.report,
    networks.predict,
    networks.train,
    networks.recipes,
    networks.lr_find,
    networks.compare_backbones,
    data.synth,
    data.quickstart,
    data.score,
    data.check_submission,
):
    app.command()(_command)  # typer makes compare-backbones of compare_backbones


def _version(asked: bool) -> None:
    if asked:
        print(f"pcam-automl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of faults.")] = False,
) -> None:
    if debug:
        os.environ["PCAM_AUTOML_DEBUG"] = "1"


_ON_WINDOWS = "error: pcam-automl runs on Linux, macOS and under WSL2, not on Windows itself; install it inside WSL2 (wsl --install)"


def main() -> None:
    """Entry point: faults in one line; 0 done, 2 the user's input, 1 anything else, 130 / 143 after a signal."""
    if sys.platform == "win32":
        print(_ON_WINDOWS, file=sys.stderr)
        sys.exit(2)
    choose_waiting()
    try:
        # Standalone the parser would frame its own faults and end the process.
        code = app(prog_name="pcam-automl", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except Exception as fault:
        if isinstance(fault, typer.Abort) and isinstance(fault.__cause__, Exception):
            fault = fault.__cause__  # an EOFError, of which the parser makes its own
        if os.environ.get("PCAM_AUTOML_DEBUG") and not isinstance(fault, _PARSER_FAULT):
            raise
        text, code = _in_one_line(fault)
        speaks = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"  # one of torchrun's
        if text and speaks:
            print(text, file=sys.stderr)
        sys.exit(code)


def run() -> None:
    """As :func:`main`, and the process is over with it.

    Python's own end looks for cycles among all that was ever imported: with torch and timm that takes (by hand) a third of the seconds
    that importing them took. Everything else of it is done here: threads are waited for, what was registered is called.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise  # a text, which Python prints
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # the reader of a pipe is gone, or the stream was closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _in_one_line(fault: Exception) -> tuple[str, int]:
    """What a person reads of a fault, and the exit code."""
    if isinstance(fault, _PARSER_FAULT):
        return _of_parser(fault), 2
    if isinstance(fault, Interrupted):
        return str(fault), fault.exit_code
    if isinstance(fault, PcamError):
        return f"error: {fault}", fault.exit_code
    first = (str(fault).strip().splitlines() or [""])[0][:300]
    return (
        f"error: unexpected {type(fault).__name__}: {first} (`pcam-automl --debug COMMAND ...` shows where; please report it)",
        1,
    )


_PARSER_FAULT: type[Any] = typer.BadParameter.__mro__[2]
"""click's base of all faults, of which newer typers have a copy of their own under no public name."""


def _of_parser(fault: Any) -> str:
    """An unknown command or option, a value that is no number: one line, too. Of no command at all the help, which rich has shown."""
    if type(fault).__name__ == "NoArgsIsHelpError":
        return str(fault.format_message())
    text, context = " ".join(fault.format_message().split()), getattr(fault, "ctx", None)
    command = "pcam-automl" if context is None else context.command_path
    return f"error: {text[:1].lower()}{text[1:].rstrip('.')} ({command} --help shows what there is)"


if __name__ == "__main__":
    run()
