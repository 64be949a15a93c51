"""`glm3 generate` as a user runs it: prompts, options, results, and mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from glm3cli.checkpoint.convert.random_model import write_random_model
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.random import RandomSource
from glm3cli.data.tokens.chat import build_prompt
from glm3cli.data.tokens.formats.base import parse_reply
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.demo import content
from tests.support import reference
from tests.support.project import Ended, Project, call, glm3
from tests.support.ranks import RankPool

PROMPTS = ("The lake is", "In winter, the old baker")
LENGTH = 6


def generate(project: Project, *arguments: object, stdin: str = "") -> Ended:
    ended = call("generate", "--model", project.model, "--device", "cpu", *arguments, stdin=stdin)
    assert ended.code == 0, ended.err
    return ended


def results(project: Project, *arguments: object) -> list[dict[str, Any]]:
    options = ("--json", "--max-new-tokens", LENGTH, *arguments)
    return json.loads(generate(project, *options).out)["results"]


def asked(*prompts: str) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def tokenizer(project: Project) -> Tokenizer:
    return Tokenizer.load(project.model)


@pytest.fixture(scope="module")
def greedy(project: Project) -> list[dict[str, Any]]:
    return results(project, *asked(*PROMPTS), "--greedy", "--logprobs")


def test_a_process_of_its_own(project: Project, greedy: list[Any], tmp_path: Path) -> None:
    arguments = ("--greedy", "--max-new-tokens", LENGTH, "--model", project.model)
    ended = glm3(tmp_path / "log", "generate", *asked(*PROMPTS), *arguments)
    assert ended.code == 0, ended.err
    assert ended.out == "".join(f"{result['text']}\n" for result in greedy)
    assert ended.err.startswith("first token ")
    assert ended.err.endswith(" tokens/s\n")


def test_fields_of_the_json_result(project: Project, tokenizer: Tokenizer) -> None:
    ended = generate(project, *asked(*PROMPTS), "--greedy", "--max-new-tokens", LENGTH, "--json")
    whole = json.loads(ended.out)
    assert whole.keys() == {"results", "first_token_seconds", "tokens_per_second"}
    assert whole["first_token_seconds"] > 0
    assert whole["tokens_per_second"] > 0
    assert [result["prompt"] for result in whole["results"]] == list(PROMPTS)
    for result in whole["results"]:
        assert result.keys() == {"prompt", "text", "token_ids", "finish_reason", "logprobs"}
        assert len(result["token_ids"]) == LENGTH
        assert result["text"] == tokenizer.decode(result["token_ids"])
        assert result["finish_reason"] == "length"
        assert result["logprobs"] is None
    assert not ended.err


def test_tokens_and_logprobs_are_transformers(
    project: Project, tokenizer: Tokenizer, greedy: list[dict[str, Any]]
) -> None:
    model = reference.build(content.MODEL, open_source(project.model))
    for prompt, result in zip(PROMPTS, greedy, strict=True):
        ids = [*tokenizer.prefix, *tokenizer.encode(prompt)]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *result["token_ids"]]])).logits[0]
        logprobs = logits[len(ids) - 1 : -1].log_softmax(dim=-1)
        assert result["token_ids"] == logprobs.argmax(dim=-1).tolist()
        # fp32 in another order of sums.
        assert result["logprobs"] == pytest.approx(logprobs.max(dim=-1).values.tolist(), abs=1e-4)


def test_greedy_is_the_same_again_and_alone(project: Project, greedy: list[Any]) -> None:
    for prompt, result in zip(PROMPTS, greedy, strict=True):
        [alone] = results(project, *asked(prompt), "--greedy", "--logprobs")
        assert alone["token_ids"] == result["token_ids"]
        assert alone["logprobs"] == pytest.approx(result["logprobs"], abs=1e-5)


def test_a_seed_decides(project: Project, greedy: list[dict[str, Any]]) -> None:
    hot = (*asked(*PROMPTS), "--temperature", 3, "--top-k", 0, "--top-p", 1)
    one, same, other = (results(project, *hot, "--seed", seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    # With one candidate, sampling is greedy.
    cold = results(project, *asked(*PROMPTS), "--top-k", 1, "--logprobs")
    assert cold == greedy
    # Equal prompts have different random numbers.
    first, second = results(project, *asked(PROMPTS[0], PROMPTS[0]), *hot[4:])
    assert first["token_ids"] != second["token_ids"]


def test_a_stream_is_the_same_text(project: Project, greedy: list[dict[str, Any]]) -> None:
    arguments = (*asked(PROMPTS[0]), "--greedy", "--max-new-tokens", LENGTH)
    assert generate(project, *arguments, "--stream").out == f"{greedy[0]['text']}\n"


def test_not_raw_asks_as_a_user(project: Project, tokenizer: Tokenizer) -> None:
    [found] = results(project, *asked(PROMPTS[0]), "--greedy", "--no-raw")
    model = reference.build(content.MODEL, open_source(project.model))
    ids = build_prompt(tokenizer, [Message("user", PROMPTS[0])])
    for _ in range(LENGTH):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found["token_ids"] == ids[-LENGTH:]
    assert found["prompt"] == PROMPTS[0]


def test_a_conversation(project: Project, tokenizer: Tokenizer) -> None:
    options = ("--chat", "--greedy", "--max-new-tokens", LENGTH)
    [said] = results(project, *asked("hello"), "--greedy", "--no-raw")
    assert generate(project, *options, stdin="hello\nquit\n").out == f"{said['text']}\n"
    # The end of the input ends it too; `new` forgets what was said, and empty lines are nothing.
    twice = generate(project, *options, stdin="hello\n\nnew\nhello\n").out
    assert twice == f"{said['text']}\n" * 2
    # Without it, the second answer stands on the first.
    turns = [Message("user", "hello"), parse_reply(said["text"]), Message("user", "hello")]
    ids = build_prompt(tokenizer, turns)
    model = reference.build(content.MODEL, open_source(project.model))
    start = len(ids)
    for _ in range(LENGTH):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    second = generate(project, *options, stdin="hello\nhello\nquit\n").out
    assert second == f"{said['text']}\n{tokenizer.decode(ids[start:])}\n"


def test_a_system_prompt_changes_the_answer(project: Project) -> None:
    options = ("--chat", "--greedy", "--max-new-tokens", LENGTH)
    plain = generate(project, *options, stdin="hello\n").out
    assert generate(project, *options, "--system", "Be a lake.", stdin="hello\n").out != plain


def generate_on_a_rank(options: dict[str, Any]) -> Any:
    """Runs the core of the command; runs on a rank of the pool."""
    from glm3cli.config.inference import GenerateConfig
    from glm3cli.infer.generate import generate

    return generate(GenerateConfig.parse(options))


@pytest.mark.dist
@pytest.mark.parametrize("number", [1, 2, 3])
def test_data_parallel_ranks_share_the_prompts(
    project: Project, ranks: RankPool, number: int
) -> None:
    """Tokens are sampled, so that a prompt's text depends on its place in the whole list."""
    prompts = [*PROMPTS, PROMPTS[0]][:number]
    options: dict[str, Any] = {
        "model": project.model,
        "prompt": prompts,
        "max_new_tokens": LENGTH,
        "temperature": 3.0,
        "logprobs": True,
    }
    [alone] = ranks.run(1, generate_on_a_rank, options)
    for found in ranks.run(2, generate_on_a_rank, options):
        assert [one["prompt"] for one in found["results"]] == prompts
        for ours, theirs in zip(found["results"], alone["results"], strict=True):
            assert ours["token_ids"] == theirs["token_ids"]
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-5)
    assert len({tuple(one["token_ids"]) for one in alone["results"]}) == number


