"""Chat templates: from messages with typed content to the strings that the originals tokenise."""

import json

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template


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
                {{- raise_exception('Content of type ' ~ block['type'] ~ ' is not known; use text, image, video or audio.') -}}
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
{%- set system = 'A chat between a curious ' + person + ' and an artificial intelligence assistant. The assistant gives '
    'helpful, detailed, and polite answers to the ' + person + "'s questions." -%}
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


__all__ = ["VIDEO_LLAVA_CHAT_TEMPLATE", "build_chat_template"]
