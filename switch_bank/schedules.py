"""What changes with the step: pure functions step -> value, and the StepState that carries them into the model."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from switch_bank.config import Config, ModelConfig, ScheduleConfig


class StepState(NamedTuple):
    """The model's view of a step: 0-dim float32 tensors on its device, so that a new value compiles nothing."""

    step: Tensor
    active_experts: Tensor  # experts 0 .. active_experts - 1 may be chosen
    temperature: Tensor
    cap: Tensor
    window: Tensor  # tokens that a long attention window spans; short windows span half of it


def active_experts(step: int, schedule: ScheduleConfig, experts: int) -> int:
    """How many experts are switched on at `step`."""
    share = [share for start, share in schedule.activation if start <= step][-1]
    return max(1, round(share * experts))


def second_expert_step(schedule: ScheduleConfig, experts: int) -> int:
    """s₀: the step that activates the second expert; 0 where there never is one."""
    return next((start for start, _ in schedule.activation if active_experts(start, schedule, experts) > 1), 0)


def temperature(step: int, schedule: ScheduleConfig, experts: int) -> float:
    """τ: constant until s₀, then falling; `temperature_steps` later `temperature_ratio` of the way is still to go."""
    start, rest = second_expert_step(schedule, experts), schedule.steps - second_expert_step(schedule, experts)
    if step <= start:
        return schedule.temperature_start
    progress = min(1.0, (step - start) / rest)
    # A run so short that Δ reaches its end leaves no exponent: Δ is held one step before it.
    reached = min(schedule.temperature_steps, rest - 1) / rest
    exponent = math.log(schedule.temperature_ratio) / math.log(1 - reached) if reached > 0 else 1.0
    span = schedule.temperature_start - schedule.temperature_end
    return schedule.temperature_end + span * (1 - progress) ** exponent


def logit_cap(step: int, schedule: ScheduleConfig, experts: int) -> float:
    """The bound on the gate's logits: constant until s₀, then geometric in the fourth power of the progress."""
    progress = (step - second_expert_step(schedule, experts)) / schedule.cap_steps
    progress = min(1.0, max(0.0, progress))
    return schedule.cap_start * (schedule.cap_end / schedule.cap_start) ** progress**4


def gumbel_noise(step: int, schedule: ScheduleConfig) -> bool:
    """Whether router choices carry Gumbel noise at `step`."""
    return any(start <= step < end for start, end in schedule.gumbel_windows)


def attention_windows(longest: int) -> list[int]:
    """The lengths in tokens, at most 6 and at least 128, that an attention window takes on its way to `longest`."""
    return sorted({min(longest, max(128, 2 * math.ceil(longest * sixth / 12))) for sixth in range(1, 7)})


def attention_window(step: int, steps: int, longest: int) -> int:
    """Tokens of a long window: longest·(4x³ - 6x² + 3x) at x = step/steps, rounded up to one of the lengths."""
    x = min(1.0, step / steps)
    wanted = longest * (4 * x**3 - 6 * x**2 + 3 * x)
    return next(length for length in attention_windows(longest) if length >= wanted - 1e-6)


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """1, then linearly to 0 over the last `cooldown` of the run."""
    left = 1 - step / schedule.steps
    return min(1.0, left / schedule.cooldown) if schedule.cooldown > 0 else 1.0


def muon_momentum(step: int, schedule: ScheduleConfig, ends: tuple[float, float]) -> float:
    """From the first to the second of `ends` over the first `momentum_steps`."""
    progress = min(1.0, step / schedule.momentum_steps)
    return ends[0] + (ends[1] - ends[0]) * progress


def layer_shape(config: ModelConfig) -> list[float]:
    """The shape in 0..1 over the depth that scales temperature and balance weights, one value a layer."""
    peak = config.layer_peak

    def tent(depth: float) -> float:
        return 1 - abs(depth - peak) / (peak if depth <= peak else 1 - peak)

    shapes = {
        "peak": tent,
        "valley": lambda depth: 1 - tent(depth),
        "rising": lambda depth: depth,
        "falling": lambda depth: 1 - depth,
    }
    return [shapes[config.layer_shape](layer / max(1, config.layers - 1)) for layer in range(config.layers)]


def step_state(step: int, config: Config, device: torch.device | str) -> StepState:
    """The StepState of one step."""
    schedule, experts = config.schedule, config.model.experts
    values = (
        step,
        active_experts(step, schedule, experts),
        temperature(step, schedule, experts),
        logit_cap(step, schedule, experts),
        attention_window(step, schedule.steps, config.model.window),
    )
    return StepState(*torch.tensor(values, dtype=torch.float32, device=device))


def step_states(config: Config, device: torch.device | str) -> list[StepState]:
    """The StepState of every step 0..N, on the device before the first one: a step copies nothing to the device."""
    rows = torch.stack([torch.stack(step_state(step, config, "cpu")) for step in range(config.schedule.steps + 1)])
    # unbind, not row views: every scalar gets storage of its own, so that compiled code sees one alignment.
    return [StepState(*(value.clone() for value in row)) for row in rows.to(device)]
