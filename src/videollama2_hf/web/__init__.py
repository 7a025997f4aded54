"""
The web page: drop a clip, an image or a sound, see what the model sees and hears of it, and talk about it.

`texts` holds every word in every language, `preview` reads and draws what the model gets, `handlers` are the functions
behind the page, `page` is its layout.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import gradio


def launch(
    checkpoints: Sequence[str | os.PathLike],
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    max_upload_mb: int = 500,
    max_new_tokens: int = 512,
    wait: bool = True,
) -> "gradio.Blocks":
    """
    Serves the page. It loads nothing from elsewhere, and sends nothing.

    Args:
        checkpoints: Models to choose from; the first is loaded at once, the others when they are chosen.
        host: Address to listen at; `"0.0.0.0"` for other machines to reach it.
        share: Whether to give the page a public address too, through a tunnel of Gradio's servers.
        max_upload_mb: Largest file that is taken, in megabytes.
        max_new_tokens: Longest answer, in tokens.
        wait: Whether to serve until Ctrl-C. If not, the page that is returned is served until its `close`.

    Raises:
        ImportError: Gradio is not installed.
        OSError: The port is taken.
        ValueError: There are no models, or two have the same name.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("The web page needs Gradio: pip install videollama2-hf[web].") from error
    from .handlers import Models
    from .page import CSS, EXAMPLE_CLIP, THEME, build_page

    models = Models(checkpoints)
    models[models.names[0]]
    page = build_page(models, max_new_tokens)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=f"{max_upload_mb}mb",
        allowed_paths=[str(EXAMPLE_CLIP)],
        theme=THEME,
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        prevent_thread_lock=not wait,
    )
    return page


__all__ = ["launch"]
