"""What the model promises beyond the recordings: any mixture in one batch, generation in every mode, clear errors."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from golden_utils import GOLDENS
from tiny_models import FAMILIES, make_config, make_model
from videollama2_hf import VideoLlama2ForConditionalGeneration, VideoLlama2Model, get_num_audio_tokens
from videollama2_hf import connector_videollama2 as connector


FRAMES = {"video": 4, "long": 6}
CLIP = 48


def row(spec: str, config, seed: int = 0) -> dict:
    """
    One row from words: `image`, `video`, `long` (a video of more frames), `audio`, `t` (three text tokens).
    """
    generator = torch.Generator().manual_seed(seed + hash_of(spec))
    ids, media = [1], {"image": [], "video": [], "audio": []}
    for word in spec.split():
        if word == "t":
            ids += torch.randint(3, 118, (3,), generator=generator).tolist()
        elif word == "image":
            media["image"].append(torch.randn(3, 28, 28, generator=generator))
            ids += [config.image_token_id] * config.num_visual_tokens("image")
        elif word in FRAMES:
            media["video"].append(torch.randn(FRAMES[word], 3, 28, 28, generator=generator))
            ids += [config.video_token_id] * config.num_visual_tokens("video", FRAMES[word])
        elif word == "audio":
            media["audio"].append(15 + 6 * torch.randn(CLIP, 128, generator=generator))
            ids += [config.audio_token_id] * get_num_audio_tokens(CLIP)
    return {"ids": ids, **media}


def hash_of(spec: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(spec))


def collate(rows: list[dict], side: str = "left") -> dict:
    length = max(len(r["ids"]) for r in rows)
    ids, mask = [], []
    for r in rows:
        pad = [0] * (length - len(r["ids"]))
        ids.append(pad + r["ids"] if side == "left" else r["ids"] + pad)
        ones = [1] * len(r["ids"])
        mask.append(pad + ones if side == "left" else ones + pad)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images, videos, sound = ([m for r in rows for m in r[kind]] for kind in ("image", "video", "audio"))
    if images:
        inputs["pixel_values"] = torch.stack(images)
    if videos:
        same = len({len(video) for video in videos}) == 1
        inputs["pixel_values_videos"] = torch.stack(videos) if same else videos
    if sound:
        inputs["input_features"] = torch.stack(sound)
    return inputs


MIXTURE = [
    "t",
    "image t",
    "video t",
    "audio t",
    "video audio t",
    "t image t video audio t image t",
    "video t video t audio audio t",
    "long t",
]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single_rows(model, side):
    rows = [row(spec, model.config) for spec in MIXTURE]
    batch = collate(rows, side)
    with torch.no_grad():
        logits = model(**batch).logits
        for i, single in enumerate(rows):
            alone = model(**collate([single])).logits[0]
            together = logits[i][batch["attention_mask"][i].bool()]
            torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_generated_batch_equals_single_rows(model):
    rows = [row(spec, model.config) for spec in MIXTURE]
    batch = collate(rows)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for i, single in enumerate(rows):
        inputs = collate([single])
        alone = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert together[i, : len(alone)].tolist() == alone.tolist(), MIXTURE[i]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(attention):
    rows = [row(spec, make_config()) for spec in MIXTURE[:6]]
    batch = collate(rows)
    other = make_model(attn_implementation=attention)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = make_model(attn_implementation="eager")(**batch).logits[valid]
        torch.testing.assert_close(other(**batch).logits[valid], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_language_model_families(family):
    """
    Text alone equals the bare language model; features stand where embeddings would (Gemma 2 scales both).
    """
    model = make_model(family)
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.model.load_state_dict(model.model.language_model.state_dict())
    bare.lm_head.load_state_dict(model.lm_head.state_dict())
    text = collate([row("t t t", model.config)])
    with torch.no_grad():
        torch.testing.assert_close(model(**text).logits, bare(**text).logits, atol=1e-5, rtol=1e-5)

        inputs = collate([row("image t", model.config)])
        scale = 32**0.5 if family == "gemma2" else 1.0
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        is_image = inputs["input_ids"] == model.config.image_token_id
        embeds = bare.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image, 0))
        embeds[is_image] = features.flatten(0, 1) * scale
        expected = bare(inputs_embeds=embeds).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    "connector_type", ["stc_connector", "stp_connector", "mlp2x_gelu", "linear", "frame_mlp2x_gelu"]
)
@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
def test_connectors_and_towers(connector_type, vision):
    model = make_model(vision=vision, connector_type=connector_type)
    rows = [row("image t video t", model.config), row("video t", model.config)]
    with torch.no_grad():
        logits = model(**collate(rows, "right")).logits
    length = len(rows[1]["ids"])
    with torch.no_grad():
        alone = model(**collate([rows[1]])).logits
    torch.testing.assert_close(logits[1, :length], alone[0], atol=2e-5, rtol=1e-4)


def test_image_is_encoded_once(model, monkeypatch):
    """The original sends an image through the tower `num_frames` times."""
    seen = []
    embeddings = model.model.vision_tower.embeddings
    real = embeddings.forward
    monkeypatch.setattr(embeddings, "forward", lambda x, *a, **k: seen.append(len(x)) or real(x, *a, **k))
    image = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        features = model.get_image_features(image).pooler_output
        as_video = model.get_video_features(image[:, None].expand(-1, 4, -1, -1, -1)).pooler_output
    assert seen == [1, 4]
    torch.testing.assert_close(features, as_video, atol=1e-6, rtol=1e-5)


def test_tower_stops_at_the_selected_layer(model, monkeypatch):
    last = model.model.vision_tower.encoder.layers[-1]
    monkeypatch.setattr(last, "forward", lambda *a, **k: pytest.fail("a layer behind the selected one ran"))
    with torch.no_grad():
        model.get_image_features(torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize("name", ["stc_connector_v35", "stp_connector", "video_llava"])
def test_long_videos_pass_in_pieces(name, monkeypatch):
    if name == "video_llava":  # attention over eight frames, which stay together
        model = VideoLlama2ForConditionalGeneration.from_pretrained(GOLDENS / name / "tiny-video-llava-7b").eval()
    else:
        model = make_model(connector_type=name)
    tower = model.model.video_tower or model.model.vision_tower
    window = tower.config.num_frames if getattr(tower.config, "add_time_attn", False) else 1
    videos = torch.randn(2, 5 * window, 3, 28, 28)
    seen = []
    tower.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    whole = model.get_video_features(videos).pooler_output.detach()
    assert seen == [10 * window]  # gradients are recorded

    monkeypatch.setattr(connector, "FRAMES_AT_ONCE", 4 * window)
    with torch.no_grad():
        pieces = model.get_video_features(videos).pooler_output
    assert seen[1:] == [4 * window, 4 * window, 2 * window]
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_selected_layer_equals_hidden_states(layer):
    model = make_model(vision="clip_vision_model", vision_feature_layer=layer)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, states[layer][:, 1:])


@pytest.mark.parametrize(
    "specs", [["video t video t audio audio t", "t"], ["t", "image t video audio t image t", "audio t"]]
)
@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_with_any_number_of_media_per_row(model, specs, mode):
    """transformers repeats sound clip by clip, which mixes rows up as soon as one has two clips and another none."""
    rows = [row(spec, model.config) for spec in specs]
    batch = collate(rows)
    together = model.generate(**batch, max_new_tokens=5, do_sample=False, **mode)[:, batch["input_ids"].shape[1] :]
    copies = mode.get("num_return_sequences", 1)
    for i, single in enumerate(rows):
        inputs = collate([single])
        alone = model.generate(**inputs, max_new_tokens=5, do_sample=False, **mode)[:, inputs["input_ids"].shape[1] :]
        for copy_index in range(copies):
            ids = alone[copy_index].tolist()
            assert together[i * copies + copy_index, : len(ids)].tolist() == ids


def test_sampled_copies_of_one_row_see_its_own_media(model):
    batch = collate([row("audio t", model.config), row("audio audio video t", model.config)])
    generated = model.generate(**batch, max_new_tokens=3, do_sample=True, top_k=1, num_return_sequences=3)
    for i in range(2):
        group = generated[3 * i : 3 * i + 3]
        assert torch.equal(group, group[:1].expand_as(group))


def test_encoded_media_are_reusable_and_stay_as_they_are(model):
    batch = collate([row("image t video audio t", model.config), row("video audio t", model.config)])
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
    beams = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=2)
    with torch.no_grad():
        encoded = model.encode_media(**batch)
    before = copy.deepcopy({name: outputs.pooler_output for name, outputs in encoded.items()})
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for _ in range(2):
        again = model.generate(**text, mm_encoder_outputs=encoded, max_new_tokens=5, do_sample=False, num_beams=2)
        assert torch.equal(again, beams)
        again = model.generate(**text, mm_encoder_outputs=encoded, max_new_tokens=5, do_sample=False)
        assert torch.equal(again, plain)
    assert set(encoded) == {"image", "video", "audio"}
    for name, outputs in encoded.items():
        assert torch.equal(outputs.pooler_output, before[name])
    with pytest.raises(ValueError, match="either `pixel_values` or encoded media"):
        model.generate(**batch, mm_encoder_outputs=encoded, max_new_tokens=1)


def keep_tower_features(model, batch: dict) -> dict:
    """What the towers make of the media of a batch, without what the connectors make of it."""
    with torch.no_grad():
        encoded = model.encode_media(**batch)
    kept = {name: outputs.last_hidden_state for name, outputs in encoded.items()}
    if "video" in kept:
        per_video = kept["video"].split([len(video) for video in batch["pixel_values_videos"]])
        kept["video"] = torch.stack(per_video) if len({len(v) for v in per_video}) == 1 else list(per_video)
    return {name: BaseModelOutputWithPooling(last_hidden_state=features) for name, features in kept.items()}


@pytest.mark.parametrize("spec", ["image t video audio t", "video t long t"])
def test_features_of_the_towers_pass_the_connectors(spec):
    batch = collate([row(spec, make_config())])
    labels = batch["input_ids"]
    results = []
    for keeps_features in (False, True):
        model = make_model()
        model.model.vision_tower.requires_grad_(False)
        model.model.audio_tower.requires_grad_(False)
        inputs = dict(batch)
        if keeps_features:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            inputs["mm_encoder_outputs"] = keep_tower_features(model, batch)
            model.model.vision_tower = model.model.audio_tower = None
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        results.append((loss, gradients, answer))
    (loss, gradients, answer), (loss_kept, gradients_kept, answer_kept) = results
    assert torch.equal(loss, loss_kept) and torch.equal(answer, answer_kept)
    assert gradients.keys() == gradients_kept.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_kept[name], rtol=0, atol=0)


@pytest.mark.parametrize("trains_towers", [False, True])
@pytest.mark.parametrize("spec", ["t", "image t", "video t", "audio t"])
def test_every_part_that_trains_gets_a_gradient_from_every_batch(spec, trains_towers):
    model = make_model()
    batch = collate([row(spec, model.config)])
    model.requires_grad_(False)
    parts = [model.model.mm_projector, model.model.mm_projector_a]
    if trains_towers:
        parts += [model.model.vision_tower.encoder.layers[0], model.model.audio_tower.patch_embedding]
    for part in parts:
        part.requires_grad_(True)
    model.config.audio_config.layerdrop = 0.0
    expected = model(**batch).logits
    outputs = model.train()(**batch, labels=batch["input_ids"])
    outputs.loss.backward()
    assert torch.equal(outputs.logits, expected)
    has_part = {"vision": spec in ("image t", "video t"), "audio": spec == "audio t"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            modality = "audio" if "audio" in name or "mm_projector_a." in name else "vision"
            assert parameter.grad is not None, name
            assert has_part[modality] or not parameter.grad.any(), name
    for part in parts[:2]:
        modality = "vision" if part is model.model.mm_projector else "audio"
        assert any(p.grad.any() for p in part.parameters()) == has_part[modality]


def test_towers_run_once_per_generate(model, monkeypatch):
    calls = []
    for name in ("get_image_features", "get_video_features", "get_audio_features"):
        real = getattr(model.model, name)
        monkeypatch.setattr(
            model.model, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    batch = collate([row("image t video audio t", model.config)])
    model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert sorted(calls) == ["get_audio_features", "get_image_features", "get_video_features"]


def test_static_cache_gives_the_same_logits(model):
    """By teacher forcing: the logits of every step, not the text."""
    batch = collate([row(spec, model.config) for spec in MIXTURE[:6]])
    kwargs = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**batch, **kwargs)
    static = model.generate(**batch, cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(plain.sequences, static.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(static.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_decode_step_compiles_to_one_graph(model):
    from transformers import StaticCache

    batch = collate([row("image t video audio t", model.config), row("video audio t", model.config)])
    length = batch["input_ids"].shape[1]
    tokens = torch.tensor([[5], [6]])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        full = {**batch, "input_ids": torch.cat([batch["input_ids"], tokens], 1), "attention_mask": mask}
        expected = model(**full).logits[:, -1]
        cache = StaticCache(config=model.config.text_config, max_cache_len=length + 4)
        model(**batch, past_key_values=cache, use_cache=True)
        step = torch.compile(model, fullgraph=True)
        padded = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1)
        positions = torch.full((2, 1), length)
        outputs = step(input_ids=tokens, attention_mask=padded, position_ids=positions, past_key_values=cache)
    torch.testing.assert_close(outputs.logits[:, -1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_forward_with_all_media_compiles_to_one_graph(model):
    batch = collate([row("image t video audio t", model.config)])
    batch["input_features_mask"] = torch.ones(batch["input_features"].shape[:2], dtype=torch.long)
    with torch.no_grad():
        expected = model(**batch).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)


def test_beams_with_media_that_the_prompt_has_no_place_for(model):
    batch = collate([row("t", model.config)])
    with pytest.raises(ValueError, match="0 placeholders, 8 features"):
        model.generate(**batch, pixel_values=torch.zeros(1, 3, 28, 28), num_beams=2, max_new_tokens=2)


def test_placeholders_are_never_generated():
    model = make_model()
    with torch.no_grad():  # a head that loves the image placeholder (119), the only one inside the vocabulary
        model.lm_head.weight.zero_()
        model.lm_head.weight[119] = 1.0
        model.model.language_model.norm.weight.abs_()
    batch = collate([row("image t", model.config)])
    for mode in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2}):
        generated = model.generate(**batch, max_new_tokens=6, **mode)[:, batch["input_ids"].shape[1] :]
        assert not (generated >= 119).any()


def test_repetition_penalty_counts_generated_tokens_only(model):
    """As the original, which generates from embeddings and so never shows the prompt to the penalty."""
    batch = collate([row("t image t video audio t", model.config), row("t t", model.config)])
    logits = model.generate(
        **batch,
        max_new_tokens=6,
        do_sample=False,
        repetition_penalty=1.7,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new_ids = logits.sequences[:, batch["input_ids"].shape[1] :]
    for r in range(2):
        seen: set[int] = set()
        for step in range(6):
            scores = logits.logits[step][r].clone()
            for token in seen:
                scores[token] = scores[token] * 1.7 if scores[token] < 0 else scores[token] / 1.7
            scores[119] = -torch.inf
            assert int(scores.argmax()) == int(new_ids[r, step])
            if int(new_ids[r, step]) == 2:
                break
            seen.add(int(new_ids[r, step]))


@pytest.mark.parametrize(
    "processor",
    [
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3},
        {"encoder_repetition_penalty": 1.3},
        {"encoder_no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2, "num_beams": 2},
        {"bad_words_ids": [[5, 6]]},
        {"prompt_lookup_num_tokens": 2},
        {"min_new_tokens": 3},
    ],
)
def test_logits_processors_survive_ids_beyond_the_vocabulary(model, processor):
    batch = collate([row("video audio t video t", model.config)])
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False, **processor)
    new_ids = generated[0, batch["input_ids"].shape[1] :].tolist()
    assert new_ids and max(new_ids) < 119
    if processor.get("no_repeat_ngram_size") == 1:
        assert len(set(new_ids)) == len(new_ids)


def test_custom_logits_processors_see_the_whole_prompt(model):
    lengths = []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return scores

    batch = collate([row("image t", model.config)])
    model.generate(**batch, max_new_tokens=2, do_sample=False, logits_processor=[Recorder()])
    assert lengths[0] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_that_names_the_cause(value):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[7, :] = value
    batch = collate([row("image t", model.config)])
    with pytest.raises(FloatingPointError, match="float32, so look for NaN or Inf in its weights"):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    with pytest.raises(FloatingPointError, match="float16.*bfloat16"):
        model.half().generate(**batch, max_new_tokens=2, do_sample=False)
    model.generate(**batch, max_new_tokens=2, do_sample=False, remove_invalid_values=True)


def test_prompt_lookup_and_continued_generation(model):
    batch = collate([row("image t video audio t t t t", model.config)])
    plain = model.generate(**batch, max_new_tokens=6, do_sample=False)
    lookup = model.generate(**batch, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(plain, lookup)


def test_generation_continues_from_a_cache(model):
    inputs = collate([row("image t video audio t", model.config)])
    first = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
    text = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    media = {name: value for name, value in inputs.items() if name not in text}
    whole = model.generate(**text, **media, max_new_tokens=4, do_sample=False)
    continued = model.generate(**text, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(whole, continued)


def test_loss_ignores_media_and_reaches_every_trained_part(model):
    model = make_model().train()
    model.gradient_checkpointing_enable()
    batch = collate([row("image t video audio t", model.config), row("video t", model.config)], "right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 118, -100)
    labels[batch["attention_mask"] == 0] = -100
    outputs = model(**batch, labels=labels)
    outputs.loss.backward()
    for name in (
        "mm_projector.s1",
        "mm_projector.readout",
        "mm_projector_a.0",
        "audio_tower.encoder",
        "vision_tower.encoder.layers.0",
        "language_model.layers.0",
    ):
        gradients = [p.grad for n, p in model.named_parameters() if name in n]
        assert gradients and any(g is not None and g.abs().sum() > 0 for g in gradients), name
    plain = make_model().train()
    plain.model.audio_tower.config.layerdrop = model.model.audio_tower.config.layerdrop = 0.0
    torch.testing.assert_close(plain(**batch, labels=labels).loss, model(**batch, labels=labels).loss)


def test_router_loss_of_mixtral_is_added_when_asked_for():
    """The original ignores `output_router_logits`; as in transformers, it adds the load-balancing loss."""
    from transformers import MixtralForCausalLM

    model = make_model("mixtral")
    text = collate([row("t t t", model.config)])
    plain = model(**text, labels=text["input_ids"]).loss
    bare = MixtralForCausalLM(model.config.text_config)
    bare.model.load_state_dict(model.model.language_model.state_dict())
    bare.lm_head.load_state_dict(model.lm_head.state_dict())
    expected = bare.eval()(**text, labels=text["input_ids"], output_router_logits=True)
    balanced = model(**text, labels=text["input_ids"], output_router_logits=True)
    torch.testing.assert_close(balanced.loss, expected.loss)
    assert balanced.loss > plain and len(balanced.router_logits) == 2


def test_labels_made_of_the_ids_do_not_train_placeholders(model):
    batch = collate([row("image t video audio t", model.config)])
    masked = batch["input_ids"].masked_fill(batch["input_ids"] >= 119, -100)
    expected = model(**batch, labels=masked).loss
    torch.testing.assert_close(model(**batch, labels=batch["input_ids"]).loss, expected)


def test_loss_over_accumulated_batches_is_normalised_by_all_their_tokens(model):
    """What Trainer asks for with `num_items_in_batch`."""
    batch = collate([row("image t t t", model.config), row("t t", model.config)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole = model(**batch, labels=labels).loss
    items = int(((labels != -100) & (labels != model.config.image_token_id))[:, 1:].sum())
    parts = []
    for spec in ("image t t t", "t t"):
        one = collate([row(spec, model.config)])
        parts.append(model(**one, labels=one["input_ids"], num_items_in_batch=items).loss)
    torch.testing.assert_close(sum(parts), whole)


def test_encode_media_keeps_no_graph(model):
    batch = collate([row("image t video audio t", model.config)])
    for outputs in model.encode_media(**batch).values():
        assert not outputs.pooler_output.requires_grad


def test_projector_in_another_dtype_than_the_tower():
    model = make_model().to(torch.bfloat16)
    model.model.mm_projector.float()
    assert torch.isfinite(model(**collate([row("image t", model.config)])).logits).all()


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("get_image_features", torch.zeros(3, 28, 28), r"\(images, 3, height, width\), got \(3, 28, 28\)"),
        ("get_video_features", torch.zeros(4, 3, 28, 28), r"\(videos, frames, 3, height, width\), got"),
        ("get_video_features", [torch.zeros(1, 4, 3, 28, 28)], r"\(frames, 3, height, width\), got"),
        ("get_audio_features", torch.zeros(32, 128), r"\(clips, time, mel bins\), got \(32, 128\)"),
    ],
)
def test_wrong_shapes_are_named(model, method, values, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(values)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vision": "dinov2"}, "vision_config must be of model_type clip_vision_model, .*'dinov2'"),
        ({"text_config": {"model_type": "t5"}}, "decoder-only language model, got 't5'"),
    ],
)
def test_parts_that_cannot_work_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_config(**kwargs)


def test_head_checkpoint_loads_into_the_base_model_and_back(tmp_path, model):
    model.save_pretrained(tmp_path / "head")
    base, info = VideoLlama2Model.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in base.state_dict().items():
        assert torch.equal(value, model.model.state_dict()[name]), name
    base.save_pretrained(tmp_path / "base")
    _, info = VideoLlama2ForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]


def test_logits_to_keep(model):
    batch = collate([row("image t", model.config)])
    with torch.no_grad():
        full, last = model(**batch).logits, model(**batch, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last[:, 0], full[:, -1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("pixel_values"), "image placeholders, but no image was given: pass `pixel_values`"),
        (lambda b: b.pop("input_features"), "no audio was given"),
        (lambda b: b.update(pixel_values=b["pixel_values"].repeat(2, 1, 1, 1)), "8 placeholders, 16 features"),
        (lambda b: b.update(pixel_values_videos=torch.zeros(1, 6, 3, 28, 28)), "video placeholders"),
        (lambda b: b.update(inputs_embeds=torch.zeros(1, 2, 32)), "exactly one of"),
    ],
)
def test_mismatches_are_named(model, change, message):
    batch = collate([row("image t video audio t t t", model.config)])
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_sound_runs_without_flash_attention():
    """Flash attention cannot add BEATs' position bias: the audio tower falls back, the rest keeps what was asked."""
    config = make_config()
    config.audio_config._attn_implementation = "flash_attention_2"
    assert VideoLlama2Model(config).audio_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("forgotten", ["pixel_values", "pixel_values_videos", "input_features", None])