@pytest.mark.parametrize(
    ("name", "reason"),
    [("</s>", "stop"), ("<|user|>", "stop"), ("<|observation|>", "stop"), ("text", "length")],
)
def test_where_an_answer_ends(
    project: Project, tokenizer: Tokenizer, tmp_path: Path, name: str, reason: str
) -> None:
    special = name.startswith("<|")
    token = tokenizer.special(name) if special else {"</s>": tokenizer.eos_id, "text": 500}[name]

    class OneToken(RandomSource):
        """Weights that always give one token.

        The hidden state is the first unit vector, and the output layer answers it with that token.
        """

        def read(self, weight: Any, layer: int | None = None) -> torch.Tensor:
            tensor = torch.zeros(weight.shape(self.model))
            if weight.logical == "embedding":
                tensor[:, 0] = 1
            elif "norm" in weight.logical:
                tensor += 1
            elif weight.logical == "output":
                tensor[token, 0] = 1
            return tensor

    write_random_model(tmp_path / "model", OneToken(content.MODEL, 1, 0.1), project.tokenizer)
    arguments = ("--model", tmp_path / "model", *asked("a"), "--greedy", "--max-new-tokens", 3)
    ended = call("generate", *arguments, "--json", "--logprobs")
    assert ended.code == 0, ended.err
    [result] = json.loads(ended.out)["results"]
    assert result["finish_reason"] == reason
    assert result["token_ids"] == ([] if reason == "stop" else [token] * 3)
    assert len(result["logprobs"]) == len(result["token_ids"])


