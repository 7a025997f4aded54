"""Processor of VideoLLaMA 2 and Video-LLaVA: messages in, model inputs out."""

import os
from inspect import signature
from typing import Any, Literal

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import (
    AudioKwargs,
    MultiModalData,
    OmniModalProcessingKwargs,
    OmniModalProcessorMixin,
    Unpack,
)
from transformers.tokenization_utils_base import AudioInput, PreTokenizedInput, PreTrainedTokenizerBase, TextInput
from transformers.utils import PROCESSOR_NAME, cached_file
from transformers.video_utils import VideoInput

from .checkpoint_videollama2 import (
    PLACEHOLDER_TOKENS,
    add_placeholder_tokens,
    find_original_config,
    load_original_image_processor_config,
    load_original_tokenizer,
)
from .configuration_videollama2 import VideoLlama2Config, get_num_audio_tokens, get_num_visual_tokens
from .messages_videollama2 import (
    check_audio_indices,
    check_conversations,
    collect_media,
    flat_images,
    flat_sounds,
    flat_videos,
    load_sound,
    load_track,
    prepare_messages,
)
from .processor_defaults_videollama2 import LOADING_ARGUMENTS, get_processor_arguments
from .prompt_videollama2 import (
    encode_prompts,
    find_assistant_spans,
    split_at_placeholders,
)
from .tokenization_videollama2 import HUB_ARGUMENTS


MissingAudio = Literal["silence", "drop", "error"]


class VideoLlama2AudioKwargs(AudioKwargs, total=False):
    """
    audio_mode (`str`, *optional*):
        What is heard of a long sound, `"reference"` or `"full"`; see [`VideoLlama2FeatureExtractor`].
    """

    audio_mode: str | None


class VideoLlama2ProcessorKwargs(OmniModalProcessingKwargs, total=False):
    """
    missing_audio (`str`, *optional*):
        What is heard of a video without an audio track where its sound is asked for: `"silence"` (as the original
        trains), `"drop"` (no audio tokens) or `"error"`. `None` takes the processor's `missing_audio_policy`. A track
        that cannot be decoded is always an error.
    """

    audio_kwargs: VideoLlama2AudioKwargs
    missing_audio: MissingAudio | None


