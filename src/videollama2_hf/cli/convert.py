"""`videollama2 convert`."""


def convert() -> None:
    """Convert an original checkpoint to safetensors that transformers load, with proof."""
