"""`glm3 generate --prompts-file`: forms of lines, bad lines, results that come, and going on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.inference import SamplingOptions
from glm3cli.data.tokens.messages import Message
from glm3cli.infer.prompts.lines import PromptLine, PromptsFile
from tests.benchmarks.kill_prompts_file import compare
from tests.support.chain_model import CALL, write_chain_model
from tests.support.project import Ended, Project, call
from tests.support.ranks import RankPool

LENGTH = 6
PROMPTS = ("The lake is", "In winter, the old baker")
# Among 50 tokens, so that a rounding in another batch moves hardly any draw to the next one.
HOT = ("--temperature", 3.0, "--top-k", 50, "--top-p", 1.0)


def generate(project: Project, file: Path, *options: object) -> Ended:
    arguments = ("--model", project.model, "--device", "cpu", "--prompts-file", file)
    return call("generate", *arguments, "--max-new-tokens", LENGTH, *options)


def results(project: Project, file: Path, *options: object) -> list[dict[str, Any]]:
    ended = generate(project, file, "--json", *options)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["results"]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prompted(project: Project, *prompts: str, options: tuple[object, ...] = ()) -> list[Any]:
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    arguments = ("--model", project.model, "--device", "cpu", "--max-new-tokens", LENGTH)
    return json.loads(call("generate", *arguments, *words, "--json", *options).out)["results"]


def test_a_file_gives_what_the_command_line_gives(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    first, second = json.dumps(PROMPTS[0]), json.dumps({"prompt": PROMPTS[1], "id": 7})
    for text in (f"{first}\n\n{second}\n", f"\ufeff{first}\r\n{second}\r\n", f"{first}\n{second}"):
        file.write_bytes(text.encode())
        options = ("--greedy", "--logprobs")
        assert results(project, file, *options) == prompted(project, *PROMPTS, options=options)
        assert results(project, file, *HOT) == prompted(project, *PROMPTS, options=HOT)


def test_texts_are_printed(project: Project, tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.jsonl", *PROMPTS)
    ended = generate(project, file, "--greedy")
    texts = [one["text"] for one in prompted(project, *PROMPTS, options=("--greedy",))]
    assert ended.out == "".join(f"{text}\n" for text in texts)
    assert ended.err.startswith("first token ")


def test_a_line_may_have_options_of_its_own(project: Project, tmp_path: Path) -> None:
    lines = [
        {"prompt": PROMPTS[0], "max_new_tokens": 2, "greedy": True},
        {"prompt": PROMPTS[0], "seed": 7},
        {"prompt": PROMPTS[0], "temperature": 1, "top_p": None},
    ]
    found = results(project, written(tmp_path / "p", *lines), *HOT)
    [greedy] = prompted(project, PROMPTS[0], options=("--greedy",))
    assert found[0]["token_ids"] == greedy["token_ids"][:2]
    assert [found[1]] == prompted(project, PROMPTS[0], options=(*HOT, "--seed", 7))
    warm = (*HOT[2:], "--temperature", 1.0, "--seed", 44)
    assert [found[2]] == prompted(project, PROMPTS[0], options=warm)


def test_conversations_are_answered(project: Project, tmp_path: Path) -> None:
    model = write_chain_model(tmp_path / "caller", *CALL, "<|observation|>")
    question = {"role": "user", "content": "Beijing?"}
    tools = [{"name": "get_weather"}]
    lines = [{"messages": [question], "tools": tools}, {"prompt": "Beijing?", "tools": tools}]
    file, output = written(tmp_path / "p", *lines), tmp_path / "o"
    ended = call("generate", "--model", model, "--prompts-file", file, "--output", output)
    assert ended.code == 0, ended.err
    first, second = records(output)
    assert {**first, "line": 2, "request": second["request"]} == second
    assert first["prompt"] == "Beijing?"
    assert first["text"] == "".join(CALL)
    function = {"name": "get_weather", "arguments": '{"city": "北京", "days": 3}'}
    assert first["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": function}],
    }
    # The answer can be put behind the question as it is.
    turns = [question, first["message"], {"role": "tool", "content": "cold"}]
    written(file, {"messages": turns})
    ended = call("generate", "--model", model, "--prompts-file", file, "--json")
    assert json.loads(ended.out)["results"][0]["prompt"] == "cold"
    written(file, {"messages": [*turns[:-1], {"role": "tool", "content": ""}]})
    ended = call("generate", "--model", model, "--prompts-file", file, "--json")
    assert json.loads(ended.out)["results"][0]["prompt"] == ""


def test_fields_of_openai_and_of_training_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked, tools = {"role": "user", "content": "q"}, [{"name": "f", "parameters": {}}]
    body = {"model": "glm", "messages": [asked], "max_tokens": 2, "tools": tools}
    rows: list[dict[str, Any]] = [
        {**body, "max_new_tokens": 2, "n": 1, "stop": "x", "logit_bias": {"7": -1}, "seed": 3},
        {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"prompt": "q", "functions": tools, "max_completion_tokens": 2, "tool_choice": "auto"},
        {
            "prompt": "q",
            "history": [["a", "b"]],
            "system_prompt": "s",
            "response_format": {"type": "x"},
        },
        {"prompt": "q", "echo": True, "response_format": {"type": "text"}},
    ]
    file = PromptsFile(written(tmp_path / "p", *rows))
    general = SamplingOptions(max_new_tokens=9, greedy=True)
    read = [*file.read(general), *file.read(general)]
    one, batch, older, past, plain = [line for line in read if isinstance(line, PromptLine)][:5]
    assert one.sampling == general.model_copy(
        update={"max_new_tokens": 2, "stop": ["x"], "logit_bias": ["7:-1"]}
    )
    assert one.messages == batch.messages == older.messages
    assert [turn.tools for turn in one.messages or ()] == [tools, None]
    assert batch.sampling == older.sampling == general.model_copy(update={"max_new_tokens": 2})
    assert (one.custom_id, batch.custom_id) == (None, "r1")
    assert past.messages == [
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "q"),
    ]
    assert len({line.request for line in (one, batch, older, past, plain)}) == 5
    said = f"{file.path}: not read here, and without effect: response_format, echo"
    assert caplog.messages == [said]


BAD = [
    ('"a"\n{"prompt": "b"\n', "p:2 is not valid JSON"),
    ('"a"\n\n{"text": "b"}\n', "p:3 has no prompt"),
    ('{"prompt": 3}\n', "p:1 has no prompt"),
    ('{"prompt": "a", "messages": []}\n', "p:1 has both prompt and messages"),
    ('"a"\n""\n', "p:2 has an empty prompt"),
    ("\n", "p holds no prompt"),
    ('"a"\n"b', "p:2 is not valid JSON: Unterminated string starting at: line 1 column 1 (char 0)"),
    ('"a"\n"b', "it has no line break: is it still being written?"),
    ('"a"\n"\udcc4\udce3"\n', "p:2 is not UTF-8: byte 2 is 0xc4"),
    ("[" * 100_000, "p:1 is not valid JSON: it is nested too deeply"),
    ("9" * 5000, "p:1 is not valid JSON"),
    ('"\\ud800"\n', "p:1 has half of a character (a lone surrogate) in its prompt"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "p:1 has half of a character"),
    ('{"messages": 3}\n', "messages: expected a list"),
    ('{"messages": [{"role": "robot", "content": "a"}]}\n', "messages[0].role: expected one of"),
    (
        '{"messages": [{"role": "assistant", "content": "a"}]}\n',
        "ends with a turn of the assistant",
    ),
    ('{"prompt": "a", "tools": "[{"}\n', "tools: expected JSON"),
    ('{"prompt": "a", "max_new_tokens": 0}\n', "--max-new-tokens 0"),
    ('{"prompt": "a", "max_new_tokens": -1}\n', "--max-new-tokens -1"),
    ('{"prompt": "a", "temperature": "hot"}\n', "--temperature hot"),
    ('{"prompt": "a", "seed": -1}\n', "seed -1 is no whole number from 0"),
    ('{"prompt": "a", "n": 3}\n', "3 answers to one line"),
    ('{"prompt": "a", "max_tokens": 3, "max_new_tokens": 4}\n', "and max_tokens differ"),
    ('{"messages": [{"role": "user", "content": "a"}], "history": [["b", "c"]]}\n', "has history"),
    ('{"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "a"}}\n', "asks for '/v1/emb"),
    ('{"custom_id": 3, "body": {"prompt": "a"}}\n', "has the custom_id 3, which is no string"),
    ("".join('"a"\n' if n % 2 else "x\n" for n in range(99)), "; lines 3, 5, 7, 9 and others are"),
]


@pytest.mark.parametrize(("text", "error"), BAD)
def test_a_bad_line_is_named_before_the_model_is_loaded(
    project: Project, tmp_path: Path, text: str, error: str
) -> None:
    (tmp_path / "p").write_bytes(text.encode("utf-8", "surrogateescape"))
    output = tmp_path / "o"
    ended = generate(project, tmp_path / "p", "--output", output)
    assert ended.code == 3
    assert error in ended.err.split("hint: ")[0]
    assert not ended.out
    assert not output.exists()


def test_bad_lines_are_left_out_if_wanted(project: Project, tmp_path: Path) -> None:
    file, output = tmp_path / "p", tmp_path / "o"
    lines = [json.dumps(PROMPTS[0]), "x", json.dumps(PROMPTS[1]), '{"prompt": ""}']
    file.write_text("\n".join(lines))
    ended = generate(project, file, *HOT, "--output", output, "--on-error", "skip")
    assert ended.code == 0, ended.err
    assert f"warning: {file}:2 is not valid JSON" in ended.err
    assert "warning: 2 lines have no answer" in ended.err
    found = records(output)
    assert [record["line"] for record in found] == [1, 2, 3, 4]
    assert [record["finish_reason"] == "error" for record in found] == [False, True] * 2
    assert found[3]["error"] == f"{file}:4 has an empty prompt"
    # A bad line has its own random numbers, so that the others' don't depend on it.
    written(file, PROMPTS[0], "x", PROMPTS[1], "y")
    good = results(project, file, *HOT)
    assert [one["token_ids"] for one in good[::2]] == [one["token_ids"] for one in found[::2]]


def test_a_prompt_that_is_too_long_is_a_bad_line(project: Project, tmp_path: Path) -> None:
    file, output = written(tmp_path / "p", PROMPTS[0], "lake " * 600, PROMPTS[1]), tmp_path / "o"
    options = (*HOT, "--output", output)
    ended = generate(project, file, *options)
    assert ended.code == 3
    assert f"error: {file}:2 " in ended.err
    assert "and the model takes 128" in ended.err
    assert [record["line"] for record in records(output)] == [1]
    ended = generate(project, file, *options, "--resume", "--on-error", "skip")
    assert ended.code == 0, ended.err
    good, bad, last = records(output)
    assert "and the model takes 128" in bad["error"]
    assert bad["prompt"] == "lake " * 600
    assert [good, last] == [record for record in records(output) if "error" not in record]
    cut = results(project, file, *HOT, "--truncate")
    assert [cut[0]["token_ids"], cut[2]["token_ids"]] == [good["token_ids"], last["token_ids"]]
    assert len(cut[1]["token_ids"]) == LENGTH


def test_a_cut_output_ends_as_if_it_had_not_been_cut(project: Project, tmp_path: Path) -> None:
    file = written(tmp_path / "p", *[f"{PROMPTS[n % 2]} {n}" for n in range(9)])
    output, options = tmp_path / "o", (*HOT, "--output", tmp_path / "o")
    ended = generate(project, file, *options, "--resume", "--json")  # begins where there is none
    assert json.loads(ended.out).keys() == {
        "output",
        "lines",
        "bad",
        "first_token_seconds",
        "tokens_per_second",
    }
    whole = output.read_bytes()
    ends = [number for number, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 1, ends[0], ends[0] + 1, ends[4] - 2, ends[7] + 9, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:cut])
        ended = generate(project, file, *options, "--resume")
        assert ended.code == 0, ended.err
        assert f"9 results in {output}" in ended.err
        assert output.read_bytes() == whole
    # A file that has got more lines is gone on with, and its results are those of one run.
    with file.open("a") as stream:
        stream.write('"and more"\n')
    assert generate(project, file, *options, "--resume").code == 0
    grown = output.read_bytes()
    assert grown.startswith(whole)
    output.unlink()
    assert generate(project, file, *options).code == 0
    assert output.read_bytes() == grown


def test_results_are_not_mixed_or_lost(project: Project, tmp_path: Path) -> None:
    file, output = written(tmp_path / "p", *PROMPTS), tmp_path / "o"
    options = ("--output", output, "--greedy")
    assert generate(project, file, *options).code == 0
    whole = output.read_bytes()
    other = written(tmp_path / "other", PROMPTS[1])
    for prompts, arguments, code, error in (
        (file, options, 2, "is there already"),
        (file, (*options, "--resume", "--seed", 1), 2, "was made with seed 42, not 1"),
        (other, (*options, "--resume"), 3, "result 1 of"),
        (file, ("--output", tmp_path), 2, "is a folder; give the name of a file"),
        (file, ("--output", tmp_path / "none/o"), 2, "none does not exist"),
    ):
        ended = generate(project, prompts, *arguments)
        assert ended.code == code, ended.err
        assert error in ended.err.split("hint: ")[0]
        assert output.read_bytes() == whole
    (tmp_path / "o.run.json").unlink()
    ended = generate(project, file, *options, "--resume")
    assert ended.code == 2
    assert "o.run.json, which tells how" in ended.err


def test_a_line_that_has_changed_is_not_gone_on_with(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": PROMPTS[0]}]
    row = {"custom_id": "r", "body": {"messages": turns, "max_tokens": 2, "seed": 1}}
    file, output = written(tmp_path / "p", row), tmp_path / "o"
    options = ("--output", output, "--resume", *HOT)
    assert generate(project, file, *options).code == 0
    whole = output.read_bytes()
    [result] = records(output)
    assert (result["custom_id"], len(result["token_ids"])) == ("r", 2)
    assert generate(project, file, *options).code == 0
    for change in (
        {"messages": [{**turns[0], "content": "t"}, turns[1]]},
        {"messages": [turns[1], {"role": "assistant", "content": "a"}, turns[1]]},
        {"tools": [{"name": "f"}]},
        {"max_tokens": 3},
        {"seed": 2},
    ):
        written(file, {**row, "body": {**row["body"], **change}})  # type: ignore[dict-item]
        ended = generate(project, file, *options)
        assert (ended.code, "is of another prompt than line 1" in ended.err) == (3, True)
        assert output.read_bytes() == whole
    # The results of an older version have no digest.
    del result["request"]
    written(output, result)
    ended = generate(project, file, *options)
    assert ended.code == 0, ended.err
    assert "known by their prompts' texts alone" in caplog.text


def test_a_file_that_grows_is_read_up_to_its_size_at_the_start(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glm3cli.infer.prompts.feed import Feed

    file, output = written(tmp_path / "p", *PROMPTS), tmp_path / "o"
    begin = Feed.begin

    def begin_late(self: Feed, tokenizer: Any) -> None:
        with file.open("a") as stream:
            stream.write('"half a li')
        begin(self, tokenizer)

    monkeypatch.setattr(Feed, "begin", begin_late)
    ended = generate(project, file, "--output", output)
    assert ended.code == 0, ended.err
    assert "has got 10 bytes since the start" in ended.err
    assert len(records(output)) == 2

    def begin_short(self: Feed, tokenizer: Any) -> None:
        os.truncate(file, 5)
        begin(self, tokenizer)

    written(file, *PROMPTS)
    output.unlink()
    monkeypatch.setattr(Feed, "begin", begin_short)
    ended = generate(project, file, "--output", output)
    assert ended.code == 3
    assert "has become shorter by" in ended.err


def test_a_pipe_is_read_once(project: Project, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'"The lake is"\nx\n"a"\n')
    os.close(writing)
    ended = generate(project, Path(f"/dev/fd/{reading}"), "--greedy")
    os.close(reading)
    [first] = prompted(project, PROMPTS[0], options=("--greedy",))
    assert ended.code == 3
    assert ended.out == f"{first['text']}\n"
    assert ":2 is not valid JSON" in ended.err


def continue_on_a_rank(options: dict[str, Any]) -> int:
    """Runs the command's core on a rank; returns the most prompts that its engine has held."""
    from glm3cli.config.inference import GenerateConfig
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.prompts import feed
    from glm3cli.infer.prompts.run import continue_file

    feed.MOST_WAITING = 20  # so that the fourth prompt, which takes longest, holds up the reading
    held, step = [0], Engine.step

    def counting(self: Engine) -> Any:
        held.append(len(self.results))
        return step(self)

    Engine.step = counting  # type: ignore[method-assign]
    try:
        continue_file(GenerateConfig.parse(options), lambda _: None, lambda _: None)
    finally:
        Engine.step = step  # type: ignore[method-assign]
    return max(held)


