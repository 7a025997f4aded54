"""`videollama2 serve`."""

from typing import Annotated

import typer


def serve(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or Hub repository of the model. Default: the bundled small one."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="VIDEOLLAMA2_API_KEY", help="Key that clients must send.", show_default=False)
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host from which media may be downloaded, NAME or NAME:PORT; repeat for more."),
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(help="Largest request or download, in MiB.")] = 64,
    max_clip_seconds: Annotated[float, typer.Option(help="Longest video or sound, or part of one.")] = 600,
    max_frames: Annotated[int, typer.Option(help="Most frames of one video.")] = 128,
    max_queue: Annotated[int, typer.Option(help="How many requests may wait while one is answered.")] = 16,
    max_request_seconds: Annotated[
        float, typer.Option(help="Longest time for the upload, and then for waiting and answering.")
    ] = 300,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
) -> None:
    """
    Answer over HTTP as OpenAI's API does: chat completions about videos with their sound, images and sounds.

    Media come inside the request, as `data:` URIs; `--allow-host` allows downloads from a host. Ctrl-C ends it.

    **Examples**

        videollama2 serve
        videollama2 serve --model converted --host 0.0.0.0 --port 9000 --allow-host media.example.org
    """
    from ..assets import get_small_model

    try:
        from ..serving import Limits
        from ..serving import serve as run
    except ImportError as error:
        raise ImportError("The server needs more packages: `pip install videollama2-hf[serve]`.") from error

    limits = Limits(
        max_upload_bytes=int(max_upload_mb * 2**20),
        max_clip_seconds=max_clip_seconds,
        max_frames=max_frames,
        max_queue=max_queue,
        max_request_seconds=max_request_seconds,
        max_new_tokens=max_new_tokens,
    )
    run(
        model or get_small_model(),
        host=host,
        port=port,
        limits=limits,
        api_key=api_key,
        allowed_hosts=allow_host or (),
        revision=revision,
        dtype=dtype,
        say=typer.echo,
    )
