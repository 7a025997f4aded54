"""VideoLLaMA 2: a vision tower, an audio tower and their connectors in front of a language model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, torch_compilable_check

from .checkpoint_videollama2 import (
    VIDEO_LLAVA_KEY_MAPPING,
    WEIGHT_RENAMINGS,
    is_video_llava_checkpoint,
)
from .configuration_videollama2 import VideoLlama2Config
from .connector_videollama2 import build_audio_connector, build_connector, split_frames
from .generation_videollama2 import (
    MODALITIES,
    MODEL_INPUTS,
    VideoLlama2GenerationMixin,
    describe_mismatch,
    describe_missing_media,
)
from .modeling_beats import VideoLlama2AudioModel
from .modeling_languagebind import LanguageBindVisionModel, check_whole_windows
from .tokenization_videollama2 import HUB_ARGUMENTS


_FOR_GENERATION = "modeling_videollama2.VideoLlama2ForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_videollama2.VideoLlama2Config",
    "AutoModel": "modeling_videollama2.VideoLlama2Model",
    "AutoModelForMultimodalLM": _FOR_GENERATION,
    "AutoModelForImageTextToText": _FOR_GENERATION,
    "AutoModelForCausalLM": _FOR_GENERATION,
}


@auto_docstring(custom_intro="Outputs of [`VideoLlama2Model`]: the language model's, and the encoded media.")
@dataclass
class VideoLlama2ModelOutputWithPast(ModelOutput):
    r"""
    past_key_values (`Cache`, *optional*):
        The key-value cache of the language model.
    image_hidden_states (`torch.Tensor` of shape `(image_tokens, hidden_size)`, *optional*):
        What stands in the language model's input for the images.
    video_hidden_states (`torch.Tensor` of shape `(video_tokens, hidden_size)`, *optional*):
        What stands in the language model's input for the videos.
    audio_hidden_states (`torch.Tensor` of shape `(audio_tokens, hidden_size)`, *optional*):
        What stands in the language model's input for the sound.
    router_logits (`tuple(torch.Tensor)`, *optional*):
        Router logits of a mixture-of-experts language model.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@auto_docstring(custom_intro="Outputs of [`VideoLlama2ForConditionalGeneration`].")
@dataclass
class VideoLlama2CausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*):
        Next-token loss over the labels that are not -100; given with `labels`.
    logits (`torch.Tensor` of shape `(batch, length or logits_to_keep, vocab_size)`):
        Scores of every token of the vocabulary, before softmax.
    past_key_values (`Cache`, *optional*):
        The key-value cache of the language model.
    image_hidden_states (`torch.Tensor` of shape `(image_tokens, hidden_size)`, *optional*):
        What stands in the language model's input for the images.
    video_hidden_states (`torch.Tensor` of shape `(video_tokens, hidden_size)`, *optional*):
        What stands in the language model's input for the videos.
    audio_hidden_states (`torch.Tensor` of shape `(audio_tokens, hidden_size)`, *optional*):
        What stands in the language model's input for the sound.
    router_logits (`tuple(torch.Tensor)`, *optional*):
        Router logits of a mixture-of-experts language model.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@auto_docstring
