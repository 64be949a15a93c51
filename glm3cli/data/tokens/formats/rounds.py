"""ChatGLM2's format: numbered rounds of a question and an answer, as one text without roles.

Source: build_prompt of chatglm2-6b's tokenization_chatglm.py, and its ptuning/main.py, by which an
answer is encoded apart from its prompt and ended by the end token.
"""

from collections.abc import Sequence
from typing import ClassVar

from glm3cli.data.tokens.formats.base import ChatFormat, Speller, answered
from glm3cli.data.tokens.messages import Message, Sample
from glm3cli.errors import DataError

_HINT = "write questions and answers in turn, or use a model that has roles, such as ChatGLM3"


class Rounds(ChatFormat):
    """Numbered rounds. The whole prompt is encoded at once, and so are the earlier answers."""

    trains_all: ClassVar[bool] = False
    template = r"""
{{- '[gMASK]sop' }}
{%- set rounds = namespace(count=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- set rounds.count = rounds.count + 1 %}
{{- '[Round %d]\n\n问：' | format(rounds.count) ~ plain(message.content) ~ '\n\n答：' }}
{%- elif message.role == 'assistant' %}
{{- plain(message.content) ~ '\n\n' }}
{%- else %}
{{- raise_exception('ChatGLM2 has no role ' ~ message.role) }}
{%- endif %}
{%- endfor %}
""".strip()

    def prompt(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model answers."""
        return [*tokenizer.prefix, *tokenizer.encode(_text(messages, "user"))]

    def begun(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model goes on with an answer."""
        answer = messages[-1].content
        return [
            *self.prompt(tokenizer, messages[:-1]),
            *(tokenizer.encode(answer) if answer else []),
        ]

    def sample(self, tokenizer: Speller, messages: Sequence[Message]) -> Sample:
        """Returns a conversation whose last answer is trained."""
        _check(messages, "assistant")
        answer = tokenizer.encode(messages[-1].content)
        return answered(self.prompt(tokenizer, messages[:-1]), answer, tokenizer.eos_id)


def _text(messages: Sequence[Message], last: str) -> str:
    """Returns the text of a conversation that ends with a question."""
    _check(messages, last)
    text = ""
    for number, question in enumerate(messages[::2], 1):
        text += f"[Round {number}]\n\n问：{question.content}\n\n答："
        for answer in messages[2 * number - 1 : 2 * number]:
            text += f"{answer.content}\n\n"
    return text


def _check(messages: Sequence[Message], last: str) -> None:
    """Checks that a conversation is of questions and answers in turn.

    Raises:
        DataError: It isn't, or ends with another role than `last`.
    """
    for place, message in enumerate(messages):
        expected = ("user", "assistant")[place % 2]
        if message.role != expected or message.metadata or message.tools:
            found = "a call of a tool" if message.metadata else f"a {message.role} turn"
            raise DataError(f"{found} can't be written in ChatGLM2's rounds", _HINT)
    if not messages or messages[-1].role != last:
        raise DataError(f"the conversation doesn't end with a turn of the {last}", _HINT)
