"""`Feed`: what rank 0 does alone for a prompts file: it reads lines, and gives out results."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from glm3cli.config.inference import GenerateConfig
from glm3cli.data.tokens.calls import ReplyStream, to_openai
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.infer.decoding.stops import cut_at
from glm3cli.infer.prompts.lines import BadLine, PromptLine, PromptsFile
from glm3cli.infer.prompts.records import Records

if TYPE_CHECKING:
    from glm3cli.infer.prompts.stream import Ended

# The results that wait for an earlier one, at most, before no more lines are read.
MOST_WAITING = 4096
_HINT = "mend the line, or give --on-error skip"


@dataclass(frozen=True)
class FileProgress:
    """How far a prompts file is.

    Attributes:
        done: The lines that have a result, those of an earlier run included.
        total: The lines in all; None if that isn't known, as of a pipe.
        before: The lines that had a result when this run began.
        num_bad: The lines of this run that have no answer.
        num_tokens: The new tokens of this run.
        seconds: The seconds since the first prompt began.
        first_token: The seconds until a prompt had its first token.
        growth: The bytes that the file has got since the run began.
    """

    done: int = 0
    total: int | None = None
    before: int = 0
    num_bad: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    first_token: float = 0.0
    growth: int = 0

    @property
    def tokens_per_second(self) -> float:
        """The new tokens of all ranks per second."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The seconds until the end at the speed so far; None if that isn't known."""
        lines = self.done - self.before
        return self.seconds * (self.total - self.done) / lines if self.total and lines else None


# Gets a result: the fields of `generate.TextResult`, the number of the line, the `custom_id` of a
# line that has one, and for a line with turns the answer as OpenAI's `message`. A line without
# answer has the reason as `error`.
Sink = Callable[[Mapping[str, Any]], None]
Report = Callable[[FileProgress], None]


