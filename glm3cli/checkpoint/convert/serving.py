"""`obstacles`: what keeps a program for serving or converting from loading a folder as it is.

The rules are those of the programs' own code, as it was in the summer of 2026:

- vLLM 0.33: model_executor/models/registry.py, model_executor/models/chatglm.py, and
  transformers_utils/configs/chatglm.py.
- MindIE-LLM 3.0: atb_llm/models/chatglm/router_chatglm.py and flash_causal_chatglm.py.
- llama.cpp (its converter): conversion/chatglm.py and conversion/glm.py.
- transformers 5: the classes GlmForCausalLM, Glm4ForCausalLM and AutoTokenizer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from glm3cli.checkpoint.layouts.complete import missing_code
from glm3cli.checkpoint.locate import Location
from glm3cli.config.family.members import Member
from glm3cli.config.family.recognise import recognise
from glm3cli.config.model import ModelConfig
from glm3cli.host.parsing import read_json

Server = Literal["vllm", "mindie", "llama.cpp", "transformers"]
SERVERS: tuple[Server, ...] = get_args(Server)
# The commands that serve or convert a folder.
USES: dict[Server, str] = {
    "vllm": "vllm serve {path}{code}",
    "mindie": "set modelWeightPath to {path} in MindIE's config.json, and trustRemoteCode to true",
    "llama.cpp": "python convert_hf_to_gguf.py {path}",
    "transformers": "transformers serve {path}",
}
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class _Folder:
    """What the rules ask of a Hugging Face folder.

    Attributes:
        path: The folder.
        config: The content of its config.json.
        tokens: The content of its tokenizer_config.json.
        model: The shape of its model.
        member: The member of the family that it holds.
    """

    path: Path
    config: dict[str, Any]
    tokens: dict[str, Any]
    model: ModelConfig
    member: Member

    @property
    def is_original(self) -> bool:
        """Whether it is in the chatglm layout, which needs the original code."""
        return self.config.get("model_type") == "chatglm"

    @property
    def name(self) -> str:
        """The model's name as its config.json has it."""
        return str(self.config.get("_name_or_path", ""))

    @property
    def has_fast_tokenizer(self) -> bool:
        """Whether it has a tokenizer.json, which needs no code."""
        return (self.path / "tokenizer.json").is_file()

    @property
    def has_tokenizer_code(self) -> bool:
        """Whether it has the original tokenizer's code, and names it."""
        has = any(self.path.glob("tokenization_*.py"))
        return has and "auto_map" in self.tokens and not missing_code(self.tokens, self.path)


def obstacles(location: Location, server: Server) -> list[str]:
    """Returns sentences about what keeps a program from loading a model as it is; none if nothing.

    Args:
        location: Where the model is.
        server: The program.

    Raises:
        CheckpointError: Its config.json is damaged.
    """
    path = location.folder
    if location.kind != "hf" or not (path / "config.json").is_file():
        layout = "chatglm" if server in ("mindie", "llama.cpp") else "glm"
        return [
            f"{server} loads Hugging Face folders, which this is not: "
            f"glm3 convert mg2hf {path} NEW --layout {layout}"
        ]
    tokens = path / "tokenizer_config.json"
    folder = _Folder(
        path=path,
        config=read_json(path / "config.json"),
        tokens=read_json(tokens) if tokens.is_file() else {},
        model=ModelConfig.from_file(path),
        member=recognise(path),
    )
    return [*_of_all(folder), *_RULES[server](folder)]


def how_to_use(path: Path, server: Server) -> str:
    """Returns the command with which a program takes a folder.

    Args:
        path: The folder.
        server: The program.
    """
    code = " --trust-remote-code" if any(path.glob("tokenization_*.py")) else ""
    return USES[server].format(path=path, code=code)


def _of_all(folder: _Folder) -> Iterator[str]:
    """What keeps every program from loading a folder."""
    for name, content in (("config.json", folder.config), ("tokenizer_config.json", folder.tokens)):
        for file in missing_code(content, folder.path):
            yield f"auto_map of {name} names {file}, which isn't there"
    if not (folder.has_fast_tokenizer or folder.has_tokenizer_code):
        yield (
            "it has neither a tokenizer.json nor the original tokenizer's code: export it with "
            "--layout glm, or put tokenization_chatglm.py and its tokenizer_config.json there"
        )


