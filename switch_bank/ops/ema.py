"""Decayed sums within documents: what the router's forward and reverse EMA are made of."""

import torch
from torch import Tensor

CHUNK = 64  # tokens that one triangular product covers


def document_scan_reference(x: Tensor, decay: float, document: Tensor) -> Tensor:
    """`document_scan` token by token, as its definition reads."""
    carry, sums = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        goes_on = document[:, t] == document[:, t - 1] if t else torch.zeros_like(document[:, 0], dtype=torch.bool)
        carry = scan_step(x[:, t], decay, carry, goes_on)
        sums.append(carry)
    return torch.stack(sums, dim=1)


def scan_step(x: Tensor, decay: float, carry: Tensor, goes_on: Tensor) -> Tensor:
    """One token of `document_scan`: x [..., D] after the sum `carry` [..., D], where goes_on [...] bool says that the
    token is not the first one of its document."""
    return x + torch.where(goes_on[..., None], decay * carry, 0.0)


def document_scan(x: Tensor, decay: float, document: Tensor) -> Tensor:
    """y_t = Σ_j decay^(t-j)·x_j over the tokens j <= t of t's document.

    x: [B, T, D] floating; document: [B, T] integers that never fall along T; 0 < decay <= 1. Returns [B, T, D].
    A triangular product within each chunk of 64 tokens, another one over the chunks' ends for what they carry on:
    no running sum is ever subtracted, and a masked weight is an exact zero, in the gradient too.
    """
    batch, tokens, width = x.shape
    padding = -tokens % CHUNK
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        document = torch.nn.functional.pad(document, (0, padding), value=torch.iinfo(document.dtype).max)
    chunks = (tokens + padding) // CHUNK
    x, document = x.view(batch, chunks, CHUNK, width), document.view(batch, chunks, CHUNK)

    within = _decay_matrix(CHUNK, decay, x) * (document[..., :, None] == document[..., None, :])
    y = within @ x
    if chunks > 1:
        last = document[..., -1]
        over_chunks = _decay_matrix(chunks, decay**CHUNK, x) * (last[..., :, None] == last[..., None, :])
        ends = over_chunks @ y[:, :, -1]  # [B, chunks, D]: the whole sum at the last token of each chunk
        carried, from_document = ends[:, :-1, None], last[:, :-1, None]
        fade = decay ** torch.arange(1, CHUNK + 1, device=x.device, dtype=x.dtype)
        weight = fade * (document[:, 1:] == from_document)
        y = torch.cat([y[:, :1], y[:, 1:] + weight[..., None] * carried], dim=1)
    return y.reshape(batch, tokens + padding, width)[:, :tokens]


def _decay_matrix(size: int, decay: float, like: Tensor) -> Tensor:
    """[size, size] with decay^(i-j) at and below the diagonal, 0 above it."""
    steps = torch.arange(size, device=like.device)
    distance = steps[:, None] - steps[None, :]
    return torch.where(distance >= 0, decay ** distance.clamp(min=0).to(like.dtype), 0.0)
