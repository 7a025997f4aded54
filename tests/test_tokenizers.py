"""Real tokenizers: our prompts have exactly the ids of SentencePiece (Mistral) and of tiktoken (Qwen)."""

import base64
import importlib.util
import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from videollama2_hf.checkpoint_videollama2 import add_placeholder_tokens
from videollama2_hf.prompt_videollama2 import (
    build_chat_template,
    encode_prompts,
    escape_placeholders,
    split_at_placeholders,
)
from videollama2_hf.tokenization_videollama2 import (
    build_sentencepiece_backend,
    load_sentencepiece_tokenizer,
    load_tokenizer,
)


GOLDENS = Path(__file__).parent / "goldens"
REPOSITORY = Path(__file__).parents[1]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def package_file(package: str, *path: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).parent.joinpath(*path)


MISTRAL_V1 = package_file("mistral_common", "data", "tokenizer.model.v1")
MISTRAL_V2 = package_file("mistral_common", "data", "mistral_instruct_tokenizer_240216.model.v2")
MISTRAL_V3 = package_file("mistral_common", "data", "mistral_instruct_tokenizer_240323.model.v3")
TINY_LLAVA = GOLDENS / "video_llava" / "tiny-video-llava-7b"


def make_corpus() -> list[str]:
    code = (REPOSITORY / "src" / "videollama2_hf" / "configuration_videollama2.py").read_text()
    prose = (REPOSITORY / "LICENSE").read_text() + (REPOSITORY / "docs" / "architecture.md").read_text()
    corpus = [line for text in (code, prose) for line in text.split("\n")]
    corpus += [code[start : start + 1500] for start in range(0, len(code), 1500)]
    for character in (" ", "\n", "\t", "a", "=", "-", ".", "#", "ha", "是", "\u3000", "▁"):
        corpus += [character * n for n in range(1, 40)] + [f"x{character * n}y z" for n in range(1, 40)]
    corpus += [
        "你好，世界！视频中有什么？",
        "日本語のテキストと絵文字😀",
        "한국어 텍스트",
        "😀😃 emoji 👨‍👩‍👧‍👦 🇫🇷 ☃️",
        "café naïve Ünïcödé",
        "e\u0301 decomposed, \ufb01 ligature",
        "مرحبا שלום ไทย",
        "\u00a0no-break\u200bzero width\x00\x01",
        "▁literal ▁▁ underline",
        "<0x0A> is not a byte here, <0x41> neither",
        "[INST] [/INST] <<SYS>>\n<</SYS>>",
        "𝕳𝖊𝖑𝖑𝖔 \U0010ffff",
        "def f(x):\n    if x:\n\treturn  x   # two  spaces\n\n\n",
    ]
    rng = random.Random(0)
    alphabet = [*"abetn(=_-.1é是の😀\n ", "  ", "    ", "\t", "the", "ing", " of"]
    corpus += ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(500)]
    return [text for text in dict.fromkeys(corpus) if text]


CORPUS = make_corpus()
SINGLE_LINES = ["What is shown?", "  two  spaces ", "你好 😀", "def f(x):\n    return x\n"]


def media_prompts(texts: list[str]) -> list[list[dict]]:
    """Conversations with media before, between and behind texts."""
    conversations = []
    for text in map(escape_placeholders, texts):
        content = [
            {"type": "video"},
            {"type": "text", "text": text},
            {"type": "image"},
            {"type": "audio"},
            {"type": "text", "text": text},
        ]
        conversations.append(
            [
                {"role": "user", "content": content},
                {"role": "assistant", "content": text},
                {"role": "user", "content": [{"type": "text", "text": text}, {"type": "video"}]},
            ]
        )
    return conversations


def test_the_corpus_is_large():
    assert len(CORPUS) > 1500


@pytest.mark.parametrize("model", [MISTRAL_V1, MISTRAL_V2, TINY_LLAVA / "tokenizer.model"], ids=lambda path: path.name)
def test_ids_and_text_equal_sentencepiece(model):
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model))
    backend = build_sentencepiece_backend(model)
    # SentencePiece does not know special tokens in a text; the fast tokenizer does.
    for text in CORPUS:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == expected.encode(text), text
        assert backend.decode(ids) == expected.decode(ids), text


def encode_as_slow_tokenizer(model: Path, legacy: bool):
    """transformers' slow Llama tokenizer (version 4.42), on SentencePiece itself."""
    spec = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    if not legacy:
        spec.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
    unknown = processor.encode("<unk>")

    def encode(text: str) -> list[int]:
        if not legacy:
            text = "▁" + text.replace("▁", " ")
        ids = []
        for piece in re.split("(<s>|</s>)", text):
            if piece in ("<s>", "</s>"):
                # The prefix in front of a special token that begins the text is dropped.
                ids = [] if ids == [processor.piece_to_id("▁")] and not legacy else ids
                ids.append(processor.piece_to_id(piece))
            elif not legacy and piece.startswith(("▁", " ")):
                ids += processor.encode("<unk>" + piece)[len(unknown) :]
            elif piece:
                ids += processor.encode(piece)
        return ids

    return encode


