"""The config classes: what they take, what they refuse, and in which words."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from glm3cli.config.inference import GenerateConfig, InferenceConfig
from glm3cli.config.launch import LaunchConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.config.presets import PRESETS
from glm3cli.config.training import TrainConfig
from glm3cli.data.kinds import ANSWERS, TEXT
from glm3cli.data.prefixes import Blend
from glm3cli.errors import ConfigError
from glm3cli.train import prepare
from tests.support.config_file import read
from tests.support.tiny import TINY, train_config

SIX_B = PRESETS["6b"]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """As if no torchrun had started this process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def generate_config(**options: Any) -> GenerateConfig:
    return GenerateConfig.parse({"model": Path("m"), "prompt": ["a"], **options})


# --- how it is cut ---


@pytest.mark.parametrize(
    "cut",
    [
        {"tp": 1},
        {"tp": 2},
        {"tp": 4},
        {"tp": 8},
        {"tp": 16},
        {"pp": 28},
        {"pp": 2, "vpp": 7},
        {"tp": 8, "pp": 4, "vpp": 7},
        {"pp": 4, "layers_per_stage": "6,8,8,6"},
        {"pp": 3, "layers_per_stage": "1,26,1"},
    ],
    ids=str,
)
def test_legal_cuts_of_the_6b_model(cut):
    ParallelConfig.parse(cut).check_fits(SIX_B)


@pytest.mark.parametrize(
    ("cut", "said", "way_out"),
    [
        (
            {"tp": 3},
            "num_attention_heads 32 is not divisible by --tp 3; ffn_hidden_size 13696 is not "
            "divisible by --tp 3; padded_vocab_size 65024 is not divisible by --tp 3; --tp 3 and "
            "multi_query_group_num 2: one must divide the other",
            "use --tp 1, 2, 4, 8, 16 or 32",
        ),
        (
            {"pp": 5},
            "num_layers 28 is not divisible by --pp 5 x --vpp 1",
            "use pp x vpp = 1, 2, 4, 7, 14 or 28, or --layers-per-stage for uneven stages",
        ),
        (
            {"pp": 2, "vpp": 4},
            "num_layers 28 is not divisible by --pp 2 x --vpp 4",
            "use pp x vpp = 1, 2, 4, 7, 14 or 28, or --layers-per-stage for uneven stages",
        ),
        (
            {"pp": 2, "layers_per_stage": "14,13"},
            "--layers-per-stage 14,13 adds up to 27 layers, but the model has 28",
            "give 2 numbers above 0 that add up to 28",
        ),
        (
            {"vpp": 2},
            "--vpp needs more than one pipeline stage",
            "drop --vpp or raise --pp",
        ),
    ],
    ids=["tp", "pp", "vpp", "uneven", "vpp without pp"],
)
def test_an_illegal_cut_says_what_would_be_legal(cut, said, way_out):
    with pytest.raises(ConfigError) as caught:
        ParallelConfig.parse(cut).check_fits(SIX_B)
    assert (caught.value.message, caught.value.hint) == (said, way_out)


def test_a_stage_without_layers_is_refused_as_such():
    with pytest.raises(ConfigError) as caught:
        ParallelConfig.parse({"pp": 2, "layers_per_stage": "0,28"}).check_fits(SIX_B)
    assert "a stage without layers" in caught.value.message
    assert caught.value.hint == "give 2 numbers above 0 that add up to 28"


def test_what_the_hint_offers_is_legal():
    for tp in (1, 2, 4, 8, 16, 32):
        ParallelConfig(tp=tp).check_fits(SIX_B)
    legal = {tp for tp in range(1, 65) if fits(tp)}
    assert legal == {1, 2, 4, 8, 16, 32}


def fits(tp: int) -> bool:
    try:
        ParallelConfig(tp=tp).check_fits(SIX_B)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"pp": 3, "layers_per_stage": "14,14"}, "names 2 stages, but --pp is 3"),
        ({"pp": 2, "vpp": 2, "layers_per_stage": "14,14"}, "can't be used together"),
        ({"pp": 2, "layers_per_stage": "14;14"}, "--layers-per-stage 14;14: "),
        ({"tp": 0}, "--tp 0: should be greater than or equal to 1"),
    ],
)
def test_a_cut_that_fits_no_model_is_refused_at_once(cut, said):
    with pytest.raises(ConfigError, match=said):
        ParallelConfig.parse(cut)