@pytest.mark.dist
@pytest.mark.parametrize(("size", "tp", "pp"), [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_all_parallel_sizes_give_the_same_file_within_bounds(
    project: Project, ranks: RankPool, tmp_path: Path, size: int, tp: int, pp: int
) -> None:
    lines: list[Any] = [{"prompt": f"{PROMPTS[n % 2]} {n}"} for n in range(300)]
    lines[7] = {"prompt": ""}
    lines[3]["max_new_tokens"] = 40  # the others wait for it
    file = written(tmp_path / "p", *lines)
    options = {
        "model": project.model,
        "prompts_file": file,
        "max_new_tokens": 3,
        "temperature": 3.0,
        "on_error": "skip",
    }
    alone, together = tmp_path / "alone", tmp_path / "together"
    [held] = ranks.run(1, continue_on_a_rank, {**options, "output": alone})
    options |= {"output": together, "tp": tp, "pp": pp}
    held_together = ranks.run(size, continue_on_a_rank, options)
    assert together.read_bytes() == alone.read_bytes()
    assert [record["line"] for record in records(alone)] == list(range(1, 301))
    assert held <= 64
    assert max(held_together) <= 64 * pp


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_results_of_one_left_alone(
    project: Project, tmp_path: Path
) -> None:
    assert compare(tmp_path, project.model, kills=3, lines=1500, seed=1) == (3, True)
