r"""The chat formats once more, as the Jinja templates that transformers reads.

A template needs special tokens, but nobody may end a turn by writing `<|user|>` into it. So `plain`
puts a mark into every spelling of a special token in a message; the normalizer of tokenizer.json,
which runs after the special tokens have been found, removes the mark again. The words SPECIAL and
BREAK stand for the names of the tokenizer's special tokens and for the mark (see `complete`).
"""

import json
from collections.abc import Sequence

# Two of Unicode's noncharacters, which no text should hold.
MARK = "\ufdd0\ufdd1"
_PLAIN = r"""
{%- macro plain(text) -%}
{%- set broken = namespace(text=text) %}
{%- for name in SPECIAL %}
{%- set broken.text = broken.text | replace(name, name[0] ~ 'BREAK' ~ name[1:]) %}
{%- endfor %}
{{- broken.text }}
{%- endmacro -%}
""".lstrip()
# Metadata and content of a turn are encoded apart, each with a space in front, so the template
# writes the space of the content. Tools are written as by json.dumps(tools, indent=4), and calls as
# by python_calls.call_text.
CHATGLM3 = r"""
{%- macro turn(role, metadata, content) -%}
{{- '<|' ~ role ~ '|>' ~ plain(metadata) ~ '\n' }}
{%- if content %}{{ ' ' ~ plain(content) }}{% endif %}
{%- endmacro -%}
{{- '[gMASK]sop' }}
{%- if tools and (not messages or messages[0].role != 'system') %}
{{- turn('system', '', TOOL_PROMPT ~ '\n' ~ tools | tojson(indent=4)) }}
{%- endif %}
{%- for message in messages %}
{%- set content = message.content or '' %}
{%- if content is not string %}{{ raise_exception('the content must be a string') }}{% endif %}
{%- if message.role == 'system' %}
{%- set given = tools if loop.first and tools else none %}
{%- set listed = given if message.tools is undefined or message.tools is none else message.tools %}
{{- turn('system', '', content if listed is none
    else (content or TOOL_PROMPT) ~ '\n' ~ listed | tojson(indent=4)) }}
{%- elif message.role == 'tool' %}
{{- turn('observation', '', content) }}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set call = call.function if call.function else call %}
{%- set listed = namespace(text=[]) %}
{%- for name, value in call.arguments.items() %}
{%- set listed.text = listed.text + ['%s=%r' | format(name, value)] %}
{%- endfor %}
{{- turn('assistant', call.name,
    '```python\ntool_call(' ~ listed.text | join(', ') ~ ')\n```') }}
{%- endfor %}
{%- elif message.role in ['user', 'assistant', 'observation'] %}
{{- turn(message.role, message.metadata or '', content) }}
{%- else %}
{{- raise_exception('role ' ~ message.role ~ ' is unknown') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
""".strip()
_TURN = r"""
{%- macro turn(role, metadata, content) -%}
{{- '<|' ~ role ~ '|>' ~ plain(metadata) ~ '\n' ~ plain(content) }}
{%- endmacro -%}
{%- macro listed(tools) -%}
{{- '<|system|>\nTOOLS' }}
{%- for tool in tools %}
{%- set function = tool.function if tool.function else tool %}
{{- '\n\n## ' ~ plain(function.name) ~ '\n\n' ~ plain(function | tojson(indent=4)) ~ '\nRULE' }}
{%- endfor %}
{%- endmacro -%}
{%- macro said(message) -%}
{%- set content = message.content or '' %}
{%- if content is not string %}{{ raise_exception('the content must be a string') }}{% endif %}
{%- if message.role == 'tool' %}
{{- turn('observation', '', VISIBLE) }}
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set call = call.function if call.function else call %}
{%- set given = call.arguments %}
{{- turn('assistant', call.name, given if given is string else given | tojson) }}
{%- endfor %}
{%- elif message.role in ['system', 'user', 'assistant', 'observation'] %}
{{- turn(message.role, message.metadata or '', VISIBLE) }}
{%- else %}
{{- raise_exception('role ' ~ message.role ~ ' is unknown') }}
{%- endif %}
{%- endmacro -%}
{{- '[gMASK]<sop>' }}
{%- if tools and not (messages and messages[0].tools) %}{{ listed(tools) }}{% endif %}
""".strip()
_IN_ORDER = r"""
{%- if SYSTEM and not (messages and messages[0].role == 'system') %}
{{- turn('system', '', SYSTEM) }}
{%- endif %}
{%- for message in messages %}
{%- if message.tools %}{{ listed(message.tools) }}{% endif %}
{%- if message.content or not message.tools and (message.role != 'system' or not tools) %}
{{- said(message) }}
{%- endif %}
{%- endfor %}
""".strip()
_SYSTEM_FIRST = r"""
{%- for message in messages %}
{%- if message.tools %}{{ listed(message.tools) }}{% endif %}
{%- endfor %}
{%- for message in messages if message.role == 'system' %}
{%- if message.content or not (message.tools or tools) %}{{ said(message) }}{% endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}{{ said(message) }}{% endfor %}
""".strip()
_THOUGHTLESS = "content if message.role == 'system' else content.split('</think>')[-1].strip()"


def glm4(tools: str, rule: str, *, system: str = "", opening: str = "") -> str:
    """Returns the template of GLM-4-9B's format.

    Args:
        tools: What stands in front of the tools.
        rule: What stands behind each tool.
        system: The system text of conversations without one; "" for none.
        opening: What a prompt has after the role token of the answer.
    """
    text = f"{_TURN}\n{_IN_ORDER}\n{_generation(opening)}"
    return _filled(text, tools, rule).replace("SYSTEM", json.dumps(system, ensure_ascii=False))


def glm4_later(tools: str, rule: str, *, thinks: bool = False) -> str:
    """Returns the template of GLM-4-0414's format.

    Args:
        tools: What stands in front of the tools.
        rule: What stands behind each tool.
        thinks: Whether answers begin by thinking, which earlier turns don't show.
    """
    opening = "\n<think>" if thinks else ""
    text = f"{_TURN}\n{_SYSTEM_FIRST}\n{_generation(opening)}"
    if thinks:
        text = text.replace("VISIBLE", _THOUGHTLESS)
    return _filled(text, tools, rule)


def _generation(opening: str) -> str:
    """Returns the part of a template that begins the answer."""
    written = json.dumps(f"<|assistant|>{opening}")
    return "{%- if add_generation_prompt %}{{ " + written + " }}{% endif %}"


def _filled(text: str, tools: str, rule: str) -> str:
    """Returns a template of GLM-4's kind with its texts."""
    text = text.replace("TOOLS", tools.replace("\n", "\\n")).replace("RULE", rule)
    return text.replace("VISIBLE", "content")


def complete(template: str, names: Sequence[str]) -> str:
    """Returns a format's template for one tokenizer.

    Args:
        template: The template; "" stays so.
        names: The tokens that are found in text by their spelling.
    """
    if not template:
        return ""
    return _PLAIN.replace("BREAK", MARK).replace("SPECIAL", json.dumps(list(names))) + template
