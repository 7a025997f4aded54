"""
Conversion of original checkpoints to safetensors that transformers load, and back.

`sources` finds out what a checkpoint consists of, `plan` decides about every tensor, `convert` writes, `restore` goes
back. Weights are copied as bytes; only what is merged or cast is computed. `verify` and `reference` prove it, `report`
and `model_card` write it down, `hub` publishes it.
"""

from .convert import convert_checkpoint
from .hub import push_to_hub
from .plan import build_plan
from .restore import restore_original
from .sources import open_source
from .tensors import ConversionError
from .verify import VerificationError


__all__ = [
    "ConversionError",
    "VerificationError",
    "build_plan",
    "convert_checkpoint",
    "open_source",
    "push_to_hub",
    "restore_original",
]
