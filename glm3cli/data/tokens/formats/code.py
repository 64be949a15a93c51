"""CodeGeeX2's format: a comment that says what code is to follow.

Source: the README of CodeGeeX2, whose prompts begin with a line that names the language.
"""

from collections.abc import Sequence
from typing import ClassVar

from glm3cli.data.tokens.formats.base import ChatFormat, Speller, answered
from glm3cli.data.tokens.messages import Message, Sample
from glm3cli.errors import DataError

_TAG, _USUAL = "# language: ", "Python"


class Comments(ChatFormat):
    """A question as comments, below a line with the language, which a system turn may name."""

    trains_all: ClassVar[bool] = False
    template = r"""
{%- set asked = namespace(language='Python', text='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set asked.language = message.content %}{% endif %}
{%- if message.role == 'user' %}{% set asked.text = message.content %}{% endif %}
{%- endfor %}
{{- '[gMASK]sop' }}
{%- if asked.text.startswith('# language: ') %}{{ plain(asked.text) ~ '\n' }}
{%- else %}
{{- '# language: ' ~ plain(asked.language) ~ '\n' }}
{%- for line in asked.text.split('\n') %}{{ '# ' ~ plain(line) ~ '\n' }}{% endfor %}
{%- endif %}
""".strip()

    def prompt(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model writes code."""
        roles = [message.role for message in messages]
        if roles not in (["user"], ["system", "user"]) or messages[0].tools:
            raise DataError(
                f"CodeGeeX2 can't be asked in the turns {', '.join(roles) or '(none)'}",
                "write one question; a system turn before it may name the language",
            )
        question = messages[-1].content
        if not question.startswith(_TAG):
            language = messages[0].content if len(messages) > 1 else _USUAL
            lines = [f"{_TAG}{language}", *(f"# {line}" for line in question.split("\n"))]
            question = "\n".join(lines)
        return [*tokenizer.prefix, *tokenizer.encode(f"{question}\n")]

    def begun(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model goes on with an answer."""
        answer = messages[-1].content
        return [
            *self.prompt(tokenizer, messages[:-1]),
            *(tokenizer.encode(answer) if answer else []),
        ]

    def sample(self, tokenizer: Speller, messages: Sequence[Message]) -> Sample:
        """Returns a question whose answer is trained."""
        if not messages or messages[-1].role != "assistant":
            raise DataError("the conversation doesn't end with an answer", "add one")
        answer = tokenizer.encode(messages[-1].content)
        return answered(self.prompt(tokenizer, messages[:-1]), answer, tokenizer.eos_id)
