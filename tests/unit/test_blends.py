"""`--data`: the parts of a blend, and the table of them that is shown before training."""

from pathlib import Path

import pytest

from glm3cli.data.kinds import ANSWERS, TEXT
from glm3cli.data.prefixes import Blend, parse_blend, read_blend
from glm3cli.data.samples.blend_table import data_sources, table
from glm3cli.data.samples.fitting import fitting, trainable
from glm3cli.errors import ConfigError, DataError
from tests.support.samples import write_documents, write_instructions


@pytest.fixture
def texts(tmp_path):
    """Data sets `a` and `b` of 100 and 200 tokens in 10 and 5 documents."""
    write_documents(tmp_path / "a", [[7] * 10] * 10)
    write_documents(tmp_path / "b", [[8] * 40] * 5)
    return tmp_path


def test_samples_and_epochs_of_texts(texts):
    blend = Blend((str(texts / "a"), str(texts / "b")), (3.0, 1.0))
    first, second = data_sources(blend, TEXT, "8,2,0", seq_length=16, num_samples=40)
    assert (first.weight, first.documents, first.tokens, first.samples) == (0.75, 8, 80, 30)
    assert (second.weight, second.documents, second.tokens, second.samples) == (0.25, 4, 160, 10)
    assert (first.epochs, second.epochs) == (30 * 16 / 80, 1.0)


def test_without_weights_texts_count_by_their_tokens(texts):
    blend = Blend((str(texts / "a"), str(texts / "b")), None)
    found = data_sources(blend, TEXT, "1,0,0", seq_length=10, num_samples=60)
    assert [source.weight for source in found] == [100 / 300, 200 / 300]
    assert [source.epochs for source in found] == pytest.approx([2.0, 2.0])


def test_samples_and_epochs_of_instructions(tmp_path):
    write_instructions(tmp_path / "a", [([1], [2, 3])] * 10)
    [source] = data_sources(Blend((str(tmp_path / "a"),), None), ANSWERS, "1,0,0", 99, 25)
    assert (source.documents, source.tokens, source.samples, source.epochs) == (10, 30, 25, 2.5)


def test_packs_are_the_samples_of_an_epoch(tmp_path):
    # Each document has two positions, of which eight fit into a sequence.
    prefix = write_instructions(tmp_path / "a", [([1, 2], [3])] * 10)
    blend = Blend((prefix,), None)
    [source] = data_sources(blend, ANSWERS, "1,0,0", 16, 6, packing=True)
    assert (source.documents, source.samples, source.epochs) == (10, 6, 3.0)


# (prompt, answer): whole, cut in its answer, nothing but a prompt within 8 positions (9 tokens), no
# answer, and the longest that isn't cut.
FITTING = [
    ([1] * 3, [2] * 3),
    ([1] * 3, [2] * 9),
    ([1] * 9, [2] * 3),
    ([1] * 5, []),
    ([1] * 8, [2]),
]


def test_samples_without_a_trained_token_are_left_out_and_counted(tmp_path):
    prefix = write_instructions(tmp_path / "a", FITTING * 10)
    [source] = data_sources(Blend((prefix,), None), ANSWERS, "8,2,0", 8, 60)
    assert (source.documents, source.tokens) == (24, 8 * (6 + 12 + 9))
    assert (source.cut, source.empty) == (10, 20)
    text = table([source])
    assert f"{prefix}: 20 samples have nothing to train on within --seq-length" in text
    assert f"{prefix}: 10 samples are longer than --seq-length, and lose their ends" in text


def test_a_sample_of_one_token_trains_nothing_as_that_is_not_predicted(tmp_path):
    prefix = write_instructions(tmp_path / "a", [([], [5]), ([], [5, 6])])
    assert trainable(prefix, range(2), 8, "training").tolist() == [1]


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_split_without_a_trained_token_is_refused(tmp_path, split):
    prefix = write_instructions(tmp_path / "a", FITTING)
    numbers = range(2, 4)
    with pytest.raises(DataError, match=f"none of its 2 samples for {split} has a token to train"):
        trainable(prefix, numbers, 8, split)
    assert trainable(prefix, numbers, 9, split).tolist() == [2]
    write_instructions(tmp_path / "a", FITTING[2:4] * 9)
    with pytest.raises(DataError, match="none of its 18 samples for training"):
        data_sources(Blend((prefix,), None), ANSWERS, "1,0,0", 8, 60)


def test_a_short_file_of_labels_is_refused(tmp_path):
    prefix = write_instructions(tmp_path / "a", FITTING)
    path = tmp_path / "a_packed_labels_document.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"labels_document\.bin is damaged"):
        fitting(prefix, range(5), 8)


def test_the_table(texts):
    blend = Blend((str(texts / "a"), str(texts / "b")), (3.0, 1.0))
    lines = table(data_sources(blend, TEXT, "8,2,0", 16, 40)).splitlines()
    assert lines[0].split() == ["data", "weight", "documents", "tokens", "samples", "epochs"]
    assert lines[1].split() == [str(texts / "a"), "75.00%", "8", "80", "30", "6.00"]


@pytest.mark.parametrize("damage", [b"", b"nonsense that is long enough for a header" * 3, None])
def test_a_damaged_index_is_told(texts, damage):
    cut = (texts / "a.idx").read_bytes()[:100]  # in its lengths
    (texts / "a.idx").write_bytes(cut if damage is None else damage)
    with pytest.raises(DataError, match=r"a\.idx is damaged"):
        data_sources(Blend((str(texts / "a"),), None), TEXT, "1,0,0", 8, 8)


def test_a_yaml_file_lists_prefixes_from_its_folder(texts):
    (texts / "blend.yaml").write_text("- 3:a\n- 1:b\n")
    blend = parse_blend([str(texts / "blend.yaml")], TEXT)
    assert blend == Blend((str(texts / "a"), str(texts / "b")), (3.0, 1.0))
    (texts / "blend.yaml").write_text("- 1:30\n- 3:~/a\n")
    home = Path("~/a").expanduser()
    named = read_blend([str(texts / "blend.yaml")])
    assert (named.prefixes, named.weights) == ((f"{texts}/30", str(home)), (1, 3))
    (texts / "blend.yaml").write_text("[a, b]")
    blend = parse_blend([str(texts / "blend.yaml")], TEXT)
    assert blend == Blend((str(texts / "a"), str(texts / "b")), None)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: 3", "holds no list of prefixes"),
        ("[]", "holds no list of prefixes"),
        ("['', a]", "holds no list of prefixes"),
        ("- [3]\n- {1: a}", "holds no list of prefixes"),
        ("- 'a", "is no YAML file"),
        ("- 3:a\n- b", "some have a weight and some don't"),
    ],
)
def test_yaml_files_that_are_no_blends(texts, content, sentence):
    (texts / "blend.yaml").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        parse_blend([str(texts / "blend.yaml")], TEXT)


def test_a_yaml_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"blend\.yaml does not exist"):
        parse_blend([str(tmp_path / "blend.yaml")], TEXT)
