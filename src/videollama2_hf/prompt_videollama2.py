"""Prompts: from messages to the strings that the originals tokenise, and from there to token ids."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .checkpoint_videollama2 import PLACEHOLDER_TOKENS


# In front of a checkpoint's own template, which takes strings as content. Two things of the original happen here:
# `modal_token + "\n" + instruction` (`mm_infer` in videollama2/__init__.py), for any number of media in reading order,
# and the system message of its inference. Text that begins with white space places itself: no line break is added.
_PRELUDE = """\
{#- VideoLLaMA 2: typed content becomes the strings that the template behind takes; strings stay as they are. -#}
{%- set prepared = namespace(messages=[]) -%}
{%- if for_training is not defined -%}
    {%- set for_training = not add_generation_prompt -%}
{%- endif -%}
{%- set default_system_message = DEFAULT_SYSTEM_MESSAGE -%}
{%- if default_system_message and not for_training and messages and messages[0]['role'] != 'system' -%}
    {%- set prepared.messages = [{'role': 'system', 'content': default_system_message}] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['content'] is not defined or message['content'] is none or message['content'] is string -%}
        {%- set prepared.messages = prepared.messages + [message] -%}
    {%- else -%}
        {%- set turn = namespace(text='', after_media=false) -%}
        {%- for block in message['content'] -%}
            {%- if block['type'] in ('image', 'video', 'audio') -%}
                {%- set turn.text = turn.text + '<' + block['type'] + '>' -%}
                {%- set turn.after_media = true -%}
            {%- elif block['type'] == 'text' -%}
                {%- if turn.after_media and block['text'] and block['text'][0] not in ' \\t\\n' -%}
                    {%- set turn.text = turn.text + '\\n' -%}
                {%- endif -%}
                {%- set turn.text = turn.text + block['text'] -%}
                {%- set turn.after_media = false -%}
            {%- else -%}
                {{- raise_exception('Content is text, image, video or audio, not ' ~ block['type'] ~ '.') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set prepared.messages = prepared.messages + [dict(message, content=turn.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = prepared.messages -%}
{{- '' }}"""
_PRELUDE_MARK = _PRELUDE.split("\n", 1)[0]

# Video-LLaVA's `conv_llava_v1` (inference: "human") and `conv_v1` (training: "user"), llava/conversation.py.
VIDEO_LLAVA_CHAT_TEMPLATE = """\
{%- set person = 'user' if for_training else 'human' -%}
{%- set system = 'A chat between a curious ' + person + ' and an artificial intelligence assistant. '
    'The assistant gives helpful, detailed, and polite answers to the ' + person + "'s questions." -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{{- system + ' ' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + message['content'] + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('The roles are system (first), user and assistant, got ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}"""


def build_chat_template(template: str | dict[str, str] | None, default_system_message: str | None = None) -> str:
    """
    Makes a chat template that takes typed content out of one that takes strings, which stays as it is.

    The result knows one variable more than the templates of transformers: `for_training`, by default the opposite of
    `add_generation_prompt`. The original trains without its default system message and infers with it.

    Args:
        template: The template of the checkpoint's tokenizer. One that was built here already is returned unchanged.
        default_system_message: Put in front of a conversation that has no system message, at inference. Dropped if
            `template` refuses system messages, where the original stops with an error.

    Raises:
        ValueError: There is no template.
    """
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(
            "The tokenizer has no chat template. Set `tokenizer.chat_template` to the one of the language model that "
            "the checkpoint is made of."
        )
    if template.startswith(_PRELUDE_MARK):
        return template
    if default_system_message is not None and not _accepts_system_message(template):
        default_system_message = None
    literal = "none" if default_system_message is None else json.dumps(default_system_message)
    return _PRELUDE.replace("DEFAULT_SYSTEM_MESSAGE", literal) + template


def _accepts_system_message(template: str) -> bool:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        render_jinja_template(
            [messages], chat_template=template, bos_token="", eos_token="", add_generation_prompt=True
        )
    except jinja2.TemplateError:
        return False
    return True


# A placeholder token in the text of a message is text. Its first character becomes a noncharacter of Unicode until the
# prompt has been split at the real placeholders: one character for another, so that offsets stay the same.
_ESCAPE = "\ufdd0"
_ESCAPED_PLACEHOLDER = re.compile(f"{_ESCAPE}({'|'.join(token[1:] for token in PLACEHOLDER_TOKENS)})")
# transformers puts this in front of control tokens that a user wrote (`sanitize_control_tokens=True`).
_SANITIZED = "\U000f0000"
_PLACEHOLDER = re.compile(f"(?<!{_SANITIZED})({'|'.join(PLACEHOLDER_TOKENS)})")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def escape_placeholders(text: str) -> str:
    """Marks placeholder tokens in a text as text; [`encode_prompts`] undoes it."""
    return _PLACEHOLDER.sub(lambda match: _ESCAPE + match.group()[1:], text)


def split_at_placeholders(prompt: str) -> list[str]:
    """Texts and placeholder tokens in turn: `[text, token, text, ..., text]`, where texts may be empty."""
    return _PLACEHOLDER.split(prompt)


@dataclass
class EncodedPrompt:
    """
    One prompt as token ids, with its placeholders expanded.

    `offsets` are the tokens' (start, end) in the prompt as it was, in characters; (0, 0) for tokens that are not text,
    and for all tokens of a slow tokenizer. `expanded` holds for every placeholder its position in the prompt, its
    token, and the tokens that took its place with their numbers.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    expanded: list[tuple[int, str, list[tuple[str, int]]]]

    def truncate(self, max_length: int, side: str, placeholder_ids: set[int]) -> None:
        """
        Cuts text off at one side.

        Raises:
            ValueError: Placeholders would be cut off.
        """
        excess = len(self.ids) - max_length
        if excess <= 0:
            return
        kept, cut = slice(max_length), slice(max_length, None)
        if side == "left":
            kept, cut = slice(excess, None), slice(excess)
        if placeholder_ids & set(self.ids[cut]):
            raise ValueError(
                f"Truncation to max_length={max_length} would cut media off: {self.describe()}. Raise max_length, "
                "lower num_frames (or fps), or leave truncation off."
            )
        self.ids, self.offsets = self.ids[kept], self.offsets[kept]

    def describe(self) -> str:
        """The numbers of tokens by part: `12 of text, 1521 of video 1, 1496 of its sound, 845 of image 1`."""
        parts, numbers, num_media = [], {}, 0
        for _, token, expansion in self.expanded:
            numbers[token] = numbers.get(token, 0) + 1
            for part, count in expansion:
                part = f"{token[1:-1]} {numbers[token]}" if part == token else "its sound"
                parts.append(f"{count} of {part}")
                num_media += count
        return ", ".join([f"{len(self.ids) - num_media} of text", *parts])

    def replacement_offsets(self) -> list[dict[str, Any]]:
        """transformers' `text_replacement_offsets`: where placeholders were, and would be if expanded as strings."""
        offsets, shift = [], 0
        for position, token, expansion in self.expanded:
            replacement = "".join(token * count for token, count in expansion)
            offsets.append(
                {
                    "type": token[1:-1],
                    "span": (position, position + len(token)),
                    "new_span": (position + shift, position + shift + len(replacement)),
                    "text": token,
                    "replacement": replacement,
                }
            )
            shift += len(replacement) - len(token)
        return offsets


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[str]],
    expansions: list[list[tuple[str, int]]],
    add_bos_token: bool = False,
    sanitize_control_tokens: bool = False,
) -> list[EncodedPrompt]:
    """
    Token ids of prompts with media, as the original makes them (`tokenizer_multimodal_token` in its `mm_utils.py`).

    Every text between two placeholders is tokenised by itself, without added special tokens. Placeholder tokens that
    [`escape_placeholders`] marked are tokenised as text.

    Args:
        prompts: What [`split_at_placeholders`] gives.
        expansions: For every placeholder in reading order the tokens that take its place, and how often.
        add_bos_token: Whether to begin a prompt with the BOS token if its text does not.
        sanitize_control_tokens: As in transformers: the texts hold marked control tokens.
    """
    encoded = _tokenize_texts(tokenizer, [text for prompt in prompts for text in prompt[::2]], sanitize_control_tokens)
    remaining = iter(expansions)
    results = []
    for prompt in prompts:
        ids, offsets, expanded, position = [], [], [], 0
        if add_bos_token and tokenizer.bos_token and not prompt[0].startswith(tokenizer.bos_token):
            ids.append(tokenizer.bos_token_id)
            offsets.append((0, 0))
        for index, piece in enumerate(prompt):
            if index % 2 == 0:
                piece_ids, piece_offsets = encoded[piece]
                ids += piece_ids
                offsets += [(position + start, position + end) for start, end in piece_offsets]
            else:
                expansion = next(remaining)
                for token, count in expansion:
                    ids += [tokenizer.convert_tokens_to_ids(token)] * count
                    offsets += [(0, 0)] * count
                expanded.append((position, piece, expansion))
            position += len(piece)
        results.append(EncodedPrompt(ids, offsets, expanded))
    return results


def _tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], sanitize_control_tokens: bool
) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    """Ids and offsets of every text. A tokenizer that is not a fast one gives offsets of (0, 0)."""
    encoded: dict[str, tuple[list[int], list[tuple[int, int]]]] = {"": ([], [])}
    plain = [text for text in dict.fromkeys(texts) if text and not _ESCAPED_PLACEHOLDER.search(text)]
    if plain:
        has_offsets = tokenizer.is_fast and not sanitize_control_tokens
        kwargs = {"sanitize_control_tokens": True} if sanitize_control_tokens else {}
        # A warning about `model_max_length` would be wrong: in original checkpoints it is that of the training.
        outputs = tokenizer(
            plain, add_special_tokens=False, return_offsets_mapping=has_offsets, verbose=False, **kwargs
        )
        for i, text in enumerate(plain):
            ids = outputs["input_ids"][i]
            encoded[text] = (ids, outputs["offset_mapping"][i] if has_offsets else [(0, 0)] * len(ids))
    for text in texts:
        if text not in encoded:
            backend = _backend_without_placeholders(tokenizer, len(tokenizer))
            encoding = backend.encode(_ESCAPED_PLACEHOLDER.sub(r"<\1", text), add_special_tokens=False)
            encoded[text] = (encoding.ids, encoding.offsets)
    return encoded


@lru_cache(maxsize=2)
def _backend_without_placeholders(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int):
    """The `tokenizers.Tokenizer` of a tokenizer as it was before placeholder tokens were added to it."""
    if not tokenizer.is_fast:
        raise ValueError(
            "The text of a message holds a placeholder token ('<image>', '<video>' or '<audio>'), which a slow "
            "tokenizer cannot take as text. Remove it, or use a fast tokenizer."
        )
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in PLACEHOLDER_TOKENS]
    return type(backend).from_str(json.dumps(state))


def find_assistant_spans(
    conversation: list[dict[str, Any]], chat_template: str, add_generation_prompt: bool, **template_kwargs
) -> list[tuple[int, int]]:
    """
    What the assistant says in a rendered conversation, with the tokens that end a turn: (start, end) of every turn, in
    characters.

    Spans are those of `{% generation %}` if the template has it. Otherwise a turn is what it adds to the conversation
    before it, generation prompt included (`preprocess` in the original's `train.py`, on characters instead of tokens).

    Raises:
        ValueError: The conversation begins with the assistant, or the template renders a turn differently when others
            follow.
    """

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool, **kwargs) -> tuple[str, list]:
        prompts, spans = render_jinja_template(
            [messages],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs,
            **kwargs,
        )
        return prompts[0], spans

    if _GENERATION_TAG.search(chat_template):
        return render(conversation, add_generation_prompt, return_assistant_tokens_mask=True)[1][0]

    prompt, _ = render(conversation, add_generation_prompt)
    spans = []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise ValueError(
                "The conversation begins with the assistant, so there is nothing that its first turn answers. Drop "
                "that turn, or use a chat template with {% generation %} tags."
            )
        before, _ = render(conversation[:turn], add_generation_prompt=True)
        through, _ = render(conversation[: turn + 1], add_generation_prompt=False)
        if not (prompt.startswith(before) and prompt.startswith(through)):
            raise ValueError(
                f"The chat template renders turn {turn} differently when it is not the last, so the tokens of the "
                "assistant cannot be told from its output. Put {% generation %} tags into the template."
            )
        spans.append((len(before), len(through)))
    return spans


__all__ = [
    "VIDEO_LLAVA_CHAT_TEMPLATE",
    "EncodedPrompt",
    "build_chat_template",
    "encode_prompts",
    "escape_placeholders",
    "find_assistant_spans",
    "split_at_placeholders",
]
