"""Attention of single tokens on a CPU with AVX2 or AVX-512: the kernel of attention_cpu.cpp, for decoding."""

from pathlib import Path

import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels

SOURCE = Path(__file__).with_suffix(".cpp")


def takes(n: Tensor) -> bool:
    """Whether the kernel runs here, for a layer's input n [B, T, D]: a token of each stream, float32."""
    return cpu_kernels.RUN and n.shape[1] == 1 and n.dtype == torch.float32 and n.device.type == "cpu"


def attend_token(
    n: Tensor, qkvo: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None, mix: Tensor, mask: Tensor,
    keys: Tensor, values: Tensor, place: int, scale: float,
) -> Tensor:  # fmt: skip
    """`model.attention.self_attention` of the next token of each stream, without gradients: [B, 1, D] in and out.

    keys, values: [B, window, H, d], those of a ring; this token's are written at `place`. mask: of `ring_mask`.
    """
    cpu_kernels.load(SOURCE, instead="--model.attention-backend reference")
    return torch.ops.switch_bank.attend_token(
        n.contiguous(), qkvo, *rotary, value_embedding, mix, mask, keys, values, place, scale
    )
