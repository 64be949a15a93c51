"""Asks a model for a fact in a long text: the needle in the haystack of `glm3 eval needle`.

A number stands once, at some depth of a text of some length, and is asked for at its end. Short
benchmarks such as MMLU can't show what is wrong with far positions; this shows at which lengths and
depths it begins.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from glm3cli.config.evaluation import NeedleConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.ledger import Display, Status, no_display
from glm3cli.evals.page import parts
from glm3cli.evals.page.write import write_page
from glm3cli.evals.results import PACKAGES
from glm3cli.evals.statistics import Interval, wilson
from glm3cli.host.files import write_json
from glm3cli.host.versions import versions
from glm3cli.infer.opening import open_here

if TYPE_CHECKING:
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.infer.engine import Engine

_SHORTEST = 256  # of the default lengths, which double up to the model's positions
_NAMES = [
    "Almer",
    "Brint",
    "Corvo",
    "Dunle",
    "Estra",
    "Felm",
    "Garno",
    "Helst",
    "Istra",
    "Jorval",
    "Kelm",
    "Lorbe",
]
_NOUNS = [
    "river",
    "farmer",
    "market",
    "garden",
    "letter",
    "window",
    "bridge",
    "teacher",
    "winter",
    "stone",
]
_VERBS = ["sees", "likes", "finds", "leaves", "needs", "follows"]
_KINDS = ["old", "small", "quiet", "green", "heavy", "bright", "early", "distant"]


class Cell(TypedDict):
    """What was found at one length and depth.

    Attributes:
        length: The number of tokens of the text, with the question.
        depth: The place of the needle in percent: 0 is the beginning, 100 the end.
        found: The number of needles whose number is the likeliest continuation, token by token.
        total: The number of needles.
        logprob: The mean log-probability of a number, in nats.
    """

    length: int
    depth: int
    found: int
    total: int
    logprob: float


class NeedleResult(TypedDict):
    """The content of results.json of a needle test.

    Attributes:
        benchmark: Always `needle`.
        micro: The share of all needles that were found.
        interval: Its 95 % interval (Wilson's).
        lengths: The share that was found at each length.
        cells: What was found at each length and depth.
        settings: The options of the run.
        versions: The versions on which a score may depend.
    """

    benchmark: str
    micro: float
    interval: Interval
    lengths: dict[str, float]
    cells: list[Cell]
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Needle:
    """One text with a needle.

    Attributes:
        length: The number of tokens of the text.
        depth: The place of the needle in percent.
        context: The token ids of the text, up to the number that is asked for.
        answer: The token ids of the number.
    """

    length: int
    depth: int
    context: list[int]
    answer: list[int]


def run_needle(config: NeedleConfig, display: Display = no_display) -> NeedleResult | None:
    """Looks for needles, and writes the result to `config.output` on rank 0, with its page.

    Returns:
        The result, on every rank; None in a process that has only started the ranks.

    Raises:
        CheckpointError: The model can't be read, or its log-probabilities are NaN.
        ConfigError: A length is more than the model's positions, or too short for a needle.
        DataError: The haystack can't be read.
    """
    hay = _read(config.haystack) if config.haystack is not None else None
    model = open_here(config)
    if model is None:
        return None
    with model:
        engine, tokenizer = model.engine, model.tokenizer
        lengths = _lengths(config, engine.model.seq_length)
        needles = list(make_needles(tokenizer, lengths, config, hay))
        with display(len(needles)) as report:
            speaks = engine.grid.rank == 0
            found = _look(engine, needles, config.batch_size, report if speaks else None)
        result = _result(config, needles, found)
        if engine.grid.rank == 0:
            _write(config.output, result)
            write_json(config.output, result)
    return result


def make_needles(
    tokenizer: "Tokenizer", lengths: Sequence[int], config: NeedleConfig, hay: str | None = None
) -> Iterator[Needle]:
    """Makes the texts of all lengths and depths.

    Args:
        tokenizer: The model's tokenizer.
        lengths: The lengths in tokens.
        config: The depths, the number of needles of each, and the seed.
        hay: The text around needles; None makes up sentences.

    Raises:
        ConfigError: A length is too short for a needle.
        DataError: The haystack is empty.
    """
    drawn = random.Random(config.seed)
    sentences = _sentences(tokenizer, max(lengths), drawn, hay)
    for length in lengths:
        for number in range(config.needles):
            name, secret = drawn.choice(_NAMES), str(drawn.randrange(10_000, 100_000))
            fact = tokenizer.encode(f"The secret number of {name} is {secret}.")
            start = f"Question: What is the secret number of {name}?\nAnswer: It is"
            asked = tokenizer.encode(start)
            answer = tokenizer.encode(f"{start} {secret}")[len(asked) :]
            room = length - len(tokenizer.prefix) - len(fact) - len(asked) - len(answer)
            if room < len(sentences[0]):
                raise ConfigError(
                    f"--lengths {length} is too short for a needle and a question",
                    f"give at least {length - room + len(sentences[0])}",
                )
            straw = _cut(sentences, room, first=number)
            for depth in config.depth_numbers:
                place = round(len(straw) * depth / 100)
                before, after = straw[:place], straw[place:]
                context = [
                    *tokenizer.prefix,
                    *(token for one in before for token in one),
                    *fact,
                    *(token for one in after for token in one),
                    *asked,
                ]
                yield Needle(length, depth, context, answer)


def _lengths(config: NeedleConfig, positions: int) -> list[int]:
    """Returns the lengths of the texts: those of --lengths, or doubling ones.

    Raises:
        ConfigError: A length is more than the model's positions.
    """
    lengths = list(config.length_numbers)
    if not lengths:
        lengths = [_SHORTEST << i for i in range(32) if _SHORTEST << i < positions]
        return [*lengths, positions]
    if max(lengths) > positions:
        raise ConfigError(
            f"--lengths {max(lengths)} is more than the model's {positions:,} positions "
            "(seq_length of its config.json)",
            "give shorter ones",
        )
    return lengths


def _sentences(
    tokenizer: "Tokenizer", room: int, drawn: random.Random, hay: str | None
) -> list[list[int]]:
    """Returns the token ids of sentences, or of a file's lines, of at least so many tokens.

    The tokenizer puts a space in front of each.
    """
    lines = [line.strip() for line in (hay or "").splitlines() if line.strip()]
    if hay is not None and not lines:
        raise DataError("--haystack has no text", "give a text of some pages")
    found: list[list[int]] = []
    total = 0
    while total < 2 * room:  # of which each needle begins elsewhere
        if hay is None:
            kinds, nouns = drawn.sample(_KINDS, 2), drawn.sample(_NOUNS, 2)
            verb = drawn.choice(_VERBS)
            text = f"The {kinds[0]} {nouns[0]} {verb} the {kinds[1]} {nouns[1]}."
        else:
            text = lines[len(found) % len(lines)]
        found.append(tokenizer.encode(text))
        total += len(found[-1])
    return found


def _cut(sentences: Sequence[list[int]], room: int, first: int) -> list[list[int]]:
    """Returns sentences of exactly so many tokens together; the last one may be cut."""
    found: list[list[int]] = []
    for one in [*sentences[first:], *sentences[:first]]:
        found.append(one[:room])
        room -= len(found[-1])
        if room == 0:
            break
    return found


def _look(
    engine: "Engine",
    needles: Sequence[Needle],
    batch_size: int,
    report: Callable[[Status], None] | None,
) -> list[tuple[float, bool]]:
    """Returns the log-probability of each number, and whether the model finds it."""
    from glm3cli.evals.spread import Batch, batches_in_order, spread

    def begin(batch: Batch) -> Callable[[], list[tuple[float, bool]]]:
        chosen = [needles[i] for i in batch.members]
        return engine.ask_continuations(
            [one.context for one in chosen], [one.answer for one in chosen]
        )

    rows = [one.context for one in needles]
    order = sorted(range(len(rows)), key=lambda i: (-needles[i].length, rows[i]))
    found: dict[int, tuple[float, bool]] = {}
    batches = batches_in_order(order, rows, batch_size)
    for new in spread(engine.grid, [[one] for one in batches], begin):
        found |= new
        if report is not None:
            report(Status(len(found), len(needles), {}))
    return [found[i] for i in range(len(needles))]


def _result(
    config: NeedleConfig, needles: Sequence[Needle], found: Sequence[tuple[float, bool]]
) -> NeedleResult:
    """Counts what was found."""
    cells: dict[tuple[int, int], Cell] = {}
    for needle, (logprob, is_found) in zip(needles, found, strict=True):
        empty = Cell(length=needle.length, depth=needle.depth, found=0, total=0, logprob=0.0)
        cell = cells.setdefault((needle.length, needle.depth), empty)
        cell["found"] += is_found
        cell["total"] += 1
        cell["logprob"] += (logprob - cell["logprob"]) / cell["total"]
    count = sum(is_found for _, is_found in found)
    return NeedleResult(
        benchmark="needle",
        micro=count / len(found),
        interval=wilson(count, len(found)),
        lengths={str(length): _share(cells, length) for length, _ in cells},
        cells=list(cells.values()),
        settings=config.to_options(),
        versions=versions(*PACKAGES),
    )


def _share(cells: dict[tuple[int, int], Cell], length: int) -> float:
    """Returns the share of the needles of a length that were found."""
    own = [cell for cell in cells.values() if cell["length"] == length]
    return sum(cell["found"] for cell in own) / sum(cell["total"] for cell in own)


def _read(path: Path) -> str:
    """Returns the text of a haystack.

    Raises:
        DataError: It can't be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--haystack {path}: {error}", "give a text file in UTF-8") from None


def _write(output: Path, result: NeedleResult) -> None:
    """Writes the page: a grid of lengths and depths."""
    depths = sorted({cell["depth"] for cell in result["cells"]})
    shares = {
        (cell["length"], cell["depth"]): cell["found"] / cell["total"] for cell in result["cells"]
    }
    lengths = sorted({length for length, _ in shares})
    rows = [(f"{depth} %", [shares[length, depth] for length in lengths]) for depth in depths]
    grid = parts.grid([f"{length:,}" for length in lengths], rows, "depth \\ tokens")
    low, high = result["interval"]
    write_page(
        output,
        title="needles in haystacks",
        about=str(result["settings"].get("model", "")),
        tiles={
            "found": f"{result['micro']:.2%}",
            "95 % interval": f"{low:.2%} to {high:.2%}",
            "needles": f"{sum(cell['total'] for cell in result['cells']):,}",
        },
        sections=[("Found, by the length of the text and the depth of the needle", grid)],
        settings=result["settings"] | result["versions"],
    )
