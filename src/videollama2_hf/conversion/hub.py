"""Publishing a converted checkpoint on the Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from transformers.utils import CONFIG_NAME

from .tensors import ConversionError


_CHECKPOINT_LINE = re.compile(r'^checkpoint = ".*"$', re.MULTILINE)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Conversion to transformers",
) -> str:
    """
    Uploads a converted folder, as it is, to a repository of the Hub, which is made if it is not there.

    The snippet in the folder's model card names the repository then. Files that the Hub has already are not sent
    again, so an upload that broke off goes on when it is repeated.

    Args:
        folder: What [`convert_checkpoint`] made.
        repo_id: `owner/name`, or `name` for a repository of the user who is logged in.
        private: Whether a repository that is made is private.
        token: Access token with the right to write. `None`: the one of `hf auth login` or of `HF_TOKEN`.
        commit_message: First line of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: `folder` is not a converted checkpoint.
        ConversionError: Not a name of a repository, nobody is logged in, or the user may not write there.
        ConnectionError: The Hub cannot be reached.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} is not a converted checkpoint: it has no {CONFIG_NAME}.")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = folder / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            card.write_text(_CHECKPOINT_LINE.sub(f'checkpoint = "{repo_id}"', text), encoding="utf-8")
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    except HFValidationError as error:
        raise ConversionError(
            f"{repo_id!r} is not a name of a Hub repository ({str(error).rstrip('.')}). Write it as owner/name."
        ) from None
    except LocalTokenNotFoundError:
        raise ConversionError(_login(repo_id)) from None
    except OfflineModeIsEnabled:
        raise ConnectionError(
            f"HF_HUB_OFFLINE is set, so {folder} was not uploaded. Unset it and upload again; nothing is lost."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise ConversionError(_login(repo_id)) from None
        if status in (403, 404):
            raise ConversionError(
                f"This token may not write to {repo_id} on the Hub ({error.server_message or status}). Choose a "
                "repository of yours, or log in with a token that has the right to write: hf auth login."
            ) from None
        raise ConnectionError(
            f"The Hub answered {error.server_message or status} when {folder} was uploaded to {repo_id}. Upload again "
            "later; what it has already is not sent twice."
        ) from None
    except HfHubHTTPError.__bases__ as error:  # any error of the library that makes its requests, and OSError
        raise ConnectionError(
            f"The Hub at {api.endpoint} cannot be reached ({str(error).strip() or type(error).__name__}). {folder} is "
            "complete; upload it again when there is a network."
        ) from None
    return str(commit.commit_url)


def _login(repo_id: str) -> str:
    return (
        f"Nobody is logged in, or the token is not valid, so {repo_id} cannot be written. Log in with a token that "
        "has the right to write (hf auth login), or set HF_TOKEN."
    )
