"""`glm3 pretrain` and `glm3 finetune`, which differ in the kind of data that they read."""

from typing import TYPE_CHECKING

import typer

from glm3cli.cli.epilogs import FINETUNE, TRAIN
from glm3cli.cli.options import command
from glm3cli.cli.progress import progress_lines
from glm3cli.config.training import FinetuneConfig, PretrainConfig, TrainConfig
from glm3cli.data.kinds import TEXT, DataKind, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glm3cli.config.model import ModelConfig
    from glm3cli.data.samples.loader import Loader
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.train.probe import Probe


def register(app: typer.Typer) -> None:
    """Adds both commands to `app`."""

    @command(app, PretrainConfig, "pretrain", epilog=TRAIN)
    def pretrain(config: PretrainConfig) -> None:
        """Train on text: every token of `preprocess --handler text` files.

        torchrun --nproc_per_node 8 -m glm3cli pretrain --model MODEL --data PREFIX --save RUN
        --tp 1 --pp 2 --seq-length 8192 --train-iters 2000
        """
        _train(config, TEXT)

    @command(app, FinetuneConfig, "finetune", epilog=FINETUNE)
    def finetune(config: FinetuneConfig) -> None:
        """Train on answers: `preprocess --handler instruction` or `chat` files.

        Other methods (--method) read `preference` files, or `feedback` files (kto).

        torchrun --nproc_per_node 8 -m glm3cli finetune --model MODEL --data PREFIX --save RUN
        --tp 1 --pp 2 --seq-length 8192 --train-iters 2000
        """
        _train(config, kind_of(config.method))


def _train(config: TrainConfig, kind: DataKind) -> None:
    """Trains and prints the path of the final checkpoint, or prints the result of a dry run."""
    if config.dry_run:
        from glm3cli.forecast.dry_run import dry_run

        for paragraph in dry_run(config, kind):
            typer.echo(paragraph)
        return
    from glm3cli.evals.suites.named import read_suites
    from glm3cli.train.start import train

    suites = read_suites(config.eval_suite)

    def probes(model: "ModelConfig", tokenizer: "Tokenizer", loader: "Loader") -> "Sequence[Probe]":
        from glm3cli.evals.suites.in_training import make_probes

        return make_probes(suites, model, tokenizer, loader)

    checkpoint = train(
        config, kind, progress_lines, lambda line: typer.echo(line, err=True), probes
    )
    if checkpoint is not None:
        typer.echo(str(checkpoint))
