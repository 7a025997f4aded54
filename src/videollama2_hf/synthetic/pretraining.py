"""
Stage 0: the parts that the published recipe takes ready-made (vision tower, audio tower, language model) learn the
world's alphabet first.

The vision tower learns which colour, shape and texture every patch shows, and where it lies; the audio tower which
sound begins and is there at every sixth of a second; the language model to answer questions about captions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from torch.utils.data import Dataset

from .dataset import draw_media
from .rendering import NUM_SAMPLES, SAMPLING_RATE, cover, describe_frames, describe_sounds, draw_frames
from .world import COLOURS, MAX_THINGS, SECONDS, SHAPES, SOUNDS, Clip, draw_clip


# Parts of a clip that the audio tower's patches tell apart.
_NUM_TIMES = 8


class ClipDataset(Dataset):
    """Clips of the training compositions by number; clip `i` follows from `(seed, i)` alone."""

    def __init__(self, num_clips: int, seed: int, scenes: tuple[str, ...], beeps: float = 0.0):
        self.num_clips, self.seed, self.scenes, self.beeps = num_clips, seed, scenes, beeps

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> Clip:
        generator = np.random.default_rng([self.seed, index])
        wants_beeps = generator.random() < self.beeps
        clip = draw_clip(generator, scenes=self.scenes)
        while wants_beeps and not clip.num_beeps:
            clip = draw_clip(generator, scenes=self.scenes)
        return clip


def collate_frames(clips: Sequence[Clip]) -> dict[str, Any]:
    """One frame of every clip, at a second that is the batch's."""
    time = np.random.default_rng(clips[0].noise_seed).uniform(0, SECONDS)
    return {"drawn": describe_frames(clips, np.array([time]))}


def collate_sounds(clips: Sequence[Clip]) -> dict[str, Any]:
    return {"drawn": {"sound": describe_sounds(clips)}}


