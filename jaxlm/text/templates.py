"""Chat templates by name: ours, ChatML, Llama 2, Vicuna, Alpaca, and one without any words of its own.

Each marks the assistant's turn, its ending token included, with `{% generation %}`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from jaxlm.text.tokenizer import SPELLINGS


class Named(NamedTuple):
    """A template and the special tokens that it is made of."""

    source: str
    needs: tuple[str, ...] = ()


_TOOLS = (
    "{%- macro calls(message) -%}{%- for call in message.tool_calls or [] -%}"
    "{{ '\\n' if message.content or not loop.first }}{% set call = call.function or call %}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": '
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}}\n</tool_call>"
    "{%- endfor -%}{%- endmacro -%}"
)
_TOOL_LIST = (
    "{%- macro offered(tools) -%}You may call these functions:\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    'Call one as <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>{%- endmacro -%}'
)

_JAXLM = (
    _TOOLS
    + _TOOL_LIST
    + "{{ bos_token }}"
    + "{%- if tools -%}<|system|>{{ offered(tools) }}<|end|>{%- endif -%}"
    + "{%- for message in messages -%}"
    + "{%- if message.role == 'assistant' -%}<|assistant|>"
    + "{%- generation -%}{{ message.content or '' }}{{ calls(message) }}<|end|>{%- endgeneration -%}"
    + "{%- else -%}<|{{ 'system' if message.role == 'developer' else message.role }}|>{{ message.content }}<|end|>"
    + "{%- endif -%}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

_CHATML = (
    _TOOLS
    + _TOOL_LIST
    + "{%- if tools -%}<|im_start|>system\n{{ offered(tools) }}<|im_end|>\n{% endif -%}"
    + "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    + "{% if message.role == 'assistant' -%}"
    + "{%- generation -%}{{ message.content or '' }}{{ calls(message) }}<|im_end|>{%- endgeneration -%}"
    + "{%- else -%}{{ message.content }}<|im_end|>{%- endif -%}{{ '\\n' }}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)

_LLAMA2 = (
    "{%- set first = messages[0] -%}"
    "{%- set system = first.content if first.role == 'system' else '' -%}"
    "{%- for message in (messages[1:] if system else messages) -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Llama 2 takes user and assistant by turns, after at most one system message') }}{%- endif -%}"
    "{%- if message.role == 'user' -%}{{ bos_token }}[INST] "
    "{% if system and loop.first -%}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif -%}"
    "{{ message.content | trim }} [/INST]"
    "{%- else -%}{%- generation -%}{{ ' ' }}{{ message.content | trim }}{{ ' ' }}{{ eos_token }}{%- endgeneration -%}"
    "{%- endif -%}{%- endfor -%}"
)

_VICUNA = (
    "{{ bos_token }}"
    "{%- set first = messages[0] -%}"
    "{%- if first.role == 'system' -%}{{ first.content }}{%- else -%}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{%- endif -%}{{ ' ' }}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}USER: {{ message.content }}{{ ' ' }}"
    "{%- elif message.role == 'assistant' -%}ASSISTANT:"
    "{%- generation -%}{{ ' ' }}{{ message.content }}{{ eos_token }}{%- endgeneration -%}"
    "{%- elif not loop.first -%}{{ raise_exception('Vicuna has no role ' ~ message.role) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"
)

_ALPACA = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content }}\n\n{% endif -%}"
    "{%- if message.role == 'user' -%}"
    "{%- if message.input -%}"
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ message.instruction }}\n\n### Input:\n{{ message.input }}\n\n"
    "{% else -%}"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ message.instruction or message.content }}\n\n"
    "{% endif -%}"
    "### Response:\n"
    "{% elif message.role == 'assistant' -%}"
    "{%- generation -%}{{ message.content }}{{ eos_token }}{%- endgeneration -%}"
    "{{ '\\n\\n' if not loop.last }}"
    "{%- endif -%}{%- endfor -%}"
)

_PLAIN = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{ message.content }}{{ eos_token if loop.last }}{%- endgeneration -%}"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- endfor -%}"
)

TEMPLATES: Mapping[str, Named] = {
    "jaxlm": Named(_JAXLM, tuple(SPELLINGS[role][0] for role in ("system", "user", "assistant", "end_of_turn"))),
    "chatml": Named(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2": Named(_LLAMA2),
    "vicuna": Named(_VICUNA),
    "alpaca": Named(_ALPACA),
    "plain": Named(_PLAIN),
}


def default_name(specials: Collection[str]) -> str:
    """The template for a tokenizer with these special tokens, by our names for them."""
    return "jaxlm" if {"user", "assistant", "end_of_turn"} <= set(specials) else "alpaca"