class VideoLlama2PreTrainedModel(PreTrainedModel):
    config: VideoLlama2Config
    base_model_prefix = "model"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["STCConnector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [
        # Equal copies of BEATs' shared table, see modeling_beats.py.
        r"audio_tower\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
        # Buffers that old versions of transformers saved.
        r"rotary_emb\.inv_freq$",
        r"\.position_ids$",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        """As for every model. Original checkpoints are understood, and Video-LLaVA's names of its towers."""
        config = kwargs.get("config") if isinstance(kwargs.get("config"), PreTrainedConfig) else None
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if is_video_llava_checkpoint(pretrained_model_name_or_path, config, **hub_kwargs):
            kwargs["key_mapping"] = VIDEO_LLAVA_KEY_MAPPING | (kwargs.get("key_mapping") or {})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers would save with these names too, and they would need a key mapping again.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if conversion._original_source_patterns[0] not in VIDEO_LLAVA_KEY_MAPPING
        ] or None
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """
        As for every model; the folder also gets the code (this file and its siblings), so that it loads by
        `trust_remote_code=True` where this package is not installed.
        """
        self.config.auto_map = dict(AUTO_MAP)
        # FSDP2 puts a class of torch's in front of the model's; the code and the name that are saved are the model's.
        current_class = type(self)
        self.__class__ = next(c for c in current_class.__mro__ if not c.__module__.startswith("torch.distributed"))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = current_class

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # Code outside of transformers is taken not to honour "this weight is loaded already", and modules that only
        # initialise their children (CLIP's attention) are then passed over. This code does honour it.
        super()._initialize_weights(module, is_custom_code=False)


def _check_shape(name: str, values: torch.Tensor, shape: str) -> None:
    if not isinstance(values, torch.Tensor) or values.ndim != shape.count(",") + 1:
        got = tuple(values.shape) if hasattr(values, "shape") else type(values).__name__
        raise ValueError(f"`{name}` must be a tensor of shape ({shape}), got {got}.")


def _build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    # By name, not by class: code that was loaded from a folder exists once per entry file, so the Auto classes may
    # know another copy of our configuration class.
    if config.model_type == "languagebind_vision":
        return LanguageBindVisionModel._from_config(config)
    return AutoModel.from_config(config)