@given(pp=st.integers(1, 8), vpp=st.integers(1, 4), size=st.integers(1, 5))
def test_every_layer_is_held_once(pp, vpp, size):
    config = ParallelConfig(pp=pp, vpp=vpp)
    num_layers = pp * vpp * size
    # The order in which a token passes: chunk by chunk, and in each from stage to stage.
    passed = [
        layer
        for chunk in range(vpp)
        for stage in range(pp)
        for layer in config.layers_of(num_layers, stage, chunk)
    ]
    assert passed == list(range(num_layers))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_layer_is_held_once_with_uneven_stages(sizes):
    config = ParallelConfig(pp=len(sizes), layers_per_stage=",".join(map(str, sizes)))
    held = [config.layers_of(sum(sizes), stage) for stage in range(len(sizes))]
    assert [len(layers) for layers in held] == sizes
    assert [layer for layers in held for layer in layers] == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("pp", "layers", "vocabulary", "stages"),
    [
        (1, 28, 65024, None),
        (2, 28, 65024, None),  # 13 layers and an output layer of 1.3 would gain 2 %
        (4, 28, 65024, None),
        (5, 28, 65024, "6,6,6,6,4"),  # not divisible
        (28, 28, 65024, None),
        (29, 28, 65024, None),  # which `check_fits` refuses
        (4, 40, 151552, "11,11,11,7"),  # GLM-4's output layer is as large as three
        (2, 28, 28 * 65024, "27,1"),
    ],
)
def test_stages_that_decode_take_equally_long(pp, layers, vocabulary, stages):
    model = SIX_B.model_copy(update={"num_layers": layers, "padded_vocab_size": vocabulary})
    balanced = ParallelConfig(pp=pp).balanced(model)
    assert balanced.layers_per_stage == stages
    if pp <= layers:
        balanced.check_fits(model)


def test_only_what_decodes_has_balanced_stages():
    generating = generate_config(pp=5)
    scoring = InferenceConfig.parse({"model": Path("m"), "pp": 5})
    assert generating.with_stages(SIX_B).layers_per_stage == "6,6,6,6,4"
    assert scoring.with_stages(SIX_B) is scoring


def test_stages_that_were_given_stay():
    given_stages = ParallelConfig(pp=2, layers_per_stage="14,14")
    assert given_stages.balanced(SIX_B) == given_stages


@given(
    layers=st.integers(1, 48),
    pp=st.integers(1, 12),
    vocabulary=st.sampled_from([512, 65024, 2**20]),
)
def test_no_stages_decode_faster_than_the_balanced_ones(layers, pp, vocabulary):
    model = SIX_B.model_copy(update={"num_layers": layers, "padded_vocab_size": vocabulary})
    output = vocabulary * model.hidden_size / model.layer_parameters
    balanced = ParallelConfig(pp=pp).balanced(model)
    if balanced.stage_sizes is None:
        return
    balanced.check_fits(model)
    *others, last = balanced.stage_sizes
    slowest = max([*others, last + output])
    least = min(
        max(math.ceil((layers - n) / (pp - 1)), n + output) for n in range(1, layers - pp + 2)
    )
    assert slowest == least


def test_the_number_of_ranks_is_a_multiple_of_one_copy():
    config = ParallelConfig(tp=2, pp=4)
    config.check_world(8)
    config.check_world(16)
    with pytest.raises(ConfigError) as caught:
        config.check_world(12)
    assert caught.value.message == "12 rank(s) can't hold --tp 2 x --pp 4 = 8"
    assert caught.value.hint == "start a multiple of 8 ranks, e.g. --nproc 8"


# --- launch ---


def test_torchrun_counts_more_than_nproc(monkeypatch):
    assert LaunchConfig().world_size == 1
    assert LaunchConfig(nproc=4).world_size == 4
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert LaunchConfig(nproc=4).world_size == 16
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert LaunchConfig(nproc=4).world_size == 1


@pytest.mark.parametrize(("ranks", "found"), [("", 4), (" ", 4), ("0", 4), ("1", 4)])
def test_a_cluster_that_starts_one_process_leaves_nproc_to_us(monkeypatch, ranks, found):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert LaunchConfig.parse({"nproc": 4}).world_size == found


