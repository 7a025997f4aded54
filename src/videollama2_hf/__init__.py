"""
VideoLLaMA 2 and Video-LLaVA for transformers.

Importing the package registers its classes with the Auto classes, so `AutoProcessor.from_pretrained` and
`AutoModelForMultimodalLM.from_pretrained` load them, original checkpoints included.
"""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_videollama2 import (
    LanguageBindVisionConfig,
    VideoLlama2AudioConfig,
    VideoLlama2Config,
    get_num_audio_tokens,
    get_num_visual_tokens,
)
from .modeling_videollama2 import (
    LanguageBindVisionModel,
    VideoLlama2AudioModel,
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Model,
)


AutoModel.register(VideoLlama2Config, VideoLlama2Model, exist_ok=True)
for _auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
    _auto_class.register(VideoLlama2Config, VideoLlama2ForConditionalGeneration, exist_ok=True)

__all__ = [
    "LanguageBindVisionConfig",
    "LanguageBindVisionModel",
    "VideoLlama2AudioConfig",
    "VideoLlama2AudioModel",
    "VideoLlama2Config",
    "VideoLlama2ForConditionalGeneration",
    "VideoLlama2Model",
    "get_num_audio_tokens",
    "get_num_visual_tokens",
]
