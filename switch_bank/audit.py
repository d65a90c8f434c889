"""Is it causal? Checks from outside the model: change what comes later, see whether anything before it moves.

Zero-initialised output matrices would let any model pass, so every check runs with random values in every parameter.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switch_bank.config import ModelConfig
from switch_bank.model.gpt import Output, SwitchBankGPT
from switch_bank.schedules import StepState

MARGIN = 1e-5  # a route whose top-K margin is below this may flip by rounding
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}  # on a token's loss in nats


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    passed: bool
    detail: str


@contextmanager
def random_parameters(model: nn.Module, seed: int) -> Iterator[None]:
    """Every parameter holds random values of a trained model's size within the block; after it, or an error in it,
    its own again."""
    own = [parameter.detach().clone() for parameter in model.parameters()]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * fan_in**-0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), own, strict=True):
                parameter.copy_(value)


def random_documents(config: ModelConfig, tokens: int, device: torch.device, seed: int) -> Tensor:
    """[tokens] int64: random text in documents of 1 to tokens/2 tokens, an empty one and a long one among them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab_size, (tokens,), generator=generator)
    text[text == config.eod_token] = (config.eod_token + 1) % config.vocab_size
    starts = torch.tensor([tokens // 8, tokens // 8 + 1, tokens // 4, tokens // 4 + tokens // 2])
    text[starts] = config.eod_token
    return text.to(device)


def cut_points(tokens: int, window: int, count: int, seed: int) -> list[int]:
    """First changed tokens: at the edges of documents (`random_documents`), blocks and the window, and at random."""
    quarter, half = tokens // 4, tokens // 2
    edges = [1, tokens - 1, quarter, quarter + 1, quarter + half, tokens // 8 + 1]
    edges += [64, 127, 128, quarter + window - 1, quarter + window]
    edges = list(dict.fromkeys(edge for edge in edges if 0 < edge < tokens))[:count]
    generator = torch.Generator().manual_seed(seed)
    while len(edges) < count:
        edges.append(int(torch.randint(1, tokens, (1,), generator=generator)))
    return edges


@torch.no_grad()
def check_suffix(
    forward: Callable[..., Output], config: ModelConfig, state: StepState, tokens: int, slices: int,
    device: torch.device, tolerance: float, window: int | None = None, cuts_in_all: int = 16, seed: int = 0,
) -> Finding:  # fmt: skip
    """Changes all tokens from a cut on and compares what is before it, on the path `forward` (an eval-mode model).

    Targets are held fixed, so that the loss of a token is a function of its logits alone. `slices` slices of
    `tokens` tokens go through together, each with a cut of its own.
    """
    worst, excused, compared, moves, moved_at = 0.0, 0, 0, False, []
    cuts = cut_points(tokens, int(state.window), cuts_in_all, seed)
    for start in range(0, len(cuts), slices):
        own_cuts = torch.tensor([cuts[(start + row) % len(cuts)] for row in range(slices)], device=device)
        text = random_documents(config, tokens, device, seed + start).expand(slices, tokens).contiguous()
        other = random_documents(config, tokens, device, seed + start + 1).expand(slices, tokens)
        other = torch.where(other == text, (other + 1) % config.vocab_size, other)
        targets = text.roll(-1, dims=1)
        before_cut = torch.arange(tokens, device=device) < own_cuts[:, None]
        one = forward(text, targets, state, window=window)
        two = forward(torch.where(before_cut, text, other), targets, state, window=window)
        difference = (one.token_losses - two.token_losses).abs()
        moves = moves or bool((difference[~before_cut] > 0).any())
        difference = torch.where(before_cut, difference, 0.0)
        # A flipped route changes its token and, through attention and state, all that follow it.
        flippable = one.margins.cummin(dim=1).values < MARGIN
        excused += int((flippable & (difference > tolerance)).sum())
        wrong = difference.masked_fill(flippable, 0.0)
        if not bool(torch.isfinite(wrong).all()):
            return Finding("suffix", False, "the losses are not finite: nothing can be said")
        worst, compared = max(worst, float(wrong.max())), compared + int(before_cut.sum())
        moved_at += [
            f"token {int(t)} reads at least {int(own_cuts[s] - t)} ahead" for s, t in (wrong > tolerance).nonzero()[:4]
        ]
    if not moves:
        return Finding("suffix", False, "nothing moves after a change either: nothing can be said")
    detail = (
        f"{len(cuts)} cuts, {compared} losses before them, largest change {worst:.2g} (tolerance {tolerance:g}), "
        f"{excused} excused by a route margin below {MARGIN:g}"
    )
    if moved_at:
        detail += "; " + ", ".join(moved_at[:4])
    return Finding("suffix", worst <= tolerance, detail)


def check_gradients(model: SwitchBankGPT, state: StepState, tokens: int, seed: int = 0) -> Finding:
    """The gradient of logits at t with respect to the embeddings after t must be exactly zero, and before t must not.

    Runs eagerly in float32 with the reference kernels on a twin that holds the model's own parameters.
    """
    config = dataclasses.replace(model.config, dtype="float32", attention_backend="reference", bank_backend="reference")
    with torch.device("meta"):
        twin = SwitchBankGPT(config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    looked_up: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        looked_up.append(output.detach().requires_grad_())
        return looked_up[-1]

    for embedding in [twin.embedding, *twin.value_embeddings]:
        embedding.register_forward_hook(keep)
    device = model.head.device
    text = random_documents(config, tokens, device, seed)[None]
    hidden = twin.trunk(text, state)[0]
    points = sorted({0, 1, tokens // 8, tokens // 4 + 1, tokens // 2, 3 * tokens // 4, tokens - 2})
    ahead = []
    reads_back = False
    for t in points:
        direction = torch.randn(config.padded_vocab, generator=torch.Generator().manual_seed(seed + t)).to(device)
        total = (twin.logits(hidden[0, t]) * direction).sum()
        gradients = torch.autograd.grad(total, looked_up, retain_graph=True, allow_unused=True)
        strength = torch.stack([g[0].abs().amax(-1) for g in gradients if g is not None]).amax(0)  # [tokens]
        ahead += [(t, int(u) - t) for u in strength[t + 1 :].nonzero().flatten()[-1:] + t + 1]
        reads_back = reads_back or bool((strength[:t] > 0).any())
    if not reads_back:
        return Finding("gradient", False, "no gradient reaches any earlier token either: nothing can be said")
    detail = f"logits at {len(points)} positions, gradient to every later embedding " + (
        "exactly 0" if not ahead else "NOT 0"
    )
    if ahead:
        detail += ": " + ", ".join(f"token {t} reads up to {far} ahead" for t, far in ahead[:4])
    return Finding("gradient", not ahead, detail)


def verdict(findings: list[Finding]) -> str:
    """The line that a log carries: `causal: yes` or `NOT CAUSAL`, and why."""
    word = "causal: yes" if all(finding.passed for finding in findings) else "NOT CAUSAL"
    return "\n".join([word, *(f"  {f.name}: {'passed' if f.passed else 'FAILED'}: {f.detail}" for f in findings)])
