"""The two symmetric products of a Newton-Schulz iteration in Triton: half of the tiles, each written with its mirror.

Imported only where there is Triton; `switch_bank.ops.orthogonalize` has the same products in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile, columns of a step along the summed side, tile rows that share what is in the L2 cache.
TILE, STEP, BAND, WARPS, STAGES = 128, 64, 4, 8, 3


def gram(x: Tensor, tile: int = TILE, step: int = STEP) -> Tensor:
    """X·Xᵀ of each matrix. x: [n, rows, cols], bfloat16 or float32, any strides. Returns [n, rows, rows] in x's dtype,
    symmetric to the bit; sums are float32."""
    return _launch(x, 0.0, 1.0, tile, step)


def polynomial(a: Tensor, b: float, c: float, tile: int = TILE, step: int = STEP) -> Tensor:
    """b·A + c·A·A, c not 0, of each symmetric matrix. a: [n, rows, rows], bfloat16 or float32, any strides. Returns the
    same shape and dtype, symmetric to the bit; sums are float32."""
    return _launch(a.contiguous(), b, c, tile, step)


def _launch(x: Tensor, b: float, c: float, tile: int, step: int) -> Tensor:
    n, rows, cols = x.shape
    out = torch.empty((n, rows, rows), dtype=x.dtype, device=x.device)
    side = triton.cdiv(rows, tile)
    symmetric_product[(side * (side + 1) // 2 * n,)](
        x, out, rows, cols, *x.stride(), b / c, c,
        ADD=b != 0.0, TILE=tile, STEP=step, BAND=BAND, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


@triton.jit
def symmetric_product(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, rows, cols, x_matrix, x_row, x_col, ratio, c,
    ADD: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out = c·(X·Xᵀ), or c·(ratio·X + X·Xᵀ) if ADD, for which X is symmetric and contiguous as out is; a program for
    each tile on or below the diagonal of each matrix."""
    side = tl.cdiv(rows, TILE)
    tiles = side * (side + 1) // 2
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile_row, tile_col = place_in_triangle(tl.program_id(0) % tiles, side, BAND)
    row, col = tile_row * TILE + tl.arange(0, TILE), tile_col * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    # What lies outside is read from inside, where it costs nothing, and is never written.
    left = x_ptr + matrix * x_matrix + (row % rows)[:, None] * x_row + k[None, :] * x_col
    right = x_ptr + matrix * x_matrix + (col % rows)[None, :] * x_row + k[:, None] * x_col
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, cols, STEP):
        inside = k < cols - start
        a = tl.load(left, mask=inside[None, :], other=0.0)
        a_transposed = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(a, a_transposed, total)
        left += STEP * x_col
        right += STEP * x_col
    inside = (row < rows)[:, None] & (col < rows)[None, :]
    here = row[:, None] * rows + col[None, :]
    if ADD:
        total += ratio * tl.load(x_ptr + matrix * x_matrix + here, mask=inside, other=0.0).to(tl.float32)
    result = (c * total).to(out_ptr.dtype.element_ty)
    mirrored = tl.trans(result)
    # On the diagonal the lower half is mirrored within the tile: symmetric whatever the order of the sums.
    result = tl.where(row[:, None] >= col[None, :], result, mirrored)
    out_ptr += matrix * rows * rows
    tl.store(out_ptr + here, result, mask=inside)
    if tile_row != tile_col:
        tl.store(out_ptr + col[:, None] * rows + row[None, :], mirrored, mask=(row < rows)[None, :])


@triton.jit
def place_in_triangle(index, side, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of a lower triangle's tile, numbered band by band of BAND rows and in a band column by column, so
    that programs that run together read few rows and columns."""
    band = row_of_triangle(index) // BAND
    first_row = band * BAND
    index -= first_row * (first_row + 1) // 2
    height = tl.minimum(BAND, side - first_row)
    within = index - height * first_row  # from here on the band's own small triangle
    row = row_of_triangle(tl.maximum(within, 0))
    in_square = within < 0
    tile_row = tl.where(in_square, index % height, row)
    tile_col = tl.where(in_square, index // height, first_row + within - row * (row + 1) // 2)
    return first_row + tile_row, tile_col


@triton.jit
def row_of_triangle(index):  # type: ignore[no-untyped-def]
    """The row of a lower triangle's element, numbered row by row: the largest r with r·(r + 1) / 2 <= index."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) / 2).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # the root is rounded
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
