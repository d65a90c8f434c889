"""What a configuration promises: documented flags parse, what cannot work is refused by name, JSON keeps it whole."""

import dataclasses
import json
from typing import Any, get_type_hints
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switch_bank import config as config_module
from switch_bank.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Range,
    RunConfig,
    ScheduleConfig,
    compute_dtype,
    from_dict,
    parse,
    presets,
    round_up,
)

GROUPS = {"model": ModelConfig, "schedule": ScheduleConfig, "optim": OptimConfig, "data": DataConfig, "run": RunConfig}


def bounded_options() -> list[tuple[str, str, Range]]:
    return [
        (group, name, bound)
        for group, cls in GROUPS.items()
        for name, hint in get_type_hints(cls, include_extras=True).items()
        for bound in getattr(hint, "__metadata__", ())
        if isinstance(bound, Range)
    ]


def changed(config: Config, group: str, **options: Any) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **options)})


# Presets


@pytest.mark.parametrize("name", ["record", "small", "nano", "lora_moe"])
def test_every_preset_can_run_and_knows_its_name(name: str) -> None:
    assert presets[name].check() is presets[name]
    assert presets[name].preset == name
    assert presets[name].model.causal


def test_the_record_preset_has_the_published_numbers() -> None:
    config = presets["record"]
    model, schedule, optim, data, run = config.model, config.schedule, config.optim, config.data, config.run
    assert (model.layers, model.width, model.heads, model.head_dim) == (28, 896, 7, 128)
    assert model.skip_attention == (11,)
    assert model.value_embeddings == 2
    assert (model.vocab_size, model.padded_vocab, model.eod_token) == (50_257, 50_304, 50_256)
    assert model.router_features == 2 * 896 + 11
    assert (model.experts, model.expert_width, model.top_k, model.shared) == (8, 1024, 1, True)
    assert model.adapter == "scale_bias"
    assert (model.forward_ema, model.reverse_ema) == (False, "causal")
    assert (model.reverse_decay, model.reverse_window) == (0.85, 384)
    assert (model.ema_stride, model.position_bins, model.opening_tokens) == (28, 8, 64)
    assert (model.cv_weight, model.entropy_weight) == (2.15e-3, 2.5e-3)
    assert (model.layer_shape, model.layer_peak) == ("peak", 0.475)
    assert (model.temperature_boost, model.balance_boost) == (0.2, 0.5)
    assert (schedule.steps, data.slices_per_step, data.slice_tokens) == (1750, 8, 12_288)
    assert (schedule.temperature_start, schedule.temperature_end) == (1.464, 0.93744)
    assert (schedule.temperature_steps, schedule.temperature_ratio) == (284, 0.49)
    assert (schedule.cap_start, schedule.cap_end, schedule.cap_steps) == (1.166, 13.757, 237)
    assert (schedule.cooldown, schedule.momentum_steps, optim.muon_momentum) == (0.65, 300, (0.85, 0.95))
    assert (optim.embedding_lr, optim.scalar_lr, optim.head_lr, optim.router_lr) == (0.3, 0.015, 1 / 320, 0.095)
    assert (optim.adapter_lr, optim.muon_lr, optim.adam_betas) == (0.03, 0.025, (0.8, 0.95))
    assert (optim.router_clip_quantile, optim.router_clip_history) == (0.1, 250)
    assert (data.val_tokens, data.repeat) == (10_485_760, False)
    assert run.val_at_seconds == (60, 120, 180, 240, 300, 360, 420, 480, 540, 600, 660, 720, 780, 840)


def test_the_clock_readings_of_the_small_presets() -> None:
    assert presets["small"].run.val_at_seconds == (60, 120, 180)
    assert presets["nano"].run.val_at_seconds == (30, 60, 120, 180)


def test_a_router_sees_the_token_each_ema_and_the_flags() -> None:
    both = ModelConfig(width=896, forward_ema=True, reverse_ema="leaky", position_bins=16)
    assert both.router_features == 3 * 896 + 3 + 16
    assert ModelConfig(width=896, reverse_ema="off", flags=False).router_features == 896


