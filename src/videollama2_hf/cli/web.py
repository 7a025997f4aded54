"""`videollama2 web`."""

from typing import Annotated

import typer


def web(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder or Hub repository of a model; repeat to choose from several. Default: the bundled small one.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Give it a public address, through Gradio's servers.")
    ] = False,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest file that is taken, in megabytes.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """
    Serve a web page to talk about videos, images and sounds. Ctrl-C ends it.

    **Examples**

        videollama2 web
        videollama2 web --model converted --model another --host 0.0.0.0 --port 8000
    """
    from ..assets import get_small_model
    from ..web import launch

    launch(model or [get_small_model()], host, port, share, max_upload_mb, max_new_tokens)
