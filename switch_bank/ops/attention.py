"""Causal attention within documents and a sliding window: one call, several backends.

A *mask* is what a backend wants to know about who sees whom; it is built once for all layers that share a window.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from switch_bank.ops import TRITON_INSTALLED, attention_cpu, cpu_kernels
from switch_bank.ops.spans import Spans

BLOCK = 128  # tokens of one side of a flex-attention block
# Of the backward in bfloat16. On an H200 these take 0.91 of the time of torch's own choice.
FLEX_OPTIONS: FlexKernelOptions = {
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_warps": 4,
    "bwd_num_stages": 2,
}  # type: ignore[typeddict-unknown-key]  # fmt: skip
FLASH_ATTN_INSTALLED = find_spec("flash_attn") is not None
TRITON_WIDTHS = (16, 32, 64, 128)  # of a head
TOKENS_PER_DOCUMENT = 32  # flash: what a slice's documents must have on average, at least


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend an option names. "auto" on CUDA is flash-attn for bfloat16 if it is installed, else our own kernels
    in Triton for the widths of heads that they take, else flex. On a CPU it is in float32 "cpu", our own kernel, where
    it runs, and else SDPA, but in bfloat16 the plain matmuls of "reference", which took 11 ms where masked SDPA took 26
    (forward and backward of a layer of `nano`). "flash" and "triton" are "auto" where their kernels cannot run: a model
    trained with them is read on a CPU, too."""
    cuda = device.type == "cuda"
    flash_runs = FLASH_ATTN_INSTALLED and cuda and dtype == torch.bfloat16
    triton_takes_it = dtype in (torch.bfloat16, torch.float32) and head_dim in TRITON_WIDTHS
    triton_runs = TRITON_INSTALLED and cuda and triton_takes_it
    if name == "flash" and not flash_runs or name == "triton" and not triton_runs:
        name = "auto"
    if name != "auto":
        return name
    if device.type == "cpu":
        own = "cpu" if cpu_kernels.RUN and dtype == torch.float32 else "sdpa"
        return "reference" if dtype == torch.bfloat16 else own
    return "flash" if flash_runs else "triton" if triton_runs else "flex"


def build_mask(backend: str, document: Tensor, window: Tensor | int) -> Any:
    """What `attention` needs to know of who sees whom: query t sees key j of its document with 0 <= t - j < window.

    document: [B, T] integers that never fall along T. window: tokens; a 0-dim tensor, so that a new length compiles
    nothing, except for backend "flash", whose kernels are compiled for a Python int.
    """
    if backend == "flash":
        return _flash_mask(document, window)
    if backend in ("triton", "cpu"):
        return _spans(document, window)
    if backend == "flex":
        return _flex_mask(document, window)
    distance = _distance(document)
    return _to_add((distance >= 0) & (distance < window) & (document[:, :, None] == document[:, None, :]))[:, None]


def ring_mask(position: Tensor, tokens_read: int, window: int) -> Tensor:
    """The mask, float32, of the next T queries of each stream, for backends "reference" and "sdpa". Of a stream's keys
    before them a ring holds the last ones, token i at place i mod window.

    position: [B, T] int64, the queries' in their documents; tokens_read: of each stream, before them. For one query
    [B, 1, 1, keys], over a ring that its own key is in; for more [B, 1, T, keys], over a ring before them, and theirs.
    """
    tokens, device = position.shape[1], position.device
    if tokens == 1:
        age = (tokens_read - torch.arange(min(tokens_read + 1, window), device=device)) % window
        return _to_add(age <= position)[:, None, None]
    place = torch.arange(min(tokens_read, window), device=device)
    held = tokens_read - 1 - (tokens_read - 1 - place) % window  # the token that stands there
    query = torch.arange(tokens_read, tokens_read + tokens, device=device)
    age = query[:, None] - torch.cat([held, query])
    return _to_add((age >= 0) & (age < window) & (age <= position[..., None]))[:, None]


def attention(backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """Softmax attention; query, key, value: [B, T, H, d]; returns [B, T, H, d]. `mask` is of `build_mask`, or of
    `ring_mask`, which says how many keys and values there are."""
    if backend == "flash":
        return _flash_attention(query, key, value, mask, scale)
    if backend == "triton":
        from switch_bank.ops import attention_triton

        return attention_triton.attend(query, key, value, mask.first, mask.end, scale)
    if backend == "cpu":
        return attention_cpu.attend(query, key, value, mask.first, mask.end, scale)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if backend == "reference":
        scores = (scale * query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
        result = torch.softmax(scores + mask, dim=-1).to(value.dtype) @ value
    elif backend == "sdpa":
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), scale=scale)
    else:
        options = FLEX_OPTIONS if query.dtype == torch.bfloat16 else None
        result = flex_attention(query, key, value, block_mask=mask, scale=scale, kernel_options=options)
    return result.transpose(1, 2)


