"""`talk`: `glm3 generate --chat`.

Nothing here imports torch before the settings and the tools were checked.
"""

import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

from glm3cli.config.inference import GenerateConfig
from glm3cli.infer.chat.conversation import Conversation
from glm3cli.infer.chat.toolbox import Toolbox, read_tools
from glm3cli.infer.decoding.grammar import read_grammar
from glm3cli.infer.defaults import with_defaults
from glm3cli.infer.opening import open_here
from glm3cli.parallel.interrupts import accept
from glm3cli.parallel.launch import is_speaker

if TYPE_CHECKING:
    from glm3cli.infer.chat.session import Terminal


def talk(config: GenerateConfig, terminal: "Terminal") -> None:
    """Holds a chat; rank 0 reads and writes, and all ranks compute.

    Args:
        config: The settings.
        terminal: Where rank 0 reads and writes.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    toolbox = read_tools(config.tools, may_run=False) if config.tools else Toolbox()
    if is_speaker():
        accept({signal.SIGINT})
    config = with_defaults(config)
    grammar = read_grammar(config.json_schema, config.regex)
    model = open_here(config, answers={signal.SIGINT})
    if model is None:
        return
    from glm3cli.infer.chat.answers import Answers
    from glm3cli.infer.chat.session import Session
    from glm3cli.infer.decoding.rules import to_decoding

    with model, ExitStack() as closing:
        answers = Answers(model, to_decoding(config, grammar=grammar))
        if not is_speaker():
            answers.follow()
            return
        closing.callback(answers.close)
        if config.tools and config.run_tools:
            toolbox = read_tools(config.tools, may_run=True)
        Session(
            model.tokenizer,
            answers,
            terminal,
            Conversation(config.system or "", toolbox.tools, chat=model.tokenizer.chat),
            toolbox,
            config.seed,
            config.run_tools,
        ).run()
