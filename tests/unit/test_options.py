"""From a config class to a command's options, and the `--config` file below them."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from glm3cli.cli.options import command, flowing
from glm3cli.config.base import Flag, Settings
from glm3cli.config.convert import ScriptConfig, ToHfConfig
from glm3cli.config.doctor import DoctorConfig
from glm3cli.config.evaluation import CompareConfig, EvalOutputOptions
from glm3cli.config.inference import GenerateConfig
from glm3cli.config.training import PretrainConfig
from glm3cli.errors import ConfigError
from glm3cli.host.files import write_text

runner = CliRunner()


class Example(Settings):
    """One field of each kind."""

    source: Annotated[Path | None, Flag(positional=True, metavar="SRC")] = Field(default=None)
    seq_length: Annotated[int, Flag(("--max-length",), panel="Data")] = Field(
        ge=2, description="Tokens of one sample."
    )
    data: list[str] = Field(default=["none"])
    rate: float = Field(default=0.5)
    shuffle: bool = Field(default=True)
    kind: Literal["a", "b"] = Field(default="a")
    as_json: Annotated[bool, Flag(name="json")] = Field(default=False)
    note: str | None = Field(default=None)
    place: Path | None = Field(default=None)
    blend: Annotated[list[str], Flag(is_path=True)] = Field(default=[])
    result: Annotated[Path, Flag(is_written=True)] = Field(default=Path("result"))


def make_app() -> tuple[typer.Typer, list[Example]]:
    app, got = typer.Typer(), []

    @command(app, Example, "run")
    def run(config: Example) -> None:
        """Does it."""
        got.append(config)

    return app, got


def parsed(*args: Any) -> Example:
    app, got = make_app()
    result = runner.invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def refused(*args: Any) -> ConfigError:
    app, got = make_app()
    with pytest.raises(ConfigError) as caught:
        runner.invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert not got
    return caught.value


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_defaults_are_those_of_the_class():
    assert parsed("--seq-length", 8) == Example(seq_length=8)


def test_the_file_wins_over_defaults_and_flags_over_the_file(write):
    file = write("seq_length: 16\nrate: 0.25\nshuffle: false\nkind: b\n")
    assert parsed("--config", file) == Example(seq_length=16, rate=0.25, shuffle=False, kind="b")
    config = parsed("--rate", 0.125, "--shuffle", "--config", file, "--seq-length", 4)
    assert config == Example(seq_length=4, rate=0.125, kind="b")


def test_a_flag_that_equals_the_default_still_wins(write):
    assert parsed("--config", write("seq_length: 8\nrate: 0.25"), "--rate", 0.5).rate == 0.5


@pytest.mark.parametrize("key", ["seq_length", "seq-length", "max_length", "max-length"])
def test_a_key_may_be_an_alias_and_have_dashes(key, write):
    assert parsed("--config", write(f"{key}: 16")).seq_length == 16


def test_a_key_is_the_options_name_where_it_is_not_the_fields(write):
    assert parsed("--config", write("json: true\nseq_length: 8")).as_json
    assert "unknown key 'as_json'" in refused("--config", write("as_json: true")).message


def test_a_list_option_takes_a_list_or_one_value(write):
    assert parsed("--config", write("seq_length: 8\ndata: [x, y]")).data == ["x", "y"]
    assert parsed("--config", write("seq_length: 8\ndata: x")).data == ["x"]
    assert parsed("--seq-length", 8, "--data", "x", "--data", "y").data == ["x", "y"]


def test_flags_replace_a_list_of_the_file(write):
    file = write("seq_length: 8\ndata: [x, y]")
    assert parsed("--config", file, "--data", "z").data == ["z"]


def test_a_null_in_the_file_means_the_default(write):
    assert parsed("--config", write("seq_length: 8\nrate:\nnote: null\ndata: ~")) == Example(
        seq_length=8
    )


def test_numbers_as_people_write_them_are_numbers(write):
    # YAML 1.1 takes 1e-6, without a point, for text.
    assert parsed("--config", write("seq_length: 8\nrate: 1e-6")).rate == 1e-6


def test_an_empty_file_sets_nothing(write):
    assert parsed("--config", write(""), "--seq-length", 8) == Example(seq_length=8)
    assert parsed("--config", write("# nothing\n"), "--seq-length", 8) == Example(seq_length=8)


def test_an_unknown_key_comes_with_the_nearest_known_one(write):
    file = write("seq_lenght: 8")
    error = refused("--config", file)
    assert error.message == f"{file}: unknown key 'seq_lenght', did you mean 'seq_length'?"
    assert "unknown key 'zzz'" in refused("--config", write("zzz: 8")).message


def test_an_argument_can_stand_in_the_file_too(write):
    file = write("seq_length: 8\nsource: a")
    assert parsed("--config", file).source == Path("a")
    assert parsed("--config", file, "b").source == Path("b")


@pytest.mark.parametrize("key", ["config", "help"])
def test_what_is_no_option_is_no_key(key, write):
    assert f"unknown key {key!r}" in refused("--config", write(f"{key}: x")).message


def test_broken_yaml_is_told_with_its_place(write):
    error = refused("--config", write("seq_length: [8\nrate: 2"))
    assert "is not valid YAML" in error.message
    assert "line 2" in error.message


def test_a_file_that_is_not_text_is_told(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not valid YAML" in refused("--config", tmp_path / "run.yaml").message


def test_a_yaml_list_is_no_set_of_options(write):
    assert "holds no mapping" in refused("--config", write("- seq_length: 8")).message


def test_a_file_that_is_missing_or_a_folder_is_told(tmp_path):
    error = refused("--config", tmp_path / "no.yaml")
    assert error.message == f"--config {tmp_path / 'no.yaml'}: No such file or directory"
    assert "Is a directory" in refused("--config", tmp_path).message


def test_a_required_option_that_is_missing_is_named_with_everything_else_that_is_wrong():
    assert refused().message == "--seq-length is missing"
    assert refused("--rate", "nan").message.split("; ")[0] == "--seq-length is missing"
    assert "--rate nan" in refused("--rate", "nan").message


def test_a_value_beyond_its_limit_is_refused_from_the_file_too(write):
    expected = "--seq-length 1: should be greater than or equal to 2"
    assert refused("--seq-length", 1).message == expected
    assert refused("--config", write("seq_length: 1")).message == expected


@pytest.mark.parametrize("text", ["rate: [1, 2]", "rate: {a: 1}", "data: {a: 1}", "data: [[a]]"])
def test_what_is_no_value_in_the_file_is_refused(text, write):
    message = refused("--seq-length", 8, "--config", write(text)).message
    assert f"{text.split(':')[0]} has something else than " in message


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("note: 10:12", "10:12"),
        ("note: no", "no"),
        ("note: 010", "010"),
        ("note: 1_0.50", "1_0.50"),
        ("note: 2026-01-02", "2026-01-02"),
        ("note: '~'", "~"),
        ("note: ~", None),
        ("note:", None),
        ("\ufeffnote: BOM", "BOM"),
        ("note: !!float 1e-4", "1e-4"),
        ("note: !!int 010", "010"),
        ("note: !!str 5", "5"),
        ("note: !!bool no", "no"),
        ("note: !!timestamp 2026-01-02", "2026-01-02"),
    ],
)
def test_text_in_the_file_stays_text(text, read, write):
    assert parsed("--seq-length", 8, "--config", write(text)).note == read


@pytest.mark.parametrize(
    "text",
    [
        "rate: 1\nrate: 2",
        "max-length: 8\nmax_length: 8",
        "seq_length: 8\nmax_length: 8",
        "data: [a]\n? data\n: [b]",
        "<<: {rate: 1}\nrate: 2\nrate: 3",
        "<<: {rate: 1, rate: 2}",
    ],
)
def test_a_key_that_is_given_twice_is_refused(text, write):
    message = refused("--config", write(text)).message
    assert "twice" in message


@pytest.mark.parametrize(
    "text",
    [
        "<<: a",
        "<<: [{rate: 1}, [a]]",
        "[" * 5000,
        "a: &a [*a, 1]\n? [b]\n: 1",
        "\x00",
        "note: !!python/tuple [a]",
    ],
)
def test_a_file_that_is_no_yaml_is_refused(text, write):
    assert "is not valid YAML" in refused("--config", write(text)).message


@pytest.mark.parametrize(
    ("text", "rate", "note"),
    [
        ("<<: {rate: 1e-4, note: a}\nrate: 2e-4", 2e-4, "a"),
        ("rate: 2e-4\n<<: {rate: 1e-4, note: a}", 2e-4, "a"),
        ("<<: [{rate: 1e-4}, {rate: 3e-4, note: b}]", 1e-4, "b"),
        ("<<: [&base {rate: 1e-4, note: c}, {<<: *base, rate: 2e-4}]", 1e-4, "c"),
        ("<<: [{<<: &base {rate: 1e-4, note: c}, rate: 2e-4}, *base]", 2e-4, "c"),
        ("'<<': {rate: 1e-4}", None, None),
    ],
)
def test_mappings_are_merged_and_own_keys_win(text, rate, note, write):
    args = ("--seq-length", 8, "--config", write(text))
    if rate is None:
        assert "unknown key '<<'" in refused(*args).message
    else:
        config = parsed(*args)
        assert (config.rate, config.note) == (rate, note)


def test_of_several_files_the_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("max_length: 8\nrate: 0.25\ndata: [x, y]\nnote: a\n")
    (tmp_path / "b.yaml").write_text("seq_length: 16\ndata: z\nnote:\n")
    files = ("--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml")
    expected = Example(seq_length=16, rate=0.25, data=["z"], note="a")
    assert parsed(*files) == expected
    assert parsed(*files, "--rate", 1) == expected.model_copy(update={"rate": 1.0})
    assert parsed(*files[2:], *files[:2]).seq_length == 8


@pytest.mark.parametrize("name", ["SRC", "--place", "--blend"])
@pytest.mark.parametrize("text", ["", " ", "${HOME}/a", "a/$SCRATCH/b"])
def test_what_is_no_path_is_refused_wherever_one_stands(name, text, write):
    key = {"SRC": "source"}.get(name, name.removeprefix("--"))
    words = [text] if name == "SRC" else [name, text]
    in_file = ["--config", write(f"{key}: '{text}'")]
    for message in (refused("--seq-length", 8, *given).message for given in (words, in_file)):
        if text.strip():
            variable = "${HOME}" if "HOME" in text else "$SCRATCH"
            assert message.startswith(f"{name} {text}: no shell has filled in {variable} here")
        else:
            assert message.startswith(f"{name} {text!r} names no file or folder")


def test_a_dollar_elsewhere_in_a_path_is_no_variable(write):
    config = parsed("--config", write("seq_length: 8\nplace: a$b/$1/c$\nnote: ${HOME}\n"))
    assert (config.place, config.note) == (Path("a$b/$1/c$"), "${HOME}")
    for wrong in ("0.5:", "0.5:${HOME}/a"):
        assert wrong in refused("--seq-length", 8, "--blend", wrong).message
    assert refused("--config", "").message == "--config '' names no file"


def test_homes_are_expanded_wherever_a_path_stands(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parsed("--seq-length", 8, "~/a").source == Path("/home/me/a")
    assert parsed(
        "--seq-length", 8, "--blend=~/a", "--blend", "0.5:~/b", "--blend", "a~b"
    ).blend == [
        "/home/me/a",
        "0.5:/home/me/b",
        "a~b",
    ]
    config = parsed("--config", write("seq_length: 8\nplace: ~/a\nnote: ~/a"))
    assert (config.place, config.note) == (Path("/home/me/a"), "~/a")
    stranger = "~nobody-of-this-name/a"
    assert parsed("--seq-length", 8, "--place", stranger).place == Path(stranger)
    assert refused("--config", stranger).message.startswith(f"--config {stranger}: No such file")


def test_what_stands_behind_a_name_is_a_path_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = [
        "--seq-length",
        8,
        "--blend=a.b=~/c",
        "--blend",
        "~/d=~/e",
        "--blend=f=",
        "--blend=g=h",
    ]
    assert parsed(*words).blend == ["a.b=/home/me/c", "/home/me/d=~/e", "f=", "g=h"]
    sentence = refused("--seq-length", 8, "--blend=a=${HOME}/c").message
    assert sentence.startswith("--blend a=${HOME}/c: no shell has filled in ${HOME} here")


def test_a_place_where_no_file_can_be_written_is_refused(write, tmp_path, monkeypatch):
    """A device would be replaced by a file, since results are written aside and renamed."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    kinds = {"is a folder": ("/", ".", "..", tmp_path), "is a device or a pipe": ("pipe",)}
    for trouble, places in {**kinds, "the folder none does not exist": ("none/a",)}.items():
        for place in places:
            for words in (["--result", place], ["--config", write(f"result: {place}")]):
                message = refused("--seq-length", 8, *words).message
                assert message.startswith(f"--result {place}: {trouble}")
            with pytest.raises(OSError, match=trouble):
                write_text(Path(place), "text")
    assert Path("pipe").is_fifo()
    Path("result").mkdir()  # the default
    assert refused("--seq-length", 8).message.startswith("--result result: is a folder")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GenerateConfig, "output"),
        (EvalOutputOptions, "output"),
        (CompareConfig, "output"),
        (ScriptConfig, "output"),
        (DoctorConfig, "chip_file"),
    ],
)
def test_options_for_files_to_write_say_so(config, name):
    assert config.flag_of(name).is_written