def test_generate_refuses_prompts_without_their_media(model, forgotten):
    batch = collate([row("image t video audio t", model.config)])
    names = [forgotten] if forgotten else ["pixel_values", "pixel_values_videos", "input_features"]
    for name in names:
        del batch[name]
    with pytest.raises(ValueError, match=f"but no .* was given: pass `{names[0]}`"):
        model.generate(**batch, max_new_tokens=2)


def test_deaf_model_refuses_sound():
    model = make_model(hears=False)
    with pytest.raises(ValueError, match="no audio tower"):
        model.get_audio_features(torch.zeros(1, 32, 128))


def test_embeddings_alone_cannot_find_placeholders_beyond_the_vocabulary(model):
    batch = collate([row("video t", model.config)])
    embeds = torch.zeros(1, batch["input_ids"].shape[1], 32)
    with pytest.raises(ValueError, match="pass `input_ids`"):
        model(inputs_embeds=embeds, pixel_values_videos=batch["pixel_values_videos"])


def test_embeddings_find_placeholders_inside_the_vocabulary(model):
    batch = collate([row("image t", model.config)])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        by_embeds = model(inputs_embeds=embeds, pixel_values=batch["pixel_values"]).logits
        torch.testing.assert_close(by_embeds, model(**batch).logits)


