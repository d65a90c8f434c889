"""Is it causal? What a run asks before its first step and after its last one, and anyone with
`python -m switch_bank audit`.

Checks (a), (c) and (d) of `causality` run on two paths. The exact one, the reference kernels in float64, has no
rounding that a leak could hide in. The real one is what the run computes with: its kernels, its dtype, compiled. Check
(b) runs on the exact one alone, with the windows of the configuration.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from switch_bank import causality, schedules
from switch_bank.causality import ComputePath, Finding, Tolerances
from switch_bank.checkpoint import CheckpointError
from switch_bank.config import Config, ConfigError, compute_dtype, parse, presets
from switch_bank.model.folder import ModelFolderError
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.numerics import set_numerics
from switch_bank.run_log import ROOT
from switch_bank.schedules import StepState

PROGRAM = "python -m switch_bank audit"
TOLERANCES = {
    torch.float64: Tolerances(rerun=1e-9, recompute=1e-9, margin=0.0),
    torch.float32: Tolerances(rerun=1e-4, recompute=1e-4, margin=causality.MARGIN),
    # Twice what was seen of `small` and `record`, compiled against eager: 0.62 of a logit over 2,048 tokens on an H200
    # (0.22 on CPUs), and a margin of 0.05 over 512.
    torch.bfloat16: Tolerances(rerun=0.02, recompute=1.25, margin=0.2),
}
# Of the exact path, so that every edge lies within its slices: their long document has 192 tokens.
TOKENS, WINDOW, REVERSE_WINDOW, OPENING_TOKENS = 256, 64, 48, 56
CPU_TOKENS = 16_384  # that go through together on a CPU, at most


@contextmanager
def random_parameters(model: nn.Module, seed: int) -> Iterator[None]:
    """Random values are added to every parameter within the block; after it, or an error in it, it has its own again.

    Zero-initialised output matrices would let any model pass. A fresh model gets values of a trained one's size.
    """
    own = [parameter.detach().clone() for parameter in model.parameters()]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=device) * fan_in**-0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), own, strict=True):
                parameter.copy_(value)


def findings(
    model: SwitchBankGPT, state: StepState, slices: int, tokens: int, windows: Sequence[int | None] = (None,),
    whole: bool = False, seed: int = 0,
) -> list[Finding]:  # fmt: skip
    """Checks (a) and (b), and (c) and (d) if `whole`, of an eval-mode model with values in all of its parameters.

    `slices` slices of `tokens` tokens go through together on the real path, at each of the `windows` that attention
    kernels take as a Python int; None leaves the window to `state`.
    """
    dtype = compute_dtype(model.config.dtype, model.head.device)
    name = f"{str(dtype).removeprefix('torch.')} as trained"
    real = [
        ComputePath(name if w is None else f"{name}, window {w}", model, _with_window(state, w), w, slices, tokens,
                    exact=False, tolerances=TOLERANCES[dtype])
        for w in windows
    ]  # fmt: skip
    exact, own_windows = exact_paths(model, state)
    results = [causality.check_suffix(path, seed) for path in [exact, *real]]
    results.append(causality.check_gradients(own_windows, seed))
    if whole:
        shortest = min(real, key=lambda path: float(path.state.window))
        if shortest.window is None:
            shortest = shortest._replace(state=_with_window(state, WINDOW))
        for check in (causality.check_decode, causality.check_packing):
            results += [check(path, seed) for path in (exact, shortest)]
    return results


def exact_paths(model: SwitchBankGPT, state: StepState) -> tuple[ComputePath, ComputePath]:
    """The float64 twin with windows that its slices cross, and with the model's own."""
    own = causality.twin(model, dtype="float64", attention_backend="reference", bank_backend="reference").double()
    shrunk = causality.twin(
        own,
        reverse_window=min(REVERSE_WINDOW, model.config.reverse_window),
        opening_tokens=min(OPENING_TOKENS, model.config.opening_tokens),
    )
    slices = max(1, min(8, 2**25 // (TOKENS * model.config.padded_vocab)))  # at most 256 MiB of logits
    path = ComputePath(
        "float64 reference", shrunk, _with_window(state, WINDOW), None, slices, TOKENS, True, TOLERANCES[torch.float64]
    )
    return path, path._replace(model=own, state=state)


def _with_window(state: StepState, window: int | None) -> StepState:
    return state if window is None else state._replace(window=torch.full_like(state.window, window))


def verdict(results: list[Finding]) -> str:
    """The lines that a log carries: `causal: yes` or `NOT CAUSAL`, and why."""
    word = "causal: yes" if all(result.passed for result in results) else "NOT CAUSAL"
    return "\n".join([word, *(f"  {r.name}: {'passed' if r.passed else 'FAILED'}: {r.detail}" for r in results)])


def load(subject: str, options: list[str], device: torch.device) -> tuple[Config, SwitchBankGPT, StepState]:
    """The model of a run's folder, or an untrained one of a preset with options of its configuration.

    Raises ConfigError, CheckpointError or ModelFolderError where there is none.
    """
    if subject in presets:
        config = parse([subject, *options], subject, PROGRAM).check()
        torch.manual_seed(config.run.seed)
        with device:
            model = SwitchBankGPT(config.model).eval()
        return config, model, schedules.step_state(config.schedule.steps, config, device)
    if not Path(subject).is_dir():
        raise ConfigError(f"{subject!r} is neither a run's folder nor a preset: presets are {', '.join(presets)}")
    if options:
        raise ConfigError(f"{options[0]} is for presets: the run in {subject} has its own configuration")
    from switch_bank.export import load_model  # here, because the trainer imports this module and needs no hub client

    config, model = load_model(Path(subject), device)
    assert model.trained_state is not None
    return config, model, model.trained_state


def main(arguments: list[str]) -> int:
    """`python -m switch_bank audit`; returns the exit code: 0 causal, 1 not, 2 not audited."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [-h] RUN|PRESET [--group.option VALUE ...]",
        description="Is it causal? Exit code 0 if the model's probabilities depend on no later token, 1 if they do, 2 "
        "if that could not be tried.",
    )
    parser.add_argument(
        "subject", metavar="RUN|PRESET", help="a run's folder, or a preset, whose options PRESET --help lists"
    )
    subject, options = parser.parse_args(arguments[:1]).subject, arguments[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config, model, state = load(subject, options, device)
    except (CheckpointError, ConfigError, ModelFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began, untrained = time.perf_counter(), model.trained_state is None
    tokens = config.data.val_slice_tokens
    slices, shortened = max(1, config.run.tokens_per_forward // tokens), ""
    if device.type == "cpu" and slices * tokens > CPU_TOKENS:
        shortened = f", not {slices} of {tokens}: this is a CPU"
        slices, tokens = 4, min(tokens, 512)
    windows: Sequence[int | None] = (None,)
    if model.attention_backend == "flash":
        windows = schedules.attention_windows(config.model.window)
    # As the trainer sets it, so that the real path is its own, compiled code of an earlier run included.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    set_numerics(device)
    if config.run.compile:
        model.compile()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{subject}: {count:,} parameters, {'with random values' if untrained else 'as trained'}, on {device}\n"
        f"float64 reference: slices of {TOKENS} tokens, attention window {WINDOW}; gradients with the windows of the "
        f"configuration\n"
        f"{compute_dtype(config.model.dtype, device)} as trained: {model.attention_backend} attention, "
        f"{'compiled' if config.run.compile else 'not compiled'}, {slices} slices of {tokens} tokens{shortened}",
        flush=True,
    )
    try:
        with random_parameters(model, config.run.seed) if untrained else nullcontext():
            results = findings(model, state, slices, tokens, windows, whole=True, seed=config.run.seed)
    except Exception as error:  # of any kind: Python would exit with 1, which says that the model is not causal
        print(f"error: {type(error).__name__} in a check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{verdict(results)}\n{time.perf_counter() - began:.0f} s")
    return 0 if all(result.passed for result in results) else 1