@torch.no_grad()
def label_patches(description: dict[str, torch.Tensor], side: int, patch_size: int) -> dict[str, torch.Tensor]:
    """
    What every patch shows, int64 (clips, patches): `colour`, `shape` and `texture`, and the `row` and `column` where
    it shows it, count from 1, 0 is the background and -100 an edge; `centre` is 1 where the centre of a thing lies.
    `present` (clips, 24) says which kinds of things are there and `number` (clips,) how many. Of the first frame.
    """
    clips = len(description["radius"])
    device = description["radius"].device
    cells = side // patch_size
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)
    share = torch.zeros(clips, MAX_THINGS, cells * cells, device=device)
    centre = torch.zeros(clips, cells * cells, dtype=torch.long, device=device)
    visible = description["visible"][:, 0] > 0
    for thing in range(MAX_THINGS):
        covered, _ = cover(description, thing, side)
        share[:, thing] = nn.functional.avg_pool2d(covered[:, :1], patch_size).flatten(1)
        x, y = (description["place"][:, 0, thing] * cells).long().clamp(0, cells - 1).unbind(1)
        inside = visible[:, thing].nonzero()[:, 0]
        centre[inside, (y * cells + x)[inside]] = 1
    most, which = share.max(dim=1)
    colour = torch.cdist(description["colour"][:, 0], palette).argmin(dim=2)  # (clips, things)
    kinds = {
        "colour": colour,
        "shape": description["shape"],
        "texture": description["striped"].long(),
    }
    patches = torch.arange(cells * cells, device=device).expand_as(which)
    shown = {name: values.gather(1, which) for name, values in kinds.items()}
    shown |= {"row": patches // cells, "column": patches % cells}
    labels = {}
    for name, values in shown.items():
        label = values + 1
        label[most < 0.35] = -100
        label[most < 0.03] = 0
        labels[name] = label
    present = torch.zeros(clips, len(COLOURS) * len(SHAPES), device=device)
    present.scatter_add_(1, colour * len(SHAPES) + description["shape"], visible.float())
    return {**labels, "centre": centre, "present": present.clamp(max=1), "number": visible.sum(dim=1)}


class CosineHead(nn.Linear):
    """
    Classes by their cosine with the features, times a fixed scale: (..., width) -> (..., classes).

    A linear head is content with a trace of what it is asked for, and the connector, which learns from few clips,
    finds no traces. With several of these on the same features all that they ask for has to be about equally strong.
    """

    scale = 16.0

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(normalize(features.float(), dim=-1)).div(self.weight.norm(dim=1))


class VisionPretraining(nn.Module):
    """The vision tower with heads on the layer that the connector reads, and on the last one."""

    def __init__(self, tower: nn.Module, layer: int = -2):
        super().__init__()
        self.tower, self.layer = tower, layer
        config: Any = tower.config
        side = config.image_size // config.patch_size
        sizes = {"colour": len(COLOURS), "shape": len(SHAPES), "texture": 2, "row": side, "column": side, "centre": 1}
        self.heads = nn.ModuleDict({name: CosineHead(config.hidden_size, size + 1) for name, size in sizes.items()})
        self.present = nn.Linear(config.hidden_size, len(COLOURS) * len(SHAPES))
        self.number = nn.Linear(config.hidden_size, MAX_THINGS + 1)

    def forward(self, drawn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config: Any = self.tower.config
        pixels = draw_frames(drawn, config.image_size)[:, 0].float() / 127.5 - 1
        labels = label_patches(drawn, config.image_size, config.patch_size)
        outputs = self.tower(pixels, output_hidden_states=True)
        features = outputs.hidden_states[self.layer]
        pooled = outputs.last_hidden_state.mean(dim=1)
        loss = binary_cross_entropy_with_logits(self.present(pooled).float(), labels["present"])
        loss = loss + 0.3 * cross_entropy(self.number(pooled).float(), labels["number"])
        accuracies = {}
        for name, head in self.heads.items():
            logits = head(features).flatten(0, 1)
            target = labels[name].flatten()
            # Most patches show nothing.
            weight = logits.new_tensor([0.25] + [1.0] * (logits.shape[1] - 1))
            loss = loss + cross_entropy(logits, target, weight)
            asked = target > 0
            accuracies[name] = (logits.argmax(dim=1) == target)[asked].float().mean().detach()
        return {"loss": loss, **accuracies}


class AudioPretraining(nn.Module):
    """The audio tower with heads that tell at every patch in time which sounds begin and are there, and when."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        config: Any = tower.config
        sizes = {"onset": len(SOUNDS), "active": len(SOUNDS), "time": _NUM_TIMES}
        self.heads = nn.ModuleDict({name: CosineHead(config.hidden_size, size + 1) for name, size in sizes.items()})
        self.beeps = nn.Linear(config.hidden_size, MAX_THINGS + 1)

    def forward(self, drawn: dict[str, Any]) -> dict[str, torch.Tensor]:
        config: Any = self.tower.config
        features = self.tower(draw_media(drawn, num_mel_bins=config.num_mel_bins)["input_features"]).last_hidden_state
        steps = features.unflatten(1, (-1, config.num_mel_bins // config.patch_size)).mean(dim=2)
        labels = label_sounds(drawn["sound"], steps.shape[1], config.patch_size)
        number = self.beeps(steps).float().mean(dim=1)
        loss = 0.2 * cross_entropy(number, labels["beeps"])
        counted = labels["beeps"] > 0
        accuracies = {"beeps": (number.argmax(dim=1) == labels["beeps"])[counted].float().mean()}
        for name, head in self.heads.items():
            logits, target = head(steps).flatten(0, 1), labels[name].flatten()
            # Mostly nothing begins, which counts less.
            loss = loss + cross_entropy(logits, target, logits.new_tensor([0.1] + [1.0] * (logits.shape[1] - 1)))
            predicted, asked = logits.argmax(dim=1), target > 0
            accuracies[name] = (predicted == target)[asked].float().mean()
            accuracies[f"false_{name}"] = ((predicted > 0) & ~asked).sum() / asked.sum().clamp(min=1)
        return {"loss": loss, **accuracies}


@torch.no_grad()
def label_sounds(description: dict[str, torch.Tensor], steps: int, patch_size: int) -> dict[str, torch.Tensor]:
    """
    Which sound begins (`onset`) and which is there (`active`) in every step of `patch_size` filter-bank frames, and at
    which eighth of the clip (`time`), int64 (clips, steps), where 0 is none and others count from 1; and how many
    `beeps` there are, int64 (clips,).
    """
    clips, device = len(description["noise"]), description["noise"].device
    onset, active = (torch.zeros(clips, steps, dtype=torch.long, device=device) for _ in range(2))
    samples = patch_size * SAMPLING_RATE // 100
    lengths = torch.tensor([seconds for _, _, seconds in SOUNDS.values()], device=device) * SAMPLING_RATE
    first = description["onset"]
    last = (first + lengths[description["name"]]).clamp(max=NUM_SAMPLES - 1)
    begins = (first // samples).clamp(max=steps - 1)
    onset[description["clip"], begins] = description["name"] + 1
    step = torch.arange(steps, device=device) * samples
    is_there = (step[None] + samples * 0.7 >= first[:, None]) & (step[None] + samples * 0.3 <= last[:, None])
    index = torch.arange(steps, device=device).expand_as(is_there)
    clip, name = (description[key][:, None].expand_as(is_there) for key in ("clip", "name"))
    active[clip[is_there], index[is_there]] = name[is_there] + 1
    beeps = torch.zeros(clips, dtype=torch.long, device=device)
    is_beep = (description["name"] == list(SOUNDS).index("beep")).long()
    beeps = beeps.index_add(0, description["clip"], is_beep)
    time = torch.where(active > 0, torch.arange(steps, device=device) * _NUM_TIMES // steps + 1, 0)
    return {"onset": onset, "active": active, "time": time, "beeps": beeps}


__all__ = [
    "AudioPretraining",
    "ClipDataset",
    "VisionPretraining",
    "collate_frames",
    "collate_sounds",
    "label_patches",
    "label_sounds",
]
