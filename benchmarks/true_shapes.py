"""
The published checkpoints in their true shapes, without their weights.

Names, shapes, dtypes and files are those of the release; the bytes of the weights are holes in sparse files, so that
all of it takes no space on the disk and reads as zeros. `python benchmarks/true_shapes.py` prints the table of
`docs/conversion.md`.
"""

import argparse
import json
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.serialization import skip_data
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME

from videollama2_hf import VideoLlama2AudioConfig, VideoLlama2Config
from videollama2_hf.checkpoint_videollama2 import (
    convert_original_config,
    load_original_image_processor_config,
)
from videollama2_hf.conversion import build_plan, open_source
from videollama2_hf.conversion.convert import shard_names
from videollama2_hf.conversion.plan import expected_tensors, group_by_size
from videollama2_hf.conversion.tensors import DTYPE_NAMES
from videollama2_hf.conversion.video_llava import original_name


SHARD_SIZE = 5 * 10**9  # bytes; transformers' default when the checkpoints were published
CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
BEATS_FILE, AUDIO_PROJECTOR_FILE = "audio_tower.bin", "mm_projector_a.bin"

Shapes = dict[str, tuple[int, ...]]

MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
MIXTRAL_8X7B = MISTRAL_7B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN2_72B = QWEN2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
VIDEO_LLAVA = {  # over Vicuna-7B
    "model_type": "llava",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "mm_image_tower": "LanguageBind/LanguageBind_Image",
    "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "torch_dtype": "bfloat16",
}
LANGUAGE_MODELS = {
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL_8X7B,
    "Qwen/Qwen2-7B-Instruct": QWEN2_7B,
    "Qwen/Qwen2-72B-Instruct": QWEN2_72B,
}
VISION_WIDTH = {CLIP: 1024, SIGLIP: 1152}


@dataclass(frozen=True)
class Published:
    """
    A published checkpoint of VideoLLaMA 2.

    Args:
        name: Its repository.
        language_model: Repository of the language model that it was trained from.
        vision_tower: Repository of its vision tower.
        num_frames: Frames of a video.
        hears: Whether it has BEATs and the audio connector.
    """

    name: str
    language_model: str
    vision_tower: str = CLIP
    num_frames: int = 8
    hears: bool = False

    @property
    def is_base(self) -> bool:
        """Whether it is the projector alone, over a language model and a vision tower."""
        return self.name.endswith("-Base")

    def config_dict(self, layers: int | None = None) -> dict[str, Any]:
        """Its `config.json`; `layers`: number of layers of the language model if not all of them."""
        text = LANGUAGE_MODELS[self.language_model]
        config = text | {
            "model_type": f"videollama2_{text['model_type']}",
            "mm_vision_tower": self.vision_tower,
            "mm_hidden_size": VISION_WIDTH[self.vision_tower],
            "mm_projector_type": "stc_connector" if self.vision_tower == CLIP else "stc_connector_v35",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "num_frames": self.num_frames,
            "image_aspect_ratio": "pad",
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": 2048,
            "use_mm_proj": True,
            "tune_mm_mlp_adapter": self.is_base,
            "torch_dtype": "bfloat16",
        }
        if self.is_base:
            config["_name_or_path"] = self.language_model
        if self.hears:
            config |= {
                "mm_audio_tower": BEATS_FILE,
                "mm_projector_a_type": "mlp2x_gelu",
                "mm_hidden_size_a": 768,
                "hidden_size_a": text["hidden_size"],
            }
        if layers is not None:
            config["num_hidden_layers"] = layers
        return config

    @property
    def command(self) -> str:
        """How to convert it."""
        options = f" --base {self.language_model}" if self.is_base else ""
        return f"videollama2 convert {self.name}{options} --output {self.name.split('/')[1]}-hf"


