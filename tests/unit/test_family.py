"""Which member of the family a folder is, and what follows from it."""

import json
import logging
from pathlib import Path

import pytest

from glm3cli.config.family.members import MEMBERS
from glm3cli.config.family.recognise import known, recognise
from glm3cli.config.model import ModelConfig
from glm3cli.config.presets import PRESETS
from tests.support.shared import SHARED, needs_shared

SIX_B, NINE_B = PRESETS["6b"].to_hf(), PRESETS["9b"].to_hf()
PLAIN = {"rope_ratio": None}
DIVIDING = "seq_idx = torch.arange(seq_len, dtype=dtype, device=device) / self.rope_ratio"
MULTIPLYING = "base = base * self.rope_ratio"


def write(folder: Path, config: dict, **files: str) -> Path:
    """A folder with a config.json, without the fields that are None, and Python files."""
    content = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_names_are_unlike_and_every_member_is_found_by_its_name(tmp_path):
    assert len({member.name.lower() for member in MEMBERS}) == len(MEMBERS)
    for member in MEMBERS:
        for path in (member.repository, f"zai-org/{member.name}", f"/data/{member.name}/"):
            assert known(write(tmp_path, {"_name_or_path": path})) is member


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SIX_B | PLAIN | {"seq_length": 32_768}, "chatglm2-6b"),
        (SIX_B | {"rope_ratio": 16, "seq_length": 32_768}, "chatglm2-6b-32k"),
        (SIX_B | PLAIN | {"interleaved_qkv": False}, "codegeex2-6b"),
        (SIX_B | PLAIN, "chatglm3-6b"),
        (SIX_B | {"rope_ratio": 50, "seq_length": 32_768}, "chatglm3-6b-32k"),
        (SIX_B | {"rope_ratio": 500, "seq_length": 131_072}, "chatglm3-6b-128k"),
        (NINE_B | {"rope_ratio": 1, "seq_length": 8_192}, "glm-4-9b"),
        (NINE_B, "glm-4-9b-chat"),
        (NINE_B | {"rope_ratio": 10_000, "multi_query_group_num": 4}, "glm-4-9b-chat-1m"),
        (PRESETS["9b-0414"].to_glm(), "GLM-4-9B-0414"),
        (PRESETS["32b-0414"].to_glm(), "GLM-4-32B-0414"),
        (PRESETS["tiny"].to_hf(), None),
    ],
)
def test_members_without_a_name_are_found_by_their_values(config, name, tmp_path):
    found = known(write(tmp_path, config))
    assert (found and found.name) == name


def test_the_tokenizer_says_of_what_kind_a_member_is(tmp_path):
    folder = write(tmp_path, PRESETS["tiny"].to_hf())
    assert recognise(folder).name == "chatglm3-6b"
    assert recognise(folder, "tiktoken").name == "glm-4-9b-chat"
    rounds = 'import sentencepiece\nprompt = "[Round {}]"'
    assert recognise(write(tmp_path, {}, tokenization_chatglm=rounds)).name == "chatglm2-6b"
    roles = f'{rounds}\nrole = "<|user|>"'
    assert recognise(write(tmp_path, {}, tokenization_chatglm=roles)).name == "chatglm3-6b"


@pytest.mark.parametrize(
    ("config", "code", "expected"),
    [
        ({"rope_ratio": 16}, "", (1, 16)),
        ({"rope_ratio": 50}, "", (50, 1)),
        ({"rope_ratio": 8, "_name_or_path": "THUDM/chatglm2-6b-32k"}, "", (1, 8)),
        ({"rope_ratio": 8}, DIVIDING, (1, 8)),
        ({"rope_ratio": 16}, MULTIPLYING, (16, 1)),
        ({"rope_ratio": 16, "_name_or_path": "THUDM/chatglm3-6b-32k"}, "", (16, 1)),
        ({"rope_ratio": 8, "rope_kind": "positions"}, MULTIPLYING, (1, 8)),
        ({"rope_ratio": 2, "rope_factor": 3}, "", (2, 3)),
    ],
    ids=str,
)
def test_what_rope_ratio_does(config, code, expected, tmp_path):
    folder = write(tmp_path, SIX_B | config, modeling_chatglm=code)
    found = ModelConfig.from_file(folder)
    assert (found.rope_ratio, found.rope_factor) == expected
    again = ModelConfig.from_file(write(tmp_path, found.to_hf(), modeling_chatglm=""))
    assert again == found
    scaling = found.to_glm()["rope_parameters"]
    assert scaling.get("factor", 1) == expected[1]
    assert scaling["rope_theta"] == 10_000 * expected[0]


@pytest.mark.parametrize(
    ("positions", "theta", "is_told"),
    [(131_072, 1e4, True), (1_048_576, 1e4, True), (131_072, 5e6, False), (8_192, 1e4, False)],
)
def test_a_lost_rotary_base_of_glm_4_is_told_once(positions, theta, is_told, tmp_path, caplog):
    changed = {"rope_theta": theta, "max_position_embeddings": positions}
    content = PRESETS["9b"].to_glm() | changed
    content["rope_parameters"] = content["rope_parameters"] | {"rope_theta": theta}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ModelConfig.from_file(write(tmp_path, content))
    right = {131_072: "5e+06", 1_048_576: "1e+08"}.get(positions)
    told = [line for line in caplog.messages if f"GLM-4-9B has {right}" in line]
    assert len(told) == is_told


@needs_shared
def test_the_real_folders():
    assert recognise(SHARED / "chatglm3-6b").name == "chatglm3-6b"
    assert recognise(SHARED / "glm-4-9b-chat").name == "glm-4-9b-chat"
    assert ModelConfig.from_file(SHARED / "glm-4-9b-chat") == PRESETS["9b"]
