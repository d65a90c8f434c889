"""What a router sees: the token, what its document has said (EMAs), and where in the document it stands (flags)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.config import ModelConfig
from switch_bank.ops.ema import document_scan


class Documents(NamedTuple):
    """Where the tokens of a batch of slices stand; all [B, T]. A slice's first token counts as a document start."""

    document: Tensor  # int64: index of the document within the slice
    position: Tensor  # int64: tokens since the document's first one
    flags: Tensor | None  # [B, T, flag_features] float32


def documents_of(tokens: Tensor, config: ModelConfig) -> Documents:
    """tokens: [B, T] int64; documents begin at `eod_token`."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    is_eod = tokens == config.eod_token
    starts = is_eod | (index == 0)
    document = starts.long().cumsum(dim=1)
    position = index - torch.where(starts, index, 0).cummax(dim=1).values
    return Documents(document, position, _flags(is_eod, position, config) if config.flags else None)


def _flags(is_eod: Tensor, position: Tensor, config: ModelConfig) -> Tensor:
    # Position 1 tells apart an EOD of this document from one that was a document of its own.
    follows_eod = F.pad(is_eod[:, :-1], (1, 0)) & (position == 1)
    opening = position < config.opening_tokens
    bins = F.one_hot(position % 128 * config.position_bins // 128, config.position_bins)
    return torch.cat([torch.stack([is_eod, follows_eod, opening], dim=-1), bins.bool()], dim=-1).float()


def forward_ema(n: Tensor, document: Tensor, decay: float) -> Tensor:
    """f_t = a·f_{t-1} + (1-a)·n_t, from zero at each document's start. n: [B, T, D]; returns float32 or float64."""
    return (1 - decay) * document_scan(_at_least_float32(n), decay, document)


def reverse_ema(n: Tensor, documents: Documents, decay: float, window: int, normalized: bool) -> Tensor:
    """The causal reverse EMA, a document's opening as known at t: r_t = Σ_{i=s..t} a^(i-s)·n_i over i - s < window,
    divided by the sum of its weights (`normalized`) or times 1 - a. n: [B, T, D]; returns float32 or float64."""
    n = _at_least_float32(n)
    position = documents.position
    weight = torch.where(position < window, decay ** position.clamp(max=window).to(n.dtype), 0.0)
    weighted = document_scan(weight[..., None] * n, 1.0, documents.document)
    if not normalized:
        return (1 - decay) * weighted
    read = (position + 1).clamp(max=window).to(n.dtype)
    # expm1: near decay 1, float32 would lose digits to 1 - decay^read.
    return weighted * ((1 - decay) / -torch.expm1(math.log(decay) * read))[..., None]


def leaky_reverse_ema(n: Tensor, documents: Documents, decay: float, window: int) -> Tensor:
    """The published form, which READS FUTURE TOKENS: an EMA that runs from right to left over the first `window`
    tokens of a document, and its value at their last token for all later ones. Kept to price the leak."""
    n = _at_least_float32(n)
    document, position, _ = documents
    opening = position < window
    # From right to left the document index falls; its negative rises, as the scan wants.
    backward = document_scan((opening[..., None] * n).flip(1), decay, -document.flip(1)).flip(1)
    index = torch.arange(n.shape[1], device=n.device)
    opening_end = index - position + window - 1  # for tokens past the opening: its last token
    source = torch.where(opening, index, opening_end)
    return (1 - decay) * backward.gather(1, source[..., None].expand_as(n))


def ema_features(n: Tensor, documents: Documents, config: ModelConfig) -> list[Tensor]:
    """The EMAs that the configuration asks for, each like n [B, T, D], the bank input of a group's first layer."""
    features = []
    if config.forward_ema:
        features.append(forward_ema(n, documents.document, config.forward_decay))
    if config.reverse_ema == "causal":
        features.append(
            reverse_ema(n, documents, config.reverse_decay, config.reverse_window, config.reverse_normalized)
        )
    elif config.reverse_ema == "leaky":
        features.append(leaky_reverse_ema(n, documents, config.reverse_decay, config.reverse_window))
    return features


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
