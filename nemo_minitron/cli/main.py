"""The `minitron` command: its parser, and exit codes for errors."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import typer

from nemo_minitron.errors import EnvironmentProblem, Interrupted, MinitronError
from nemo_minitron.system.disclosure import masked, masked_command
from nemo_minitron.system.disk import disk_errors
from nemo_minitron.system.outer_job import ensure_user_name, unset_launcher_variables
from nemo_minitron.system.terminal import Screen

INTERRUPTED = 130
PIPE_CLOSED = 141
"""Exit code that shells give to a program ended by SIGPIPE."""

GROUPS = ("assets", "env")
"""Groups of commands; the module of each in this package defines the group as NAME_app."""
COMMANDS = (
    "check",
    "run",
    "report",
    "plan",
    "recipes",
    "schema",
    "doctor",
    "status",
    "launch",
    "logs",
    "cancel",
    "show",
    "convert",
    "bundle",
    "chat",
    "rlhf",
    "version",
    "stage",
)
"""Commands in the order of the help text; the module of each in this package has a function of the same name."""
HIDDEN = ("stage",)


def make_app(names: Collection[str] = (*GROUPS, *COMMANDS)) -> typer.Typer:
    """Return the parser of these commands. Only their modules are imported; all would take 70 ms."""
    app = typer.Typer(
        # With a callback, the name of a command is required even if there is only one.
        callback=_no_options,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="""Make a small language model out of a big one: prune, distill, report.

Example: `minitron run recipes/smollm2_135m/width.yaml stages.distill.lr=1e-4 execution.parallel.pp=2`""",
    )
    for name in GROUPS:
        if name in names:
            app.add_typer(getattr(_module(name), f"{name}_app"), name=name)
    for name in COMMANDS:
        if name in names:
            app.command(hidden=name in HIDDEN)(getattr(_module(name), name))
    return app


def _no_options() -> None: ...


def _module(command: str) -> ModuleType:
    return import_module(f"nemo_minitron.cli.{command}")


def _app_of(arguments: Sequence[str]) -> typer.Typer:
    """Return the parser of the command that is named first, or of all commands for the help and for errors."""
    known = arguments and arguments[0] in (*GROUPS, *COMMANDS)
    return make_app(arguments[:1]) if known else make_app()


def main() -> None:
    """Run the command. An error that a user can cause is a message and exit code 2, never a traceback."""
    _make_streams_safe()
    ensure_user_name()
    unset_launcher_variables()
    try:
        # Outside standalone mode typer returns the exit code, 130 after an interrupt.
        with disk_errors(_working_folder()):
            code = _app_of(sys.argv[1:])(standalone_mode=False)
            sys.stdout.flush()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except BrokenPipeError:
        _forget_stdout()
        sys.exit(PIPE_CLOSED)
    except Interrupted as error:
        _end_interrupted(error)
    except MinitronError as error:
        Screen(stderr=True).say(error, "error:", "red")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _end_interrupted("interrupted; the same command continues from there")
    except MemoryError as error:
        message = f"This machine is out of memory{': ' if str(error) else ''}{error}."
        Screen(stderr=True).say(message, "error:", "red")
        sys.exit(2)
    except Exception as error:
        sys.exit(_unexpected(error))


def _end_interrupted(message: object) -> NoReturn:
    """Say what happened and exit with INTERRUPTED, also under `python -m nemo_minitron`.

    Some extension modules run Python code while they are imported (PyRun_String). If KeyboardInterrupt passes through
    such a call, CPython takes it for unhandled, although it is caught later, and ends by SIGINT (Py_RunMain in
    Modules/main.c) unless other code has been run in this way since.
    """
    import ctypes

    Screen(stderr=True).say(message)
    ctypes.pythonapi.PyRun_SimpleString(b"")
    sys.exit(INTERRUPTED)


def _make_streams_safe() -> None:
    """Make every text printable: replace closed streams by /dev/null, and escape what the encoding lacks.

    A program that is started without open streams has None in their place.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise EnvironmentProblem(
            "The folder in which this was started has been deleted.", next_step="Change to another folder (cd)."
        ) from None


def _forget_stdout() -> None:
    """Redirect stdout after its reader has gone (`minitron plan ... | head`), so that the final flush does not fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> int:
    """Print a usage error, or write the traceback of a bug to a file; return the exit code."""
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        _print_usage_error(error, format_message())
        return 2
    text = masked(f"{' '.join(masked_command(sys.argv))}\n{traceback.format_exc()}")
    log = _write_crash_log(text)
    request = f"Please report it with {log}." if log else f"Please report it with what follows.\n{text}"
    message = f"{type(error).__name__}: {error}\n  This is a bug of nemo-minitron. {request}"
    Screen(stderr=True).say(message, "unexpected error:", "red")
    return 1


def _print_usage_error(error: Exception, message: str) -> None:
    """Print the error here, because the parser's own `show` treats what was typed as markup."""
    screen, context = Screen(stderr=True), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # The help is printed to stdout while the error is made; the message is then empty.
        if message:
            screen.say(message)
        return
    if context is not None:
        screen.say(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.")
    screen.say(message, "error:", "red")


def _write_crash_log(text: str) -> Path | None:
    """Write the text to a new private file in the working folder, or else in the folder for temporary files.

    Returns:
        The file, or None if neither folder is writable.
    """
    for folder in (Path(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            number, name = tempfile.mkstemp(prefix="minitron-crash-", suffix=".log", dir=folder)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)
            return Path(name).absolute()
    return None
