"""The memory estimate against what a training step on this machine really holds."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny_models import make_model
from videollama2_hf.training import Recipe, estimate_memory, prepare_for_training
from videollama2_hf.training.estimate import describe_memory


def make_recipe(**changes) -> Recipe:
    values = {
        "model": "unused",
        "output_dir": "unused",
        "data": "unused",
        "trainable": ["language_model", "lm_head"],
        "learning_rate": 1e-3,
        "global_batch_size": 2,
        "per_device_batch_size": 2,
        "max_text_length": 200,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return Recipe.from_dict({**values, **changes})


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors alive at once, at most, among those made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int):
        self.now -= size


def step(model, recipe: Recipe) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer states and, at its peak, all else in a step on the longest rows."""
    prepare_for_training(model, recipe.trainable).train()
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    config = model.config
    video = [config.video_token_id] * config.num_visual_tokens("video")
    ids = torch.tensor([video + [5] * recipe.max_text_length] * recipe.per_device_batch_size)
    pixels = torch.zeros(len(ids), config.num_frames, 3, 28, 28)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)

    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    peaks = []
    for _ in range(2):
        with PeakMemory() as memory:
            model(input_ids=ids, labels=ids, pixel_values_videos=pixels, use_cache=False).loss.backward()
        peaks.append(memory.peak)
        gradients = size(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # so that the second time no gradient is made inside
    states = size(value for state in optimizer.state.values() for value in state.values() if value.ndim)
    return size(model.parameters()), gradients, states, peaks[1]


@pytest.mark.parametrize(
    "trainable", [["language_model", "lm_head"], ["mm_projector"], ["language_model", "mm_projector"]]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_what_a_step_takes(trainable, checkpointing):
    recipe = make_recipe(trainable=trainable, gradient_checkpointing=checkpointing)
    model = make_model("qwen2", hears=False, text_config={"num_hidden_layers": 6})
    estimate = estimate_memory(recipe, model.config)
    weights, gradients, optimizer, activations = step(model, recipe)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (weights, gradients, optimizer)
    assert 0.8 * activations < estimate.activations < 1.4 * activations, (activations, estimate.activations)


def test_checkpointing_saves_memory():
    config = make_model("qwen2", hears=False, text_config={"num_hidden_layers": 8}).config
    whole, checkpointed = (
        estimate_memory(make_recipe(gradient_checkpointing=flag), config).activations for flag in (False, True)
    )
    assert checkpointed < 0.6 * whole


def test_sharding_divides():
    recipe, config = make_recipe(), make_model("qwen2", hears=False).config
    alone = estimate_memory(recipe, config)
    for sharding in ("zero3", "fsdp"):
        many = estimate_memory(recipe, config, world_size=64, sharding=sharding)
        assert many.gradients < alone.gradients / 30 and many.weights < alone.weights
    zero2 = estimate_memory(recipe, config, world_size=64, sharding="zero2")
    assert zero2.weights == alone.weights and zero2.optimizer < alone.optimizer / 30
    with pytest.raises(ValueError, match="sharding must be none, zero2, zero3 or fsdp, got 'zero1'"):
        estimate_memory(recipe, config, sharding="zero1")


def test_lora_trains_little_and_quantises_the_language_model():
    config = make_model("qwen2", hears=True).config
    recipe = make_recipe(trainable=["mm_projector"], lora={"r": 2, "alpha": 4}, bf16=True)
    lora = estimate_memory(recipe, config)
    recipe.lora.quantize = 4
    quantised = estimate_memory(recipe, config)
    assert quantised.weights < lora.weights and quantised.gradients == lora.gradients
    table = describe_memory(make_recipe(), config)
    for name in ("1 device", "ZeRO-2", "ZeRO-3", "FSDP2", "LoRA, 1 device", "QLoRA", "without gradient checkpointing"):
        assert name in table