class Feed:
    """The lines of a prompts file, and their results in the order of the lines."""

    def __init__(self, config: GenerateConfig, sink: Sink, report: Report) -> None:
        """Opens the prompts file.

        Args:
            config: The settings.
            sink: Called with each result.
            report: Called with the progress after each result.

        Raises:
            DataError: The file can't be read.
        """
        assert config.prompts_file is not None
        self._config = config
        self._sink = sink
        self._report = report
        self._file = PromptsFile(config.prompts_file)
        self._records = Records(config.output, config) if config.output else None
        self._lines: Iterator[PromptLine | BadLine] = iter(())
        self._reading: dict[int, PromptLine | BadLine] = {}  # what has no result yet
        self._ended: dict[int, Ended | None] = {}  # what waits for an earlier one; None if bad
        self._num_read = self._num_written = 0
        self._error: DataError | None = None
        self._progress = FileProgress()

    def check(self) -> None:
        """Checks the output, and all lines of the file, which it counts.

        Raises:
            ConfigError: The output can't be written or gone on with.
            DataError: There is no line, or a bad one that isn't to be left out.
        """
        if self._records:
            self._records.check()
        if self._file.size is None:  # a pipe, which can be read only once
            return
        total, bad = 0, list[BadLine]()
        for line in self._file.read(self._config):
            total += 1
            if isinstance(line, BadLine) and self._config.on_error == "stop":
                bad.append(line)
                if len(bad) > 5:
                    break
        if bad:
            others = ", ".join(f"{line.number:,}" for line in bad[1:5])
            more = f"; lines {others}{' and others' if len(bad) > 5 else ''} are bad, too"
            raise DataError(bad[0].problem + (more if others else ""), _HINT)
        if not total:
            raise DataError(f"{self._file.path} holds no prompt", 'write {"prompt": "..."} lines')
        self._progress = replace(self._progress, total=total)

    def begin(self, tokenizer: Tokenizer) -> None:
        """Begins with the first line that has no result.

        Args:
            tokenizer: The tokenizer of the model.

        Raises:
            ConfigError: Another run writes the output.
            DataError: The output can't be written, or has the results of other prompts.
        """
        self._tokenizer = tokenizer
        self._lines = self._file.read(self._config)
        done = self._records.open(self._lines) if self._records else 0
        self._progress = replace(self._progress, done=done, before=done)
        self._begun = time.perf_counter()

    def read(self, room: int) -> tuple[list[PromptLine | BadLine], bool]:
        """Returns the next lines, and whether they are the last ones.

        Args:
            room: The most lines to read; there are fewer if many results wait for an earlier one.
        """
        if self._error:
            return [], True
        room = max(0, min(room, MOST_WAITING - len(self._ended)))
        lines = list[PromptLine | BadLine]()
        try:
            lines += islice(self._lines, room)
        except DataError as error:
            self._error = error
        for index, line in enumerate(lines, self._num_read):
            self._reading[index] = line
            if isinstance(line, BadLine):
                self._ended[index] = None
        self._num_read += len(lines)
        return lines, len(lines) < room or self._error is not None

    def take(self, ended: "Sequence[Ended]", *, has_token: bool) -> None:
        """Takes what has ended, and gives out the results that no earlier one is missing before.

        Args:
            ended: The continuations that have ended.
            has_token: Whether any prompt has had a token so far.

        Raises:
            DataError: The output can't be written.
        """
        seconds = time.perf_counter() - self._begun
        if has_token and not self._progress.first_token:
            self._progress = replace(self._progress, first_token=seconds)
        self._ended |= {one.index: one for one in ended}
        while self._num_written in self._ended and not self._error:
            one = self._ended.pop(self._num_written)
            line = self._reading.pop(self._num_written)
            self._num_written += 1
            record = self._record(line, one)
            if "error" in record and self._config.on_error == "stop":
                self._error = DataError(record["error"], _HINT)
                return
            if self._records:
                request = line.request if isinstance(line, PromptLine) else None
                self._records.write({**record, "request": request})
            self._sink(record)
            now = self._progress
            self._progress = replace(
                now,
                done=now.done + 1,
                num_bad=now.num_bad + ("error" in record),
                num_tokens=now.num_tokens + len(record["token_ids"]),
                seconds=time.perf_counter() - self._begun,
            )
            self._report(self._progress)

    def finish(self) -> FileProgress:
        """Returns how it has ended.

        Raises:
            DataError: A line was bad, or the file couldn't be read to its end; all results before
                are there.
        """
        if self._error:
            raise self._error
        return replace(self._progress, growth=self._file.growth())

    def close(self) -> None:
        """Waits until the results are on the disk.

        Raises:
            DataError: The output can't be written.
        """
        if self._records:
            self._records.close()

    def _record(self, line: PromptLine | BadLine, ended: "Ended | None") -> dict[str, Any]:
        """Returns the result of a line."""
        record: dict[str, Any] = {"line": line.number, "prompt": None, "text": None}
        record |= {"token_ids": [], "finish_reason": "error", "logprobs": None}
        if isinstance(line, BadLine):
            return {**record, "error": line.problem}
        record["prompt"] = line.prompt
        if line.custom_id is not None:
            record["custom_id"] = line.custom_id
        if ended is None or ended.generation is None:
            reason = ended.problem if ended else ""
            return {**record, "error": f"{self._file.path}:{line.number} {reason}"}
        tokens = ended.generation.token_ids
        record |= {
            "text": cut_at(line.sampling.stop, self._tokenizer.decode(tokens)),
            "token_ids": tokens,
            "finish_reason": ended.generation.finish_reason,
            "logprobs": ended.generation.logprobs if self._config.logprobs else None,
        }
        if line.messages is not None:
            stream = ReplyStream(self._tokenizer)
            for token in tokens:
                stream.push(token)
            stream.finish()
            record["message"] = to_openai(stream.messages, self._tokenizer.chat)
        return record
