"""
How much memory answering takes: weights, key-value cache and activations, counted without weights.

The parts of the model are run on tensors without data (the meta device), and the bytes that are alive at a time are
counted: media through towers and connectors, then the whole prompt through the language model, which is when most is
held. Attention counts as flash attention and its kin run it, without all scores. Weights in 8 and 4 bits are those of
`training.lora.get_quantization_config`: the linear layers of the language model; all else is bfloat16.
"""

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from .configuration_videollama2 import VideoLlama2Config
from .modeling_videollama2 import VideoLlama2ForConditionalGeneration
from .training.estimate import QUANTIZED_BYTES, build_on_meta


# Of a question and the words around it.
TEXT_TOKENS = 128


@dataclass(frozen=True)
class InferenceMemory:
    """
    Bytes on one device; what the libraries themselves take (about 1 GiB with CUDA) comes on top.

    Args:
        weights: Of all parameters.
        cache: Keys and values of the prompt and the whole answer.
        activations: What is held beside them when most is held.
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def get_num_mel_frames(chunk_length: float, sampling_rate: int = 16000) -> int:
    """Filter-bank frames of a window of sound, of 25 ms every 10 ms: 2998 of 30 seconds."""
    return 1 + (round(chunk_length * sampling_rate) - sampling_rate * 25 // 1000) // (sampling_rate // 100)


def estimate_inference(
    config: VideoLlama2Config,
    num_frames: int | None = None,
    hears: bool = True,
    num_new_tokens: int = 256,
    batch_size: int = 1,
    chunk_length: float = 30,
    num_text_tokens: int = TEXT_TOKENS,
) -> dict[str, InferenceMemory]:
    """
    Peak memory by precision of the weights (`"bfloat16"`, `"8 bit"`, `"4 bit"`) for `batch_size` questions, each about
    a video of its own with its sound.

    Args:
        num_frames: Frames of a video. `None`: the model's own number; 0: no video.
        hears: Whether there is sound, one window of `chunk_length` seconds. Models without an audio tower never hear.
        num_text_tokens: Tokens of the prompt beside the media.

    Raises:
        ValueError: Not so many frames for this model.
    """
    model = build_on_meta(copy.deepcopy(config), torch.bfloat16).eval()
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad(), torch.device("meta"), PeakMemory() as memory:
        inputs, features = _encode(model, num_frames, hears, batch_size, chunk_length)
        encoding, memory.peak = memory.peak, memory.live
        length = num_text_tokens + sum(item.shape[1] for item in features)
        text: Any = config.text_config
        embeds = torch.empty(batch_size, length, text.hidden_size, dtype=model.dtype)
        output = model.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        model.lm_head(output.last_hidden_state[:, -1:]).float()
        prefill = memory.peak
    del inputs, features, embeds, output
    filled = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    full = sum(_cache_size(layer, length, length + num_new_tokens) for layer in cache.layers)
    activations = max(encoding - full, prefill - filled)  # while media are encoded there is no cache yet
    linear = [module.weight for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    count = sum(weight.numel() for weight in linear)
    rest = 2 * (sum(parameter.numel() for parameter in model.parameters()) - count)
    # 4-bit weights are unpacked one matrix at a time, where many tokens are multiplied with them.
    unpacked = 2 * max(weight.numel() for weight in linear)
    return {
        "bfloat16": InferenceMemory(rest + 2 * count, full, activations),
        "8 bit": InferenceMemory(rest + int(count * QUANTIZED_BYTES[8]), full, activations),
        "4 bit": InferenceMemory(rest + int(count * QUANTIZED_BYTES[4]), full, activations + unpacked),
    }


def _encode(
    model: VideoLlama2ForConditionalGeneration, num_frames: int | None, hears: bool, batch_size: int, seconds: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and features (batch, tokens, width) of a batch of videos with their sound; both stay alive."""
    config, base, inputs, features = model.config, model.model, [], []
    audio: Any = config.audio_config
    if num_frames != 0:
        config.num_visual_tokens("video", num_frames)  # refuses what the connector cannot take
        size = config.tower_config("video").image_size
        inputs.append(torch.empty(batch_size, num_frames or config.num_frames, 3, size, size))
        features.append(base.get_video_features(inputs[0]).pooler_output)
    if hears and audio is not None:
        inputs.append(torch.empty(batch_size, get_num_mel_frames(seconds), audio.num_mel_bins))
        features.append(base.get_audio_features(inputs[-1]).pooler_output)
    return inputs, features


def _cache_size(layer: Any, length: int, final_length: int) -> int:
    """Bytes of a layer's keys and values at the end of the answer; a sliding window does not grow beyond its size."""
    if layer.is_sliding:
        final_length = min(final_length, max(layer.sliding_window, layer.keys.shape[-2]))
        length = layer.keys.shape[-2]
    return (layer.keys.nbytes + layer.values.nbytes) * final_length // length


class PeakMemory(TorchDispatchMode):
    """
    Counts the bytes of tensors that are made inside: `live` now, `peak` at most. Each storage counts once, until
    nothing holds it; on the meta device too, where there are no bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and _address(tensor) not in taken:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


__all__ = ["TEXT_TOKENS", "InferenceMemory", "PeakMemory", "estimate_inference", "get_num_mel_frames"]
