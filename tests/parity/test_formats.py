"""The chat format of every member: its text, its template, its samples and its calls."""

import json
import shutil

import pytest

from glm3cli.config.family.members import MEMBERS, FormatName
from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.tokens.calls import ReplyStream, to_openai
from glm3cli.data.tokens.chat import build_prompt, build_sample
from glm3cli.data.tokens.fast.tokenizer import to_fast, to_fast_config
from glm3cli.data.tokens.messages import IGNORED_LABEL, Message, ToolCall
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import DataError
from glm3cli.infer.decoding.grammar import Grammar, from_lark
from glm3cli.infer.serve.protocol.called import call_grammar
from glm3cli.infer.serve.protocol.errors import ApiError
from tests.support.shared import GOLDEN, SHARED, needs_shared
from tests.support.tiny_ranks import tiny_ranks_folder
from tests.support.tiny_tokenizer import tiny_tokenizer_folder
from tests.unit.test_handlers import handler

transformers = pytest.importorskip("transformers")
FORMATS: list[FormatName] = list(dict.fromkeys(member.chat for member in MEMBERS))
LATER = ("glm4", "codegeex4", "glm4-0414", "glm-z1")
CODEGEEX = (
    "<|system|>\n你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
    "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。"
)
TOOL = {"name": "天气", "parameters": {"city": "<b> & '北'"}}
LISTED = "# 可用工具\n\n## 天气\n\n{\n" + '    "name": "天气",\n    "parameters": {\n'
LISTED += '        "city": "<b> & \'北\'"\n    }\n}'
LISTED += "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
INTRODUCED = "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱{}训练的语言模型 GLM-4 模型开发的，"
INTRODUCED += "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n"
CHAT = [
    {"role": "user", "content": "天气?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "天气", "arguments": {"c": "苏"}}}]},
    {"role": "tool", "content": " 3 "},
    {"role": "assistant", "content": "<think>so</think>\n3\n"},
    {"role": "user", "content": "a<|user|>b[gMASK]"},
]
CALLED = '<|user|>\n天气?<|assistant|>天气\n{"c": "苏"}<|observation|>\n'
# What the models' own templates make of the tools and the chat.
EXPECTED = {
    "glm4": f"<|system|>\n{INTRODUCED.format('AI')}{LISTED}<|system|>\nKind.{CALLED} 3 "
    "<|assistant|>\n<think>so</think>\n3\n<|user|>\na<|user|>b[gMASK]<|assistant|>",
    "glm4-0414": f"<|system|>\n{LISTED}<|system|>\nKind.{CALLED} 3 "
    "<|assistant|>\n<think>so</think>\n3\n<|user|>\na<|user|>b[gMASK]<|assistant|>",
    "glm-z1": f"<|system|>\n{INTRODUCED.format(' AI 公司')}{LISTED}<|system|>\nKind.{CALLED}3"
    "<|assistant|>\n3<|user|>\na<|user|>b[gMASK]<|assistant|>\n<think>",
}
PLAIN = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "a dog\n"},
    {"role": "user", "content": "sop </s> x"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """For every format, the tokenizer of a folder of its kind, and what transformers loads."""
    found = {}
    for name in FORMATS:
        member = next(one for one in MEMBERS if one.chat == name)
        is_ranks = member.tokens.kind == "tiktoken"
        source = (tiny_ranks_folder if is_ranks else tiny_tokenizer_folder)()
        folder = tmp_path_factory.mktemp(name)
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
        (folder / "config.json").write_text(json.dumps({"_name_or_path": member.repository}))
        ours = Tokenizer.load(folder)
        assert ours.member is member
        for file, content in (
            ("tokenizer.json", to_fast(ours)),
            ("tokenizer_config.json", to_fast_config(ours, 64)),
        ):
            (folder / file).write_text(json.dumps(content))
        (folder / "config.json").unlink()
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found[name] = ours, fast
    return found


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special=False)


def templated(fast, turns, **more):
    return fast.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **more)


