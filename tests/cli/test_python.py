"""glm3 from Python, as the README shows it; importing it costs nothing."""

import json
import subprocess
import sys

import pytest
import torch

import glm3cli
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.demo import content
from glm3cli.errors import ConfigError
from tests.support import reference
from tests.support.project import Project, call
from tests.support.readme import blocks

OPTIONS = {"device": "cpu"}


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, glm3cli; print({'torch', 'megatron', 'numpy', 'pydantic'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_lines_of_the_readme_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = blocks("python")
    assert len(program.strip().splitlines()) <= 12
    opened = glm3cli.open_model
    monkeypatch.setattr(glm3cli, "open_model", lambda path: opened(project.model, **OPTIONS))
    exec(compile(program, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_it_gives_what_the_command_gives(project: Project) -> None:
    words = ("--model", project.model, "--device", "cpu", "--greedy", "--max-new-tokens", 6)
    prompts = ("The lake is", "In winter")
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    ended = call("generate", *words, *asked, "--json", "--logprobs")
    expected = json.loads(ended.out)["results"]
    with glm3cli.open_model(project.model, **OPTIONS) as model:
        found = [vars(one) for one in model.generate(prompts, max_new_tokens=6)]
        assert found == [{**one, "index": 0, "top_logprobs": []} for one in expected]


def test_logprobs_are_transformers(project: Project) -> None:
    contexts, continuations = ["The lake is", "", "In winter,"], [" old and cold.", "A", " the"]
    with glm3cli.open_model(project.model, **OPTIONS) as model:
        found = model.logprobs(contexts, continuations)
        tokenizer = model.tokenizer
    peer = reference.build(content.MODEL, open_source(project.model))
    for context, continuation, score in zip(contexts, continuations, found, strict=True):
        ids = [*tokenizer.prefix, *tokenizer.encode(context + continuation)]
        count = len(ids) - len(tokenizer.prefix) - len(tokenizer.encode(context) if context else [])
        with torch.no_grad():
            logprobs = peer(torch.tensor([ids])).logits[0, -count - 1 : -1].log_softmax(dim=-1)
        target = torch.tensor(ids[-count:]).unsqueeze(1)
        # fp32 in another order of sums.
        assert score == pytest.approx(float(logprobs.gather(1, target).sum()), abs=1e-4)


def test_nothing_to_do_is_done(project: Project) -> None:
    with glm3cli.open_model(project.model, **OPTIONS) as model:
        assert model.generate([]) == []
        assert model.logprobs([], []) == []
        assert model.logprobs(["", "A lake"], ["", ""]) == [0, 0]
        [alone] = model.logprobs(["A lake"], [" is"])
        assert model.logprobs(["", "A lake"], ["", " is"]) == [0, pytest.approx(alone, abs=1e-4)]


def test_after_an_interruption_it_starts_anew(project: Project) -> None:
    """As in a notebook, where Ctrl-C ends a cell, and the next cell asks something else."""

    def interrupt(_text: str) -> None:
        raise KeyboardInterrupt

    with glm3cli.open_model(project.model, **OPTIONS) as model:
        [expected] = model.generate("In winter", max_new_tokens=4)
        with pytest.raises(KeyboardInterrupt):
            model.generate("The lake is", max_new_tokens=8, on_text=interrupt)
        assert model.engine.is_idle
        assert model.engine.results == {}
        assert model.generate("In winter", max_new_tokens=4) == [expected]


def test_what_is_wrong_is_a_sentence(project: Project) -> None:
    with glm3cli.open_model(project.model, **OPTIONS) as model:
        with pytest.raises(ConfigError, match="max_new_tokens is 0, and must be at least 1"):
            model.generate("The lake is", max_new_tokens=0)
        with pytest.raises(ConfigError, match="a prompt has no token"):
            model.continue_ids([[5], []], 4)
        assert model.engine.is_idle


def test_one_model_is_open_at_a_time(project: Project) -> None:
    with glm3cli.open_model(project.model, **OPTIONS) as model:
        expected = model.generate("In winter", max_new_tokens=2)
        with pytest.raises(ConfigError, match="a model is open in this process"):
            glm3cli.open_model(project.model, **OPTIONS)
        assert model.generate("In winter", max_new_tokens=2) == expected
    with glm3cli.open_model(project.model, **OPTIONS) as model:
        assert model.generate("In winter", max_new_tokens=2) == expected


def test_what_cannot_be_opened_is_a_sentence(project: Project) -> None:
    with pytest.raises(ConfigError, match="can't hold --tp 1 x --pp 2"):
        glm3cli.open_model(project.model, pp=2, **OPTIONS)