@pytest.mark.parametrize("legacy", [True, False])
def test_special_tokens_equal_the_slow_tokenizer(legacy, tmp_path):
    encode = encode_as_slow_tokenizer(MISTRAL_V1, legacy)
    tokenizer = load_sentencepiece_tokenizer(MISTRAL_V1, legacy=legacy)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [f"<s>{text}</s>{text[::-1]}<s> {text}" for text in CORPUS[::3] if "▁" not in text]
    texts += [text for text in CORPUS if "▁" not in text] + ["</s>", "<s></s>", " </s> a", "a</s>"]
    assert len(texts) > 1000
    for tok in (tokenizer, reloaded):
        for text, ids in zip(texts, tok(texts, add_special_tokens=False)["input_ids"]):
            assert ids == encode(text), text


def test_settings_beside_the_model(tmp_path):
    tokenizer = load_sentencepiece_tokenizer(TINY_LLAVA / "tokenizer.model")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (2048, "right")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids == tokenizer("a b").input_ids
    plain = load_sentencepiece_tokenizer(MISTRAL_V1, padding_side="left")
    assert (plain.bos_token_id, plain.eos_token_id, plain.unk_token_id) == (1, 2, 0) and plain.padding_side == "left"


def test_load_tokenizer_takes_tokenizer_json_as_it_is(tmp_path):
    """`LlamaTokenizer` of transformers 5 rebuilds it and loses the space in front of a text that begins with one."""
    folder = GOLDENS / "processing" / "tokenizers" / "llama"
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    for text in ("  indented", " one", "no", "\nline"):
        assert tokenizer(text, add_special_tokens=False).input_ids == expected.encode(text)
    # Without tokenizer.json the same ids come from the SentencePiece model, in both of the slow tokenizer's modes.
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    converted = load_tokenizer(tmp_path, local_files_only=True)
    assert converted.chat_template == tokenizer.chat_template
    for text in CORPUS[::5]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert converted(text, add_special_tokens=False).input_ids == ids


def test_models_that_cannot_be_converted(tmp_path):
    with pytest.raises(ValueError, match="is not converted here"):
        build_sentencepiece_backend(MISTRAL_V3)  # user-defined pieces
    spec = sentencepiece_model_pb2.ModelProto.FromString(MISTRAL_V1.read_bytes())
    spec.trainer_spec.model_type = 1
    (tmp_path / "unigram.model").write_bytes(spec.SerializeToString())
    with pytest.raises(ValueError, match="is not converted here"):
        build_sentencepiece_backend(tmp_path / "unigram.model")
    for content in (b"", b"not a model", b"\xff" * 40):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(ValueError, match="is not a SentencePiece model"):
            build_sentencepiece_backend(tmp_path / "broken.model")


def render(template: str, conversation: list[dict], **kwargs) -> list[str]:
    prompts, _ = render_jinja_template(
        [conversation], chat_template=build_chat_template(template), add_generation_prompt=True, **kwargs
    )
    return split_at_placeholders(prompts[0])


def check_prompts(tokenizer, template: str, encode, texts: list[str], **kwargs):
    """Every text between media has the ids that `encode` gives to it alone."""
    for conversation in media_prompts(texts):
        prompt = render(template, conversation, **kwargs)
        assert prompt[1::2] == ["<video>", "<image>", "<audio>", "<video>"]
        encoded = encode_prompts(tokenizer, [prompt], [[(token, 3)] for token in prompt[1::2]])[0]
        expected = []
        for index, piece in enumerate(prompt):
            text = piece.replace("\ufdd0", "<")  # a placeholder token that a text holds
            expected += encode(text) if index % 2 == 0 else [tokenizer.convert_tokens_to_ids(piece)] * 3
        assert encoded.ids == expected, prompt


def test_mistral_prompts_with_media():
    tokenizer = load_sentencepiece_tokenizer(MISTRAL_V1)
    add_placeholder_tokens(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<video>", "<audio>"]) == [32000, 32001, 32002]
    encode = encode_as_slow_tokenizer(MISTRAL_V1, legacy=True)
    texts = SINGLE_LINES + [text for text in CORPUS[::4] if "<s>" not in text]
    check_prompts(tokenizer, MISTRAL_TEMPLATE, encode, texts, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def qwen():
    """Qwen's tiktoken encoding, and the same vocabulary as the tokenizer that Qwen2 checkpoints have."""
    lines = package_file("dashscope", "resources", "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    special = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in visible}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}

    def to_text(token: bytes) -> str:
        return "".join(map(characters.__getitem__, token))

    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # the pair of lowest rank is merged first, as tiktoken does
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((to_text(parts[0]), to_text(parts[1])))
    vocabulary = {to_text(token): rank for token, rank in ranks.items()}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, unk_token=None, pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())
    add_placeholder_tokens(tokenizer)
    return encoding, tokenizer


def test_qwen_prompts_with_media(qwen):
    encoding, tokenizer = qwen

    def encode(text: str) -> list[int]:
        return encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    for text in CORPUS:
        assert encode_prompts(tokenizer, [[escape_placeholders(text)]], [])[0].ids == encode(text), text
    check_prompts(tokenizer, QWEN_TEMPLATE, encode, SINGLE_LINES + CORPUS[::8])