@pytest.mark.parametrize("text", ["kind: c", "rate: fast", "shuffle: perhaps"])
def test_a_value_of_another_type_in_the_file_is_wrong_usage(text, write):
    app, got = make_app()
    result = runner.invoke(app, ["--seq-length", "8", "--config", str(write(text))])
    assert (result.exit_code, got) == (2, [])
    assert text.split(":")[0] in result.stderr


def test_help_lists_names_texts_and_defaults():
    app, _ = make_app()
    help_text = runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for expected in (
        "Does it.",
        "--max-length",
        "Tokens of one sample.",
        "--no-shuffle",
        "--json",
        "[SRC]",
        "[default: 0.5]",
        "--config",
    ):
        assert expected in help_text


EPILOG = """
    A paragraph of two lines, which
    the terminal breaks. See glm3[eval] and [mine].

    - an item that
      goes on
    - another

        code --option
            is as it is
    """


def test_a_help_text_ends_with_the_epilog():
    app = typer.Typer()

    @command(app, Example, "run", epilog=EPILOG)
    def run(config: Example) -> None:
        """Does it (pip install 'glm3[eval]')."""

    help_text = runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    assert "pip install 'glm3[eval]'" in help_text
    options, epilog = help_text.rsplit("╯", 1)
    assert "--config" in options
    lines = [line.rstrip()[1:] for line in epilog.strip("\n").splitlines()]
    assert [line for line in lines if line] == [
        "A paragraph of two lines, which the terminal breaks. See glm3[eval] and [mine].",
        "- an item that goes on",
        "- another",
        "    code --option",
        "        is as it is",
    ]


