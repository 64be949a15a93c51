"""`Session`: a chat on rank 0, line by line: what is said, commands, and calls of tools."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from glm3cli.data.tokens.calls import ReplyStream
from glm3cli.data.tokens.chat import build_prompt
from glm3cli.data.tokens.messages import Message, ToolCall
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import Glm3Error
from glm3cli.host.files import expanded
from glm3cli.infer.chat.answers import Answers
from glm3cli.infer.chat.conversation import Conversation
from glm3cli.infer.chat.toolbox import Toolbox, read_tools, tool_name

# So often in a row a model may call tools, before the user is asked again.
MAX_CALLS = 8

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
_OLD_WORDS = {"quit": "/exit", "exit": "/exit", "new": "/clear", "clear": "/clear"}


class Terminal(Protocol):
    """A place where a chat is read and shown."""

    def read(self, is_observation: bool) -> str | None:
        """Returns what the user says next; None at the end.

        Args:
            is_observation: Whether the user is asked what a tool has returned.

        Raises:
            KeyboardInterrupt: The user has dropped the line by Ctrl-C.
        """

    def write(self, text: str) -> None:
        """Shows a piece of an answer."""

    def note(self, text: str) -> None:
        """Shows a remark of the program."""

    def show_call(self, text: str) -> None:
        """Shows the call of a tool."""

    def is_stopped(self) -> bool:
        """Whether Ctrl-C was pressed since the answer began."""

    def answering(self) -> AbstractContextManager[None]:
        """Within the block, Ctrl-C makes `is_stopped` true and raises nothing."""


@dataclass
class _Asked:
    """What has come of an answer."""

    num_tokens: int
    finish_reason: str
    is_stopped: bool


class Session:
    """A chat with a model on rank 0."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        answers: Answers,
        terminal: Terminal,
        conversation: Conversation,
        toolbox: Toolbox,
        seed: int,
        may_run: bool,
    ) -> None:
        """Prepares a chat.

        Args:
            tokenizer: The tokenizer of the model.
            answers: Has the model answer.
            terminal: Where the chat is read and shown.
            conversation: The turns to begin with.
            toolbox: The tools, which `conversation` shows to the model.
            seed: The seed of the random numbers; the n-th answer, from 0, gets seed + n.
            may_run: Whether functions that the user gives are run when the model calls them.
        """
        self._tokenizer = tokenizer
        self._answers = answers
        self._terminal = terminal
        self._conversation = conversation
        self._toolbox = toolbox
        self._seed = seed
        self._may_run = may_run
        self._is_over = False

    def run(self) -> None:
        """Holds the chat until its end."""
        while not self._is_over:
            try:
                text = self._terminal.read(bool(self._conversation.calls))
                if text is None:
                    return
                self._take(text)
            except KeyboardInterrupt:
                self._terminal.note("stopped; /exit or Ctrl-D ends the chat")
            except Glm3Error as error:
                self._terminal.note(f"error: {error.message}")
                if error.hint:
                    self._terminal.note(f"hint: {error.hint}")

    def _take(self, text: str) -> None:
        """Does what a line says: runs a command, or lets the model answer.

        Raises:
            Glm3Error: It can't be done; the chat is as it was.
            KeyboardInterrupt: The user has stopped it.
        """
        text = _OLD_WORDS.get(text.strip(), text)
        command = _COMMAND.fullmatch(text.strip())
        if command:
            self._command(command[1], (command[2] or "").strip())
        elif text.strip():
            self._say(text.strip("\n"))

    def _command(self, name: str, argument: str) -> None:
        """Runs a command of the chat."""
        known = COMMANDS.get(name)
        if known is None:
            self._terminal.note(f"/{name} is no command; /help lists them")
        elif known.argument is None and argument:
            self._terminal.note(f"/{name} takes nothing after it")
        else:
            known.run(self, argument)

    def _say(self, text: str) -> None:
        """Adds a turn and lets the model answer it, and the results of the tools it calls."""
        before = len(self._conversation.turns)
        self._conversation.say(text)
        try:
            self._answer()
        except Glm3Error:
            del self._conversation.turns[before:]
            raise

    def _answer(self) -> None:
        """Lets the model answer, and runs the tools that it calls, if it may."""
        for _ in range(MAX_CALLS):
            asked = self._ask()
            self._remark(asked)
            calls = self._conversation.calls
            for call in calls:
                self._terminal.show_call(show_call(call))
            if not calls or not self._run(calls):
                return
        self._terminal.note(f"{MAX_CALLS} calls in a row; /retry goes on, /clear starts over")

    def _ask(self) -> _Asked:
        """Has the model answer the turns so far, and adds its answer to them.

        A turn to which nothing was answered is taken back.
        """
        prompt = build_prompt(self._tokenizer, self._conversation.messages)
        stream, seed = ReplyStream(self._tokenizer), self._seed
        shown = ""

        def show(text: str) -> None:
            nonlocal shown
            shown += text
            if text:
                self._terminal.write(text)

        with self._terminal.answering():
            generation = self._answers.ask(
                prompt, seed, lambda token: show(stream.push(token)), self._terminal.is_stopped
            )
        self._seed += 1
        show(stream.finish())
        if shown or not generation.token_ids:
            self._terminal.write("\n")
        is_stopped = self._terminal.is_stopped()
        if generation.token_ids or not is_stopped:
            self._conversation.add(stream.messages)
        else:
            self._conversation.take_back()
        return _Asked(len(generation.token_ids), generation.finish_reason, is_stopped)

    def _remark(self, asked: _Asked) -> None:
        """Tells how an answer has ended, if not by itself."""
        if asked.is_stopped and not asked.num_tokens:
            self._terminal.note("stopped before the first word; what you said is taken back")
        elif asked.is_stopped:
            self._terminal.note("stopped; /retry asks again")
        elif asked.finish_reason == "length":
            self._terminal.note(f"cut after {asked.num_tokens:,} tokens (--max-new-tokens)")

    def _run(self, calls: list[ToolCall]) -> bool:
        """Runs the functions that the model calls, and adds what they return.

        Returns:
            Whether the model can go on; if not, the user is asked for the result.
        """
        if missing := [call.name for call in calls if call.name not in self._toolbox.functions]:
            if self._toolbox.functions:
                self._terminal.note(f"there is no function {missing[0]}; type what it returns")
            return False
        results = [self._toolbox.run(call) for call in calls]
        for result in results:
            self._terminal.note(result)
        self._conversation.turns += [Message("observation", result) for result in results]
        return True

    def _help(self, _argument: str) -> None:
        usages = {name: f"/{name} {one.argument or ''}" for name, one in COMMANDS.items()}
        width = max(len(usage) for usage in usages.values())
        for name, usage in usages.items():
            self._terminal.note(f"{usage:<{width}}  {COMMANDS[name].does}")
        self._terminal.note('Several lines: end a line with \\, or put them between """ and """.')
        self._terminal.note("Ctrl-C stops an answer, and Ctrl-D ends the chat.")

    def _clear(self, _argument: str) -> None:
        self._conversation.turns.clear()
        self._terminal.note("the model knows nothing of what was said")

    def _system(self, argument: str) -> None:
        if argument:
            self._conversation.system = argument
        shown = self._conversation.system
        self._terminal.note(f"system: {shown}" if shown else "there is no system text")

    def _save(self, argument: str) -> None:
        if not argument:
            self._terminal.note("/save FILE: give the name of the file")
            return
        self._conversation.save(Path(expanded(argument)))
        self._terminal.note(f"saved {len(self._conversation.turns):,} turns to {argument}")

    def _load(self, argument: str) -> None:
        if not argument:
            self._terminal.note("/load FILE: give the name of the file")
            return
        self._conversation.load(Path(expanded(argument)))
        self._terminal.note(f"loaded {len(self._conversation.turns):,} turns from {argument}")

    def _tools(self, argument: str) -> None:
        if argument == "none":
            self._toolbox, self._conversation.tools = Toolbox(), None
        elif argument:
            self._toolbox = read_tools(Path(expanded(argument)), may_run=self._may_run)
            self._conversation.tools = self._toolbox.tools
        tools = self._conversation.tools or []
        for tool in tools if isinstance(tools, list) else [tools]:
            name = tool_name(tool) or str(tool)
            how = "is run" if name in self._toolbox.functions else "you type its result"
            self._terminal.note(f"{name} ({how})")
        if not tools:
            self._terminal.note("there are no tools; /tools FILE reads them")

    def _retry(self, _argument: str) -> None:
        turns = list(self._conversation.turns)
        last = self._conversation.take_back()
        if last is None:
            self._terminal.note("nothing was said yet")
            return
        self._conversation.turns.append(last)
        try:
            self._answer()
        except Glm3Error:
            self._conversation.turns = turns
            raise

    def _exit(self, _argument: str) -> None:
        self._is_over = True


@dataclass(frozen=True)
class Command:
    """A command of a chat.

    Attributes:
        run: Runs the command with the text after its name.
        does: What it does, for /help.
        argument: What stands after its name; None if nothing does.
    """

    run: Callable[[Session, str], None]
    does: str
    argument: str | None = None


COMMANDS = {
    "help": Command(Session._help, "shows this list"),
    "clear": Command(Session._clear, "forgets all turns but the system text"),
    "system": Command(Session._system, "shows the system text, or replaces it", "[TEXT]"),
    "tools": Command(
        Session._tools, "lists the tools, or reads others (none: drops them)", "[FILE]"
    ),
    "retry": Command(Session._retry, "asks the last turn again, with other random numbers"),
    "save": Command(Session._save, "writes the conversation as a line of JSON", "FILE"),
    "load": Command(Session._load, "goes on with a conversation that was saved", "FILE"),
    "exit": Command(Session._exit, "ends the chat"),
}


def show_call(call: ToolCall) -> str:
    """Returns a call as Python would write it, in one line."""
    listed = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({listed})"
