"""
VideoLLaMA 2 and Video-LLaVA for transformers.

Importing the package registers its classes with the Auto classes, so `AutoProcessor.from_pretrained` and
`AutoModelForMultimodalLM.from_pretrained` load them, original checkpoints included.
"""

from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)

from .configuration_videollama2 import (
    LanguageBindVisionConfig,
    VideoLlama2AudioConfig,
    VideoLlama2Config,
    get_num_audio_tokens,
    get_num_visual_tokens,
)
from .feature_extraction_videollama2 import VideoLlama2FeatureExtractor
from .image_processing_videollama2 import VideoLlama2ImageProcessor
from .media_videollama2 import VideoClip
from .modeling_videollama2 import (
    LanguageBindVisionModel,
    VideoLlama2AudioModel,
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Model,
)
from .processing_videollama2 import VideoLlama2Processor
from .video_processing_videollama2 import VideoLlama2VideoProcessor


AutoModel.register(VideoLlama2Config, VideoLlama2Model, exist_ok=True)
for _auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
    _auto_class.register(VideoLlama2Config, VideoLlama2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoLlama2Config, VideoLlama2Processor, exist_ok=True)
AutoImageProcessor.register(
    VideoLlama2Config, image_processor_classes={"torchvision": VideoLlama2ImageProcessor}, exist_ok=True
)
AutoVideoProcessor.register(VideoLlama2Config, VideoLlama2VideoProcessor, exist_ok=True)
AutoFeatureExtractor.register(VideoLlama2Config, VideoLlama2FeatureExtractor, exist_ok=True)
# So that saving copies the code of the processors too.
VideoLlama2Processor.register_for_auto_class()
VideoLlama2ImageProcessor.register_for_auto_class("AutoImageProcessor")
VideoLlama2VideoProcessor.register_for_auto_class("AutoVideoProcessor")
VideoLlama2FeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = [
    "LanguageBindVisionConfig",
    "LanguageBindVisionModel",
    "VideoClip",
    "VideoLlama2AudioConfig",
    "VideoLlama2AudioModel",
    "VideoLlama2Config",
    "VideoLlama2FeatureExtractor",
    "VideoLlama2ForConditionalGeneration",
    "VideoLlama2ImageProcessor",
    "VideoLlama2Model",
    "VideoLlama2Processor",
    "VideoLlama2VideoProcessor",
    "get_num_audio_tokens",
    "get_num_visual_tokens",
]
