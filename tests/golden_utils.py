"""Reading the recordings of the original: its negative placeholder ids and spliced sequences, in our terms."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from videollama2_hf import VideoLlama2Config, get_num_audio_tokens


GOLDENS = Path(__file__).parent / "goldens"
ORIGINAL_IDS = {-200: "image", -201: "video", -202: "audio"}


class Recording:
    """One folder of recordings."""

    def __init__(self, name: str):
        self.folder = GOLDENS / name
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.outputs = load_file(self.folder / "outputs.safetensors")

    def medium(self, name: str) -> torch.Tensor:
        """A tensor by the manifest's name for it, `video_a[:1]` included."""
        match = re.fullmatch(r"(\w+)(\[:1\])?", name)
        tensor = self.inputs[match[1]].float()
        return tensor[:1] if match[2] else tensor

    def model_inputs(self, case: str, config: VideoLlama2Config, with_labels: bool = True) -> dict[str, torch.Tensor]:
        """
        The case's inputs for this model: placeholders expanded, rows right-padded as the original pads its spliced
        rows.
        """
        ids, rows = self.inputs[f"{case}.input_ids"].long(), []
        mask = self.inputs.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
        labels = self.inputs.get(f"{case}.labels")
        queue = list(self.manifest["cases"][case].get("images") or [])
        media: dict[str, list[torch.Tensor]] = {"image": [], "video": [], "audio": []}
        for row in range(len(ids)):
            new_ids, new_mask, new_labels = [], [], []
            if not (ids[row] < 0).any() and queue:
                queue.pop(0)  # the original wants a dummy entry for a text-only row
            for position, token in enumerate(ids[row].tolist()):
                run, label = [token], -100 if labels is None else int(labels[row, position])
                if token < 0:
                    name, modality = queue.pop(0)
                    match = re.fullmatch(r"\{video:(\w+),audio:(\w+)\}", name)
                    parts = [("video", match[1]), ("audio", match[2])] if match else [(modality, name)]
                    run, label = [], -100
                    for kind, tensor_name in parts:
                        tensor = self.medium(tensor_name)
                        if kind == "audio":
                            count = get_num_audio_tokens(tensor.shape[1])
                        else:
                            count = config.num_visual_tokens(kind, tensor.shape[0])
                        media[kind].append(tensor)
                        run += [getattr(config, f"{kind}_token_id")] * count
                new_ids += run
                new_mask += [bool(mask[row, position])] * len(run)
                new_labels += [label] * len(run)
            rows.append((new_ids, new_mask, new_labels))
        length = max(len(row[0]) for row in rows)
        inputs = {
            "input_ids": torch.tensor([row[0] + [0] * (length - len(row[0])) for row in rows]),
            "attention_mask": torch.tensor([row[1] + [False] * (length - len(row[1])) for row in rows]).long(),
        }
        if labels is not None and with_labels:
            inputs["labels"] = torch.tensor([row[2] + [-100] * (length - len(row[2])) for row in rows])
        if media["image"]:
            inputs["pixel_values"] = torch.cat(media["image"])
        if media["video"]:
            inputs["pixel_values_videos"] = torch.stack(media["video"])
        if media["audio"]:
            inputs["input_features"] = torch.cat(media["audio"])
        return inputs
