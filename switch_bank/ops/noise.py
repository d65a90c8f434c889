"""Random draws that depend on what they are for, not on when or where they are made.

A draw is a hash of (seed, step, slice, layer, position, expert): batching slices differently, recomputing a layer or
resuming a run on other processes gives the same draws.
"""

import torch
from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """A bijective scramble of 32-bit integers held in int64 (the two-round xor-shift-multiply of C. Wellons'
    hash-prospector, constants 21f0aaad and d35a2d97, shifts 16, 15, 15)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    # The second constant is above 2^31: its representative below zero keeps the product within int64.
    x = ((x ^ (x >> 15)) * (0xD35A2D97 - (1 << 32))) & 0xFFFFFFFF
    return x ^ (x >> 15)


def gumbel_keys(seed: Tensor | int, step: Tensor, slices: Tensor, layers: int) -> Tensor:
    """What each layer's draws begin with, [layers, B] int64; seed, step: 0-dim; slices: [B] int64, indices in the step.

    Not to be compiled: Inductor traces a value once more for each of its uses, and a hash uses its input eight times.
    The four hashes here and the two of a draw, in one graph, kept it busy for 25 s."""
    device = slices.device
    of_slice = mix(mix(step.long() + mix(torch.as_tensor(seed, device=device))) + slices)
    return mix(of_slice + torch.arange(layers, device=device)[:, None])


def gumbel(keys: Tensor, tokens: int, experts: int) -> Tensor:
    """Gumbel(0, 1) draws [B, tokens, experts] in float32 from one layer's keys [B]."""
    of_token = mix(keys[:, None] + torch.arange(tokens, device=keys.device))
    bits = mix(of_token[..., None] + torch.arange(experts, device=keys.device))
    # 23 bits and a half fit float32 exactly, so that a draw is never 0 or 1.
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    # log1p: compiled for a GPU, log is an approximation that may round log(1 - 2^-24) to 0, and the draw to infinity.
    return -torch.log(-torch.log1p(-uniform))
