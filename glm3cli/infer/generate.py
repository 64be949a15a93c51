"""The generate command: prompts in, texts out."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist

from glm3cli.config.inference import GenerateConfig, SamplingOptions
from glm3cli.data.tokens.chat import Message, build_prompt, parse_reply
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.infer.engine import Engine, Generation, Timing
from glm3cli.infer.load import open_engine
from glm3cli.infer.sampling import Sampling


class TextResult(TypedDict):
    """One prompt's continuation; `token_ids` are the new ones."""

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None


class GenerateResult(TypedDict):
    """What `generate --json` prints."""

    results: list[TextResult]
    first_token_seconds: float
    tokens_per_second: float


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Where an answer ends: eos, or a role that speaks next."""
    roles = ("<|user|>", "<|observation|>")
    return [tokenizer.eos_id, *(tokenizer.special(role) for role in roles)]


def to_sampling(options: SamplingOptions) -> Sampling:
    """The options as the engine takes them."""
    return Sampling(options.greedy, options.temperature, options.top_k, options.top_p)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line or of the file.

    Raises:
        DataError: The file is missing, empty, or has a line without a prompt.
    """
    if config.prompts_file is None:
        return list(config.prompt)
    prompts = list(_lines(config.prompts_file))
    if not prompts:
        raise DataError(f"{config.prompts_file} holds no prompt", 'write {"prompt": "..."} lines')
    return prompts


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts-file {path}: {error}", "give a UTF-8 file") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number} is not valid JSON: {error}", "mend the line"
            ) from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise DataError(
                f"{path}:{number} has no prompt", 'write {"prompt": "..."} or a JSON string'
            )
        yield prompt


def generate(config: GenerateConfig) -> GenerateResult | None:
    """Continues the prompts, or talks (`--chat`, which has no result).

    Raises:
        Glm3Error: As its children say.
    """
    prompts = [] if config.chat else read_prompts(config)
    with open_engine(config) as (engine, tokenizer):
        if config.chat:
            _Chat(config, engine, tokenizer).run()
            return None
        return _continue(config, engine, tokenizer, prompts)


def _continue(
    config: GenerateConfig, engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str]
) -> GenerateResult:
    ids = [_prompt_ids(tokenizer, prompt, raw=config.raw) for prompt in prompts]
    # Data parallel ranks share the prompts out; a row's seed goes by its place in the whole list.
    grid, timing = engine.grid, Timing()
    stride = -(-len(ids) // grid.dp_size)
    mine = range(grid.dp_rank * stride, min((grid.dp_rank + 1) * stride, len(ids)))
    printer = _Printer(tokenizer, speaks=config.stream and grid.rank == 0)
    generations: list[Generation] = []
    if mine:
        generations = engine.generate(
            [ids[row] for row in mine],
            to_sampling(config),
            config.max_new_tokens,
            stop_ids(tokenizer),
            seed=config.seed + mine.start,
            on_tokens=printer.push,
            timing=timing,
        )
    printer.close()
    results = [
        _result(prompts[row], generation, tokenizer, with_logprobs=config.logprobs)
        for row, generation in zip(mine, generations, strict=True)
    ]
    gathered: list[list[TextResult]] = [[] for _ in range(grid.dp_size)]
    dist.all_gather_object(gathered, results, group=grid.dp_group)
    return GenerateResult(
        results=[result for part in gathered for result in part],
        first_token_seconds=timing.first_token,
        tokens_per_second=timing.num_tokens / timing.total if timing.total else 0.0,
    )


def _prompt_ids(tokenizer: Tokenizer, prompt: str, *, raw: bool) -> list[int]:
    if raw:
        return [*tokenizer.prefix, *tokenizer.encode(prompt)]
    return build_prompt(tokenizer, [Message("user", prompt)])


def _result(
    prompt: str, generation: Generation, tokenizer: Tokenizer, *, with_logprobs: bool
) -> TextResult:
    return TextResult(
        prompt=prompt,
        text=tokenizer.decode(generation.token_ids),
        token_ids=generation.token_ids,
        finish_reason=generation.finish_reason,
        logprobs=generation.logprobs if with_logprobs else None,
    )


class _Printer:
    """Prints the text of one row as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, *, speaks: bool) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._speaks = speaks

    def push(self, tokens: list[int | None]) -> None:
        if self._speaks and tokens[0] is not None:
            self._write(self._decoder.push(tokens[0]))

    def close(self) -> None:
        if self._speaks:
            self._write(self._decoder.finish() + "\n")

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@dataclass
class _Chat:
    """A conversation on the terminal; rank 0 reads and prints, all ranks think."""

    config: GenerateConfig
    engine: Engine
    tokenizer: Tokenizer
    history: list[Message] = field(default_factory=list)

    def run(self) -> None:
        self._reset()
        while (line := self._read()) is not None:
            if line in ("quit", "exit"):
                return
            if line in ("clear", "new"):
                self._reset()
                continue
            if line:
                self.history.append(self._message(line))
                self._answer()

    def _reset(self) -> None:
        self.history = []
        tools = _read_tools(self.config.tools)
        if self.config.system or tools is not None:
            system = self.config.system or "Answer the following questions as best as you can."
            self.history.append(Message("system", system, tools=tools))

    def _message(self, line: str) -> Message:
        last = self.history[-1] if self.history else None
        # After a tool call, what is typed is the tool's answer.
        called = last is not None and last.role == "assistant" and bool(last.metadata)
        return Message("observation" if called else "user", line)

    def _read(self) -> str | None:
        line: list[str | None] = [None]
        if self.engine.grid.rank == 0:
            try:
                line[0] = input("you> " if os.isatty(0) else "").strip()
            except EOFError:
                line[0] = None
        dist.broadcast_object_list(line, src=0)
        return line[0]

    def _answer(self) -> None:
        printer = _Printer(self.tokenizer, speaks=self.engine.grid.rank == 0)
        [generation] = self.engine.generate(
            [build_prompt(self.tokenizer, self.history)],
            to_sampling(self.config),
            self.config.max_new_tokens,
            stop_ids(self.tokenizer),
            seed=self.config.seed + len(self.history),
            on_tokens=printer.push,
        )
        printer.close()
        self.history.append(parse_reply(self.tokenizer.decode(generation.token_ids)))


def _read_tools(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--tools {path}: {error}", "give a JSON file of tools") from None