WRONG = [
    (["--prompt", "a", "--tp", "3", "--nproc", "3"], 2, "is not divisible by --tp 3", "--tp 1, 2"),
    (["--prompt", "a", "--pp", "2"], 2, "1 rank(s) can't hold --tp 1 x --pp 2", "--nproc 2"),
    (["--prompt", "a", "--vpp", "2"], 2, "--vpp is for training", "--help"),
    (["--prompt", "a", "--model", "none"], 3, "none does not exist", "give a model folder"),
    ([], 2, "give one of --prompt TEXT, --prompts-file FILE, --chat", "--help"),
    (["--prompt", ""], 2, "--prompt is empty", "--help"),
    (["--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens 0", "--help"),
    (["--prompt", "a", "--max-new-tokens", "-3"], 2, "--max-new-tokens -3", "--help"),
    (["--prompt", "a", "--output", "o"], 2, "--output goes with --prompts-file", "--help"),
    (["--prompts-file", "f", "--resume"], 2, "--resume goes with --output", "--help"),
    (["--chat", "--run-tools"], 2, "--run-tools goes with --chat and --tools FILE.py", "--help"),
    (["--prompt", "a", "--chat"], 2, "give one of --prompt TEXT", "--help"),
    (["--prompt", "a", "--prompt", "b", "--stream"], 2, "--stream goes with one", "--help"),
    (["--chat", "--json"], 2, "it has no --json result", "--help"),
    (["--prompt", "a", "--system", "b"], 2, "--system and --tools go with --chat", "--help"),
    (["--prompt", "a", "--temperature", "-1"], 2, "--temperature -1.0", "--help"),
    (["--prompt", "a", "--temperature", "1e-6"], 2, "is below 0.0001; 0 takes", "--help"),
    (["--prompt", "a", "--stop", ""], 2, "--stop is empty", "--help"),
    (["--prompt", "a", "--logit-bias", "7:x"], 2, "7:x is no ID:NUMBER", "--help"),
    (["--prompt", "a", "--length-penalty", "2"], 2, "--length-penalty goes with", "--help"),
    (["--prompt", "a", "--early-stopping", "yes"], 2, "--early-stopping goes with", "--help"),
    (
        ["--prompt", "a", "--num-beams", "2", "--num-return-sequences", "3"],
        2,
        "--num-return-sequences 3 is more than the 2 of --num-beams",
        "--help",
    ),
    (
        ["--prompt", "a", "--greedy", "--num-return-sequences", "3"],
        2,
        "without --num-beams or drawing, all are the same",
        "--help",
    ),
    (["--prompt", "a", "--prompt-lookup", "3"], 2, "--prompt-lookup goes with --greedy", "--help"),
    (["--prompt", "a", "--num-beams", "2", "--stream"], 2, "goes without beams", "--help"),
    (["--prompt", "a", "--regex", "("], 2, "--regex (: ", "llguidance"),
    (["--prompt", "a", "--json-schema", "none"], 3, "--json-schema none: ", "give a JSON file"),
    (["--prompt", "a", "--regex", "a", "--json-schema", "b"], 2, "give one of --json", "--help"),
    (["--prompt", "a", "--regex", "a", "--num-beams", "2"], 2, "go with --num-beams", "--help"),
    (["--chat", "--num-beams", "2"], 2, "--num-beams has no use in a --chat", "--help"),
    (["--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens 0", "--help"),
    (
        ["--prompt", "a", "--num-beams", "9", "--max-batch-size", "4"],
        2,
        "9 beams don't fit into the 4 rows of a pass",
        "--max-batch-size",
    ),
    (
        ["--prompt", "word " * 600],
        2,
        "a prompt has 603 tokens, and the model takes 128",
        "--truncate",
    ),
    (["--prompt", "a", "--tokenizer", "none"], 3, "none does not exist", "tokenizer.model"),
    (["--prompts-file", "none"], 3, "--prompts-file none", "UTF-8"),
]


@pytest.mark.parametrize(("arguments", "code", "error", "hint"), WRONG)
def test_wrong_commands(
    project: Project, arguments: list[str], code: int, error: str, hint: str
) -> None:
    ended = call("generate", "--model", project.model, *arguments)
    assert ended.code == code, ended.err
    assert error in ended.err.split("hint: ")[0]
    assert hint in ended.err.split("hint: ")[1]
    assert not ended.out


def test_a_tokenizer_larger_than_the_model_is_refused(project: Project, tmp_path: Path) -> None:
    small = content.MODEL.model_copy(update={"padded_vocab_size": 1000})
    source = RandomSource(small, seed=1, std=0.1)
    write_random_model(tmp_path / "small", source, project.tokenizer)
    ended = call("generate", "--model", tmp_path / "small", "--prompt", "a")
    assert ended.code == 3
    assert "has 1009 tokens, but the model's vocabulary has 1000 entries" in ended.err
    assert "hint: give the tokenizer that belongs to this model" in ended.err


def test_a_damaged_model_is_refused(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = call("generate", "--model", tmp_path / "model", "--prompt", "a")
    assert ended.code == 3
    assert str(weights) in ended.err
    assert "hint: " in ended.err