class VideoLlama2Processor(OmniModalProcessorMixin):
    r"""
    Turns prompts and media into the inputs of VideoLLaMA 2 and Video-LLaVA.

    Prompts are tokenised as the original does: the texts before, between and behind the media each by itself, without
    special tokens other than those that the chat template prints. Every medium becomes as many placeholder ids as it
    will have features; a video with its sound is its video placeholders followed by its audio placeholders.

    Args:
        connector_type (`str`): The model's connector; with the numbers that follow it gives the placeholders of an
            image or a video, see [`get_num_visual_tokens`].
        patch_size (`int`), video_patch_size (`int`, *optional*): Patch sizes of the vision towers, in pixels. `None`:
            that of images.
        image_num_frames (`int`): Frames that an image is repeated to before the connector.
        image_class_tokens (`int`), video_class_tokens (`int`): Class tokens kept in front of a frame's patches.
        audio_patch_size (`int`): Patch size of BEATs, in filter-bank frames and bins.
        has_audio (`bool`): Whether the model hears. If not, sounds are refused.
        hears_videos (`bool`, *optional*): Default of `load_audio_from_video`. `None`: `has_audio`.
        missing_audio_policy (`str`): Default of the argument `missing_audio`; see [`VideoLlama2ProcessorKwargs`].
        context_length (`int`, *optional*): Longest prompt that the model takes, in tokens. `None`: not checked.
        add_bos_token (`bool`): Whether prompts begin with the tokenizer's BOS token, which the template does not print
            (Video-LLaVA).
    """

    valid_processor_kwargs = VideoLlama2ProcessorKwargs
    skip_tensor_conversion = ["video_metadata", "text_replacement_offsets", "offset_mapping"]

    text_kwargs = {"padding": True}

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        feature_extractor=None,
        tokenizer=None,
        chat_template=None,
        connector_type: str = "stc_connector",
        patch_size: int = 14,
        video_patch_size: int | None = None,
        image_num_frames: int = 8,
        image_class_tokens: int = 0,
        video_class_tokens: int = 0,
        audio_patch_size: int = 16,
        has_audio: bool = False,
        missing_audio_policy: MissingAudio = "silence",
        context_length: int | None = None,
        add_bos_token: bool = False,
        hears_videos: bool | None = None,
    ):
        if missing_audio_policy not in MissingAudio.__args__:
            raise ValueError(
                f"missing_audio_policy must be 'silence', 'drop' or 'error', got {missing_audio_policy!r}."
            )
        self.connector_type = connector_type
        self.patch_size = patch_size
        self.video_patch_size = video_patch_size
        self.image_num_frames = image_num_frames
        self.image_class_tokens = image_class_tokens
        self.video_class_tokens = video_class_tokens
        self.audio_patch_size = audio_patch_size
        self.has_audio = has_audio
        self.missing_audio_policy = missing_audio_policy
        self.context_length = context_length
        self.add_bos_token = add_bos_token
        self.hears_videos = hears_videos
        super().__init__(image_processor, video_processor, feature_extractor, tokenizer, chat_template=chat_template)

        add_placeholder_tokens(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.image_token, self.video_token, self.audio_token = PLACEHOLDER_TOKENS
        ids = tokenizer.convert_tokens_to_ids(list(PLACEHOLDER_TOKENS))
        self.image_token_id, self.video_token_id, self.audio_token_id = ids

    @property
    def load_audio_from_video(self) -> bool:
        """Whether the sound of videos is heard where neither the call nor the block says; saved as `hears_videos`."""
        return self.has_audio if self.hears_videos is None else self.hears_videos

    @load_audio_from_video.setter
    def load_audio_from_video(self, value: bool):
        self.hears_videos = value

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "VideoLlama2Processor":
        """
        As for every processor. From the folder or Hub repository of an original checkpoint, which has none, it is made
        of the tokenizer there, the vision tower's preprocessing and the model's configuration.
        """
        checkpoint = str(pretrained_model_name_or_path)
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if cached_file(checkpoint, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is None:
            config_dict = find_original_config(checkpoint, **hub_kwargs)
            if config_dict is not None:
                own = {name: value for name, value in kwargs.items() if name not in LOADING_ARGUMENTS}
                if "_from_pipeline" in own:  # a pipeline passes the model's options too, such as dtype
                    own = {}
                return cls.from_config(
                    VideoLlama2Config.from_pretrained(checkpoint, **hub_kwargs),
                    load_original_tokenizer(checkpoint, config_dict, **hub_kwargs),
                    load_original_image_processor_config(config_dict, checkpoint),
                    **own,
                )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_config(
        cls,
        config: VideoLlama2Config,
        tokenizer: PreTrainedTokenizerBase,
        vision_preprocessor: dict[str, Any] | None = None,
        **kwargs,
    ) -> "VideoLlama2Processor":
        """
        The processor of a model that comes without one: an original checkpoint, or a new combination of parts.

        Args:
            config: The model's configuration.
            tokenizer: The language model's tokenizer; see [`load_tokenizer`] for that of an original checkpoint. Its
                chat template is kept. Without one, a model with Video-LLaVA's connector takes Video-LLaVA's.
            vision_preprocessor: `preprocessor_config.json` of the vision tower. `None`: what towers of its kind have.
            **kwargs: Arguments of the processor that are to differ, or options of its parts (`num_frames`, `exact`,
                `audio_mode`, `padding_side`, ...), each for every part that has it.

        Raises:
            TypeError: Neither the processor nor a part of it has an argument of that name.
            ValueError: The placeholder ids of the configuration are not the tokenizer's.
        """
        own = {name: kwargs.pop(name) for name in signature(cls).parameters if name in kwargs}
        arguments = get_processor_arguments(config, tokenizer, vision_preprocessor, **kwargs)
        return cls(tokenizer=tokenizer, **{**arguments, **own})

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As for every processor, which stays as it was: transformers would leave an `auto_map` on it."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.__dict__.pop("auto_map", None)
        return files

    # Prompts and media to model inputs

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        audio_from_video_indices: list[int | None] | None = None,
        **kwargs: Unpack[VideoLlama2ProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Model inputs from prompts that hold one placeholder token per medium.

        Args:
            images, videos, audio: The media of all prompts in reading order, each kind by itself; any form that the
                image processor, the video processor and the feature extractor take. May be nested by prompt.
            text: A prompt or a list of prompts; [`apply_chat_template`] makes them from messages.
            audio_from_video_indices: One entry per sound: the index of the video whose sound it is, or `None` for one
                of `audio`. Needed only to hear some of the videos, or if `audio` holds the sounds of the videos too.

        Returns:
            `input_ids` and `attention_mask` (batch, length), padded on `padding_side`, and as far as there are such
            media `pixel_values`, `pixel_values_videos`, `input_features` and `input_features_mask`.

        Raises:
            ValueError: Prompts and media do not fit together, the model does not hear, or a prompt is too long.
        """
        images, text, videos, audio = self.prepare_inputs_layout(images, text, videos, audio)
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        hears_videos = options["videos_kwargs"].pop("load_audio_from_video", options["load_audio_from_video"])
        heard, tracks = set(range(len(videos or []))) if hears_videos else set(), {}
        if audio_from_video_indices is None:
            heard = heard if self.has_audio else set()  # as in transformers, the flag means nothing to a deaf model
        else:
            check_audio_indices(audio_from_video_indices, len(videos or []), len(audio or []))
            heard &= set(audio_from_video_indices)
            if heard and audio and len(audio) == len(audio_from_video_indices):
                tracks = {index: sound for index, sound in zip(audio_from_video_indices, audio) if index in heard}
                audio = [sound for index, sound in zip(audio_from_video_indices, audio) if index is None]
        self.validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if (audio or heard) and not self.has_audio:
            raise ValueError(
                "This model does not hear (has_audio=False), so it takes no sounds, of videos or by themselves. Leave "
                "them out, or use a model with an audio tower."
            )

        prompts = [split_at_placeholders(prompt) for prompt in text or []]
        tokens = [token for prompt in prompts for token in prompt[1::2]]
        if text is None:
            tokens = [self.video_token] * len(videos or []) + [self.audio_token] * len(audio or [])
        media = _number(tokens)

        sounds = self._load_sounds(media, videos or [], audio or [], heard, tracks, options)

        processed, num_tokens, num_sound_tokens = {}, {}, {}
        if images:
            processed |= self.image_processor(images, **options["images_kwargs"])
            for index, pixels in enumerate(processed["pixel_values"]):
                num_tokens[self.image_token, index] = self._num_image_tokens(pixels)
        if videos:
            processed |= self.video_processor(videos, **options["videos_kwargs"])
            for index, pixels in enumerate(processed["pixel_values_videos"]):
                num_tokens[self.video_token, index] = self._num_video_tokens(pixels)
        if sounds:
            waveforms, rates = zip(*sounds.values())
            audio_options = {name: options["audio_kwargs"].get(name) for name in ("return_tensors", "audio_mode")}
            processed |= self.feature_extractor(list(waveforms), list(rates), **audio_options)
            for name, mask in zip(sounds, processed["input_features_mask"]):
                num_sound_tokens[name] = self._num_audio_tokens(mask)

        if text is not None:
            expansions = []
            for name in media:
                expansion = [(name[0], num_tokens[name])] if name in num_tokens else []
                if name in num_sound_tokens:
                    expansion.append((self.audio_token, num_sound_tokens[name]))
                expansions.append(expansion)
            processed = {**self._tokenize(prompts, expansions, options), **processed}
        if not kwargs.get("return_metadata"):
            processed.pop("video_metadata", None)
        ragged = ["pixel_values_videos"] if isinstance(processed.get("pixel_values_videos"), list) else []
        return BatchFeature(
            processed,
            tensor_type=options["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion + ragged,
        )

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs) -> tuple:
        """Flat lists of prompts and of opened images, videos and sounds; `None` for what there is none of."""
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        if images is not None:
            images = self.image_processor.fetch_images(flat_images(images))
        if videos is not None:
            videos = flat_videos(videos)
        if audio is not None:
            audio = flat_sounds(audio)
        return images or None, text, videos or None, audio or None

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Refuses prompts and media that do not fit together."""
        if "audios" in kwargs:
            raise ValueError("Pass sounds as `audio`, not as `audios`.")
        if images is None and text is None and videos is None and audio is None:
            raise ValueError("There is nothing to process: pass at least one of images, text, videos and audio.")
        if text is None:
            return
        if not all(isinstance(prompt, str) for prompt in text):
            raise ValueError("`text` must be a string or a list of strings.")
        tokens = [token for prompt in text for token in split_at_placeholders(prompt)[1::2]]
        for token, name, media in zip(
            PLACEHOLDER_TOKENS, ("images", "videos", "audio inputs"), (images, videos, audio)
        ):
            if tokens.count(token) != len(media or []):
                raise ValueError(
                    f"The number of {token} tokens in the prompts should be the same as the number of {name} passed, "
                    f"but there are {tokens.count(token)} {token} tokens and {len(media or [])} {name}."
                )

    def _load_sounds(
        self, media: list[tuple[str, int]], videos: list, audio: list, heard: set, tracks: dict, options: dict
    ) -> dict[tuple[str, int], tuple[Any, int]]:
        """Waveforms and rates in reading order, by the placeholder that they belong to: a sound's, or a video's."""
        extractor, sampling_rate = self.feature_extractor, options["audio_kwargs"].get("sampling_rate")
        audio_mode = options["audio_kwargs"].get("audio_mode")
        window = [options["videos_kwargs"].get(name) for name in ("start", "end")]
        policy = options.get("missing_audio") or self.missing_audio_policy
        sounds = {}
        for token, index in media:
            if token == self.audio_token:
                sounds[token, index] = load_sound(extractor, audio[index], sampling_rate, audio_mode)
            elif token == self.video_token and index in tracks:
                sounds[token, index] = load_sound(extractor, tracks[index], sampling_rate, audio_mode)
            elif token == self.video_token and index in heard:
                track = load_track(extractor, videos[index], *window, audio_mode)
                if track is None and policy == "error":
                    raise ValueError(
                        f"Video {index} has no audio track, and missing_audio is 'error' (a track that ends before "
                        "the part that is taken counts as none). Choose 'silence' or 'drop', or "
                        "load_audio_from_video=False for it."
                    )
                if track is None and policy == "silence":
                    track = extractor.silent_waveform(), extractor.sampling_rate
                if track is not None:
                    sounds[token, index] = track
        return sounds

    # Placeholders

    def _num_image_tokens(self, pixels: torch.Tensor) -> int:
        rows, columns = (size // self.patch_size for size in pixels.shape[-2:])
        return get_num_visual_tokens(
            self.connector_type, self.image_num_frames, rows, columns, self.image_class_tokens
        )

    def _num_video_tokens(self, pixels: torch.Tensor) -> int:
        patch_size = self.video_patch_size or self.patch_size
        rows, columns = (size // patch_size for size in pixels.shape[-2:])
        return get_num_visual_tokens(self.connector_type, len(pixels), rows, columns, self.video_class_tokens)

    def _num_audio_tokens(self, mask: torch.Tensor) -> int:
        return get_num_audio_tokens(int(mask.sum()), self.feature_extractor.feature_size, self.audio_patch_size)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self._num_image_tokens(image_inputs["pixel_values"][image_idx])

    def replace_video_token(
        self,
        video_inputs: dict,
        video_idx: int,
        processed_audio: Any = None,
        video_to_audio_indices: list[int | None] | None = None,
        **kwargs,
    ) -> str:
        text = self.video_token * self._num_video_tokens(video_inputs["pixel_values_videos"][video_idx])
        audio_idx = video_to_audio_indices[video_idx] if video_to_audio_indices else None
        return text if audio_idx is None else text + self.replace_audio_token(processed_audio, audio_idx)

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        return self.audio_token * self._num_audio_tokens(audio_inputs["input_features_mask"][audio_idx])

    # Text

    def _tokenize(self, prompts: list[list[str]], expansions: list[list[tuple[str, int]]], options: dict) -> dict:
        """`input_ids` and `attention_mask` of split prompts, and what else `options` ask for."""
        text_options = options["text_kwargs"]
        unsupported = ("is_split_into_words", "return_overflowing_tokens", "stride", "text_pair", "text_target")
        for name in unsupported:
            if text_options.get(name):
                raise ValueError(f"`{name}` is not supported: prompts are single strings and keep all their media.")
        add_bos_token = text_options.get("add_special_tokens")
        encoded = encode_prompts(
            self.tokenizer,
            prompts,
            expansions,
            add_bos_token=self.add_bos_token if add_bos_token is None else add_bos_token,
            sanitize_control_tokens=bool(text_options.get("sanitize_control_tokens")),
        )
        truncation, max_length = text_options.get("truncation"), text_options.get("max_length")
        placeholder_ids = {self.image_token_id, self.video_token_id, self.audio_token_id}
        for index, prompt in enumerate(encoded):
            if truncation not in (None, False, "do_not_truncate") and max_length is not None:
                prompt.truncate(max_length, self.tokenizer.truncation_side, placeholder_ids)
            if self.context_length is not None and len(prompt.ids) > self.context_length:
                raise ValueError(
                    f"Prompt {index} has {len(prompt.ids)} tokens, but the model takes {self.context_length}: "
                    f"{prompt.describe()}. Lower num_frames (or fps) or the number of media, or shorten "
                    "the text."
                )

        padding = text_options.get("padding")
        padding_side = text_options.get("padding_side") or self.tokenizer.padding_side
        outputs = dict(
            self.tokenizer.pad(
                {"input_ids": [prompt.ids for prompt in encoded]},
                padding=padding,
                max_length=max_length if padding == "max_length" else None,
                pad_to_multiple_of=text_options.get("pad_to_multiple_of"),
                padding_side=padding_side,
                return_attention_mask=text_options.get("return_attention_mask"),
            )
        )
        if text_options.get("return_offsets_mapping"):
            padded = []
            for prompt, ids in zip(encoded, outputs["input_ids"]):
                fill = [(0, 0)] * (len(ids) - len(prompt.offsets))
                padded.append(fill + prompt.offsets if padding_side == "left" else prompt.offsets + fill)
            outputs["offset_mapping"] = padded
        if options["return_text_replacement_offsets"]:
            outputs["text_replacement_offsets"] = [prompt.replacement_offsets() for prompt in encoded]
        if options["return_mm_token_type_ids"]:
            outputs["mm_token_type_ids"] = self.create_mm_token_type_ids(outputs["input_ids"])
        return outputs

    # Messages

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool | None = None,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ):
        r"""
        Prompts, or with `tokenize=True` model inputs, from messages.

        The content of a message is a string, taken as it is, or a list of blocks in reading order:

        - `{"type": "text", "text": ...}`; a line break comes between a medium and text behind it, unless the text
          begins with white space. Placeholder tokens in the text are text.
        - `{"type": "image", "image": ...}`
        - `{"type": "video", "video": ..., "start": ..., "end": ..., "num_frames": ..., "fps": ...,
          "load_audio_from_video": ...}`; all but the video are optional, times are in seconds.
        - `{"type": "audio", "audio": ..., "start": ..., "end": ..., "sampling_rate": ...}`; the rate in Hz is that of
          an array, by default the feature extractor's. The audio may be a row of a data set,
          `{"array": ..., "sampling_rate": ...}`.

        Instead of its type, the key of a medium may be `url`, `path` or `base64`. An empty audio block right behind a
        video stands for the video's sound. Other keys are refused unless their value is `None`.

        Args:
            conversation: Messages, or a list of conversations.
            add_generation_prompt: Whether to end with the start of an answer. Then (and with
                `continue_final_message`) the batch is padded on the left and the default system message of the
                original's inference is put in front; otherwise it is padded on the right. `padding_side` and
                `for_training` override that.
            return_assistant_tokens_mask: Whether to return `assistant_masks` (with `return_dict=True`), 1 for the
                tokens that the assistant says, the end of its turn included. The template needs no `{% generation %}`.
            load_audio_from_video: Whether to hear the sound of videos whose blocks do not say. `None`: yes. Means
                nothing to a model that does not hear.
            sanitize_control_tokens: Whether control tokens (`</s>`, `<|im_end|>`, ...) in the messages are text.
            chat_template, tools, documents, continue_final_message, tokenize, return_tensors, return_dict,
                processor_kwargs: As in transformers.

        Without `tokenize`, the prompt is one that `processor(text=...)` takes with the media: a placeholder token that
        somebody typed has the noncharacter U+FDD0 in place of its `<`, which is undone when it is tokenised.
        """
        chat_template = self._resolve_chat_template(chat_template)
        check_conversations(conversation)
        conversations, is_batched = self._normalize_conversations(conversation)
        conversations = [prepare_messages(messages, not sanitize_control_tokens) for messages in conversations]
        inference = add_generation_prompt or bool(continue_final_message)
        if "for_training" in chat_template:
            kwargs.setdefault("for_training", not inference)
        processor_kwargs = dict(processor_kwargs or {})
        given = {**kwargs, **processor_kwargs, **processor_kwargs.get("text_kwargs", {})}
        if "padding_side" not in given:
            processor_kwargs["padding_side"] = "left" if inference else "right"
        if load_audio_from_video is None:
            load_audio_from_video = processor_kwargs.pop("load_audio_from_video", None)
        if return_assistant_tokens_mask:
            if not (tokenize and return_dict):
                raise ValueError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True.")
            if continue_final_message or sanitize_control_tokens or not self.tokenizer.is_fast:
                raise ValueError(
                    "return_assistant_tokens_mask=True needs a fast tokenizer, and neither continue_final_message nor "
                    "sanitize_control_tokens."
                )
            processor_kwargs["return_offsets_mapping"] = True

        outputs = super().apply_chat_template(
            conversations if is_batched else conversations[0],
            chat_template=chat_template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            return_tensors=return_tensors,
            return_dict=return_dict,
            load_audio_from_video=load_audio_from_video,
            processor_kwargs=processor_kwargs,
            sanitize_control_tokens=sanitize_control_tokens,
            **kwargs,
        )
        if return_assistant_tokens_mask:
            template_kwargs = {**self.tokenizer.special_tokens_map, "tools": tools, "documents": documents, **kwargs}
            masks = []
            for messages, offsets in zip(conversations, outputs.pop("offset_mapping")):
                spans = find_assistant_spans(messages, chat_template, add_generation_prompt, **template_kwargs)
                masks.append([int(any(s <= start < e and start < end for s, e in spans)) for start, end in offsets])
            tensor_type = None if return_tensors == "auto" else return_tensors
            outputs.update(BatchFeature({"assistant_masks": masks}, tensor_type=tensor_type))
        return outputs

    def _multimodal_inputs_from_conversations(
        self,
        conversations: list[list[dict[str, Any]]],
        audio_loading_params: dict,
        load_audio_from_video: bool | None = None,
    ) -> tuple[list[list], list[list], list, dict[str, Any]]:
        default = self.load_audio_from_video if load_audio_from_video is None else load_audio_from_video
        images, videos, sounds, indices = collect_media(conversations, default and self.has_audio)
        hears_videos = any(index is not None for index in indices)
        return images, videos, sounds, {"audio_from_video_indices": indices, "load_audio_from_video": hears_videos}

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        audio_lengths: list[int] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """
        Numbers of placeholders, for serving libraries.

        Args:
            image_sizes: (height, width) of images, which do not matter: all become the same size.
            video_sizes: (frames, height, width) of videos whose frames are chosen already.
            audio_lengths: Numbers of samples, which do not matter either.
        """
        data = MultiModalData()
        if image_sizes is not None:
            pixels = torch.empty(3, *_output_size(self.image_processor), device="meta")
            data.num_image_tokens = [self._num_image_tokens(pixels)] * len(image_sizes)
            data.num_image_patches = [1] * len(image_sizes)
        if video_sizes is not None:
            size = _output_size(self.video_processor)
            data.num_video_tokens = [
                self._num_video_tokens(torch.empty(frames, 3, *size, device="meta")) for frames, *_ in video_sizes
            ]
        if audio_lengths is not None:
            extractor = self.feature_extractor
            silence = extractor(extractor.silent_waveform(), extractor.sampling_rate)  # all sounds fill one window
            data.num_audio_tokens = [self._num_audio_tokens(silence["input_features_mask"][0])] * len(audio_lengths)
        return data


def _number(tokens: list[str]) -> list[tuple[str, int]]:
    """Placeholder tokens with their numbers, each kind counted by itself."""
    counts = dict.fromkeys(PLACEHOLDER_TOKENS, -1)
    numbered = []
    for token in tokens:
        counts[token] += 1
        numbered.append((token, counts[token]))
    return numbered


def _output_size(processor: Any) -> tuple[int, int]:
    """(height, width) of what an image or video processor puts out."""
    size = processor.crop_size or processor.size
    if size["shortest_edge"] is not None:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


__all__ = ["VideoLlama2Processor", "VideoLlama2ProcessorKwargs"]