def _to_add(seen: Tensor) -> Tensor:
    """What a mask adds to the scores: float32, 0 where `seen` and -inf elsewhere. SDPA makes the same of a mask of
    bools, for every layer again; and Inductor's code for CPUs writes bools one by one."""
    return torch.where(seen, 0.0, -torch.inf)


def _distance(document: Tensor) -> Tensor:
    position = torch.arange(document.shape[1], device=document.device)
    return position[:, None] - position[None, :]


def _spans(document: Tensor, window: Tensor | int) -> Spans:
    """From plain operations that all run within the compiled forward, no sync."""
    tokens = document.shape[1]
    index = torch.arange(tokens, device=document.device, dtype=torch.int32)
    starts = F.pad(torch.where(_begins(document), index, tokens)[:, 1:], (0, 1), value=tokens)
    next_start = starts.flip(1).cummin(dim=1).values.flip(1)
    return Spans(_first_seen(document, window), torch.minimum(next_start, index + _reach(window)))


def _first_seen(document: Tensor, window: Tensor | int) -> Tensor:
    """[B, T] int32: the first token that each one sees."""
    index = torch.arange(document.shape[1], device=document.device, dtype=torch.int32)
    starts = torch.where(_begins(document), index, 0).cummax(dim=1).values
    return torch.maximum(starts, index - (_reach(window) - 1))


def _reach(window: Tensor | int) -> Tensor | int:
    return window.to(torch.int32) if isinstance(window, Tensor) else window


def _flex_mask(document: Tensor, window: Tensor | int) -> BlockMask:
    """The block mask, from what the first token of each block sees: all within the compiled forward, no sync.

    What a query sees begins at one token and ends at itself, and that of later queries begins no earlier: so a mask is
    one comparison with that token, and the blocks that a block sees, or is seen by, are counted and not sorted. (To
    compile a sort of 96 blocks took minutes.)

    No block is called full, though most are and would be spared their mask: it takes all queries of a block to know,
    later ones too, and kernels take full blocks last. A token's sums would be rounded in an order that depends on
    tokens to come.
    """
    tokens = document.shape[1]
    if tokens % BLOCK:
        raise ValueError(f"flex attention takes slices of a multiple of {BLOCK} tokens, not {tokens}")
    first = _first_seen(document, window)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first[b, q])

    # With the dimension of heads from here on: Inductor gives one that is put in at the end a stride of 0, by which the
    # kernels would find the first slice's blocks for every slice.
    block = torch.arange(tokens // BLOCK, device=document.device, dtype=torch.int32)
    first_block = first[:, None, ::BLOCK] // BLOCK  # [B, 1, blocks]
    keys = block + 1 - first_block
    queries = (first_block[..., None] <= block).sum(-2, dtype=torch.int32) - block
    # Behind the counted ones stand the other blocks, which nothing reads.
    key_blocks = (first_block[..., None] + block) % len(block)
    query_blocks = (block[:, None] + block) % len(block) + torch.zeros_like(key_blocks)
    return BlockMask(
        (tokens, tokens), keys, key_blocks, None, None, queries, query_blocks, None, None,
        BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees,
    )  # fmt: skip


def _begins(document: Tensor) -> Tensor:
    """[B, T] bool: the first token of each document in a slice."""
    return F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)


def _flash_mask(document: Tensor, window: Tensor | int) -> tuple[Tensor, int]:
    """Cumulative document lengths of the flattened batch, in a static shape, and the window."""
    if not isinstance(window, int):
        raise TypeError("flash-attn takes its window as a Python int: pass one compiled variant per length")
    batch, tokens = document.shape
    starts = _begins(document)
    total, room = batch * tokens, batch * max(1, tokens // TOKENS_PER_DOCUMENT)
    torch._assert_async(
        starts.sum() <= room, f"documents of fewer than {TOKENS_PER_DOCUMENT} tokens on average: use flex"
    )
    position = torch.arange(total, device=document.device)
    ordered = torch.where(starts.flatten(), position, total).sort().values[:room]
    return torch.cat([ordered, ordered.new_full((1,), total)]).int(), window


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: tuple[Tensor, int], scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cumulative, window = mask
    batch, tokens = query.shape[:2]
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    result = flash_attn_varlen_func(
        query, key, value, cumulative, cumulative, tokens, tokens,
        softmax_scale=scale, causal=True, window_size=(window - 1, 0),
    )  # fmt: skip
    return result.unflatten(0, (batch, tokens))
