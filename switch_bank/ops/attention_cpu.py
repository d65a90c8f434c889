"""Attention in float32 on a CPU with AVX2 or AVX-512: the kernels of attention_cpu.cpp, compiled once."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels
from switch_bank.ops.spans import backward_by, gradients, outputs, save_for_backward

SOURCE = Path(__file__).with_suffix(".cpp")


def attend(query: Tensor, key: Tensor, value: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """query, key, value: [B, T, H, d] float32. Query t sees keys first[t] to t, and key j is seen by queries j to
    end[j] - 1; first, end: [B, T] int32, neither falls along T. Returns [B, T, H, d], contiguous.

    A token's result has the same bits wherever its document is packed, whatever comes after it, and on any number of
    threads."""
    _load()
    return torch.ops.switch_bank.attend_slices(query, key, value, first, end, scale)[0]


def takes_token(n: Tensor) -> bool:
    """Whether `attend_token` runs here, for a layer's input n [B, T, D]: a token of each stream, float32."""
    return cpu_kernels.RUN and n.shape[1] == 1 and n.dtype == torch.float32 and n.device.type == "cpu"


def attend_token(
    n: Tensor, qkvo: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None, mix: Tensor, mask: Tensor,
    keys: Tensor, values: Tensor, place: int, scale: float,
) -> Tensor:  # fmt: skip
    """`model.attention.self_attention` of the next token of each stream, without gradients: [B, 1, D] in and out.

    keys, values: [B, window, H, d], those of a ring; this token's are written at `place`. mask: of `ring_mask`.
    """
    _load()
    return torch.ops.switch_bank.attend_token(
        n.contiguous(), qkvo, *rotary, value_embedding, mix, mask, keys, values, place, scale
    )


@functools.cache
def _load_once() -> None:
    cpu_kernels.load(SOURCE, advice="--model.attention-backend reference does without it")
    torch.library.register_fake("switch_bank::attend_slices", outputs)
    torch.library.register_fake("switch_bank::attend_slices_backward", gradients)
    torch.library.register_autograd(
        "switch_bank::attend_slices", backward_by(torch.ops.switch_bank.attend_slices_backward),
        setup_context=save_for_backward,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _load() -> None:
    """Where a function that attends is compiled, while it is."""
    _load_once()