@pytest.mark.parametrize("name", LATER)
def test_tools_calls_and_texts_are_written_as_the_model_s_own_template_does(tokenizers, name):
    ours, fast = tokenizers[name]
    turns = [{"role": "system", "content": "Kind."}, *CHAT]
    messages = rows.openai({"messages": turns, "tools": [TOOL]})
    prompt = build_prompt(ours, messages)
    assert templated(fast, turns, tools=[TOOL]) == prompt
    expected = f"[gMASK]<sop>{EXPECTED.get(name, EXPECTED['glm4'])}"
    assert text_of(ours, prompt) == expected + "\n" * (name == "codegeex4")
    assert prompt.count(ours.special("<|user|>")) == 2
    without = rows.openai({"messages": turns[1:], "tools": [TOOL]})
    assert templated(fast, turns[1:], tools=[TOOL]) == build_prompt(ours, without)


@pytest.mark.parametrize("name", FORMATS)
def test_template_and_prompt_of_a_plain_chat_are_the_same(tokenizers, name):
    ours, fast = tokenizers[name]
    turns = PLAIN[:1] if name == "codegeex2" else PLAIN
    prompt = build_prompt(ours, [Message.from_dict(turn) for turn in turns])
    assert templated(fast, turns) == prompt
    start = {
        "chatglm2": "[gMASK]sop [Round 1]\n\n问：the fox\n\n答：a dog\n\n\n[Round 2]\n\n问：sop",
        "codegeex2": "[gMASK]sop # language: Python\n# the fox\n",
        "chatglm3": "[gMASK]sop<|user|>",
        "codegeex4": f"[gMASK]<sop>{CODEGEEX}<|user|>\nthe fox<|assistant|>\na dog\n<|user|>",
    }.get(name, "[gMASK]<sop><|user|>\nthe fox<|assistant|>\na dog")
    assert text_of(ours, prompt).startswith(start)


def test_code_may_name_its_language(tokenizers):
    ours, fast = tokenizers["codegeex2"]
    asked = [Message("user", "# language: C++\n# sort")]
    assert text_of(ours, build_prompt(ours, asked)) == "[gMASK]sop # language: C++\n# sort\n"
    turns = [{"role": "system", "content": "C++"}, {"role": "user", "content": "one\ntwo"}]
    prompt = build_prompt(ours, [Message.from_dict(turn) for turn in turns])
    assert text_of(ours, prompt) == "[gMASK]sop # language: C++\n# one\n# two\n"
    assert templated(fast, turns) == prompt


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_trains_what_follows_the_prompt_of_its_last_answer(tokenizers, name):
    ours, _ = tokenizers[name]
    turns = [Message.from_dict(turn) for turn in PLAIN] + [Message("assistant", "the dog")]
    if name == "codegeex2":
        turns = turns[2:]
    prompt, sample = build_prompt(ours, turns[:-1]), build_sample(ours, turns)
    if name == "glm-z1":  # its prompts begin the thoughts of an answer, which this one hasn't
        prompt = prompt[: prompt.index(ours.special("<|assistant|>"), -9) + 2]
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.labels[len(prompt) :] == sample.input_ids[len(prompt) :]
    assert sample.labels[len(prompt) - 1] == IGNORED_LABEL
    assert sample.labels[-1] == ours.eos_id
    trained = [label for label in sample.labels[: len(prompt)] if label != IGNORED_LABEL]
    assert bool(trained) == ours.chat.trains_all
    if trained:
        assert trained[-1] == ours.special("<|user|>")


