"""The published checkpoints: how to know them, and what their authors published about them."""

from dataclasses import dataclass
from typing import Any

from ..configuration_videollama2 import VideoLlama2Config


@dataclass(frozen=True)
class Published:
    """
    A published checkpoint.

    Args:
        language_model: Repository of the language model that it began with.
        hidden_size, num_layers: Sizes of that language model, to know the checkpoint by more than its name.
        num_frames: Frames of a video.
        hears: Whether it has an audio tower.
        scores: As published, by benchmark.
    """

    language_model: str
    hidden_size: int
    num_layers: int
    num_frames: int
    hears: bool = False
    scores: tuple[tuple[str, str], ...] = ()

    def is_described_by(self, config: VideoLlama2Config) -> bool:
        """Whether a configuration is this checkpoint's."""
        text: Any = config.text_config
        return (text.hidden_size, text.num_hidden_layers, config.num_frames, config.audio_config is not None) == (
            self.hidden_size,
            self.num_layers,
            self.num_frames,
            self.hears,
        )


_BENCHMARKS = (
    "EgoSchema",
    "Perception-Test",
    "MVBench",
    "Video-MME without / with subtitles",
    "MSVC correctness / detail",
    "MSVD-QA accuracy / score",
    "ActivityNet-QA accuracy / score",
    "Video-ChatGPT: correctness, detail, context, time, consistency",
)


def _scores(*values: str) -> tuple[tuple[str, str], ...]:
    return tuple(zip(_BENCHMARKS, values))


_MISTRAL = ("mistralai/Mistral-7B-Instruct-v0.2", 4096, 32)
_MIXTRAL = ("mistralai/Mixtral-8x7B-Instruct-v0.1", 4096, 32)
_QWEN2, _QWEN2_72B = ("Qwen/Qwen2-7B-Instruct", 3584, 28), ("Qwen/Qwen2-72B-Instruct", 8192, 80)
# Scores: tables of the paper (arXiv 2406.07476v3, 2311.10122) and of the original's README.md.
PUBLISHED = {
    "DAMO-NLP-SG/VideoLLaMA2-7B": Published(
        *_MISTRAL,
        8,
        scores=_scores(
            "50.5",
            "49.6",
            "53.4",
            "45.1 / 46.6",
            "2.57 / 2.61",
            "71.7 / 3.9",
            "49.9 / 3.3",
            "3.09, 3.09, 3.68, 2.63, 3.25",
        ),
    ),
    "DAMO-NLP-SG/VideoLLaMA2-7B-Base": Published(*_MISTRAL, 8),
    "DAMO-NLP-SG/VideoLLaMA2-7B-16F": Published(
        *_MISTRAL,
        16,
        scores=_scores(
            "51.7",
            "51.4",
            "54.6",
            "47.9 / 50.3",
            "2.53 / 2.59",
            "70.9 / 3.8",
            "50.2 / 3.3",
            "3.16, 3.08, 3.69, 2.56, 3.14",
        ),
    ),
    "DAMO-NLP-SG/VideoLLaMA2-7B-16F-Base": Published(*_MISTRAL, 16),
    "DAMO-NLP-SG/VideoLLaMA2-8x7B": Published(
        *_MIXTRAL,
        8,
        scores=_scores(
            "53.3",
            "52.2",
            "53.9",
            "47.9 / 49.7",
            "2.53 / 2.56",
            "70.5 / 3.8",
            "50.3 / 3.4",
            "3.08, 3.11, 3.64, 2.67, 3.26",
        ),
    ),
    "DAMO-NLP-SG/VideoLLaMA2-8x7B-Base": Published(*_MIXTRAL, 8),
    "DAMO-NLP-SG/VideoLLaMA2-72B": Published(
        *_QWEN2_72B,
        8,
        scores=_scores(
            "63.9",
            "57.5",
            "62.0",
            "61.4 / 63.1",
            "2.71 / 2.67",
            "71.0 / 3.8",
            "55.2 / 3.4",
            "3.23, 3.11, 3.71, 2.62, 3.12",
        ),
    ),
    "DAMO-NLP-SG/VideoLLaMA2-72B-Base": Published(*_QWEN2_72B, 8),
    "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F": Published(
        *_QWEN2,
        16,
        scores=_scores(
            "53.1",
            "54.9",
            "57.3",
            "54.9 / 56.4",
            "2.87 / 2.81",
            "70.6 / 3.8",
            "53.0 / 3.4",
            "3.30, 3.18, 3.78, 2.66, 3.20",
        ),
    ),
    "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F-Base": Published(*_QWEN2, 16),
    "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV": Published(
        *_QWEN2,
        16,
        hears=True,
        scores=(
            ("Clotho-AQA", "71.02"),
            ("TUT2017", "77.28"),
            ("VocalSound", "92.40"),
            ("Music-AVQA", "80.9"),
            ("AVSD", "57.2"),
            ("VGGSound (AVSSD)", "71.4"),
        ),
    ),
    "LanguageBind/Video-LLaVA-7B": Published(
        "lmsys/vicuna-7b-v1.5",
        4096,
        32,
        8,
        scores=(
            ("MSVD-QA accuracy / score", "70.7 / 3.9"),
            ("MSRVTT-QA accuracy / score", "59.2 / 3.5"),
            ("TGIF-QA accuracy / score", "70.0 / 4.0 (later evaluations: 47.0 / 3.3)"),
            ("ActivityNet-QA accuracy / score", "45.3 / 3.3"),
            ("VQAv2", "74.7"),
            ("GQA", "60.3"),
            ("VizWiz", "48.1"),
            ("ScienceQA-Image", "66.4"),
            ("TextVQA", "51.8"),
            ("POPE", "84.4"),
            ("MMBench", "60.9"),
        ),
    ),
}


def find_published(name: str, config: VideoLlama2Config) -> str | None:
    """
    The repository of a published checkpoint that goes by this name, or has it as its last part, and has this
    configuration: sizes alone would take a fine-tuned model for the published one.
    """
    last = name.split("/")[-1].lower()
    for repository, published in PUBLISHED.items():
        same = repository.lower() == name.lower() if "/" in name else repository.split("/")[-1].lower() == last
        if same and published.is_described_by(config):
            return repository
    return None