def test_padded_sound_equals_the_clip_alone(model):
    rows = [row("audio t", model.config), row("audio audio t", model.config)]
    batch = collate(rows)
    with torch.no_grad():
        plain = model(**batch).logits
        longer = torch.nn.functional.pad(batch["input_features"], (0, 0, 0, 40))
        mask = torch.zeros(longer.shape[:2], dtype=torch.long)
        mask[:, :CLIP] = 1
        padded = model(**{**batch, "input_features": longer, "input_features_mask": mask}).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(padded[valid], plain[valid], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_media_are_cast_inside(dtype):
    model = make_model().to(dtype)
    outputs = model(**collate([row("image t video audio t", model.config)]))
    assert outputs.logits.dtype == dtype and torch.isfinite(outputs.logits).all()


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_save_and_load_keep_the_original_keys(tmp_path, family):
    from safetensors import safe_open

    model = make_model(family)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    assert "model.vision_tower.vision_tower.embeddings.patch_embedding.weight" in keys
    assert "model.audio_tower.encoder.pos_conv.0.weight_g" in keys
    assert not any("language_model" in key for key in keys)
    loaded, info = VideoLlama2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, value), (_, other) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(value, other), name


def test_a_new_vision_tower_is_initialised_as_transformers_would(tmp_path):
    """Part of transformers' initialisation passes out-of-tree code over; a tower trained from scratch needs it."""
    from transformers import CLIPVisionModel

    config = make_config(vision="clip_vision_model")
    torch.manual_seed(3)
    tower = CLIPVisionModel(config.vision_config)
    torch.manual_seed(3)
    ours = VideoLlama2Model(config).vision_tower
    spread = {name: float(parameter.std()) for name, parameter in tower.named_parameters() if parameter.ndim > 1}
    for name, parameter in ours.named_parameters():
        if name in spread:
            assert float(parameter.std()) == pytest.approx(spread[name], rel=0.25), name