def test_only_the_leaky_ema_is_not_causal() -> None:
    assert [ModelConfig(reverse_ema=name).causal for name in ("off", "causal", "leaky")] == [True, True, False]


# Bounds


@pytest.mark.parametrize(("group", "name", "bound"), bounded_options(), ids=lambda value: str(value).split("(")[0])
def test_every_bound_is_enforced_by_name(group: str, name: str, bound: Range) -> None:
    whole = isinstance(getattr(getattr(Config(), group), name), int)
    distance = 1 if whole else 1e-3
    too_far = [bound.low - distance, bound.high * 1.01 + distance]
    for value in [*map(int, too_far)] if whole else [*too_far, float("nan")]:
        with pytest.raises(ConfigError, match=rf"{group}\.{name} is {value}: it must be in ") as error:
            changed(Config(), group, **{name: value}).check()
        assert f"{bound.low:g}..{bound.high:g}" in str(error.value)


def test_there_are_bounds_on_what_counts_and_scales() -> None:
    named = {f"{group}.{name}" for group, name, _ in bounded_options()}
    for group, cls in GROUPS.items():
        for option in dataclasses.fields(cls):
            number = isinstance(option.default, (int, float)) and not isinstance(option.default, bool)
            if number and option.name != "position_bins":  # a choice among three numbers
                assert f"{group}.{option.name}" in named


@pytest.mark.parametrize(
    ("group", "options", "name"),
    [
        ("model", {"width": 900}, "model.width"),
        ("model", {"width": 896, "heads": 448}, "model.width / model.heads"),
        ("model", {"top_k": 9}, "model.top_k"),
        ("model", {"eod_token": 50_257}, "model.eod_token"),
        ("model", {"value_embeddings": 15}, "model.value_embeddings"),
        ("model", {"skip_attention": (28,)}, "model.skip_attention"),
        ("model", {"skip_attention": (-1,)}, "model.skip_attention"),
        ("model", {"position_bins": 7}, "model.position_bins"),
        ("model", {"balance": "auxiliary"}, "model.balance"),
        ("model", {"reverse_ema": "acausal"}, "model.reverse_ema"),
        ("optim", {"muon": "adam"}, "optim.muon"),
        ("model", {"width": 36, "heads": 3}, "model.width"),
        ("model", {"expert_width": 12}, "model.expert_width"),
        ("model", {"lora_rank": 12}, "model.lora_rank"),
        ("model", {"bank_backend": "triton", "adapter": "lora"}, "model.bank_backend"),
        ("model", {"bank_backend": "triton", "dtype": "float64"}, "model.bank_backend"),
        ("model", {"bank_backend": "grouped", "dtype": "float64"}, "model.bank_backend"),
        ("model", {"attention_backend": "flash", "dtype": "float32"}, "model.attention_backend"),
        ("data", {"slice_tokens": 12_289}, "data.slice_tokens"),
        ("data", {"val_slice_tokens": 1000}, "data.val_slice_tokens"),
        ("schedule", {"activation": ()}, "schedule.activation"),
        ("schedule", {"activation": ((5, 0.5), (10, 1.0))}, "schedule.activation"),
        ("schedule", {"activation": ((0, 0.5), (10, 0.25), (20, 1.0))}, "schedule.activation"),
        ("schedule", {"activation": ((0, 0.5), (20, 0.75), (10, 1.0))}, "schedule.activation"),
        ("schedule", {"activation": ((0, 0.5), (10, 0.75))}, "schedule.activation"),
        ("schedule", {"activation": ((0, 0.0), (10, 1.0))}, "schedule.activation"),
        ("schedule", {"gumbel_windows": ((30, 20),)}, "schedule.gumbel_windows"),
        ("schedule", {"gumbel_windows": ((-1, 20),)}, "schedule.gumbel_windows"),
        ("schedule", {"freeze_adapters_at": -1}, "schedule.freeze_adapters_at"),
        ("schedule", {"prune_at": -1}, "schedule.prune_at"),
        ("optim", {"muon_momentum": (0.85, 1.0)}, "optim.muon_momentum"),
        ("optim", {"adam_betas": (-0.1, 0.95)}, "optim.adam_betas"),
        ("run", {"steps": 0}, "run.steps"),
        ("run", {"seconds": 0.0}, "run.seconds"),
        ("run", {"seconds": float("nan")}, "run.seconds"),
        ("run", {"seconds": float("inf")}, "run.seconds"),
        ("run", {"steps": 100, "seconds": 60.0}, "run.seconds"),
        ("run", {"val_at_seconds": (60.0, 0.0)}, "run.val_at_seconds"),
        ("run", {"val_at_steps": (-1,)}, "run.val_at_steps"),
    ],
)
def test_what_cannot_work_is_refused_by_name(group: str, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        changed(Config(), group, **options).check()
    assert str(error.value).startswith(f"{name} is ")
    assert "it must be" in str(error.value)


def test_the_slices_of_a_step_are_shared_evenly_by_the_processes() -> None:
    for processes in (1, 2, 4, 8):
        presets["record"].check(processes)
    for processes in (3, 16):
        with pytest.raises(ConfigError, match=rf"data\.slices_per_step is 8.*number of processes \({processes}\)"):
            presets["record"].check(processes)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 6, 8]), st.integers(1, 64), st.booleans())