def test_prose_flows_and_code_stays():
    assert flowing("a\nb\n\n    c\n    d\ne\nf") == "a b\n\n    c\n    d\ne f"
    assert flowing("see:\n- a\n- b\n  c\n") == "see:\n- a\n- b c"


class Shared(Settings):
    """The options of two commands, one of them with an option of its own."""

    steps: int = Field(default=1)
    rank: Annotated[int, Flag(only="tune")] = Field(default=0)


class Tune(Shared):
    command = "tune"


class Read(Shared):
    command = "read"


def test_an_option_of_one_command_is_unknown_to_the_other(write):
    app, got = typer.Typer(), []
    for config in (Tune, Read):
        command(app, config, config.command)(got.append)
    file = str(write("steps: 2\nrank: 3\n"))
    for given in (["--steps", "2", "--rank", "3"], ["--config", file]):
        assert runner.invoke(app, ["tune", *given]).exit_code == 0
        assert runner.invoke(app, ["read", *given]).exit_code != 0
    assert got == [Tune(steps=2, rank=3)] * 2
    assert got[0].to_options() == {"steps": 2, "rank": 3}
    assert Read().to_options() == {"steps": 1}


def test_a_whole_number_that_no_type_holds_is_refused():
    for text in ("9223372036854775808", "9" * 30):
        message = refused("--seq-length", text).message
        assert f"--seq-length {text}: should be at most 9223372036854775807" in message
    assert parsed("--seq-length", "9223372036854775807").seq_length == 2**63 - 1


def test_a_text_that_is_no_utf8_is_refused_where_it_breaks_a_rule():
    with pytest.raises(ConfigError, match="bytes that are no UTF-8"):
        GenerateConfig.parse({"model": Path("m"), "prompt": ["a"], "logit_bias": ["\udcff"]})


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("5", 5), ("1kb", 1000), ("0.5GB", 5 * 10**8), ("3M", 3 * 10**6)]
)
def test_units_of_shards_are_powers_of_1000(size, num_bytes):
    config = ToHfConfig.parse({"source": Path("a"), "target": Path("b"), "shard_size": size})
    assert config.options.shard_bytes == num_bytes


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "9" * 16, "1." + "9" * 16])
def test_sizes_have_a_length(size):
    with pytest.raises(ConfigError, match="--device-memory"):
        PretrainConfig.parse({"device_memory": size})
    with pytest.raises(ConfigError, match="--shard-size"):
        ToHfConfig.parse({"source": Path("a"), "target": Path("b"), "shard_size": size})
