"""
Runs the original code of VideoLLaMA 2 or Video-LLaVA on the CPU in float32 and records what its layers put out.

This file is a script for another interpreter, one that has the original's requirements; it imports nothing of this
package. Its one argument is a JSON file, written by [`compare_with_original`]. What it records lies beside that file:
`CASE.MODULE.npy`, and `versions.json` at the end.

The original is changed in what keeps it from running or from being exact here, and in nothing else:
- its `torch.float16`, which it always loads in, is `torch.float32`;
- attention is eager, where it asks for flash attention without asking whether there is a GPU;
- the class of the language model is that of `model_type`, where it guesses from the name of the base;
- a vision tower that it builds but does not load (projectors and LoRA over a plain language model) is loaded;
- BEATs has the sizes of the checkpoint, which the original keeps in its code, and is read from a file beside the
  checkpoint where it lies there, which the original does in training only;
- a question about an image is asked without the audio tower, which would take the image for sound.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


class _Float32(types.ModuleType):
    """`torch` for code whose float16 is to be float32."""

    float16 = half = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def import_original(code: Path) -> Any:
    """The module with `load_pretrained_model`. Reading of media, which nothing here needs, is not imported."""
    name = "videollava" if (code / "videollava").is_dir() else "videollama2"
    package = types.ModuleType(name)
    package.__path__ = [str(code / name)]
    sys.modules[name] = package
    sys.path.insert(0, str(code))
    builder = importlib.import_module(f"{name}.model.builder" if name == "videollava" else f"{name}.model")
    for key, module in list(sys.modules.items()):
        if key.startswith(name) and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = _Float32("torch")
    return builder


def use_eager_attention() -> None:
    """For versions of transformers that choose between attentions; older ones have only this."""
    method = getattr(transformers.PreTrainedModel, "_autoset_attn_implementation", None)
    if method is None:
        return
    original = method.__func__

    def choose(cls: type, config: Any, use_flash_attention_2: bool = False, **kwargs: Any) -> Any:
        config._attn_implementation = "eager"
        return original(cls, config, use_flash_attention_2=False, **kwargs)

    transformers.PreTrainedModel._autoset_attn_implementation = classmethod(choose)


def load_original(job: dict[str, Any]) -> Any:
    """The original's model, by its own loading function."""
    use_eager_attention()
    builder = import_original(Path(job["code"]))
    language_models = getattr(builder, "VLLMs", {})
    if job["model_type"] in language_models:
        for name in dir(builder):
            if name.startswith("Videollama2") and name.endswith("ForCausalLM"):
                setattr(builder, name, language_models[job["model_type"]])
    builder.lora_cfg_pretrained = None  # a name that the branch audio_visual uses but does not set
    if job["audio_sizes"]:
        beats = importlib.import_module("videollama2.model.beats.BEATs")
        initialise = beats.BEATsConfig.__init__

        def with_sizes(self: Any, cfg: Any = None) -> None:
            initialise(self, {**job["audio_sizes"], **(cfg or {})})

        beats.BEATsConfig.__init__ = with_sizes
    model = builder.load_pretrained_model(job["checkpoint"], job["base"], job["name"], device="cpu")[1]
    if job["load_vision_tower"]:
        tower = model.get_vision_tower()
        tower.vision_tower = type(tower.vision_tower).from_pretrained(tower.vision_tower_name)
    for path, prefix in job["files"]:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors["model"] if "cfg" in tensors else tensors
        model.load_state_dict({prefix + name: tensor for name, tensor in tensors.items()}, strict=False)
    model = model.float().eval()
    parameters = dict(model.named_parameters())
    for names, dtype in job["rounded"]:
        found = next((name for name in names if name in parameters), None)
        if found is None:
            raise KeyError(f"The original has no parameter {' or '.join(names)}.")
        parameters[found].data = parameters[found].data.to(getattr(torch, dtype)).float()
    return model


@torch.no_grad()
def run_case(model: Any, case: dict[str, Any], inputs: Any, modules: list[str], output: Path) -> None:
    """One forward pass; writes what the modules and the model put out."""

    def save(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        np.save(output / f"{case['name']}.{name}.npy", value.detach().float().numpy())

    named = dict(model.named_modules())
    handles = [
        named[name].register_forward_hook(lambda module, args, result, name=name: save(name, result))
        for name in modules
        if name in named
    ]
    layer = named["model.layers.0"]

    def save_embeddings(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        save("inputs_embeds", args[0] if args else kwargs["hidden_states"])

    handles.append(layer.register_forward_pre_hook(save_embeddings, with_kwargs=True))
    tensors = {name: torch.from_numpy(inputs[name]) for name in inputs.files}
    images: list[Any] = []
    for kind, names in case["media"]:
        if kind == "plain":  # Video-LLaVA
            images.append(tensors[names])
        elif isinstance(names, dict):
            images.append(({key: tensors[name] for key, name in names.items()}, kind))
        else:
            images.append((tensors[names], kind))
    ids = tensors[f"{case['name']}.input_ids"]
    audio_tower = getattr(model.model, "audio_tower", None)
    if case["without_audio_tower"]:
        model.model.audio_tower = None
    try:
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            images=images or None,
            use_cache=False,
            return_dict=True,
        ).logits
    finally:
        if case["without_audio_tower"]:
            model.model.audio_tower = audio_tower
        for handle in handles:
            handle.remove()
    save("logits", logits)


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    model = load_original(job)
    with np.load(path.parent / "inputs.npz") as inputs:
        for case in job["cases"]:
            run_case(model, case, inputs, job["modules"], path.parent)
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "timm", "peft"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    (path.parent / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    # The folder of this file, which Python puts in front, holds modules of other names that are not meant.
    sys.path.pop(0)
    main(Path(sys.argv[1]))