def _vllm(folder: _Folder) -> Iterator[str]:
    if folder.is_original:
        # GLMAttention asks for original_rope without a default, and ChatGLMConfig's own default of
        # the other two is false.
        for name in ("original_rope", "add_qkv_bias", "multi_query_attention"):
            if name not in folder.config:
                yield f"config.json lacks {name}, which vLLM's ChatGLMForCausalLM reads"
        if folder.model.rope_factor != 1:
            yield (
                "vLLM multiplies the rotary base by rope_ratio, where this model divides "
                "positions: texts come out wrong; --layout glm says it in a way that vLLM follows"
            )
        if folder.config.get("quantization_bit"):
            yield "config.json has quantization_bit, which vLLM ignores"
    has_template = "chat_template" in folder.tokens
    if not has_template and not any((folder.path / name).is_file() for name in _TEMPLATES):
        yield "it has no chat template, so vLLM can complete texts, but not chat: --layout glm has"


def _mindie(folder: _Folder) -> Iterator[str]:
    name, kind = folder.name.lower(), folder.config.get("model_type")
    if kind not in ("chatglm", "glm"):
        yield f"MindIE has no model of the type {kind}"
        return
    known = ("chatglm2", "codegeex2", "chatglm3", "glm-4")
    if not any(one in name for one in known) and not (kind == "glm" and not name):
        yield (
            f"config.json has _name_or_path {folder.name!r}, and MindIE chooses its code by one of "
            f"{', '.join(known)} in it"
        )
    if kind == "glm":
        if name and "glm-4" not in name:
            yield f"MindIE takes {folder.name} with the original names only: --layout chatglm"
        if folder.config.get("rope_ratio", 1) != folder.model.rope_ratio:
            yield (
                "MindIE reads rope_ratio, never rope_theta, so texts come out wrong: "
                "glm3 convert mg2hf writes both"
            )
    elif not folder.has_tokenizer_code:
        yield "MindIE builds its prompts by the original tokenizer's code, which isn't there"


def _llama_cpp(folder: _Folder) -> Iterator[str]:
    kind = folder.config.get("model_type")
    if kind == "glm4":
        return
    read = {"rope_ratio": 1.0, "layernorm_epsilon": 1e-5}
    for name, usual in read.items():
        if kind == "glm" and folder.config.get(name, usual) != getattr(folder.model, name):
            yield (
                f"llama.cpp's converter reads {name} of a GlmForCausalLM, never transformers' own "
                "name for it, so texts come out wrong: glm3 convert mg2hf writes both"
            )
    if folder.model.rope_factor != 1:
        yield "llama.cpp's converter knows no positions that are divided: texts come out wrong"
    if folder.member.tokens.kind == "sentencepiece":
        if "THUDM/chatglm3-6b" not in folder.name:
            yield (
                f"config.json has _name_or_path {folder.name!r}, and llama.cpp's converter reads "
                "sentencepiece's tokens only where THUDM/chatglm3-6b is in it"
            )
        elif not folder.has_tokenizer_code:
            yield (
                "llama.cpp's converter reads ChatGLM3's tokens by the original tokenizer's code: "
                "--layout chatglm, of a model that has tokenization_chatglm.py"
            )
    elif "vocab_size" not in folder.config:
        yield "config.json lacks vocab_size, which llama.cpp's converter reads"


def _transformers(folder: _Folder) -> Iterator[str]:
    if not folder.is_original:
        if not folder.has_fast_tokenizer:
            yield "it has no tokenizer.json"
        return
    if "auto_map" not in folder.config:
        yield (
            "transformers has no class for the model type chatglm, and the original code isn't "
            "there: --layout glm needs none"
        )
    else:
        yield (
            "the original code was written for transformers 4.30 to 4.48 and doesn't run in 5: "
            "--layout glm needs no code"
        )


_RULES: dict[Server, Callable[[_Folder], Iterator[str]]] = {
    "vllm": _vllm,
    "mindie": _mindie,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
