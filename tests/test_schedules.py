"""What changes with the step: every formula of the design, and that a run of any length keeps its shape."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switch_bank.config import Config, ModelConfig, ScheduleConfig, presets
from switch_bank.schedules import (
    active_experts,
    attention_window,
    attention_windows,
    gumbel_noise,
    layer_shape,
    learning_rate_factor,
    logit_cap,
    muon_momentum,
    second_expert_step,
    step_state,
    step_states,
    temperature,
)

RECORD = presets["record"].schedule
N, S0 = 1750, 75  # the record preset's steps, and its step that activates the second expert

lengths = st.integers(1, 20_000)
windows = st.integers(128, 100_000)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    """A schedule of 2 steps or more whose second of 8 experts comes before its end."""
    steps = draw(st.integers(2, 5000))
    second = draw(st.integers(0, steps - 1))
    return ScheduleConfig(
        steps=steps,
        activation=((0, 0.125), (second, 1.0)),
        temperature_steps=draw(st.integers(1, 2 * steps)),
        temperature_ratio=draw(st.floats(0.01, 0.99)),
        cap_steps=draw(st.integers(1, 2 * steps)),
        momentum_steps=draw(st.integers(1, 2 * steps)),
    )


@pytest.mark.parametrize(
    ("step", "experts"),
    [(0, 1), (74, 1), (75, 2), (140, 2), (141, 3), (233, 3), (234, 4), (337, 4), (338, 5), (440, 5), (441, 6), (590, 6),
     (591, 7), (694, 7), (695, 8), (1750, 8)],
)  # fmt: skip
def test_the_record_preset_activates_its_experts_one_by_one(step: int, experts: int) -> None:
    assert active_experts(step, RECORD, 8) == experts


@given(lengths, st.integers(1, 1024), st.sampled_from(list(presets)))
def test_active_experts_never_fall_and_end_at_all_of_them(steps: int, experts: int, preset: str) -> None:
    schedule = presets[preset].with_steps(steps).schedule
    counts = [active_experts(step, schedule, experts) for step in range(0, steps + 1, max(1, steps // 100))]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert active_experts(steps, schedule, experts) == experts


def test_the_second_expert_step_is_the_first_one_with_two_experts() -> None:
    assert second_expert_step(RECORD, 8) == S0
    # An eighth of 64 experts is 8 of them: more than one is on from the start.
    assert second_expert_step(RECORD, 64) == 0
    assert second_expert_step(RECORD, 1) == 0


def test_temperature_of_the_record_preset() -> None:
    for step in (0, 40, S0):
        assert temperature(step, RECORD, 8) == 1.464
    # 284 steps after the second expert, 49 % of the way is still to go.
    assert temperature(S0 + 284, RECORD, 8) == pytest.approx(0.93744 + 0.49 * (1.464 - 0.93744), rel=1e-12)
    exponent = math.log(0.49) / math.log(1 - 284 / (N - S0))
    for step in (76, 500, 1000, 1749):
        expected = 0.93744 + (1.464 - 0.93744) * (1 - (step - S0) / (N - S0)) ** exponent
        assert temperature(step, RECORD, 8) == pytest.approx(expected, rel=1e-12)
    assert temperature(N, RECORD, 8) == 0.93744


@given(schedules())
def test_temperature_starts_high_ends_low_and_leaves_the_stated_share_after_the_stated_steps(
    schedule: ScheduleConfig,
) -> None:
    second, steps = second_expert_step(schedule, 8), schedule.steps
    span = schedule.temperature_start - schedule.temperature_end
    points = sorted({*range(0, steps + 1, max(1, steps // 50)), second, steps})
    values = [temperature(step, schedule, 8) for step in points]
    assert all(later <= earlier for earlier, later in zip(values, values[1:], strict=False))
    assert temperature(second, schedule, 8) == schedule.temperature_start
    assert temperature(steps, schedule, 8) == pytest.approx(schedule.temperature_end)
    delta = schedule.temperature_steps
    if delta < steps - second:
        left = (temperature(second + delta, schedule, 8) - schedule.temperature_end) / span
        assert left == pytest.approx(schedule.temperature_ratio, rel=1e-9)


def test_logit_cap_of_the_record_preset() -> None:
    for step in (0, 40, S0):
        assert logit_cap(step, RECORD, 8) == 1.166
    for after in (1, 100, 118, 236):
        expected = 1.166 * (13.757 / 1.166) ** ((after / 237) ** 4)
        assert logit_cap(S0 + after, RECORD, 8) == pytest.approx(expected, rel=1e-12)
    for step in (S0 + 237, 1000, N):
        assert logit_cap(step, RECORD, 8) == pytest.approx(13.757, rel=1e-12)


@given(schedules())
def test_logit_cap_rises_from_its_start_to_its_end_in_the_stated_steps(schedule: ScheduleConfig) -> None:
    second = second_expert_step(schedule, 8)
    values = [logit_cap(second + after, schedule, 8) for after in range(0, schedule.cap_steps + 2)]
    assert values == sorted(values)
    assert values[0] == schedule.cap_start
    assert values[-2] == values[-1] == pytest.approx(schedule.cap_end)
    # The fourth power: half way through its steps the logarithm has gone a sixteenth of its way.
    doubled = dataclasses.replace(schedule, cap_steps=2 * schedule.cap_steps)
    half = logit_cap(second + schedule.cap_steps, doubled, 8)
    whole = math.log(schedule.cap_end / schedule.cap_start)
    assert math.log(half / schedule.cap_start) == pytest.approx(whole / 16)


def test_gumbel_noise_is_on_from_the_first_step_of_a_window_to_the_one_before_its_end() -> None:
    windows = [
        (75, 441), (459, 488), (534, 722), (900, 909), (1004, 1022),
        (1097, 1107), (1200, 1209), (1284, 1313), (1472, 1500),
    ]  # fmt: skip
    noisy = {step for start, end in windows for step in range(start, end)}
    assert {step for step in range(N + 1) if gumbel_noise(step, RECORD)} == noisy
    assert not gumbel_noise(10, ScheduleConfig(gumbel_windows=((10, 10),)))


def test_attention_windows_of_the_record_preset() -> None:
    assert attention_windows(3456) == [576, 1152, 1728, 2304, 2880, 3456]
    for step in range(N + 1):
        x = step / N
        wanted = 3456 * (4 * x**3 - 6 * x**2 + 3 * x)
        assert attention_window(step, N, 3456) == max(576, 576 * math.ceil((wanted - 1e-6) / 576))
    # The polynomial is flat in the middle: half of the longest window is what most steps have.
    assert attention_window(N // 2, N, 3456) == 1728
    assert attention_window(N, N, 3456) == 3456


@given(windows)
def test_attention_windows_are_at_most_six_exact_lengths_up_to_the_longest(longest: int) -> None:
    lengths = attention_windows(longest)
    assert 1 <= len(lengths) <= 6
    assert all(isinstance(length, int) for length in lengths)
    assert lengths == sorted(set(lengths))
    assert lengths[0] >= 128
    assert lengths[0] // 2 >= 64
    assert lengths[-1] == longest


@given(lengths, windows)
def test_the_attention_window_only_grows_and_never_falls_short_of_its_curve(steps: int, longest: int) -> None:
    points = sorted({*range(0, steps + 1, max(1, steps // 100)), steps})
    taken = [attention_window(step, steps, longest) for step in points]
    assert taken == sorted(taken)
    assert set(taken) <= set(attention_windows(longest))
    assert taken[-1] == longest
    for step, length in zip(points, taken, strict=True):
        x = step / steps
        assert length >= longest * (4 * x**3 - 6 * x**2 + 3 * x) - 1e-3


def test_learning_rate_is_flat_then_linear_to_zero_over_the_last_65_percent() -> None:
    assert {learning_rate_factor(step, RECORD) for step in range(0, round(0.35 * N))} == {1.0}
    assert learning_rate_factor(round(0.675 * N), RECORD) == pytest.approx(0.5, abs=1e-3)
    cooling = [learning_rate_factor(step, RECORD) for step in range(round(0.35 * N) + 1, N + 1)]
    falls = [earlier - later for earlier, later in zip(cooling, cooling[1:], strict=False)]
    assert falls == pytest.approx([1 / (0.65 * N)] * len(falls), rel=1e-6)
    assert cooling[-1] == 0.0
    assert learning_rate_factor(N, dataclasses.replace(RECORD, cooldown=0.0)) == 1.0


def test_momentum_rises_over_the_first_steps_and_stays() -> None:
    ends = (0.85, 0.95)
    assert muon_momentum(0, RECORD, ends) == 0.85
    assert muon_momentum(75, RECORD, ends) == pytest.approx(0.875)
    assert muon_momentum(150, RECORD, ends) == pytest.approx(0.9)
    late = [muon_momentum(step, RECORD, ends) for step in range(300, N + 1)]
    assert late == pytest.approx([0.95] * len(late))


@given(lengths, st.sampled_from(list(presets)))
def test_a_run_of_another_length_has_its_schedule_in_proportion(steps: int, preset: str) -> None:
    config = presets[preset]
    old, new, ratio = config.schedule, config.with_steps(steps).schedule, steps / config.schedule.steps
    assert new.steps == config.with_steps(steps).run.steps == steps
    assert [share for _, share in new.activation] == [share for _, share in old.activation]
    steps_named = [
        *zip([step for step, _ in old.activation], [step for step, _ in new.activation], strict=True),
        *zip(sum(old.gumbel_windows, ()), sum(new.gumbel_windows, ()), strict=True),
    ]
    assert all(after == round(before * ratio) for before, after in steps_named)
    for name in ("temperature_steps", "cap_steps", "momentum_steps"):
        assert getattr(new, name) == max(1, round(getattr(old, name) * ratio)), name
    unscaled = {"temperature_start", "temperature_end", "temperature_ratio", "cap_start", "cap_end", "cooldown"}
    assert all(getattr(new, name) == getattr(old, name) for name in unscaled)


def test_freezing_and_pruning_scale_with_the_run() -> None:
    schedule = ScheduleConfig(freeze_adapters_at=1600, prune_at=700)
    scaled = Config(schedule=schedule).with_steps(875).schedule
    assert (scaled.freeze_adapters_at, scaled.prune_at) == (800, 350)
    assert Config().with_steps(875).schedule.prune_at is None


@given(lengths, st.sampled_from(list(presets)))
def test_a_run_of_any_length_has_finite_values_in_bounds_at_every_step(steps: int, preset: str) -> None:
    config = presets[preset].with_steps(steps).check()
    schedule, model = config.schedule, config.model
    for step in sorted({0, 1, 2, steps // 3, steps // 2, steps - 1, steps} & set(range(steps + 1))):
        tau = temperature(step, schedule, model.experts)
        assert schedule.temperature_end <= tau <= schedule.temperature_start
        cap = logit_cap(step, schedule, model.experts)
        assert schedule.cap_start <= cap <= schedule.cap_end * (1 + 1e-12)
        assert 0 <= learning_rate_factor(step, schedule) <= 1
        assert 0.85 <= muon_momentum(step, schedule, (0.85, 0.95)) <= 0.95 + 1e-12
        assert 128 <= attention_window(step, steps, model.window) <= model.window


def test_the_values_at_a_share_of_the_run_are_those_of_the_preset_at_that_share() -> None:
    double = presets["record"].with_steps(2 * N).schedule
    for step in range(0, N + 1, 7):
        assert active_experts(2 * step, double, 8) == active_experts(step, RECORD, 8)
        assert temperature(2 * step, double, 8) == pytest.approx(temperature(step, RECORD, 8), rel=1e-9)
        assert logit_cap(2 * step, double, 8) == pytest.approx(logit_cap(step, RECORD, 8), rel=1e-9)
        assert gumbel_noise(2 * step, double) == gumbel_noise(step, RECORD)
        assert attention_window(2 * step, 2 * N, 3456) == attention_window(step, N, 3456)
        assert learning_rate_factor(2 * step, double) == pytest.approx(learning_rate_factor(step, RECORD))
        assert muon_momentum(2 * step, double, (0.85, 0.95)) == pytest.approx(muon_momentum(step, RECORD, (0.85, 0.95)))


def test_layer_shapes_over_the_depth() -> None:
    def shape(name: str, layers: int = 5, peak: float = 0.25) -> list[float]:
        return layer_shape(ModelConfig(layers=layers, layer_shape=name, layer_peak=peak))  # type: ignore[arg-type]

    assert shape("rising") == [0, 0.25, 0.5, 0.75, 1]
    assert shape("falling") == [1, 0.75, 0.5, 0.25, 0]
    assert shape("peak") == pytest.approx([0, 1, 2 / 3, 1 / 3, 0])
    assert shape("valley") == pytest.approx([1, 0, 1 / 3, 2 / 3, 1])
    # The record preset: 28 layers, the top of the tent at 0.475 of the depth.
    record = layer_shape(presets["record"].model)
    assert len(record) == 28
    assert record[0] == record[27] == 0
    assert record.index(max(record)) == 13
    assert record[10] == pytest.approx(1 - abs(10 / 27 - 0.475) / 0.475)
    assert record[20] == pytest.approx(1 - abs(20 / 27 - 0.475) / 0.525)


@given(st.integers(1, 64), st.floats(0.01, 0.99), st.sampled_from(["peak", "valley", "rising", "falling"]))
def test_layer_shapes_stay_between_zero_and_one(layers: int, peak: float, name: str) -> None:
    shape = layer_shape(ModelConfig(layers=layers, layer_peak=peak, layer_shape=name))  # type: ignore[arg-type]
    assert len(shape) == layers
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in shape)


def test_a_step_reaches_the_model_as_scalar_float32_tensors() -> None:
    state = step_state(500, presets["record"], "cpu")
    assert all(value.shape == () and value.dtype == torch.float32 for value in state)
    expected = (500, 6, temperature(500, RECORD, 8), logit_cap(500, RECORD, 8), attention_window(500, N, 3456))
    assert [value.item() for value in state] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", list(presets))
def test_the_states_of_all_steps_are_those_of_each_step(preset: str) -> None:
    config = presets[preset].with_steps(60)
    states = step_states(config, "cpu")
    assert len(states) == 61
    for step, state in enumerate(states):
        for name, value, single in zip(state._fields, state, step_state(step, config, "cpu"), strict=True):
            assert torch.equal(value, single), (step, name)
            assert value.shape == () and value.dtype == torch.float32
    # Each scalar owns its storage: compiled code specialises on alignment, and views of one row have several.
    assert all(value.storage_offset() == 0 and value.untyped_storage().nbytes() == 4 for value in states[7])
