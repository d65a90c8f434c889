"""TurboMuon against Muon on the matrices of a preset: milliseconds of a step, and how orthogonal the update is.

python -m benchmarks.optimizer [PRESET] [--group.option VALUE ...] [--seconds S] [--json]
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, device_name, preset_options, quartiles, random_like, show
from switch_bank.config import Config, compute_dtype
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.ops.orthogonalize import POLYNOMIALS, Variant, orthogonalize
from switch_bank.optim.groups import parameter_groups
from switch_bank.optim.turbo_muon import TurboMuon


def plain_matmuls(matrices: Tensor, variant: Variant) -> Tensor:
    """Newton-Schulz with a plain batched product for each product of the formula; matrices [n, rows <= cols]."""
    x = matrices / torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLYNOMIALS[variant]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def matrix_shapes(config: Config) -> list[torch.Size]:
    """Shapes [..., rows, cols] of the parameters that Muon updates."""
    with torch.device("meta"):
        groups = parameter_groups(SwitchBankGPT(config.model))
    return [parameter.shape for parameter in groups["attention"] + groups["experts"]]


def gradients(shapes: list[torch.Size], spectrum: str, device: torch.device) -> list[Tensor]:
    """Random gradients: "gaussian" values, or singular values 1, 1/2, 1/3, ... ("decaying") in random directions."""
    drawn = [random_like(shape, device, torch.float32) for shape in shapes]
    if spectrum == "decaying":
        for gradient in drawn:
            left = torch.linalg.qr(gradient).Q
            right = torch.linalg.qr(torch.randn_like(gradient.mT)).Q
            rank = min(gradient.shape[-2:])
            values = 1 / torch.arange(1, rank + 1, device=device)
            gradient.copy_(left[..., :rank] * values @ right[..., :rank].mT)
    return drawn


def contenders(
    shapes: list[torch.Size], config: Config, device: torch.device, lr: float, momentum: float
) -> dict[str, tuple[list[nn.Parameter], torch.optim.Optimizer]]:
    """Each optimizer with parameters of its own, all zero; torch's takes no stacked matrices, so it has one each."""
    dtype = compute_dtype(config.optim.muon_dtype, device)

    def stacked() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]

    def ours(variant: Variant, kernel: Callable[[Tensor, Variant], Tensor] = orthogonalize) -> TurboMuon:
        return TurboMuon(stacked(), lr, momentum, variant=variant, dtype=dtype, orthogonalize=kernel)

    single = [
        nn.Parameter(torch.zeros(shape[-2:], device=device)) for shape in shapes for _ in range(shape[:-2].numel())
    ]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "turbo": ours("turbo"),
        "plain": ours("plain"),
        "plain_matmuls": ours("plain", plain_matmuls),
        "torch_muon": torch.optim.Muon(single, lr=lr, momentum=momentum, weight_decay=0.0, adjust_lr_fn="original"),
    }
    return {name: (optimizer.param_groups[0]["params"], optimizer) for name, optimizer in optimizers.items()}


def set_gradients(parameters: list[nn.Parameter], given: list[Tensor]) -> None:
    """Each stacked gradient to its parameter, or matrix by matrix to parameters of one matrix each."""
    if len(parameters) != len(given):
        given = [matrix for gradient in given for matrix in gradient.reshape(-1, *gradient.shape[-2:])]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.view_as(parameter)


def orthogonality_error(update: Tensor) -> float:
    """Mean over the matrices U of `update` [..., rows, cols], taken so that rows <= cols, of the Frobenius norm of
    U·Uᵀ - I, divided by the rank: 0 for orthonormal rows, at most 1 for values between 0 and 1."""
    wide = update.mT if update.shape[-2] > update.shape[-1] else update
    rows = wide.shape[-2]
    off = wide @ wide.mT - torch.eye(rows, device=update.device)
    return (torch.linalg.matrix_norm(off) / rows).mean().item()


def mean_error(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, given: list[Tensor]) -> float:
    """Orthogonality error of the update that a gradient alone makes: one step of rate 1 from zero, without momentum."""
    set_gradients(parameters, given)
    optimizer.step()
    total, count = 0.0, 0
    for parameter in parameters:
        rows, cols = parameter.shape[-2:]
        matrices = parameter.shape[:-2].numel()
        total += matrices * orthogonality_error(parameter.detach() / max(1, rows / cols) ** 0.5)
        count += matrices
    return total / count


def measure(config: Config, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each optimizer; `ratio` is its time over that of plain Muon with plain batched products."""
    shapes = matrix_shapes(config)
    errors: dict[str, dict[str, float]] = {}
    for spectrum in ("gaussian", "decaying"):
        given = gradients(shapes, spectrum, device)
        for name, (parameters, optimizer) in contenders(shapes, config, device, lr=1.0, momentum=0.0).items():
            errors.setdefault(name, {})[spectrum] = mean_error(parameters, optimizer, given)
    timed = contenders(shapes, config, device, lr=config.optim.muon_lr, momentum=config.optim.muon_momentum[1])
    for parameters, _ in timed.values():
        set_gradients(parameters, given)
    times = alternate({name: optimizer.step for name, (_, optimizer) in timed.items()}, device, seconds)
    slowest = statistics.median(times["plain_matmuls"])
    dtype = str(compute_dtype(config.optim.muon_dtype, device)).removeprefix("torch.")
    return [
        {
            "device": device_name(device), "preset": config.preset, "optimizer": name,
            "dtype": "bfloat16" if name == "torch_muon" else dtype,
            "matrices": sum(shape[:-2].numel() for shape in shapes), "ms": statistics.median(times[name]),
            "quartiles_ms": quartiles(times[name]), "ratio": statistics.median(times[name]) / slowest,
            "orthogonality_error": errors[name], "repetitions": len(times[name]),
        }
        for name in timed
    ]  # fmt: skip


def main() -> int:
    options, device, config = preset_options(
        "python -m benchmarks.optimizer", __doc__.splitlines()[0], 10.0, "for all", "an object a line"
    )
    torch.manual_seed(0)
    for row in measure(config, device, options.seconds):
        errors = ", ".join(f"{spectrum} {error:.4f}" for spectrum, error in row["orthogonality_error"].items())
        text = f"{row['optimizer']:<22}{row['ms']:9.2f} ms  {row['ratio']:.3f} of plain matmuls  error {errors}"
        show(row, options.json, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
