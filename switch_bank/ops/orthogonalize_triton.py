"""What an orthogonalization does to whole matrices, in Triton: products, of the symmetric ones half of the tiles, each
written with its mirror; and scaling in one pass.

Imported only where there is Triton; `switch_bank.ops.orthogonalize` has the same in torch.
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


def add_product(x: Tensor, left: Tensor, right: Tensor, a: float, tile: int = TILE, step: int = STEP) -> Tensor:
    """a·X + L·R of matrices x [n, rows, cols], left [n, rows, depth] and right [n, depth, cols], bfloat16 or float32.
    Returns x's shape and dtype; sums are float32. (For `record`'s matrices cuBLAS has tiles of half the speed.)"""
    (n, rows, cols), depth = x.shape, left.shape[2]
    x, left, right = x.contiguous(), left.contiguous(), right.contiguous()
    out = torch.empty_like(x)
    sums_of_products[(triton.cdiv(rows, tile) * triton.cdiv(cols, tile) * n,)](
        x, left, right, out, rows, cols, depth, a,
        TILE=tile, STEP=step, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def scaled(x: Tensor, *factors: Tensor) -> Tensor:
    """x [n, rows, cols] times one or two factors, float32, for rows [n, rows, 1], columns [n, 1, cols] or a matrix
    [n, 1, 1]: in float32, and rounded once."""
    x = x.contiguous()
    n, rows, cols = x.shape
    one = torch.ones(1, 1, 1, device=x.device)
    by_row, by_column = one, one
    for factor in factors:
        if factor.shape[2] == 1 and by_row is one:
            by_row = factor
        else:
            by_column = factor
    by_row, by_column = by_row.expand(n, rows, 1), by_column.expand(n, 1, cols)
    out = torch.empty_like(x)
    scale_values[(triton.cdiv(rows, 16), n)](
        x, by_row, by_column, out, rows, cols, *by_row.stride()[:2], by_column.stride(0), by_column.stride(2),
        ROWS=16, COLUMNS=256,
    )  # fmt: skip
    return out


def row_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ of each row's magnitudes, summed in dtype: x [n, rows, cols] to [n, rows, 1]. A GPU's norm makes no copy of
    |x|. (A CPU's adds one number after another, ten times less exact than a sum.)"""
    return torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True, dtype=dtype)


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
def product(left, right, left_step, right_step, depth, TILE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_k left_k·right_k in float32, [TILE, TILE]. left: pointers [TILE, STEP] to the first columns of rows; right:
    [STEP, TILE] to the first rows of columns; each with its step from one k to the next."""
    k = tl.arange(0, STEP)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, depth, STEP):
        inside = k < depth - start
        of_left = tl.load(left, mask=inside[None, :], other=0.0)
        of_right = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(of_left, of_right, total)
        left += STEP * left_step
        right += STEP * right_step
    return total


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
    total = product(left, right, x_col, x_col, cols, TILE, STEP)
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
def sums_of_products(  # type: ignore[no-untyped-def]
    x_ptr, left_ptr, right_ptr, out_ptr, rows, cols, depth, a, TILE: tl.constexpr, STEP: tl.constexpr
):
    """out = a·X + L·R, all contiguous; a program a tile."""
    tiles_in_row = tl.cdiv(cols, TILE)
    tiles = tl.cdiv(rows, TILE) * tiles_in_row
    matrix, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = (tile // tiles_in_row) * TILE + tl.arange(0, TILE)
    col = (tile % tiles_in_row) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    # What lies outside is read from inside, where it costs nothing, and is never written.
    left = left_ptr + matrix * rows * depth + (row % rows)[:, None] * depth + k[None, :]
    right = right_ptr + matrix * depth * cols + k[:, None] * cols + (col % cols)[None, :]
    total = product(left, right, 1, cols, depth, TILE, STEP)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    here = matrix * rows * cols + row[:, None] * cols + col[None, :]
    total += a * tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_values(  # type: ignore[no-untyped-def]
    x_ptr, row_factors_ptr, column_factors_ptr, out_ptr, rows, cols, row_matrix, row_step, column_matrix, column_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = x · factor of the row · factor of the column, for some rows of a matrix."""
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    by_row = tl.load(row_factors_ptr + matrix * row_matrix + row * row_step, mask=row < rows, other=0.0)
    for start in range(0, cols, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        by_column = tl.load(column_factors_ptr + matrix * column_matrix + col * column_step, mask=col < cols, other=0.0)
        here = (matrix * rows + row[:, None]) * cols + col[None, :]
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + here, (x * by_row[:, None] * by_column[None, :]).to(out_ptr.dtype.element_ty), mask=inside)


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
