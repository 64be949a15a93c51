"""The demo's texts, words, rows and questions agree with each other, and tests stay unseen."""

import csv
import dataclasses

import pytest

from glm3cli.config.options.data import DataOptions
from glm3cli.config.options.optimizer import OptimizerOptions
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.data.preprocess import rows
from glm3cli.data.tokens.chat import build_sample
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.demo import content, quiz
from glm3cli.demo.kinds import kind_of
from glm3cli.demo.words import OPPOSITES, SUBJECTS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    content.train_tokenizer(folder)
    return Tokenizer.load(folder)


def test_tokenizer_is_the_same_each_time_and_quiet(tokenizer, tmp_path, capfd):
    content.train_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    assert (tmp_path / "tokenizer_config.json").is_file()
    assert capfd.readouterr() == ("", "")


def test_tokenizer_has_the_traits_of_chatglm3s(tokenizer):
    assert tokenizer.vocab_size == content.NUM_PIECES + 9 <= content.MODEL.padded_vocab_size
    assert tokenizer.special("[MASK]") == content.NUM_PIECES
    newline = 3 + ord("\n")  # <0x0A>: the byte pieces follow unk, bos and eos
    assert tokenizer.encode("\n")[1:] == [newline]
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("The  42")]
    assert pieces == [" The", " ", " ", b"4", b"2"]
    for text in ("snowman ☃ and 雪人", "  two  spaces\tand a tab ", "ﬁne ½"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_word_of_the_tasks_is_one_piece(tokenizer):
    words = [word for pair in OPPOSITES for word in pair]
    for subject in SUBJECTS.values():
        words += [word for kind, members in subject.kinds.items() for word in (kind, *members)]
    assert [word for word in [*words, *quiz.LETTERS] if len(tokenizer.encode(word)) > 1] == []


def test_words_are_unique_and_in_the_bundled_text():
    words = [word for pair in OPPOSITES for word in pair]
    for subject in SUBJECTS.values():
        words += [word for members in subject.kinds.values() for word in members]
    assert len(set(words)) == len(words)
    text = "\n".join(content.prose()).lower()
    assert [word for word in words if word not in text] == []


def test_held_out_rows_are_new_combinations_of_trained_words():
    train, held_out = content.training_rows(), content.held_out_rows()
    assert (len(train), len(held_out)) == (2168, 40)
    assert all(set(row) == {"instruction", "input", "output"} for row in train + held_out)
    seen = {frozenset(row["output"].split(" and ")) for row in train}
    assert not seen & {frozenset(row["output"].split(" and ")) for row in held_out}
    trained_words = {word for row in train for word in row["output"].split(" and ")}
    assert trained_words == {word for pair in OPPOSITES for word in pair}
    assert held_out == content.held_out_rows()


def test_an_answer_names_the_opposites_in_order():
    rows = {row["instruction"]: row["output"] for row in content.training_rows()}
    rows |= {row["instruction"]: row["output"] for row in content.held_out_rows()}
    assert rows["Give the opposites of hot and tall."] == "cold and short"
    assert rows["Give the opposites of tall and cold."] == "short and hot"
    assert "Give the opposites of hot and cold." not in rows


def test_every_row_fits_the_finetuning_length(tokenizer):
    for row in content.training_rows() + content.held_out_rows():
        turns = [Message("user", row["instruction"]), Message("assistant", row["output"])]
        assert len(build_sample(tokenizer, turns).input_ids) <= content.FINETUNE.seq_length


def test_documents_state_every_fact_and_no_test_question():
    documents = content.pretrain_documents()
    assert documents == content.pretrain_documents()
    text = "\n".join(documents)
    assert all(fact in text for fact in quiz.facts())
    assert len(quiz.test_texts()) == 24
    assert [question for question in quiz.test_texts() if question in text] == []


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_mmlu_files_agree_with_the_tables(subject, split):
    with (quiz.MMLU_DIR / split / f"{subject}_{split}.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    known = [question.cells for question in quiz.all_questions() if question.subject == subject]
    assert [cells for cells in lines if cells not in known] == []
    answers = [cells[5] for cells in lines]
    if split == "test":
        assert [answers.count(letter) for letter in quiz.LETTERS] == [2, 2, 2, 2]
    else:
        assert len(lines) == 5
        assert not {cells[0] for cells in lines} & quiz.test_texts()


def test_quiz_documents_have_the_form_of_the_mmlu_prompt():
    [document] = quiz.quiz_documents(1, seed=1)
    header, *questions = document.split("\n\n")
    subject = header.split("about ")[1].removesuffix(".")
    assert header == f"The following are multiple choice questions (with answers) about {subject}."
    assert len(questions) == quiz.QUESTIONS_PER_DOCUMENT
    for question in questions:
        text, *options, answer = question.split("\n")
        kinds = SUBJECTS[subject].kinds
        assert options == [f"{x}. {kind}" for x, kind in zip("ABCD", kinds, strict=True)]
        known = [item for item in quiz.all_questions() if item.text == text]
        assert [f"Answer: {item.answer}" for item in known] == [answer]


def test_model_and_recipes_are_valid_options():
    ModelParallelConfig(tp=2, pp=2).check_fits(content.MODEL)
    assert content.MODEL.padded_vocab_size % 64 == 0
    for recipe in (content.PRETRAIN, content.FINETUNE):
        values = dataclasses.asdict(recipe)
        OptimizerOptions.parse(
            {k: v for k, v in values.items() if k in OptimizerOptions.model_fields}
        )
        DataOptions.parse(
            {"data": ["x"], **{k: v for k, v in values.items() if k in DataOptions.model_fields}}
        )
        assert recipe.seq_length <= content.MODEL.seq_length


def test_a_tokenizer_of_glm_4_s_kind_and_its_rows(tmp_path):
    kind = kind_of("glm4")
    kind.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.member.chat == "glm4"
    assert tokenizer.vocab_size <= kind.model.padded_vocab_size
    for text in content.prose():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    asked = {row["messages"][0]["content"] for row in kind.rows}
    for row in [*kind.rows[::29], *kind.calls]:
        sample = build_sample(tokenizer, rows.openai(row))
        assert len(sample.input_ids) <= kind.finetune.seq_length
    assert not {row["messages"][0]["content"] for row in kind.calls} & asked
