"""`Stream`: keeps the engines of all ranks busy with prompts that rank 0 hands out.

Rank 0 alone reads the file. Every rank knows how many prompts are under way on which data parallel
rank, so that all of them ask for more at the same time, and agree on who takes what. Data parallel
ranks show each other what has ended.
"""

from dataclasses import dataclass

import torch.distributed as dist

from glm3cli.config.inference import GenerateConfig
from glm3cli.data.tokens.chat import build_prompt
from glm3cli.errors import ConfigError
from glm3cli.infer.decoding.grammar import read_grammar
from glm3cli.infer.decoding.rules import to_decoding
from glm3cli.infer.model import Model
from glm3cli.infer.prompts.lines import PromptLine
from glm3cli.infer.requests import Generation

# The steps after which data parallel ranks show each other what has ended.
_STEPS_TOGETHER = 16


@dataclass(frozen=True)
class Ended:
    """How the continuation of a prompt has ended.

    Attributes:
        index: The number of the prompt, from 0.
        generation: The continuation; None if the model can't take the prompt.
        problem: Why the model can't take the prompt; "" if it can.
    """

    index: int
    generation: Generation | None
    problem: str = ""


class Stream:
    """Prompts under way on all ranks; every rank has one, and calls its methods alike.

    Attributes:
        has_token: Whether any prompt of this rank has had a token.
    """

    def __init__(self, model: Model, config: GenerateConfig) -> None:
        """Begins without prompts.

        Args:
            model: The model.
            config: The settings.
        """
        model.engine.limit(config.max_batch_size)
        self._model = model
        self._is_chat = not config.raw  # plain prompts are answered as a user's turn
        self._truncates = config.truncate
        self._grammar = read_grammar(config.json_schema, config.regex)
        self._logprobs = 0 if config.logprobs else None
        self._running: dict[int, int] = {}  # indices by the engine's numbers
        self._refused: list[Ended] = []
        self._owners: dict[int, int] = {}  # data parallel ranks by indices, of all prompts
        self._loads = [0] * model.engine.grid.dp_size
        # Twice what the engines run side by side: a row that gets free finds a prompt waiting.
        self._capacity = 2 * model.engine.capacity * len(self._loads)
        self.has_token = False

    @property
    def is_empty(self) -> bool:
        """Whether no prompt is under way on any rank."""
        return not self._owners

    @property
    def room(self) -> int:
        """The number of prompts to add; 0 as long as more than half of the room is taken."""
        taken = len(self._owners)
        return self._capacity - taken if taken <= self._capacity // 2 else 0

    def add(self, index: int, line: PromptLine) -> None:
        """Adds a prompt, which the data parallel rank that has the fewest continues."""
        grid, engine = self._model.engine.grid, self._model.engine
        owner = self._loads.index(min(self._loads))
        self._owners[index] = owner
        self._loads[owner] += 1
        if owner != grid.dp_rank:
            return
        tokenizer = self._model.tokenizer
        if line.messages is None:
            ids = self._model.prompt_ids(line.prompt, answer=self._is_chat)
        else:
            ids = build_prompt(tokenizer, line.messages)
        decoding = to_decoding(line.sampling, self._logprobs, self._grammar)
        try:
            ids = self._model.fitting(ids, truncate=self._truncates)
            [request] = self._model.requests(ids, decoding, line.seed)
            self._running[engine.add(request)] = index
        except ConfigError as error:
            self._refused.append(Ended(index, None, error.message))

    def step(self) -> list[Ended]:
        """Works on the prompts for a while, and returns those that have ended, on any rank."""
        engine, grid = self._model.engine, self._model.engine.grid
        ended, self._refused = self._refused, []
        for _ in range(_STEPS_TOGETHER if grid.dp_size > 1 else 1):
            if engine.is_idle:
                break
            engine.step()
            if not self.has_token:
                self.has_token = any(engine.results[number].token_ids for number in self._running)
            ended += self._ended()
        if grid.dp_size > 1:
            gathered: list[list[Ended]] = [[] for _ in range(grid.dp_size)]
            dist.all_gather_object(gathered, ended, group=grid.dp_group)
            ended = [one for part in gathered for one in part]
        for one in ended:
            self._loads[self._owners.pop(one.index)] -= 1
        return ended

    def _ended(self) -> list[Ended]:
        """Takes the continuations that have ended on this rank."""
        engine = self._model.engine
        numbers = [number for number in self._running if not engine.is_open(number)]
        return [Ended(self._running.pop(n), engine.results.pop(n)) for n in numbers]
