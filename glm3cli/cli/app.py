"""The `glm3` program: puts its commands together, and reports the errors that they raise."""

import errno
import io
import os
import sys
import traceback

import typer

from glm3cli.cli import convert, demo, doctor, evaluate, generate, train
from glm3cli.cli import preprocess as data
from glm3cli.errors import DataError, DeviceError, Glm3Error
from glm3cli.host.terminal import keep_stderr_unfailing, outlive_terminal_if_asked
from glm3cli.parallel.launch import hand_over, is_alone, is_speaker
from glm3cli.version import __version__

_TOO_MANY_FILES = DeviceError(
    "this process may not open as many files at once as it needs",
    "raise the limit with `ulimit -n 4096`, or ask the machine's owner to",
)

app = typer.Typer(
    name="glm3",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="ChatGLM3 on Ascend NPUs, from checkpoint to score. The same code runs on a CPU.",
)
app.add_typer(convert.app, name="convert")
data.register(app)
train.register(app)
generate.register(app)
app.add_typer(evaluate.app, name="eval")
demo.register(app)
doctor.register(app)


def _show_version(value: bool) -> None:
    """Prints the version and ends the program, if --version is given."""
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


def main() -> None:
    """Runs the program.

    An error that a user can mend ends it with message and hint on stderr, and with the error's exit
    code; any other keeps its traceback.
    """
    _take_any_text()
    keep_stderr_unfailing()
    outlive_terminal_if_asked()
    try:
        app()
    except Glm3Error as error:
        if os.environ.get("GLM3_DEBUG"):
            traceback.print_exc()
        _report(error)
        sys.exit(error.exit_code)
    except OSError as error:  # of a file or folder that nobody has looked at before
        if not error.errno:
            raise
        if os.environ.get("GLM3_DEBUG"):
            traceback.print_exc()
        sentence = _of_system(error)
        _report(sentence)
        sys.exit(sentence.exit_code)
    except RuntimeError as error:  # torch has no other class for the errors of an accelerator
        trouble = _explained(error)
        if trouble is None:
            raise
        _report(trouble)
        traceback.print_exc()
        sys.exit(trouble.exit_code)


def _take_any_text() -> None:
    """Makes stdin and stdout take every text, whatever encoding the machine is set to.

    A terminal shows what its encoding lacks as question marks. A file or a pipe gets a result as
    it is, in UTF-8, with the bytes of file names that are no UTF-8 as they were.
    """
    for stream in (sys.stdin, sys.stdout):
        if not isinstance(stream, io.TextIOWrapper):
            continue  # closed, or a test's
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _of_system(error: OSError) -> Glm3Error:
    """Returns an error of the operating system as a sentence, with the file that it is about."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return _TOO_MANY_FILES
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return DataError(
        f"{name}: {error.strerror}" if name else str(error.strerror),
        "look at this file or folder, its rights and its disk; GLM3_DEBUG=1 shows what used it",
    )


def _explained(error: RuntimeError) -> Glm3Error | None:
    """Returns the machine's error with an explanation; None if it isn't one, or isn't known."""
    if os.strerror(errno.EMFILE) in str(error):  # as gloo has it
        return _TOO_MANY_FILES
    if "torch" not in sys.modules:
        return None
    from glm3cli.device.doctor.codes import explain

    return explain(f"{type(error).__name__}: {error}")


def _report(error: Glm3Error) -> None:
    """Prints message and hint to stderr, on one rank alone if a launcher shows the others'."""
    # The launcher prints it if it is ours. torchrun has the errors of all ranks in its summary, so
    # rank 0 prints alone; without a launcher every rank does.
    if hand_over(error) or not (is_speaker() or is_alone()):
        return
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
