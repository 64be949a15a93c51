r"""Turns conversations into token ids, for training and for generation.

The model's own chat format (see `formats`) writes the turns. An assistant turn is ended by what
comes next, such as the role token of the next turn, so a model learns to stop only if that token is
trained, too.
"""

from collections.abc import Sequence
from typing import Literal

from glm3cli.data.tokens.messages import IGNORED_LABEL, Message, Sample
from glm3cli.data.tokens.tokenizer import Tokenizer

# `chatglm3` stands for the chat format of the model, whichever that is.
Template = Literal["chatglm3", "modellink"]

# ModelLink 1.1's prompt (source: its prompter.py); the files made with it must be byte-identical.
_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request. Please note that you "
    "need to think through your response logically and step by step."
)
_INSTRUCTION, _RESPONSE = "### Instruction:", "### Response:"


def build_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns the ids after which the model answers.

    Raises:
        DataError: The model's chat format can't write the conversation.
    """
    return tokenizer.chat.prompt(tokenizer, messages)


def begin_turn(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns the ids after which the model goes on with the last of the turns, an answer.

    Raises:
        DataError: The model's chat format can't write the conversation.
    """
    return tokenizer.chat.begun(tokenizer, messages)


def build_sample(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: Template = "chatglm3",
    append_eod: bool = False,
) -> Sample:
    """Turns a conversation into ids and labels for training.

    Args:
        tokenizer: The tokenizer.
        messages: The turns.
        template: `chatglm3` is the model's own chat format, which trains every assistant turn with
            `loss`, and the token that ends it. `modellink` writes ModelLink 1.1's prompt and
            trains the last answer only.
        append_eod: Appends the end token in the template `modellink`; `chatglm3` always does.

    Raises:
        DataError: The model's chat format can't write the conversation.
    """
    if template == "modellink":
        return _modellink_sample(tokenizer, messages, append_eod)
    return tokenizer.chat.sample(tokenizer, messages)


def truncate(tokenizer: Tokenizer, sample: Sample, length: int) -> Sample | None:
    """Cuts a sample to at most `length` tokens so that it still ends with a trained token.

    A cut within an answer keeps the answer's beginning, followed by the token that ended it. A cut
    within a prompt is moved back to the end of the answer before it.

    Args:
        tokenizer: The tokenizer that made the sample.
        sample: The sample.
        length: The largest number of tokens.

    Returns:
        The cut sample, the same object if it is short enough, or None if no trained token is left.
    """
    ids, labels = sample.input_ids, sample.labels
    if len(ids) <= length:
        return sample
    cut = length - 1
    if labels[cut] == IGNORED_LABEL:
        while cut >= 0 and labels[cut] == IGNORED_LABEL:
            cut -= 1
        return Sample(ids[: cut + 1], labels[: cut + 1]) if cut >= 0 else None
    end = cut
    while not tokenizer.is_special(ids[end]) and labels[end + 1 : end + 2] not in (
        [],
        [IGNORED_LABEL],
    ):
        end += 1
    kept = labels[:cut]
    return Sample([*ids[:cut], ids[end]], [*kept, labels[end]])


def _modellink_sample(
    tokenizer: Tokenizer, messages: Sequence[Message], append_eod: bool
) -> Sample:
    """Builds a sample in ModelLink's template; every turn but the assistant's is an instruction."""
    text = f"\n{_SYSTEM}\n" + "".join(
        f"{_RESPONSE if message.role == 'assistant' else _INSTRUCTION}\n{message.content}\n"
        for message in messages
    )
    # The last marker of the whole text, as in ModelLink: a marker within the answer, too, makes
    # everything before it untrained.
    prompt = f"{text.rsplit(_RESPONSE, maxsplit=1)[0]}{_RESPONSE}\n"
    ids = [*tokenizer.prefix, *tokenizer.encode(text)]
    if append_eod:
        ids.append(tokenizer.eos_id)
    num_hidden = min(len(ids), len(tokenizer.prefix) + len(tokenizer.encode(prompt)))
    return Sample(ids, [IGNORED_LABEL] * num_hidden + ids[num_hidden:])
