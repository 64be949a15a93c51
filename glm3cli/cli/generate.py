"""`glm3 generate`: continue texts, or talk."""

import json

import typer

from glm3cli.checkpoint.layouts.opening import read_shape
from glm3cli.cli.options import command
from glm3cli.config.inference import GenerateConfig
from glm3cli.parallel.launch import is_speaker, run_here


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""

    @command(app, GenerateConfig, "generate")
    def generate(config: GenerateConfig) -> None:
        """Continue texts, or talk with the model (--chat; then type quit, or new to start over).

        glm3 generate --model MODEL --prompt "What is a lake?" --greedy
        """
        config.check_world(config.world_size)
        config.check_fits(read_shape(config.model))
        if not run_here(config):
            return
        from glm3cli.infer import generate as core

        result = core.generate(config)
        if result is None or not is_speaker():
            return
        if config.as_json:
            typer.echo(json.dumps(result, ensure_ascii=False))
            return
        if not config.stream:
            for item in result["results"]:
                typer.echo(item["text"])
        typer.echo(
            f"first token {result['first_token_seconds']:.2f} s, "
            f"{result['tokens_per_second']:.1f} tokens/s",
            err=True,
        )
