"""Softmax attention of a block: per-head RMS norm, half-truncated rotary, value embeddings, documents and window."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_bank.ops import attention_cpu
from switch_bank.ops.attention import attention
from switch_bank.ops.microbatches import linear, scaled

SCALE = 0.12  # of the scores; q and k are normed, so it does not depend on the head's width


@dataclass
class Ring:
    """The keys and values of a layer's last tokens, as many as its window spans; token i stands at i mod window."""

    keys: Tensor  # [B, window, H, d]
    values: Tensor  # [B, window, H, d]
    tokens_read: int = 0

    def next_place(self) -> int:
        """Where the next token's key and value are to be written; it counts as read."""
        self.tokens_read += 1
        return (self.tokens_read - 1) % self.keys.shape[1]

    def read(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the next T tokens' keys and values, [B, T, H, d] each, in the places of those that leave the window.
        Returns what these tokens may see, in the order of `ring_mask`."""
        tokens, window = key.shape[1], self.keys.shape[1]
        if tokens == 1:
            place = self.next_place()
            self.keys[:, place], self.values[:, place] = key[:, 0], value[:, 0]
            return self.keys[:, : self.tokens_read], self.values[:, : self.tokens_read]
        before, self.tokens_read = self.tokens_read, self.tokens_read + tokens
        seen = torch.cat([self.keys[:, :before], key], dim=1), torch.cat([self.values[:, :before], value], dim=1)
        last = torch.arange(max(0, tokens - window), tokens, device=key.device)
        places = (before + last) % window
        self.keys[:, places], self.values[:, places] = key[:, last], value[:, last]
        return seen


def attention_matrices(width: int) -> nn.Parameter:
    """A layer's matrices q, k, v and o, [4, D, D], each (out, in); o starts at zero."""
    bound = 0.5 * (3 / width) ** 0.5
    matrices = torch.empty(4, width, width).uniform_(-bound, bound)
    matrices[3] = 0
    return nn.Parameter(matrices)


def self_attention(
    qkvo: Tensor, n: Tensor, heads: int, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None, mix: Tensor,
    backend: str, mask: Any, ring: Ring | None = None,
) -> Tensor:  # fmt: skip
    """qkvo: [4, D, D]; n: [B, T, D]; value_embedding: [B, T, D] or None; mix: [2], the weights of v and of the value
    embedding. qkvo and mix may be per microbatch. With a ring, these tokens are the next ones after those that it
    holds."""
    shape = (*n.shape[:2], -1, n.shape[2] // heads)
    weight = qkvo.to(n.dtype)
    if ring is not None and backend != "reference" and attention_cpu.takes_token(n):
        place = ring.next_place()
        return attention_cpu.attend_token(
            n, weight, rotary, value_embedding, mix, mask, ring.keys, ring.values, place, SCALE
        )
    query, key = rotate(rms_norm(linear(n, weight[..., :2, :, :].flatten(-3, -2)).view(shape)), rotary).chunk(2, dim=2)
    # A scale a row, so that its gradient is summed by rows: how one sum of all is cut up depends on the threads.
    value = linear(n, mix[..., 0, None, None].expand(*mix.shape[:-1], n.shape[2], 1) * weight[..., 2, :, :])
    if value_embedding is not None:
        value = value + scaled(value_embedding, mix[..., 1])
    value = value.view(shape)
    if ring is not None:
        key, value = ring.read(key, value)
        backend = "reference" if backend == "reference" else "sdpa"  # the others take no ring
    y = attention(backend, query, key, value, mask, SCALE)
    return linear(y.flatten(2), weight[..., 3, :, :])


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotary_tables(position: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, T, 1, head_dim / 2] each, of document positions [B, T]. The second half of the frequencies
    is zero ("half-truncated"): those channels carry content only."""
    turning = head_dim // 4
    exponent = torch.linspace(
        0, 1, turning, device=position.device, dtype=torch.float64 if dtype == torch.float64 else None
    )
    frequency = F.pad((1 / 1024) ** exponent, (0, head_dim // 2 - turning))
    angle = position[..., None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of x [B, T, H, d], pairing channel i with i + d/2."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
