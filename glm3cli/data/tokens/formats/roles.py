r"""The formats in which every turn begins with the token of its role.

A turn is that token, the tokens of "METADATA\n", and the tokens of its content; the metadata of an
assistant turn is the name of the tool that it calls. Sources: build_single_message and
build_chat_input of ChatGLM3's tokenization_chatglm.py, and the chat templates in the
tokenizer_config.json of GLM-4-9B-Chat, CodeGeeX4, GLM-4-9B-0414 and GLM-Z1-9B-0414.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from glm3cli.data.tokens.formats import json_calls, python_calls, templates
from glm3cli.data.tokens.formats.base import ChatFormat, Speller, parse_reply
from glm3cli.data.tokens.messages import IGNORED_LABEL, Message, Sample, ToolCall

# The system message that ChatGLM3 was trained on in front of tools (source: its finetune_demo).
TOOL_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)
_GLM4_TOOLS = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_Z1_TOOLS = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_TOOL_RULE = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
_CODEGEEX = (
    "你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
    "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。"
)


class Roles(ChatFormat):
    """A format with a token for each role.

    Attributes:
        opening: What a prompt has after the role token of the answer.
    """

    separator: ClassVar[str | None] = "<|assistant|>"
    opening: ClassVar[str] = ""

    def turns(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yields the turns as they are written, each with the text that the model reads."""
        for message in messages:
            yield replace(message, content=self.text(message))

    def prompt(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the prefix, all turns, and the role token of the answer."""
        ids = list(tokenizer.prefix)
        for message in self.turns(messages):
            ids += _turn(tokenizer, message)
        return [*ids, tokenizer.special("<|assistant|>"), *self._opened(tokenizer)]

    def begun(self, tokenizer: Speller, messages: Sequence[Message]) -> list[int]:
        """Returns the prefix and all turns."""
        turns = [_turn(tokenizer, message) for message in self.turns(messages)]
        return [*tokenizer.prefix, *(token for turn in turns for token in turn)]

    def text_start(self, tokenizer: Speller) -> list[int]:
        """Returns the empty line that stands where a call has the name of its tool."""
        return [] if self.opening else tokenizer.encode("\n")

    def sample(self, tokenizer: Speller, messages: Sequence[Message]) -> Sample:
        """Returns all turns; a trained answer is ended by the next role token or the end token."""
        ids, labels = list(tokenizer.prefix), [IGNORED_LABEL] * len(tokenizer.prefix)
        trained = False
        turns = list(self.turns(messages))
        for place, message in enumerate(turns, 1):
            turn = _turn(tokenizer, message)
            labels.append(turn[0] if trained else IGNORED_LABEL)
            may_train = self.trains_all or place == len(turns)
            trained = message.role == "assistant" and message.loss and may_train
            # A line break that prompts have isn't trained.
            first = 2 if trained and self.opening and not message.metadata else 1
            labels += [IGNORED_LABEL] * (first - 1)
            labels += turn[first:] if trained else [IGNORED_LABEL] * (len(turn) - first)
            ids += turn
        labels.append(tokenizer.eos_id if trained else IGNORED_LABEL)
        return Sample([*ids, tokenizer.eos_id], labels)

    def parse(self, text: str) -> Message:
        """Splits a generated text at its first line break into metadata and content."""
        return parse_reply(text)

    def _opened(self, tokenizer: Speller) -> list[int]:
        """Returns the ids of what a prompt has after the role token of the answer."""
        return tokenizer.encode(self.opening) if self.opening else []


class ChatGLM3(Roles):
    """ChatGLM3: tools as a JSON list in the system turn, and calls as Python code."""

    calls: ClassVar[Literal["python", "json"] | None] = "python"
    template = templates.CHATGLM3.replace("TOOL_PROMPT", json.dumps(TOOL_PROMPT))

    def text(self, message: Message) -> str:
        """Returns what the model reads of a turn, which includes the tools of a system turn."""
        if message.role == "system" and message.tools is not None:
            listed = json.dumps(message.tools, indent=4, ensure_ascii=False)
            return f"{message.content or TOOL_PROMPT}\n{listed}"
        return super().text(message)

    def call_text(self, arguments: Mapping[str, Any]) -> str:
        """Returns the content of a turn that calls a tool."""
        return python_calls.call_text(arguments)

    def read_calls(self, message: Message) -> list[ToolCall]:
        """Returns the calls that an assistant turn consists of; none if it is text."""
        return python_calls.read_calls(message)

    def may_be_call(self, text: str) -> bool:
        """Returns whether an answer that begins with a text can still become a call."""
        return python_calls.may_be_call(text)


class Glm4(Roles):
    """GLM-4-9B: a system turn of its own for tools, and calls as JSON.

    Attributes:
        tools_text: What stands in front of the tools.
    """

    calls: ClassVar[Literal["python", "json"] | None] = "json"
    tools_text: ClassVar[str] = _GLM4_TOOLS
    template = templates.glm4(_GLM4_TOOLS, _TOOL_RULE)

    def turns(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yields the turns, the tools of one before its own text."""
        for message in messages:
            if message.tools:
                yield Message("system", self._listed(message.tools))
            if message.content or not message.tools:
                yield replace(message, tools=None, content=self.said(message))

    def said(self, message: Message) -> str:
        """Returns the text of a turn, without its tools."""
        return super().text(replace(message, tools=None))

    def text(self, message: Message) -> str:
        """Returns what the model reads of a turn, which includes its tools."""
        return (self._listed(message.tools) if message.tools else "") + self.said(message)

    def call_text(self, arguments: Mapping[str, Any]) -> str:
        """Returns the content of a turn that calls a tool."""
        return json_calls.call_text(arguments)

    def read_calls(self, message: Message) -> list[ToolCall]:
        """Returns the call that an assistant turn is; none if it is text."""
        return json_calls.read_calls(message)

    def may_be_call(self, text: str) -> bool:
        """Returns whether an answer that begins with a text can still become a call."""
        return json_calls.may_be_call(text)

    def _listed(self, tools: Any) -> str:
        """Returns the text of the system turn for tools."""
        text = self.tools_text
        for tool in tools if isinstance(tools, list) else [tools]:
            function = tool.get("function", tool) if isinstance(tool, dict) else {"name": tool}
            listed = json.dumps(function, indent=4, ensure_ascii=False)
            text += f"\n\n## {function.get('name', '')}\n\n{listed}\n{_TOOL_RULE}"
        return text


class CodeGeeX4(Glm4):
    """CodeGeeX4: GLM-4's turns, a system text of its own, and prompts that end with a line."""

    opening: ClassVar[str] = "\n"
    template = templates.glm4(_GLM4_TOOLS, _TOOL_RULE, system=_CODEGEEX, opening="\n")

    def turns(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yields the turns, the usual system text first if there is none."""
        first, others = Message("system", ""), list(messages)
        if others and others[0].role == "system":
            first = others.pop(0)
        first = replace(first, content=first.content or _CODEGEEX)
        yield from super().turns([first, *others])


class Glm4Later(Glm4):
    """GLM-4-0414: the tools first, then all system texts, then the other turns."""

    tools_text: ClassVar[str] = "# 可用工具"
    template = templates.glm4_later("# 可用工具", _TOOL_RULE)

    def turns(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yields the turns in this order."""
        for message in messages:
            if message.tools:
                yield Message("system", self._listed(message.tools))
        for is_system in (True, False):
            for message in messages:
                if (message.role == "system") is is_system and (
                    message.content or not message.tools
                ):
                    yield replace(message, tools=None, content=self.said(message))


class GlmZ1(Glm4Later):
    """GLM-Z1: answers begin by thinking, which later turns don't show any more."""

    trains_all: ClassVar[bool] = False
    opening: ClassVar[str] = "\n<think>"
    tools_text: ClassVar[str] = _Z1_TOOLS
    template = templates.glm4_later(_Z1_TOOLS, _TOOL_RULE, thinks=True)

    def turns(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yields the turns without the thoughts, but for an answer that is trained."""
        written = list(super().turns(messages))
        for place, message in enumerate(written):
            is_trained = place == len(written) - 1 and message.role == "assistant"
            if message.role == "system" or is_trained:
                yield message
            else:
                yield replace(message, content=message.content.split("</think>")[-1].strip())


def _turn(tokenizer: Speller, message: Message) -> list[int]:
    """Returns the ids of a turn: its role token, its metadata, and its content."""
    return [
        tokenizer.special(f"<|{message.role}|>"),
        *tokenizer.encode(f"{message.metadata}\n"),
        *tokenizer.encode(message.content),
    ]