PUBLISHED = [
    Published(f"DAMO-NLP-SG/{name}{base}", *parts)
    for name, *parts in (
        ("VideoLLaMA2-7B", "mistralai/Mistral-7B-Instruct-v0.2", CLIP, 8),
        ("VideoLLaMA2-7B-16F", "mistralai/Mistral-7B-Instruct-v0.2", CLIP, 16),
        ("VideoLLaMA2-8x7B", "mistralai/Mixtral-8x7B-Instruct-v0.1", CLIP, 8),
        ("VideoLLaMA2-72B", "Qwen/Qwen2-72B-Instruct", CLIP, 8),
        ("VideoLLaMA2.1-7B-16F", "Qwen/Qwen2-7B-Instruct", SIGLIP, 16),
    )
    for base in ("", "-Base")
]
AUDIO_VISUAL = Published("DAMO-NLP-SG/VideoLLaMA2.1-7B-AV", "Qwen/Qwen2-7B-Instruct", SIGLIP, 16, hears=True)
PUBLISHED.append(AUDIO_VISUAL)


def tensor_shapes(config_dict: dict[str, Any], folder: str = "", audio_layers: int | None = None) -> Shapes:
    """
    Names and shapes of all weights of a checkpoint, as the original names them.

    Args:
        config_dict: Its `config.json`.
        folder: Where a vision tower that is not one of the published ones is described.
        audio_layers: Layers of BEATs, if not all of them.
    """
    visual = {key: value for key, value in config_dict.items() if key != "mm_audio_tower"}
    arguments = convert_original_config(visual, folder)
    if "mm_audio_tower" in config_dict:
        audio_config = VideoLlama2AudioConfig(**({"num_hidden_layers": audio_layers} if audio_layers else {}))
        arguments |= {"audio_config": audio_config, "audio_connector_type": "mlp2x_gelu"}
    return expected_tensors(VideoLlama2Config(**arguments))


