"""
Conversion of original checkpoints to safetensors that transformers load, and back.

`sources` finds out what a checkpoint consists of, `plan` decides about every tensor, `convert` writes, `restore` goes
back. Weights are copied as bytes; only what is merged or cast is computed.
"""

from .convert import convert_checkpoint
from .plan import build_plan
from .restore import restore_original
from .sources import open_source
from .tensors import ConversionError


__all__ = ["ConversionError", "build_plan", "convert_checkpoint", "open_source", "restore_original"]
