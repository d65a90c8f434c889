"""What a router sees: the token, what its document has said (EMAs), and where in the document it stands (flags)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from switch_bank.config import ModelConfig
from switch_bank.ops.ema import document_scan, scan_step


class Documents(NamedTuple):
    """Where the tokens of a batch of slices stand; all [B, T]. A slice's first token counts as a document start."""

    document: Tensor  # int64: index of the document within the slice
    position: Tensor  # int64: tokens since the document's first one
    is_eod: Tensor  # bool
    flags: Tensor | None  # [B, T, flag_features] float32


class EmaSums(NamedTuple):
    """What the EMAs of one group of layers have summed up to the last token; [B, 1, C] float32 or float64 each, C being
    `Routers.ema_channels`."""

    forward: Tensor
    reverse: Tensor


def documents_of(tokens: Tensor, config: ModelConfig, before: Documents | None = None) -> Documents:
    """tokens: [B, T] int64; documents begin at `eod_token`. `before` is of the tokens before these in their slices; its
    position is -1 where there are none."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    is_eod = tokens == config.eod_token
    document = is_eod.long().cumsum(dim=1)
    if before is None:
        start, was_eod = torch.zeros_like(index[:1]), torch.zeros_like(is_eod[:, :1])
    else:
        start, was_eod = -1 - before.position[:, -1:], before.is_eod[:, -1:]
        document = document + before.document[:, -1:]
    position = index - torch.where(is_eod, index, start).cummax(dim=1).values
    after_eod = torch.cat([was_eod, is_eod[:, :-1]], dim=1)
    return Documents(document, position, is_eod, _flags(is_eod, after_eod, position, config) if config.flags else None)


def _flags(is_eod: Tensor, after_eod: Tensor, position: Tensor, config: ModelConfig) -> Tensor:
    # Position 1 tells apart an EOD of this document from one that was a document of its own.
    follows_eod = after_eod & (position == 1)
    opening = position < config.opening_tokens
    bins = torch.arange(config.position_bins, device=position.device)
    in_bin = (position % 128 * config.position_bins // 128)[..., None] == bins
    return torch.cat([torch.stack([is_eod, follows_eod, opening], dim=-1), in_bin], dim=-1).float()


def forward_ema(n: Tensor, documents: Documents, decay: float, past: Tensor | None = None) -> Tensor:
    """f_t = a·f_{t-1} + (1-a)·n_t, from zero at each document's start. n: [B, T, D]; returns float32 or float64.
    `past` is of `_scan`."""
    return (1 - decay) * _scan(_at_least_float32(n), decay, documents, past)


def reverse_ema(
    n: Tensor, documents: Documents, decay: float, window: int, normalized: bool, past: Tensor | None = None
) -> Tensor:
    """The causal reverse EMA, a document's opening as known at t: r_t = Σ_{i=s..t} a^(i-s)·n_i over i - s < window,
    divided by the sum of its weights (`normalized`) or times 1 - a. n: [B, T, D]; returns float32 or float64.
    `past` is of `_scan`."""
    n = _at_least_float32(n)
    position = documents.position
    weight = torch.where(position < window, decay ** position.clamp(max=window).to(n.dtype), 0.0)
    weighted = _scan(weight[..., None] * n, 1.0, documents, past)
    if not normalized:
        return (1 - decay) * weighted
    read = (position + 1).clamp(max=window).to(n.dtype)
    # expm1: near decay 1, float32 would lose digits to 1 - decay^read.
    return weighted * ((1 - decay) / -torch.expm1(math.log(decay) * read))[..., None]


def leaky_reverse_ema(n: Tensor, documents: Documents, decay: float, window: int, past: Tensor | None = None) -> Tensor:
    """The published form, which READS FUTURE TOKENS: an EMA that runs from right to left over the first `window`
    tokens of a document, and its value at their last token for all later ones. Kept to price the leak.

    With `past` [B, 1, D], the last of these tokens that was read, the tokens to come are not there: T is 1, and the
    document is taken as one that ends at t. That is the best that generation can do, and not what the model was trained
    on."""
    n = _at_least_float32(n)
    opening = documents.position < window
    if past is not None:
        return (1 - decay) * past.copy_(torch.where(opening[..., None], n, past))
    # From right to left the document index falls; its negative rises, as the scan wants.
    backward = document_scan((opening[..., None] * n).flip(1), decay, -documents.document.flip(1)).flip(1)
    index = torch.arange(n.shape[1], device=n.device)
    opening_end = index - documents.position + window - 1  # for tokens past the opening: its last token
    source = torch.where(opening, index, opening_end)
    return (1 - decay) * backward.gather(1, source[..., None].expand_as(n))


def emas_of(documents: Documents, config: ModelConfig, past: EmaSums | None = None) -> list[Callable[[Tensor], Tensor]]:
    """The EMAs that the configuration asks for, each a linear function of a tensor [B, T, C] that gives one like it.
    `past`, the sums before these tokens, is brought up to date in place."""
    of_forward, of_reverse = past or (None, None)
    decay, window = config.reverse_decay, config.reverse_window
    emas: list[Callable[[Tensor], Tensor]] = []
    if config.forward_ema:
        emas.append(lambda x: forward_ema(x, documents, config.forward_decay, of_forward))
    if config.reverse_ema == "causal":
        emas.append(lambda x: reverse_ema(x, documents, decay, window, config.reverse_normalized, of_reverse))
    elif config.reverse_ema == "leaky":
        emas.append(lambda x: leaky_reverse_ema(x, documents, decay, window, of_reverse))
    return emas


def _scan(x: Tensor, decay: float, documents: Documents, past: Tensor | None) -> Tensor:
    """`document_scan` of x [B, T, D]; or T tokens more of it, the last sums of which take the place of `past`, the sums
    before them [B, 1, D]."""
    document, position = documents.document, documents.position
    if past is None:
        return document_scan(x, decay, document)
    if x.shape[1] == 1:
        return past.copy_(scan_step(x, decay, past, position > 0))
    summed = document[:, :1] - (position[:, :1] == 0).long()  # the document that `past` is of
    sums = document_scan(torch.cat([past, x], dim=1), decay, torch.cat([summed, document], dim=1))[:, 1:]
    past.copy_(sums[:, -1:])
    return sums


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
