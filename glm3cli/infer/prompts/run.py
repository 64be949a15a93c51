"""`continue_file`: `glm3 generate --prompts-file`.

Nothing here imports torch before the settings, all lines and the output were checked.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from glm3cli.config.inference import GenerateConfig
from glm3cli.infer.decoding.grammar import read_grammar
from glm3cli.infer.defaults import with_defaults
from glm3cli.infer.opening import check_model, open_here
from glm3cli.infer.prompts.feed import Feed, FileProgress, Report, Sink
from glm3cli.infer.prompts.lines import PromptLine
from glm3cli.parallel.launch import is_speaker

if TYPE_CHECKING:
    from glm3cli.infer.model import Model


def continue_file(config: GenerateConfig, sink: Sink, report: Report) -> FileProgress | None:
    """Continues or answers the prompts of a file.

    Args:
        config: The settings.
        sink: Called on rank 0 with each result, in the order of the lines.
        report: Called on rank 0 with the progress, after each result.

    Returns:
        How it has ended; None on other ranks than 0, and in a process that has only started ranks.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do. The
            results that came before are in --output.
    """
    check_model(config)
    config = with_defaults(config)
    read_grammar(config.json_schema, config.regex)  # a wrong one is found here, not on each rank
    # Rank 0 alone reads the file and writes the results; so does the process that starts it, up to
    # the model.
    feed = Feed(config, sink, report) if is_speaker() else None
    if feed:
        feed.check()
    model = open_here(config)
    if model is None:
        return None
    with model, ExitStack() as closing:
        if feed:
            closing.callback(feed.close)
            feed.begin(model.tokenizer)
        _run(config, model, feed)
        return feed.finish() if feed else None


def _run(config: GenerateConfig, model: "Model", feed: Feed | None) -> None:
    """Continues all prompts on every rank, of which rank 0 has the feed."""
    from glm3cli.infer.prompts.stream import Stream

    stream, count, is_read = Stream(model, config), 0, False
    while not (is_read and stream.is_empty):
        if stream.room and not is_read:
            lines, is_read = model.from_rank_0(feed.read(stream.room) if feed else ([], False))
            for index, line in enumerate(lines, count):
                if isinstance(line, PromptLine):
                    stream.add(index, line)
            count += len(lines)
        ended = stream.step()
        if feed:
            feed.take(ended, has_token=stream.has_token)
