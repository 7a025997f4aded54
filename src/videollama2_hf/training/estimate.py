"""
How much memory of a device a recipe takes, before it is started.

Parameters are counted on a model without weights (the meta device); activations are what the layers of that model save
for the backward pass when they are run on tensors without data.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface

from ..configuration_videollama2 import VideoLlama2Config, get_num_audio_tokens
from ..modeling_videollama2 import VideoLlama2ForConditionalGeneration
from .lora import get_lora_target_names
from .recipe import LoraRecipe, Recipe
from .stages import CONNECTOR_NAME, count_parameters, prepare_for_training


Sharding = Literal["none", "zero2", "zero3", "fsdp"]

_ATTENTION = "videollama2_memory_estimate"
# NF4 with double quantisation: 4 bits, and 0.127 for the scales of every 64 weights (QLoRA, section 3).
QUANTIZED_BYTES = {4: 4.127 / 8, 8: 1.0}
# The longest text of a row where the recipe does not limit it.
_TEXT_TOKENS = 2048
_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device; what the libraries themselves take (about 1 GiB with CUDA) comes on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class _Sizes:
    """Of one model under one recipe: parameters, bytes of a weight and of what is frozen, bytes of activations."""

    trainable: int
    total: int
    frozen_bytes: float
    largest_layer: int
    activations: int
    itemsize: int


def estimate_memory(
    recipe: Recipe, config: VideoLlama2Config | None = None, world_size: int = 1, sharding: Sharding = "none"
) -> MemoryEstimate:
    """
    Peak memory on one device at the longest row that the recipe allows, a video with its sound among them.

    Args:
        config: The model's. `None`: read from `recipe.model`.
        world_size: Devices.
        sharding: Who holds the weights: every device (`"none"`), DeepSpeed (`"zero2"`, `"zero3"`) or FSDP2 (`"fsdp"`).
    """
    return _place(_measure(recipe, config or _load_config(recipe)), world_size, sharding)


def _load_config(recipe: Recipe) -> VideoLlama2Config:
    recipe.check_model()
    return VideoLlama2Config.from_pretrained(recipe.model)


def _measure(recipe: Recipe, config: VideoLlama2Config) -> _Sizes:
    config = copy.deepcopy(config)
    if recipe.num_frames is not None:
        config.num_frames = recipe.num_frames
    model = build_on_meta(config, torch.bfloat16 if recipe.bf16 else torch.float32)
    trainable, frozen, quantized = _count(model, recipe)
    itemsize = model.dtype.itemsize
    bits = recipe.lora.quantize if recipe.lora is not None else None
    return _Sizes(
        trainable=trainable,
        total=trainable + frozen + quantized,
        frozen_bytes=frozen * itemsize + quantized * (QUANTIZED_BYTES[bits] if bits else itemsize),
        largest_layer=max(_size(layer) for layer in model.model.language_model.layers),
        activations=recipe.per_device_batch_size * _count_activations(model, recipe),
        itemsize=itemsize,
    )


def _place(sizes: _Sizes, world_size: int, sharding: Sharding) -> MemoryEstimate:
    trainable, itemsize = sizes.trainable, sizes.itemsize
    gathered = 2 * sizes.largest_layer * itemsize  # the layer at work and the next
    weights: float
    gradients: float
    optimizer: float
    if sharding == "none":
        # In float32, with the copies in bfloat16 that autocast keeps; DDP sends gradients in buckets of their size.
        weights = sizes.frozen_bytes + trainable * (4 if itemsize == 4 else 6)
        gradients, optimizer = trainable * (4 if world_size == 1 else 8), trainable * 8
    elif sharding == "zero2":
        weights = sizes.frozen_bytes + trainable * itemsize
        gradients, optimizer = trainable * itemsize / world_size, trainable * 12 / world_size
    elif sharding == "zero3":
        weights = sizes.total * itemsize / world_size + gathered
        gradients, optimizer = trainable * itemsize / world_size, trainable * 12 / world_size
    elif sharding == "fsdp":
        weights = sizes.total * 4 / world_size + gathered
        gradients, optimizer = trainable * 4 / world_size, trainable * 8 / world_size
    else:
        raise ValueError(f"sharding must be none, zero2, zero3 or fsdp, got {sharding!r}.")
    return MemoryEstimate(int(weights), int(gradients), int(optimizer), sizes.activations)


def describe_memory(recipe: Recipe, config: VideoLlama2Config | None = None) -> str:
    """A table of the recipe under the usual settings, and of its LoRA variants where it trains the language model."""
    config = config or _load_config(recipe)
    devices = max(int(os.environ.get("WORLD_SIZE", "1")), 8)
    settings: list[tuple[str, int, Sharding]] = [
        ("1 device", 1, "none"),
        (f"DDP, {devices} devices", devices, "none"),
        (f"ZeRO-2, {devices} devices", devices, "zero2"),
        (f"ZeRO-3, {devices} devices", devices, "zero3"),
        (f"FSDP2, {devices} devices", devices, "fsdp"),
    ]
    sizes = _measure(recipe, config)
    rows = [(name, _place(sizes, world_size, sharding)) for name, world_size, sharding in settings]
    if recipe.lora is None and "language_model" in recipe.trainable:
        parts = [part for part in recipe.trainable if part.startswith(CONNECTOR_NAME)]
        for name, lora in (("LoRA", LoraRecipe()), ("QLoRA", LoraRecipe(quantize=4))):
            variant = replace(recipe, trainable=parts, lora=lora)
            rows.append((f"{name}, 1 device", _place(_measure(variant, config), 1, "none")))
    lines = [f"{'GiB per device':<22}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'total':>9}"]
    for name, m in rows:
        columns = ((m.weights, 10), (m.gradients, 11), (m.optimizer, 11), (m.activations, 13), (m.total, 9))
        lines.append(f"{name:<22}" + "".join(f"{value / _GIB:>{width}.2f}" for value, width in columns))
    length = _row_length(config, recipe)
    checkpointing = "with" if recipe.gradient_checkpointing else "without"
    lines.append(f"{recipe.per_device_batch_size} rows of {length} tokens, {checkpointing} gradient checkpointing")
    return "\n".join(lines)


def build_on_meta(config: VideoLlama2Config, dtype: torch.dtype) -> VideoLlama2ForConditionalGeneration:
    """A model without weights whose attention keeps what flash attention keeps, not all scores."""
    AttentionInterface.register(_ATTENTION, _attend)
    with torch.device("meta"):
        model = VideoLlama2ForConditionalGeneration(config).to(dtype)
    base = model.model
    for part in (base.language_model, base.vision_tower, base.video_tower, base.audio_tower):
        # A language model that has no other attention than the eager one (Gemma 2) does hold all scores.
        if part is not None and part.config._attn_implementation != "eager":
            part.config._attn_implementation = _ATTENTION
    return model


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention and its kin keep; on the meta device torch would keep all scores."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, *([] if bias is None else [bias]))
        return output


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    bias = kwargs.get("position_bias", attention_mask)  # BEATs
    return _FlashAttention.apply(query, key, value, bias).transpose(1, 2), None


def _count(model: VideoLlama2ForConditionalGeneration, recipe: Recipe) -> tuple[int, int, int]:
    """Parameters that train, that are frozen, and that are frozen and quantised."""
    if recipe.trainable:
        prepare_for_training(model, recipe.trainable)
    else:
        model.requires_grad_(False)
    counts = count_parameters(model)
    trainable = sum(part[0] for part in counts.values())
    frozen = sum(part[1] for part in counts.values()) - trainable
    if recipe.lora is None:
        return trainable, frozen, 0
    targets, names = 0, get_lora_target_names(model)
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names:
            targets += module.weight.numel()
            trainable_here = recipe.lora.r * (module.in_features + module.out_features)
            trainable += trainable_here
    frozen += sum(part[0] for part in counts.values())  # PEFT keeps the original of what trains whole
    quantized = targets if recipe.lora.quantize is not None else 0
    return trainable, frozen - quantized, quantized


def _row_length(config: VideoLlama2Config, recipe: Recipe) -> int:
    length = (recipe.max_text_length or _TEXT_TOKENS) + _num_visual_tokens(config, recipe) + _num_audio_tokens(config)
    return length if recipe.max_length is None else min(length, recipe.max_length)


def _num_visual_tokens(config: VideoLlama2Config, recipe: Recipe) -> int:
    return config.num_visual_tokens("video", recipe.num_frames)


def _num_audio_tokens(config: VideoLlama2Config) -> int:
    audio: Any = config.audio_config
    return 0 if audio is None else get_num_audio_tokens(2998, audio.num_mel_bins, audio.patch_size)


def _count_activations(model: VideoLlama2ForConditionalGeneration, recipe: Recipe) -> int:
    """Bytes that one row leaves for the backward pass, and the logits with their gradient."""
    config: Any = model.config
    text, dtype = config.text_config, model.dtype
    length = _row_length(config, recipe)
    model.train()
    learns = recipe.lora is not None or any(parameter.requires_grad for parameter in model.parameters())
    embeds = torch.empty(1, length, text.hidden_size, device="meta", dtype=dtype, requires_grad=learns)
    language_model, layers = model.model.language_model, len(model.model.language_model.layers)
    if recipe.lora is not None:  # the inputs of every linear layer are kept for its adapter
        for module in language_model.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(True)

    def run() -> torch.Tensor:
        return language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    saved = _saved_bytes(run, model)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        saved = _saved_bytes(run, model) + saved // layers  # and one layer that is computed again
    # Logits, in float32 for the loss, and the gradient of both.
    saved += length * text.vocab_size * 2 * (4 + dtype.itemsize)
    return saved + _count_connector_activations(model, recipe)


def _count_connector_activations(model: VideoLlama2ForConditionalGeneration, recipe: Recipe) -> int:
    config, base, dtype = model.config, model.model, model.dtype
    tower: Any = config.tower_config("video")
    saved = 0
    if any(parameter.requires_grad for parameter in base.mm_projector.parameters()):
        patches = (tower.image_size // tower.patch_size) ** 2
        patches += int(config.select_strategy("video") == "full" and tower.model_type != "siglip_vision_model")
        frames = recipe.num_frames or config.num_frames
        video = torch.empty(1, frames, patches, tower.hidden_size, device="meta", dtype=dtype)
        saved += _saved_bytes(lambda: base.mm_projector(video), model)
    tokens, audio = _num_audio_tokens(config), base.audio_tower
    if audio is None:
        return saved
    sound = torch.empty(1, 2998, audio.config.num_mel_bins, device="meta", dtype=dtype)
    if any(parameter.requires_grad for parameter in audio.parameters()):
        saved += _saved_bytes(lambda: audio(sound).last_hidden_state, model)
    if any(parameter.requires_grad for parameter in base.mm_projector_a.parameters()):
        features = torch.empty(1, tokens, audio.config.hidden_size, device="meta", dtype=dtype)
        saved += _saved_bytes(lambda: base.mm_projector_a(features), model)
    return saved


def _saved_bytes(run: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Bytes that `run` saves for its backward pass, beside the model's parameters."""
    with count_saved_bytes(model) as sizes:
        output = run()
    del output
    return sum(sizes.values())


@contextmanager
def count_saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """
    Bytes of every storage that autograd saves inside, beside those of a model's parameters; whatever holds the graph
    must outlive the block, for storages are told apart by their address.
    """
    sizes: dict[int, int] = {}
    own = {_identity(parameter) for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _identity(tensor) not in own:
            sizes[_identity(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def _identity(tensor: torch.Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


__all__ = ["QUANTIZED_BYTES", "MemoryEstimate", "build_on_meta", "describe_memory", "estimate_memory"]