def test_a_cluster_that_starts_several_processes_counts(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert LaunchConfig.parse({"nproc": 1}).world_size == LaunchConfig().world_size == 2
    with pytest.raises(ConfigError, match="--nproc 4, but WORLD_SIZE=2 in the environment"):
        LaunchConfig.parse({"nproc": 4})
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE=two in the environment is no whole number"):
        LaunchConfig.parse({})


# --- a training run ---


def test_ranks_and_batch_give_the_rest_of_the_plan():
    config = train_config(nproc=8, tp=2, pp=2, micro_batch_size=2, global_batch_size=12)
    assert (config.dp, config.num_microbatches) == (2, 3)
    config.check_sizes(TINY)
    config = train_config(nproc=8, tp=2, cp=2, micro_batch_size=2, global_batch_size=12)
    assert (config.dp, config.num_microbatches) == (2, 3)


@pytest.mark.parametrize(
    ("options", "said", "way_out"),
    [
        (
            {"nproc": 2, "micro_batch_size": 3, "global_batch_size": 8},
            "--global-batch-size 8 is not a multiple of --micro-batch-size 3 x data parallel "
            "size 2",
            "use a multiple of 6",
        ),
        (
            {"nproc": 2, "tp": 2, "seq_length": 33},
            "--seq-length 33 is not divisible by --tp 2",
            "use a multiple of 2, or --no-sequence-parallel",
        ),
        (
            {"nproc": 2, "pp": 2, "vpp": 2, "global_batch_size": 3},
            "--vpp 2 needs a multiple of --pp 2 micro-batches per step, not 3",
            "use a --global-batch-size that is a multiple of 2",
        ),
        (
            {"tp": 2},
            "1 rank(s) can't hold --tp 2 x --pp 1 = 2",
            "start a multiple of 2 ranks, e.g. --nproc 2",
        ),
        (
            {"nproc": 3, "tp": 3},
            "num_attention_heads 8 is not divisible by --tp 3; padded_vocab_size 128 is not "
            "divisible by --tp 3; --tp 3 and multi_query_group_num 2: one must divide the other",
            "use --tp 1, 2, 4 or 8",
        ),
    ],
    ids=["batch", "sequence", "vpp", "ranks", "model"],
)
def test_a_plan_that_does_not_divide_is_refused(options, said, way_out):
    with pytest.raises(ConfigError) as caught:
        train_config(**options).check_sizes(TINY)
    assert (caught.value.message, caught.value.hint) == (said, way_out)


def test_a_sequence_of_any_length_goes_without_sequence_parallelism():
    config = train_config(nproc=2, tp=2, seq_length=33, sequence_parallel=False)
    config.check_sizes(TINY)


def test_warmup_is_a_share_or_a_number_of_steps():
    assert train_config(lr_warmup_iters=0, lr_warmup_fraction=0.25).warmup_iters == 5.0
    assert train_config(lr_warmup_iters=3).warmup_iters == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": Path("m")}, "give either --model MODEL or --from-scratch"),
        ({"from_scratch": False}, "give either --model MODEL or --from-scratch"),
        ({"shape": None}, "--from-scratch needs --model-config"),
        ({"from_scratch": False, "model": Path("m")}, "--model-config goes with --from-scratch"),
        ({"min_lr": 0.1}, "--min-lr 0.1 is above --lr 0.01"),
        ({"lr_warmup_fraction": 0.1}, "--lr-warmup-fraction or --lr-warmup-iters, not both"),
        ({"lr_warmup_iters": 20}, "--lr-warmup-iters 20 must be below --train-iters 20"),
        ({"overlap_param_gather": True}, "--overlap-param-gather needs --overlap-grad-reduce"),
        ({"split": "90,10"}, "--split 90,10: "),
        ({"data": []}, "--data "),
        ({"lr": float("nan")}, "--lr nan: "),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(ConfigError) as caught:
        train_config(**options)
    assert said in caught.value.message


# --- generate ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": []}, "give one of --prompt TEXT, --prompts-file FILE, --chat"),
        ({"chat": True}, "give one of --prompt TEXT, --prompts-file FILE, --chat"),
        ({"prompt": [], "chat": True, "as_json": True}, "it has no --json result"),
        ({"prompt": ["a", "b"], "stream": True}, "--stream goes with one --prompt"),
        ({"stream": True, "as_json": True}, "--stream goes with one --prompt, without --json"),
        ({"system": "be kind"}, "--system and --tools go with --chat"),
        ({"pp": 2, "vpp": 2}, "--vpp is for training"),
        ({"temperature": -1.0}, "--temperature -1.0: should be greater than or equal to 0"),
        ({"temperature": 1e-5}, "--temperature 1e-05 is below 0.0001"),
        ({"top_p": 1.5}, "--top-p 1.5: should be less than or equal to 1"),
    ],
)
def test_generate_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ConfigError) as caught:
        generate_config(**options)
    assert said in caught.value.message