def test_rounds_and_comments_refuse_what_they_can_not_write(tokenizers):
    rounds, comments = tokenizers["chatglm2"][0], tokenizers["codegeex2"][0]
    user, answer = Message("user", "a"), Message("assistant", "b")
    for turns in ([Message("system", "x"), user], [user, answer], [], [user, user]):
        with pytest.raises(DataError, match=r"can't be written|doesn't end with a turn of"):
            build_prompt(rounds, turns)
    call = Message("assistant", "", "f", arguments={})
    with pytest.raises(DataError, match="a call of a tool can't be written in ChatGLM2's rounds"):
        build_sample(rounds, [user, call, user, answer])
    with pytest.raises(DataError, match="CodeGeeX2 can't be asked in the turns user, assistant"):
        build_prompt(comments, [user, answer, user])
    with pytest.raises(DataError, match="doesn't end with an answer"):
        build_sample(comments, [user])


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize(
    ("answer", "calls", "shown"),
    [
        ('get_weather\n{"city": "北京", "days": [1, 2.5]}', True, ""),
        ('\nget_weather is\n{"a": 1}', False, 'get_weather is\n{"a": 1}'),
        ("get_weather\n{broken", False, "get_weather\n{broken"),
        ("get_weather\n[1]", False, "get_weather\n[1]"),
        ("\n the fox", False, "the fox"),
    ],
)
def test_calls_are_read_from_answers_token_by_token(tokenizers, name, answer, calls, shown):
    ours, _ = tokenizers[name]
    stream = ReplyStream(ours)
    seen = [stream.push(token) for token in ours.encode(answer)]
    assert "".join([*seen, stream.finish()]) == shown
    found = to_openai(stream.messages, ours.chat)
    assert bool(found.get("tool_calls")) == calls
    if calls:
        call = ToolCall("get_weather", {"city": "北京", "days": [1, 2.5]})
        assert ours.chat.read_calls(stream.messages[0]) == [call]
        written = Message("assistant", "", "get_weather", arguments=call.arguments)
        assert f"get_weather\n{ours.chat.text(written)}" == answer


@pytest.mark.parametrize("name", ["chatglm2", "glm-z1"])
def test_each_answer_has_a_sample_where_one_can_t_train_all(tokenizers, name):
    ours, _ = tokenizers[name]
    read = handler("chat", ours)
    turns = [*PLAIN, {"role": "assistant", "content": "the dog"}]
    ids = read.encode({"messages": turns}).sequences["input_ids"]
    messages = [Message.from_dict(turn) for turn in turns]
    assert ids == [build_sample(ours, part).input_ids for part in (messages[:2], messages)]
    turns[1] = turns[1] | {"loss": False}
    assert len(read.encode({"messages": turns}).sequences["input_ids"]) == 1
    if name == "chatglm2":
        asked = {"messages": [{"role": "system", "content": "x"}, *turns]}
        with pytest.raises(RowError, match="a system turn can't be written in ChatGLM2's rounds"):
            read.encode(asked)


def test_a_call_that_must_come_follows_the_schema_of_its_tool(tokenizers):
    city = {"type": "object", "properties": {"city": {"enum": ["北"]}}, "required": ["city"]}
    ours, _ = tokenizers["glm4"]
    grammar = from_lark(call_grammar({"天气": {"parameters": city}}, ours.chat.calls), "tools")
    matcher = Grammar(grammar, ours, ours.ends).begin()
    ids, new = ours.encode('天气\n{"city": "北"}'), list[int]()
    for token in [*ours.encode("天气\n"), *ours.encode('{"city": "北"}')]:
        assert matcher.allowed(new)[token], ours.token_name(token)
        new.append(token)
    assert new == ids
    allowed = matcher.allowed(new).nonzero().flatten().tolist()
    assert sorted(allowed) == sorted(ours.ends)
    with pytest.raises(ApiError, match="knows no calls"):
        call_grammar({"f": {}}, tokenizers["chatglm2"][0].chat.calls)


@needs_shared
def test_prompts_of_glm_4_are_the_original_ones():
    tokenizer = Tokenizer.load(SHARED / "glm-4-9b-chat")
    chats = json.loads((GOLDEN / "glm4_tokenizer.json").read_text("utf-8"))["chat"]
    for chat in chats.values():
        messages = [Message.from_dict(turn) for turn in chat["messages"]]
        assert build_prompt(tokenizer, messages) == chat["input_ids"]


@needs_shared
@pytest.mark.slow
def test_ids_of_real_texts_equal_ours_in_transformers(tmp_path):
    from tests.parity.test_glm_export import real_texts

    ours = Tokenizer.load(SHARED / "glm-4-9b-chat")
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_fast(ours)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(to_fast_config(ours, 64)))
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = real_texts()[:10_000]
    assert len(texts) >= 5_000
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    for text, ids in zip(texts, fast(texts, **plain)["input_ids"], strict=True):
        assert ids == ours.encode(text)
    assert fast("a")["input_ids"] == [*ours.prefix, *ours.encode("a")]
