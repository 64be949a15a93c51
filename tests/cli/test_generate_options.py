"""The options of `glm3 generate` for how an answer is made, and the model's own defaults."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.launch import KERNELS
from glm3cli.data.tokens.tokenizer import Tokenizer
from tests.cli.test_generate import LENGTH, PROMPTS, asked, generate_on_a_rank, results
from tests.support.project import Project, call
from tests.support.ranks import RankPool

HOT = ("--temperature", 3, "--top-k", 0, "--top-p", 1)


@pytest.fixture(scope="module")
def tokenizer(project: Project) -> Tokenizer:
    return Tokenizer.load(project.model)


@pytest.fixture(scope="module")
def greedy(project: Project) -> list[dict[str, Any]]:
    return results(project, *asked(*PROMPTS), "--greedy")


def test_temperature_0_is_greedy(project: Project, greedy: list[Any]) -> None:
    assert results(project, *asked(*PROMPTS), "--temperature", 0) == greedy


def test_a_stop_text_ends_an_answer_before_it(project: Project, greedy: list[Any]) -> None:
    """It begins within one token and ends within another."""
    whole = greedy[0]["text"]
    stop = whole[2:5]
    first = whole.index(stop)
    [found] = results(project, *asked(PROMPTS[0]), "--greedy", "--stop", stop, "--stop", "never")
    assert found["text"] == whole[:first]
    assert found["finish_reason"] == "stop_text"
    count = len(found["token_ids"])
    assert found["token_ids"] == greedy[0]["token_ids"][:count]
    assert 0 < count <= LENGTH
    command = ("generate", "--model", project.model, *asked(PROMPTS[0]), "--greedy", "--device")
    ended = call(*command, "cpu", "--stop", stop, "--stream", "--max-new-tokens", LENGTH)
    assert ended.out == f"{whole[:first]}\n"


def test_a_stop_id_ends_an_answer_unless_ends_are_ignored(
    project: Project, greedy: list[Any]
) -> None:
    token = greedy[0]["token_ids"][3]
    first = greedy[0]["token_ids"].index(token)
    options = (*asked(PROMPTS[0]), "--greedy", "--stop-id", token)
    [found] = results(project, *options)
    assert found["token_ids"] == greedy[0]["token_ids"][:first]
    assert found["finish_reason"] == "stop"
    [ignoring] = results(project, *options, "--ignore-eos")
    assert ignoring["token_ids"] == greedy[0]["token_ids"]
    assert ignoring["finish_reason"] == "length"


def test_several_answers_to_each_prompt(project: Project) -> None:
    several = results(project, *asked(*PROMPTS), *HOT, "--num-return-sequences", 3)
    assert [(one["prompt"], one["index"]) for one in several] == [
        (prompt, index) for prompt in PROMPTS for index in range(3)
    ]
    assert len({tuple(one["token_ids"]) for one in several}) == 6
    # They are the answers to the same prompt, given six times.
    alone = results(project, *asked(*[p for p in PROMPTS for _ in range(3)]), *HOT)
    assert [one["token_ids"] for one in alone] == [one["token_ids"] for one in several]
    # Fewer at a time change nothing.
    few = results(
        project, *asked(*PROMPTS), *HOT, "--num-return-sequences", 3, "--max-batch-size", 2
    )
    assert few == several


def test_beams_are_the_best_answers(project: Project) -> None:
    options = (*asked(*PROMPTS), "--num-beams", 3, "--logprobs")
    best = results(project, *options)
    several = results(project, *options, "--num-return-sequences", 3, "--length-penalty", 0)
    assert [one["index"] for one in several] == [0, 1, 2] * 2
    sums = [sum(one["logprobs"]) for one in several]
    assert sums[:3] == sorted(sums[:3], reverse=True)
    assert len({tuple(one["token_ids"]) for one in several}) == 6
    assert len(best) == 2
    sampled = results(project, *options, *HOT)
    assert sampled != best


def test_the_likeliest_tokens(project: Project, greedy: list[Any]) -> None:
    options = (*asked(PROMPTS[0]), "--greedy", "--logprobs", "--top-logprobs", 4)
    [found] = results(project, *options)
    assert found["token_ids"] == greedy[0]["token_ids"]
    for token, logprob, top in zip(
        found["token_ids"], found["logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[0] == [token, pytest.approx(logprob, abs=1e-6)]
        assert [one[1] for one in top] == sorted((one[1] for one in top), reverse=True)
        assert len(top) == 4


def test_lookup_says_what_it_has_found(
    project: Project, greedy: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    command = ("generate", "--model", project.model, *asked(*PROMPTS), "--greedy", "--device")
    options = ("cpu", "--json", "--max-new-tokens", LENGTH, "--prompt-lookup", 3)
    ended = call(*command, *options)
    assert json.loads(ended.out)["results"] == greedy
    assert "guessed tokens accepted" in caplog.text


def test_plain_torch_gives_the_same_answers(
    project: Project, greedy: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    left_out = [part for name in KERNELS for part in ("--without-kernel", name)]
    assert results(project, *asked(*PROMPTS), "--greedy", *left_out) == greedy
    assert f"left out by --without-kernel: {', '.join(KERNELS)}" in caplog.text
    refused = call("generate", "--model", project.model, *asked(*PROMPTS), *left_out[:1], "norm")
    assert refused.code == 2
    assert "--without-kernel norm: the names are rms-norm, swiglu" in refused.err


def test_a_prompt_that_is_too_long_loses_its_beginning(
    project: Project, tokenizer: Tokenizer
) -> None:
    words = "word " * 600
    [found] = results(project, "--prompt", words, "--greedy", "--truncate")
    assert len(found["token_ids"]) == LENGTH


def test_a_bias_makes_a_token_come(project: Project) -> None:
    [found] = results(project, *asked(PROMPTS[0]), "--greedy", "--logit-bias", "300:100")
    assert found["token_ids"] == [300] * LENGTH
    options = ("--logit-bias", "300:100", "--no-repeat-ngram-size", 1)
    [found] = results(project, *asked(PROMPTS[0]), "--greedy", *options)
    assert found["token_ids"].count(300) == 1


def with_file(project: Project, folder: Path, **values: Any) -> Path:
    """Returns a folder with the project's model, and a generation_config.json."""
    folder.mkdir()
    for file in project.model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_a_models_own_defaults(
    project: Project, greedy: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file wins over our defaults, and options win over the file."""
    token = greedy[0]["token_ids"][3]
    cold = with_file(project, tmp_path / "cold", do_sample=False, eos_token_id=[2, token])
    hot = with_file(project, tmp_path / "hot", do_sample=True, temperature=3, top_k=0, top_p=1.0)

    def run(model: Path, *options: object) -> tuple[list[int], str]:
        caplog.clear()
        command = ("generate", "--model", model, *asked(PROMPTS[0]), "--device", "cpu", "--json")
        ended = call(*command, "--max-new-tokens", LENGTH, *options)
        assert ended.code == 0, ended.err
        return json.loads(ended.out)["results"][0]["token_ids"], caplog.text

    first = greedy[0]["token_ids"].index(token)
    tokens, said = run(cold)
    assert tokens == greedy[0]["token_ids"][:first]
    assert "generation_config.json: " in said
    [drawn] = results(project, *asked(PROMPTS[0]), *HOT)
    tokens, said = run(hot)
    assert tokens == drawn["token_ids"]
    assert "temperature 3.0, top_k 0" in said
    assert run(hot, "--greedy")[0] == greedy[0]["token_ids"]
    assert run(hot, "--top-k", 1)[0] == greedy[0]["token_ids"]
    # Temperatures that draw nothing else, and the mass of the likeliest token alone.
    icy = with_file(project, tmp_path / "icy", do_sample=True, temperature=1e-5, typical_p=1.0)
    tokens, said = run(icy)
    assert tokens == greedy[0]["token_ids"]
    assert said.count("icy/generation_config.json: temperature 1e-05; options win over it") == 1
    assert "not read here" not in said
    assert run(with_file(project, tmp_path / "top", top_p=0.0))[0] == greedy[0]["token_ids"]
    unread = {"min_new_tokens": 5, "typical_p": 0.3, "num_beam_groups": 2, "suppress_tokens": [3]}
    text = greedy[0]["text"]
    ended = {"stop_strings": [text[2:5]], "do_sample": False, "bad_words_ids": []}
    model = with_file(project, tmp_path / "ended", **ended, **unread)
    caplog.clear()
    command = ("generate", "--model", model, *asked(PROMPTS[0]), "--device", "cpu", "--json")
    [stopped] = json.loads(call(*command, "--max-new-tokens", LENGTH).out)["results"]
    assert stopped["text"] == text[: text.index(text[2:5])]
    said = caplog.text
    names = "min_new_tokens, num_beam_groups, suppress_tokens, typical_p"
    assert said.count(f"not read here, and without effect: {names}") == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[1]", "generation_config.json holds no JSON object"),
        ("{", "generation_config.json: "),
        ('{"temperature": -2.0}', "temperature Input should be greater than or equal to 0"),
        ('{"top_k": "many"}', "top_k Input should be a valid integer"),
    ],
)
def test_a_wrong_file_is_named(project: Project, tmp_path: Path, content: str, error: str) -> None:
    model = with_file(project, tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    ended = call("generate", "--model", model, *asked("a"), "--device", "cpu")
    assert ended.code == 3
    assert error in ended.err
    assert "hint: mend" in ended.err


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"enum": ["small", "large"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size", "age"],
    "additionalProperties": False,
}


def check(text: str) -> None:
    """Checks that a text is JSON of the schema."""
    value = json.loads(text)
    assert value.keys() == {"name", "size", "age"}
    assert len(value["name"]) <= 6
    assert value["size"] in ("small", "large")
    assert 0 <= value["age"] <= 99


@pytest.mark.dist
def test_answers_follow_a_schema(project: Project, ranks: RankPool, tmp_path: Path) -> None:
    """Greedy and drawn ones, side by side, and the same ones at other parallel sizes."""
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    options: dict[str, Any] = {
        "model": project.model,
        "prompt": [*PROMPTS, "A"],
        "json_schema": file,
        "max_new_tokens": 100,
    }
    for more in ({"greedy": True}, {"temperature": 2.0, "num_return_sequences": 4}):
        [alone] = ranks.run(1, generate_on_a_rank, {**options, **more})
        for one in alone["results"]:
            check(one["text"])
            assert one["finish_reason"] == "stop"
        sizes = {"tp": 2, "pp": 2}
        for found in ranks.run(4, generate_on_a_rank, {**options, **more, **sizes}):
            assert found["results"] == alone["results"]
    assert len({one["text"] for one in alone["results"]}) > 9


def test_answers_match_an_expression(project: Project) -> None:
    """One that begins with a space, too."""
    pattern = r" ?(lake|winter) [0-9]{2,4}(, (lake|winter) [0-9]{2,4}){0,2}"
    options = (*asked(*PROMPTS), *HOT, "--num-return-sequences", 8, "--regex", pattern)
    found = results(project, *options, "--max-new-tokens", 80)
    assert all(re.fullmatch(pattern, one["text"]) for one in found)
    assert {one["text"][0] == " " for one in found} == {True, False}
    assert {one["finish_reason"] for one in found} == {"stop"}


def test_weights_of_8_bits_say_nearly_the_same(project: Project, greedy: list[Any]) -> None:
    found = results(project, *asked(*PROMPTS), "--greedy", "--quantize", "int8")
    assert [len(one["token_ids"]) for one in found] == [LENGTH] * 2
    assert found[0]["token_ids"][0] == greedy[0]["token_ids"][0]