def test_on_a_cpu_microbatches_are_the_same_on_every_number_of_processes_that_was_asked_for(
    slices: int, same_on: int, most: int, strict: bool
) -> None:
    config = changed(Config(), "data", slices_per_step=slices, slice_tokens=128)
    config = changed(config, "model", dtype="float32")
    config = changed(config, "run", same_on_processes=same_on, tokens_per_forward=128 * most)
    with mock.patch.object(config_module, "STRICT_PRODUCTS", strict):
        found = {p: config.microbatch(p, torch.device("cpu")) for p in range(1, slices + 1) if slices % p == 0}
    assert len({of_microbatch for p, (of_microbatch, _) in found.items() if same_on % p == 0}) == 1
    for p, (of_microbatch, together) in found.items():
        assert together is not None
        assert slices // p % (of_microbatch * together) == 0 and of_microbatch * together <= most
        # As many go through together as fit; a power of two, by which a mean is divided without rounding.
        twice = 2 * of_microbatch * together
        assert together.bit_count() == 1 and (twice > most or slices // p % twice or not strict)
        assert strict or together == 1
    # No more is asked of a GPU than that they fit; nor of a CPU, for a single process.
    largest = max(n for n in range(1, min(slices, most) + 1) if slices % n == 0)
    assert config.microbatch(1, torch.device("cuda")) == (largest, None)
    assert same_on > 1 or found[1] == (largest, 1)
    with mock.patch.object(config_module, "STRICT_PRODUCTS", strict):
        in_bfloat16 = changed(config, "model", dtype="bfloat16").microbatch(1, torch.device("cpu"))
    assert in_bfloat16 == (found[1][0], 1)


@given(st.integers(1, 20_000), st.sampled_from(list(presets)))
def test_a_preset_of_another_length_can_run(steps: int, preset: str) -> None:
    config = presets[preset].with_steps(steps).check()
    assert config.run.steps == config.schedule.steps == steps
    # From here on it is a run of so many steps, whatever fixed them.
    assert config.run.seconds is None
    assert config.with_steps(steps) == config


# The command line


@pytest.mark.parametrize(
    ("arguments", "group", "name", "value"),
    [
        ("--run.steps 300", "run", "steps", 300),
        ("--run.seconds 90", "run", "seconds", 90.0),
        ("--run.val-at-seconds 60 120", "run", "val_at_seconds", (60.0, 120.0)),
        ("--run.val-at-steps 100 200 300", "run", "val_at_steps", (100, 200, 300)),
        ("--run.val-at-seconds", "run", "val_at_seconds", ()),
        ("--run.out runs/mine", "run", "out", "runs/mine"),
        ("--run.seed 7", "run", "seed", 7),
        ("--run.resume", "run", "resume", True),
        ("--run.checkpoint-every 50", "run", "checkpoint_every", 50),
        ("--run.profile", "run", "profile", True),
        ("--run.no-compile", "run", "compile", False),
        ("--data.train shards/train_*.bin", "data", "train", "shards/train_*.bin"),
        ("--data.val shards/val_*.bin", "data", "val", "shards/val_*.bin"),
        ("--data.val-tokens 65536", "data", "val_tokens", 65_536),
        ("--data.slice-tokens 512", "data", "slice_tokens", 512),
        ("--data.slices-per-step 4", "data", "slices_per_step", 4),
        ("--model.layers 12", "model", "layers", 12),
        ("--model.experts 64", "model", "experts", 64),
        ("--model.top-k 2", "model", "top_k", 2),
        ("--model.reverse-ema off", "model", "reverse_ema", "off"),
        ("--model.reverse-ema causal", "model", "reverse_ema", "causal"),
        ("--model.reverse-ema leaky", "model", "reverse_ema", "leaky"),
        ("--model.forward-ema", "model", "forward_ema", True),
        ("--model.no-shared", "model", "shared", False),
        ("--model.skip-attention 1 3", "model", "skip_attention", (1, 3)),
        ("--optim.muon turbo", "optim", "muon", "turbo"),
        ("--optim.muon plain", "optim", "muon", "plain"),
        ("--schedule.activation 0 0.5 10 1.0", "schedule", "activation", ((0, 0.5), (10, 1.0))),
    ],
)
@pytest.mark.parametrize("preset", list(presets))
def test_an_option_changes_itself_and_nothing_else(
    preset: str, arguments: str, group: str, name: str, value: Any
) -> None:
    config = parse([preset, *arguments.split()], "record")
    options = {name: value, **({"seconds": None} if name == "steps" else {})}
    assert config == changed(presets[preset], group, **options)
    assert type(getattr(getattr(config, group), name)) is type(value)


def test_the_preset_is_the_first_word_or_the_default() -> None:
    assert parse([], "record") == presets["record"]
    assert parse([], "nano") == presets["nano"]
    assert parse(["small"], "nano") == presets["small"]
    assert parse(["--run.seed", "3"], "nano") == changed(presets["nano"], "run", seed=3)


@pytest.mark.parametrize(("arguments", "default"), [(["hubris"], "nano"), ([], "hubris")])
def test_an_unknown_preset_is_refused_with_the_known_ones(arguments: list[str], default: str) -> None:
    with pytest.raises(ConfigError, match="no preset 'hubris'.*record.*small.*nano"):
        parse(arguments, default)


@pytest.mark.parametrize(
    "arguments",
    [
        "--model.layer 4",
        "--model.layers four",
        "--model.reverse-ema acausal",
        "--optim.muon adam",
        "--run.steps",
        "--preset small",
        "--run.seed 1 small",
        "small --run.resume yes",
    ],
)
def test_a_wrong_option_exits_with_code_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(arguments.split(), "nano")
    assert exit_.value.code == 2
    assert capsys.readouterr().err


def test_steps_given_by_hand_replace_a_preset_s_seconds() -> None:
    assert presets["nano"].run.seconds is not None
    config = parse(["nano", "--run.steps", "40"], "record").check()
    assert (config.run.steps, config.run.seconds) == (40, None)
    assert config.with_steps(40).check().schedule.steps == 40


def test_steps_and_seconds_given_together_are_refused() -> None:
    config = parse(["nano", "--run.steps", "40", "--run.seconds", "15"], "record")
    with pytest.raises(ConfigError, match=r"run\.seconds is 15.*run\.steps"):
        config.check()


# Saved configurations


@pytest.mark.parametrize("preset", list(presets))
def test_a_configuration_survives_json(preset: str) -> None:
    for config in (presets[preset], presets[preset].with_steps(77)):
        assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@given(st.data())
def test_a_configuration_of_any_options_survives_json(data: st.DataObject) -> None:
    config = Config()
    tied_to_others = ["layers", "width", "heads", "top_k", "experts", "vocab_size", "eod_token", "value_embeddings"]
    tied_to_others += ["expert_width", "lora_rank", "slice_tokens", "val_slice_tokens"]
    for group, name, bound in bounded_options():
        if name in tied_to_others:
            continue
        whole = isinstance(getattr(getattr(config, group), name), int)
        values = st.integers(int(bound.low), int(bound.high)) if whole else st.floats(bound.low, bound.high)
        config = changed(config, group, **{name: data.draw(values)})
    windows = st.lists(st.tuples(st.integers(0, 999), st.integers(999, 9999)), max_size=4).map(tuple)
    config = changed(
        config, "schedule", gumbel_windows=data.draw(windows), prune_at=data.draw(st.none() | st.integers(0, 10**12))
    )
    saved = json.dumps(dataclasses.asdict(config))
    assert from_dict(json.loads(saved)) == config
    assert hash(from_dict(json.loads(saved))) == hash(config)


def test_a_saved_configuration_with_an_unknown_name_is_refused() -> None:
    saved = dataclasses.asdict(presets["nano"])
    with pytest.raises(ConfigError, match="model has the unknown option 'depth'"):
        from_dict({**saved, "model": {**saved["model"], "depth": 3}})
    with pytest.raises(ConfigError, match="the saved configuration has the unknown option 'optimizer'"):
        from_dict({**saved, "optimizer": {}})


def test_options_that_a_saved_configuration_lacks_keep_their_defaults() -> None:
    assert from_dict({"preset": "mine", "model": {"width": 448}}) == Config(
        preset="mine", model=dataclasses.replace(ModelConfig(), width=448)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "the saved configuration is a list: it must be a dict of options"),
        ({"model": None}, "model is None: it must be a dict of options"),
        ({"model": {"layers": "28"}}, "model.layers is '28': it must be a whole number"),
        ({"model": {"layers": True}}, "model.layers is True: it must be a whole number"),
        ({"model": {"layers": 10**5000}}, "model.layers is an integer of 16610 bits: it must be in 1..512"),
        ({"model": {"layers": 0}}, "model.layers is 0: it must be in 1..512"),
        ({"model": {"heads": 6}}, "model.width is 896: it must be a multiple of model.heads (6)"),
        ({"model": {"shared": 1}}, "model.shared is 1: it must be on or off"),
        ({"model": {"position_bins": 8.0}}, "model.position_bins is 8.0: it must be one of 4, 8, 16"),
        ({"model": {"cv_weight": None}}, "model.cv_weight is None: it must be a number"),
        ({"data": {"train": ["a", "b"]}}, "data.train is a list: it must be text"),
        ({"optim": {"adam_betas": [0.8]}}, "optim.adam_betas is a list: it must be a list of 2"),
        ({"schedule": {"activation": [[0, float("nan")], [1, 1.0]]}}, "schedule.activation is nan: it must be in 0..1"),
        ({"run": {"val_at_seconds": [float("inf")]}}, "run.val_at_seconds is inf: it must be in 0.001..1e+07"),
        ({"run": {"val_at_steps": 5}}, "run.val_at_steps is 5: it must be a list"),
    ],
)
def test_a_saved_value_that_cannot_work_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    assert str(error.value) == message


# Small functions


@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_round_up_gives_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple


def test_the_compute_dtype_is_the_one_named() -> None:
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("float64", torch.float64)):
        assert compute_dtype(name, torch.device("cpu")) is dtype
    assert compute_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert compute_dtype("auto", torch.device("cuda")) is torch.bfloat16
