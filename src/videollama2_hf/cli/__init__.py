"""
The command `videollama2`.

Every command lives in a module of its own beside this file and only turns arguments into one call of the library. What
is wrong with the input reaches the user as one sentence and exit code 2; `--debug` shows the traceback.
"""

import re
import sys

import typer

from . import data
from .ask import ask, chat
from .caption import caption
from .convert import convert
from .doctor import doctor
from .evaluate import evaluate
from .info import info
from .serve import serve
from .train import train
from .web import web


app = typer.Typer(
    name="videollama2",
    help="VideoLLaMA 2 and Video-LLaVA: questions about video, images and sound.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(ask)
app.command()(chat)
app.command()(caption)
app.command()(convert)
app.command()(train)
app.command()(web)
app.command()(serve)
app.command("eval")(evaluate)
app.command()(info)
app.command()(doctor)
app.add_typer(data.app, name="data")


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """
    Runs the command and ends the process: 0 done, 1 the work failed (disk full, a check that did not hold), 2 the
    input is wrong, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="videollama2")
    except (ValueError, FileNotFoundError, NotADirectoryError, FileExistsError, ImportError) as error:
        if "--debug" in arguments:
            raise
        _fail(error, 2)
    except (OSError, RuntimeError, FloatingPointError) as error:
        if "--debug" in arguments:
            raise
        _fail(error, 1)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise SystemExit(130) from None


def _fail(error: Exception, code: int) -> None:
    message = str(error)
    if message.startswith("Caught ") and "Original Traceback" in message:  # by a worker of a DataLoader
        message = re.split(rf"\n[\w.]*\b{type(error).__name__}: ", message.rstrip())[-1]
    typer.secho("Error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    raise SystemExit(code) from None