def _run_tower(tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
    """What a layer of a vision tower gives, counted as in its `hidden_states`; no layer behind it runs."""
    hidden_states = tower.embeddings(pixel_values)
    if hasattr(tower, "pre_layrnorm"):
        hidden_states = tower.pre_layrnorm(hidden_states)
    layers = tower.encoder.layers
    for encoder_layer in layers[: layer if layer >= 0 else len(layers) + 1 + layer]:
        hidden_states = encoder_layer(hidden_states, attention_mask=None)
    return hidden_states


def _takes_part(module: nn.Module) -> bool:
    """Whether a part trains, or runs on all processes together (ZeRO-3; FSDP2, where it shards the part by itself)."""
    return any(p.requires_grad or hasattr(p, "ds_id") or hasattr(p, "placements") for p in module.parameters())


def _to_device_of(tower: PreTrainedModel, values: torch.Tensor) -> torch.Tensor:
    """A tower that is offloaded has no device of its own; its layers fetch their inputs themselves."""
    return values if tower.device.type == "meta" else values.to(tower.device)


class VideoLlama2Model(VideoLlama2PreTrainedModel):
    """
    VideoLLaMA 2 (or Video-LLaVA) without the language modelling head.

    Media are numbered in reading order over the batch, each kind by itself. A video with its sound is its video
    placeholders followed by its audio placeholders, one entry in `pixel_values_videos` and one in `input_features`.
    """

    # The head of a whole checkpoint.
    _keys_to_ignore_on_load_unexpected = [
        *VideoLlama2PreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",
    ]

    def __init__(self, config: VideoLlama2Config):
        super().__init__(config)
        self.vision_tower = _build_vision_tower(config.vision_config)
        self.video_tower = _build_vision_tower(config.video_config) if config.video_config is not None else None
        # The two projectors keep the original's names (`mm_projector`, `mm_projector_a`).
        self.mm_projector = build_connector(config)
        if config.audio_config is not None:
            # Flash attention cannot add a position bias; what was asked for goes to the other parts.
            if "flash" in (config.audio_config._attn_implementation or ""):
                config.audio_config._attn_implementation = "sdpa"
            self.audio_tower = VideoLlama2AudioModel._from_config(config.audio_config)
            self.mm_projector_a = build_audio_connector(config)
        else:
            self.audio_tower = None
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _encode_frames(
        self, modality: Literal["image", "video"], pixel_values: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        (frames, 3, H, W) -> `last_hidden_state` (frames, patches, width): the selected layer's output, with or without
        the class token as the configuration says.

        The tower's own forward would run all layers and what is behind them. It is called only where their states or
        attentions are asked for.
        """
        tower = self.video_tower if modality == "video" and self.video_tower is not None else self.vision_tower
        pixel_values = _to_device_of(tower, pixel_values).to(tower.dtype)
        layer = self.config.vision_feature_layer
        wants_states = kwargs.pop("output_hidden_states", tower.config.output_hidden_states)
        if wants_states or kwargs.get("output_attentions", tower.config.output_attentions):
            outputs = tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
            hidden_states = outputs.hidden_states[layer]
        else:
            outputs = BaseModelOutputWithPooling()
            window = tower.config.num_frames if getattr(tower.config, "add_time_attn", False) else 1
            states = [_run_tower(tower, piece, layer) for piece in split_frames(pixel_values, tower, window)]
            hidden_states = states[0] if len(states) == 1 else torch.cat(states)
        has_class_token = tower.config.model_type != "siglip_vision_model"
        if has_class_token and self.config.select_strategy(modality) == "default":
            hidden_states = hidden_states[:, 1:]
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def project_features(
        self, modality: str, features: torch.Tensor | Sequence[torch.Tensor]
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        What a tower gave, through the connector: tokens (items, tokens, hidden_size), or a list of them.

        Args:
            modality: `"image"`, `"video"` or `"audio"`.
            features: (images, patches, width), (videos, frames, patches, width) or (clips, tokens, width); a list of
                tensors without the first dimension where items differ in length.
        """
        if not isinstance(features, torch.Tensor):
            return [self.project_features(modality, item.unsqueeze(0))[0] for item in features]
        connector = self.mm_projector_a if modality == "audio" else self.mm_projector
        # A trained connector may be in another dtype than the frozen tower; a quantised one holds integers.
        dtype = next(connector.parameters()).dtype
        features = features.to(dtype) if dtype.is_floating_point else features
        if modality == "image":
            features = features.unsqueeze(1).expand(-1, self.config.image_num_frames, -1, -1)
        return connector(features)

    @can_return_tuple
    @auto_docstring
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes images of shape (images, 3, H, W). Each image passes the tower once and enters the connector as a video
        of `config.image_num_frames` equal frames.

        Returns:
            `pooler_output`: (images, tokens, hidden_size). `last_hidden_state`: (images, patches, width), the tower's.
        """
        _check_shape("pixel_values", pixel_values, "images, 3, height, width")
        outputs = self._encode_frames("image", pixel_values, **kwargs)
        outputs.pooler_output = self.project_features("image", outputs.last_hidden_state)
        return outputs

    @can_return_tuple
    @auto_docstring
    def get_video_features(
        self, pixel_values_videos: torch.Tensor | list[torch.Tensor], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encodes videos of shape (videos, frames, 3, H, W), or a list of (frames, 3, H, W) with different numbers of
        frames.

        Returns:
            `pooler_output`: (videos, tokens, hidden_size), or a list of (tokens, hidden_size) for a list.
            `last_hidden_state`: (frames of all videos, patches, width), the tower's.
        """
        if isinstance(pixel_values_videos, torch.Tensor):
            _check_shape("pixel_values_videos", pixel_values_videos, "videos, frames, 3, height, width")
        else:
            for video in pixel_values_videos:
                _check_shape("pixel_values_videos", video, "frames, 3, height, width")
        lengths = [len(video) for video in pixel_values_videos]
        tower_config = self.config.tower_config("video")
        if getattr(tower_config, "add_time_attn", False):
            for length in lengths:
                check_whole_windows(length, tower_config.num_frames)
        if isinstance(pixel_values_videos, torch.Tensor):
            outputs = self._encode_frames("video", pixel_values_videos.flatten(0, 1), **kwargs)
            features = outputs.last_hidden_state.unflatten(0, pixel_values_videos.shape[:2])
        else:
            outputs = self._encode_frames("video", torch.cat(pixel_values_videos), **kwargs)
            features = outputs.last_hidden_state.split(lengths)
        outputs.pooler_output = self.project_features("video", features)
        return outputs

    @can_return_tuple
    @auto_docstring
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        input_features (`torch.Tensor` of shape `(clips, time, num_mel_bins)`):
            Kaldi log-mel filter banks before BEATs' own normalisation.
        input_features_mask (`torch.Tensor` of shape `(clips, time)`, *optional*):
            0 for frames that only pad a shorter clip.

        Returns:
            `pooler_output`: (clips, tokens, hidden_size), or a list of (tokens, hidden_size) where clips are padded.
            `last_hidden_state`: (clips, tokens, width), the tower's.
        """
        if self.audio_tower is None:
            raise ValueError(
                "This model has no audio tower (config.audio_config is None), so it takes no `input_features`. Leave "
                "the sound out, or load a model that hears."
            )
        _check_shape("input_features", input_features, "clips, time, mel bins")
        input_features = _to_device_of(self.audio_tower, input_features)
        outputs = self.audio_tower(input_features, input_features_mask, return_dict=True, **kwargs)
        features = self.project_features("audio", outputs.last_hidden_state)
        # Compiled graphs take clips of one length: others have fewer placeholders than features, which is an error.
        if input_features_mask is not None and not torch.compiler.is_compiling() and not input_features_mask.all():
            mask = self.audio_tower.get_token_mask(input_features_mask.to(features.device))
            features = [clip[valid] for clip, valid in zip(features, mask)]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def encode_media(self, **inputs: Any) -> dict[str, BaseModelOutputWithPooling]:
        """
        Encodes the media among a processor's outputs (`pixel_values`, `pixel_values_videos`, `input_features`,
        `input_features_mask`); what is returned goes into `forward` or `generate` as `mm_encoder_outputs`, as often as
        wanted.

        What is given as `mm_encoder_outputs` is returned too. With a `last_hidden_state` in the form that
        [`~VideoLlama2Model.project_features`] takes and no `pooler_output`, it passes the connector here: the towers'
        features can be kept while the connectors train.
        """
        encoded = {modality: self._encode(modality, inputs) for modality in MODALITIES}
        return {modality: outputs for modality, outputs in encoded.items() if outputs is not None}

    def _encode(self, modality: str, inputs: dict[str, Any]) -> BaseModelOutputWithPooling | None:
        """The media of one modality among the inputs of [`~VideoLlama2Model.encode_media`]; `None` without any."""
        name = MODEL_INPUTS[modality]
        given = (inputs.get("mm_encoder_outputs") or {}).get(modality)
        if inputs.get(name) is None:
            if given is not None and given.pooler_output is None:
                return replace(given, pooler_output=self.project_features(modality, given.last_hidden_state))
            return given
        if given is not None:
            raise ValueError(f"Pass either `{name}` or encoded media, `mm_encoder_outputs[{modality!r}]`.")
        if modality == "audio":
            return self.get_audio_features(inputs[name], inputs.get("input_features_mask"), return_dict=True)
        return getattr(self, f"get_{modality}_features")(inputs[name], return_dict=True)

    def _encode_nothing(self, modality: str, device: torch.device) -> torch.Tensor | None:
        """
        No tokens, (0,), that depend on the tower and connector of a modality where these train or are sharded.

        A training step whose batch has no media of the modality adds their sum. So every step gives every part that
        trains a gradient (of zero), whatever the batch of one process holds; without, the processes of a distributed
        run would wait for each other's gradients, or for weights of which each holds a part.
        """
        if modality == "audio" and self.audio_tower is None:
            return None
        tower, connector = self.vision_tower, self.mm_projector
        if modality == "audio":
            tower, connector = self.audio_tower, self.mm_projector_a
        elif modality == "video" and self.video_tower is not None:
            tower = self.video_tower
        config = tower.config
        if _takes_part(tower):
            if modality == "audio":
                blank = torch.zeros(1, config.patch_size, config.num_mel_bins, device=device)
            else:
                num_frames = config.num_frames if getattr(config, "add_time_attn", False) else 2
                blank = torch.zeros(1, num_frames, 3, config.image_size, config.image_size, device=device)
            blank = blank[:, 0] if modality == "image" else blank
            tokens = self._encode(modality, {MODEL_INPUTS[modality]: blank}).pooler_output
        elif _takes_part(connector):
            shape = {"image": (1, 4), "video": (1, 2, 4), "audio": (1, 1)}[modality]
            tokens = self.project_features(modality, torch.zeros(*shape, config.hidden_size, device=device))
        else:
            return None
        return tokens.flatten()[:0]

    def _token_id(self, modality: str) -> int:
        return getattr(self.config, f"{modality}_token_id")

    def get_placeholder_masks(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Where the placeholders of every modality stand: bool, (batch, length).

        Without `input_ids` they are found by their embedding, which a placeholder beyond the vocabulary does not have.
        """
        if input_ids is not None:
            return {modality: input_ids == self._token_id(modality) for modality in MODALITIES}
        masks = {}
        embedding = self.get_input_embeddings()
        for modality in MODALITIES:
            if self._token_id(modality) < embedding.num_embeddings:
                token_id = torch.full((), self._token_id(modality), dtype=torch.long, device=inputs_embeds.device)
                masks[modality] = (inputs_embeds == embedding(token_id)).all(-1)
        return masks

    def _embed_text(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Embeddings of the text. A placeholder, whose id may lie beyond the vocabulary, gets that of id 0."""
        masks = self.get_placeholder_masks(input_ids)
        is_placeholder = masks["image"] | masks["video"] | masks["audio"]
        return self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))

    def _scatter_features(
        self,
        modality: str,
        features: torch.Tensor | Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the features of one modality over its placeholders; also returns them in one tensor."""
        if mask is None:
            raise ValueError(
                f"With `inputs_embeds` the {modality} placeholders cannot be found, because their id "
                f"({self._token_id(modality)}) has no embedding; pass `input_ids`."
            )
        flat = features.flatten(0, 1) if isinstance(features, torch.Tensor) else torch.cat(list(features))
        flat = flat.to(inputs_embeds.device, inputs_embeds.dtype)
        # Gemma 2 scales embeddings inside its embedding layer; the original scales features along with the text.
        scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        if scale is not None:
            flat = flat * scale.to(flat.dtype)
        num_placeholders = mask.sum()
        torch_compilable_check(
            num_placeholders == flat.shape[0],
            lambda: describe_mismatch(modality, int(num_placeholders), features),
        )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), flat), flat

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | list[torch.Tensor] | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VideoLlama2ModelOutputWithPast:
        r"""
        input_features (`torch.Tensor` of shape `(clips, time, num_mel_bins)`, *optional*):
            Kaldi log-mel filter banks before BEATs' own normalisation.
        input_features_mask (`torch.Tensor` of shape `(clips, time)`, *optional*):
            0 for frames that only pad a shorter clip.
        mm_encoder_outputs (`dict` of `BaseModelOutputWithPooling`, *optional*):
            Media that are encoded already, under `"image"`, `"video"` and `"audio"`; see
            [`~VideoLlama2Model.encode_media`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self._embed_text(input_ids)  # type: ignore[arg-type]  # one of the two is there
        media = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        encoded = {}
        for modality in MODALITIES:  # in one order, which distributed training depends on
            outputs = self._encode(modality, media)
            if outputs is not None:
                encoded[modality] = outputs
            elif self.training and torch.is_grad_enabled():
                nothing = self._encode_nothing(modality, inputs_embeds.device)
                if nothing is not None:
                    inputs_embeds = inputs_embeds + nothing.sum().to(inputs_embeds.device)
        flat_features = {}
        if encoded:
            masks = self.get_placeholder_masks(input_ids, inputs_embeds)
            for modality in MODALITIES:
                if modality in encoded:
                    inputs_embeds, flat_features[modality] = self._scatter_features(
                        modality, encoded[modality].pooler_output, masks.get(modality), inputs_embeds
                    )
                elif modality in masks:
                    torch_compilable_check(~masks[modality].any(), describe_missing_media(modality))

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return VideoLlama2ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=flat_features.get("image"),
            video_hidden_states=flat_features.get("video"),
            audio_hidden_states=flat_features.get("audio"),
            router_logits=getattr(outputs, "router_logits", None),
        )


class VideoLlama2ForConditionalGeneration(VideoLlama2PreTrainedModel, VideoLlama2GenerationMixin):
    """VideoLLaMA 2 (or Video-LLaVA) with its language modelling head: `generate` answers questions about media."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VideoLlama2Config):
        super().__init__(config)
        self.model = VideoLlama2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @auto_docstring
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""See [`VideoLlama2Model.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @auto_docstring
    def get_video_features(
        self, pixel_values_videos: torch.Tensor | list[torch.Tensor], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""See [`VideoLlama2Model.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @auto_docstring
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        input_features (`torch.Tensor` of shape `(clips, time, num_mel_bins)`):
            Kaldi log-mel filter banks before BEATs' own normalisation; see [`VideoLlama2Model.get_audio_features`].
        input_features_mask (`torch.Tensor` of shape `(clips, time)`, *optional*):
            0 for frames that only pad a shorter clip.
        """
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    @torch.no_grad()
    def encode_media(self, **inputs: Any) -> dict[str, BaseModelOutputWithPooling]:
        """[`VideoLlama2Model.encode_media`] without gradients, for generation."""
        return self.model.encode_media(**inputs)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | list[torch.Tensor] | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VideoLlama2CausalLMOutputWithPast:
        r"""
        input_features (`torch.Tensor` of shape `(clips, time, num_mel_bins)`, *optional*):
            Kaldi log-mel filter banks before BEATs' own normalisation.
        input_features_mask (`torch.Tensor` of shape `(clips, time)`, *optional*):
            0 for frames that only pad a shorter clip.
        mm_encoder_outputs (`dict` of `BaseModelOutputWithPooling`, *optional*):
            Media that are encoded already, under `"image"`, `"video"` and `"audio"`; see
            [`~VideoLlama2Model.encode_media`].
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Targets; -100 is ignored, and so are the placeholders in `input_ids`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            input_features_mask=input_features_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        text_config = self.config.text_config
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma 2
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        loss = None
        if labels is not None:
            targets: torch.Tensor = labels
            if input_ids is not None:  # placeholders are no targets, whatever the labels were made from
                for mask in self.model.get_placeholder_masks(input_ids).values():
                    targets = targets.masked_fill(mask.to(targets.device), -100)
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=text_config.vocab_size, **kwargs)
            if outputs.router_logits is not None:  # Mixtral with `output_router_logits`; the original ignores it
                balance = load_balancing_loss_func(
                    outputs.router_logits,
                    text_config.num_local_experts,
                    text_config.num_experts_per_tok,
                    attention_mask,
                )
                loss = loss + text_config.router_aux_loss_coef * balance.to(loss.device)
        return VideoLlama2CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            router_logits=outputs.router_logits,
        )


# Of the base model: transformers applies it to that part of the model with a head, too.
register_checkpoint_conversion_mapping("VideoLlama2Model", WEIGHT_RENAMINGS, overwrite=True)

# So that saving copies the code, also after a load that found this package and not the folder's copy.
VideoLlama2Model.register_for_auto_class("AutoModel")
VideoLlama2ForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = [
    "LanguageBindVisionModel",
    "VideoLlama2AudioModel",
    "VideoLlama2ForConditionalGeneration",
    "VideoLlama2Model",
    "VideoLlama2PreTrainedModel",
]
