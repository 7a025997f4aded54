"""
What the package brings along, so that everything can be tried offline: the small model, trained on the synthetic world
(`docs/small_model.md`), and a clip of that world.
"""

from pathlib import Path


_FOLDER = Path(__file__).parent
# A folder that `from_pretrained` loads: a VideoLLaMA 2.1-AV of 9 million parameters.
SMALL_MODEL = _FOLDER / "small_model"
# Four seconds of video with sound.
EXAMPLE_CLIP = _FOLDER / "clip.mp4"


def get_small_model() -> str:
    """
    The folder of the small model, for commands that are given no other.

    Raises:
        FileNotFoundError: This copy of the package has no small model.
    """
    if not SMALL_MODEL.is_dir():
        raise FileNotFoundError(
            "This copy of the package comes without the small model. Name a checkpoint: --model FOLDER, or the name "
            "of a Hub repository."
        )
    return str(SMALL_MODEL)


__all__ = ["EXAMPLE_CLIP", "SMALL_MODEL", "get_small_model"]
