"""`glm3 generate`: continues texts, or holds a conversation."""

import json
import sys

import typer

from glm3cli.cli.epilogs import GENERATE
from glm3cli.cli.options import command
from glm3cli.cli.prompts import continue_file
from glm3cli.config.inference import GenerateConfig


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""

    @command(app, GenerateConfig, "generate", epilog=GENERATE)
    def generate(config: GenerateConfig) -> None:
        """Continue texts, talk with the model (--chat), or answer OpenAI's API (--serve).

        glm3 generate --model MODEL --prompt "What is a lake?" --greedy
        """
        if config.chat:
            _talk(config)
        elif config.prompts_file:
            continue_file(config)
        elif config.serve:
            _serve(config)
        else:
            _generate(config)


def _talk(config: GenerateConfig) -> None:
    """Holds a chat on stdin and stdout."""
    from glm3cli.cli.chat import ChatTerminal
    from glm3cli.infer.chat.talk import talk

    talk(config, ChatTerminal())


def _serve(config: GenerateConfig) -> None:
    """Answers requests until a signal comes."""
    from glm3cli.infer.serve.run import serve

    serve(config, lambda url: typer.echo(f"serving at {url}; Ctrl-C ends it", err=True))


def _write(text: str) -> None:
    """Prints a piece of a text, without waiting for the end of its line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _generate(config: GenerateConfig) -> None:
    """Continues the prompts, and prints the texts and the speed."""
    from glm3cli.infer.generate import generate
    from glm3cli.parallel.launch import is_speaker

    result = generate(config, _write if config.stream else None)
    if result is None or not is_speaker():
        return
    if config.as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    if config.stream:
        typer.echo()
    else:
        for item in result["results"]:
            typer.echo(item["text"])
    typer.echo(
        f"first token {result['first_token_seconds']:.2f} s, "
        f"{result['tokens_per_second']:.1f} tokens/s",
        err=True,
    )