def write_sparse(path: Path, shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> None:
    """A weight file, safetensors or PyTorch's, whose tensors are holes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        with skip_data():  # the memory is never touched
            torch.save({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, path)
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)


def shards(shapes: Shapes, limit: int = SHARD_SIZE, itemsize: int = 2) -> dict[str, list[str]]:
    """Names of tensors by the file that they are in."""
    groups = group_by_size([(name, torch.Size(shape).numel() * itemsize) for name, shape in shapes.items()], limit)
    return dict(zip(shard_names(len(groups)), groups))


def write_index(folder: Path, files: dict[str, list[str]]) -> None:
    """The index of sharded safetensors files; none for a single file."""
    if len(files) > 1:
        weight_map = {name: filename for filename, names in files.items() for name in names}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer; a plan and a conversion do not depend on the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2048
    )
    tokenizer.save_pretrained(folder)


def write_language_model(folder: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """The repository of a language model, with sparse weights."""
    shapes = {name: shape for name, shape in shapes.items() if not is_multimodal(name)}
    files = shards(shapes)
    for filename, names in files.items():
        write_sparse(folder / filename, {name: shapes[name] for name in names})
    write_index(folder, files)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    write_tokenizer(folder)


def is_multimodal(name: str) -> bool:
    """Whether a weight belongs to a tower or a connector."""
    return any(module in name for module in ("mm_projector", "vision_tower", "audio_tower"))


def write_vision_tower(folder: Path, name: str) -> None:
    """The repository of a vision tower: both halves of the contrastive model in float32, weights sparse."""
    if name == CLIP:
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
        config, model_class = CLIPConfig(text_config=text, projection_dim=768), CLIPModel
    else:
        text = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        config, model_class = SiglipConfig(text_config=text), SiglipModel
    tower = convert_original_config(AUDIO_VISUAL.config_dict() | {"mm_vision_tower": name, "mm_audio_tower": None}, "")
    for key, value in tower["vision_config"].items():
        if key != "model_type":
            setattr(config.vision_config, key, value)
    with torch.device("meta"):
        state_dict = model_class(config).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if not key.endswith("position_ids")}
    write_sparse(folder / SAFE_WEIGHTS_NAME, shapes, torch.float32)
    config.save_pretrained(folder)
    preprocessor = load_original_image_processor_config({"mm_vision_tower": name}, "")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def write_checkpoint(root: Path, published: Published) -> Path:
    """
    A published checkpoint with sparse weights, and beside it, under their names, the repositories that it needs.

    Returns:
        The checkpoint's folder.
    """
    folder = root / published.name.split("/")[1]
    folder.mkdir(parents=True)
    config_dict = published.config_dict()
    shapes = tensor_shapes(config_dict)
    (folder / CONFIG_NAME).write_text(json.dumps(config_dict))
    if published.is_base:
        write_sparse(folder / "mm_projector.bin", {k: v for k, v in shapes.items() if "mm_projector" in k})
        write_language_model(root / published.language_model, LANGUAGE_MODELS[published.language_model], shapes)
        write_vision_tower(root / published.vision_tower, published.vision_tower)
        return folder
    files = shards(shapes)
    for filename, names in files.items():
        write_sparse(folder / filename, {name: shapes[name] for name in names})
    write_index(folder, files)
    write_tokenizer(folder)
    if published.hears:
        table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
        tower = {name: shape for name, shape in shapes.items() if "audio_tower" in name}
        for layer in range(1, 12):  # the original has the table of all layers in every one of them
            tower[f"model.audio_tower.{table.format(layer)}"] = tower[f"model.audio_tower.{table.format(0)}"]
        write_sparse(folder / BEATS_FILE, tower)
        projector = {name: shape for name, shape in shapes.items() if "mm_projector_a" in name}
        write_sparse(folder / AUDIO_PROJECTOR_FILE, projector)
    return folder


def write_video_llava(root: Path) -> Path:
    """Video-LLaVA-7B in PyTorch's files, its two towers inside."""
    folder = root / "Video-LLaVA-7B"
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(json.dumps(VIDEO_LLAVA))
    write_tokenizer(folder)
    towers = {
        VIDEO_LLAVA["mm_image_tower"]: {"model_type": "languagebind_vision", "add_time_attn": False},
        VIDEO_LLAVA["mm_video_tower"]: {"model_type": "languagebind_vision", "add_time_attn": True},
    }
    config = VideoLlama2Config(**convert_original_config(VIDEO_LLAVA, "", towers=towers))
    shapes = {original_name(name): shape for name, shape in expected_tensors(config).items()}
    for layer in range(VIDEO_LLAVA["num_hidden_layers"]):
        shapes[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (64,)
    files = {name.replace("model", "pytorch_model", 1): keys for name, keys in shards(shapes, 10**10).items()}
    files = {name.replace(".safetensors", ".bin"): keys for name, keys in files.items()}
    for filename, names in files.items():
        write_sparse(folder / filename, {name: shapes[name] for name in names})
    weight_map = {name: filename for filename, names in files.items() for name in names}
    (folder / WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def describe(folder: Path, command: str) -> list[str]:
    """The first cells of a row of the table, from a plan of the checkpoint (what `--dry-run` prints)."""
    plan = build_plan(open_source(folder))
    read = {tensor.source.file for tensor in plan.tensors} | {item.source.file for item in plan.left_out}
    counts: dict[str, int] = {}
    for path in sorted(read, key=lambda path: (path.parent != folder, path)):
        label = re.sub(r"-\d{5}-of-\d{5}", "-*", path.name)
        label = label if path.parent == folder else f"{path.parent.name}/{label}"
        counts[label] = counts.get(label, 0) + 1
    return [
        f"`{command}`",
        ", ".join(f"{count} x `{label}`" if count > 1 else f"`{label}`" for label, count in counts.items()),
        f"{sum(path.stat().st_size for path in read) / 1e9:.2f}",
        f"{plan.nbytes / 1e9:.2f}",
        f"{plan.peak_memory / 1e6:.0f}",
    ]


HEADER = ["command", "files read", "GB read", "GB written", "peak memory, MB", "vision tower", "base"]


def rows() -> Iterator[list[str]]:
    """The rows of the table, one per published checkpoint."""
    for published in PUBLISHED:
        with tempfile.TemporaryDirectory() as root:
            cells = describe(write_checkpoint(Path(root), published), published.command)
        needed = [f"`{published.vision_tower}`", f"`{published.language_model}`"]
        yield cells + (needed if published.is_base else ["inside", "none"])
    with tempfile.TemporaryDirectory() as root:
        command = "videollama2 convert LanguageBind/Video-LLaVA-7B --output Video-LLaVA-7B-hf"
        yield [*describe(write_video_llava(Path(root)), command), "inside, both", "none"]


def format_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(format_row(HEADER))
    print(format_row(["---"] * len(HEADER)))
    for row in rows():
        print(format_row(row), flush=True)