# --- strictness ---


@pytest.mark.parametrize("value", ["2", 2.0, True, None, [2]])
def test_a_value_of_another_type_is_refused(value):
    with pytest.raises(ConfigError, match="--tp "):
        ParallelConfig.parse({"tp": value})


def test_an_unknown_key_comes_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match="unknown key 'seq_lenght', did you mean 'seq_length'"):
        train_config(seq_lenght=1)
    with pytest.raises(ConfigError) as caught:
        ParallelConfig.parse({"zzz": 1})
    assert caught.value.message == "unknown key 'zzz'"


def test_all_problems_are_told_together():
    with pytest.raises(ConfigError) as caught:
        train_config(tp=0, lr=-1.0, dtype="int8", save=5, train_iterations=1)
    said = caught.value.message.split("; ")
    starts = ("--tp 0: ", "--lr -1.0: ", "--dtype int8: ", "--save 5: ", "unknown key ")
    assert len(said) == len(starts)
    for start in starts:
        assert sum(sentence.startswith(start) for sentence in said) == 1, said


def test_a_missing_option_is_named_as_it_is_typed():
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse({"from_scratch": True, "shape": "6b"})
    assert caught.value.message.split("; ") == [
        "--data is missing",
        "--train-iters is missing",
        "--save is missing",
    ]


def test_a_config_can_not_be_changed():
    config = ParallelConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.tp = 2  # type: ignore[misc]


# --- there and back through a file ---


@pytest.mark.parametrize(
    "config",
    [
        train_config(),
        train_config(
            nproc=4,
            tp=2,
            pp=2,
            layers_per_stage="1,3",
            data=["0.3:a b", "0.7:c"],
            lr=1e-6,
            min_lr=1e-8,
            adam_eps=1e-15,
            sequence_parallel=False,
            split="1,0,0",
            shape="no",
            tokenizer=Path("12"),
            resume="1e5",
            save=Path("运行"),
        ),
        generate_config(prompt=["line\nline", "yes", "1.0", "~"], as_json=True, seed=0),
    ],
    ids=["train", "train, much set", "generate"],
)
def test_options_written_as_yaml_are_read_back_as_the_same_config(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_options(), allow_unicode=True), encoding="utf-8")
    assert read(type(config), file) == config
    given = {key: value for key, value in config.to_options().items() if value is not None}
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert read(type(config), file) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp": 1, "dtype": "bf16"}, "--mc2 with --tp 1"),
        ({"tp": 2, "dtype": "fp32"}, "--dtype fp32"),
        ({"tp": 2, "dtype": "bf16", "sequence_parallel": False}, "--no-sequence-parallel"),
        ({"tp": 2, "dtype": "bf16"}, r"these over \(64, 32, 48\)"),
    ],
)
def test_mc2_is_for_what_its_operators_take(monkeypatch, options, said):
    monkeypatch.setenv("WORLD_SIZE", str(options["tp"]))
    config = train_config(mc2=True, micro_batch_size=4, **options)
    with pytest.raises(ConfigError, match=said) as caught:
        config.check_sizes(TINY)
    assert "--mc2" in caught.value.hint
    config = train_config(mc2=True, tp=2, dtype="bf16", micro_batch_size=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config.check_sizes(SIX_B)


@pytest.mark.parametrize(
    ("kind", "prefixes", "size"),
    [(TEXT, "a", 17), (TEXT, "ab", 27), (ANSWERS, "ab", 10), (ANSWERS, "a", 0)],
)
def test_the_order_of_the_samples_may_take_half_of_the_memory(monkeypatch, kind, prefixes, size):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    blend = Blend(tuple(prefixes), None)
    step = 4 * 2 * size  # of 4 samples, on 2 ranks
    monkeypatch.setattr(prepare, "total_memory", lambda: 2 * 1000 * step)
    for steps in (1000, 1001, 2**62):
        config = train_config(train_iters=steps, global_batch_size=4, nproc=2)
        if steps == 1000 or not size:
            prepare._check_order(config, kind, blend)
            continue
        with pytest.raises(ConfigError, match=r"2 rank\(s\) of this machine would keep") as caught:
            prepare._check_order(config, kind, blend)
        assert caught.value.hint.startswith("give at most 1,000 steps")
