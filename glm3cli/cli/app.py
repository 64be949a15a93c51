"""The `glm3` program: one line per command, and the only place that catches an error."""

import os
import sys
import traceback

import typer

from glm3cli.cli import convert, demo, doctor, evaluate, generate, train
from glm3cli.cli import preprocess as data
from glm3cli.errors import Glm3Error
from glm3cli.parallel.launch import hand_over, is_alone, is_speaker
from glm3cli.version import __version__

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
    """Runs the program; a user's error becomes a sentence on stderr and its exit code."""
    try:
        app()
    except Glm3Error as error:
        if os.environ.get("GLM3_DEBUG"):
            traceback.print_exc()
        _report(error)
        sys.exit(error.exit_code)
    except RuntimeError as error:  # of an accelerator: torch has nothing more exact
        trouble = _explained(error)
        if trouble is None:
            raise
        _report(trouble)
        traceback.print_exc()
        sys.exit(trouble.exit_code)


def _explained(error: RuntimeError) -> Glm3Error | None:
    if "torch" not in sys.modules:
        return None
    from glm3cli.device.doctor.codes import explain

    return explain(f"{type(error).__name__}: {error}")


def _report(error: Glm3Error) -> None:
    # One speaks: the launcher if it is ours, else rank 0; torchrun's summary has the others, and
    # without a launcher nobody has.
    if hand_over(error) or not (is_speaker() or is_alone()):
        return
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
