"""The inverse of a lower triangular matrix with ones on its diagonal, within a Triton kernel.

By halves: the inverse of [[L, 0], [C, R]] is [[L⁻¹, 0], [-R⁻¹ C L⁻¹, R⁻¹]]. Blocks of one element
become blocks of 2, 4, … elements. A series of powers would lose all digits where the elements below
the diagonal are close to 1.
"""

import triton
import triton.language as tl


@triton.jit
def unit_lower_inverse(lower, SIZE: tl.constexpr):
    """(I + A)⁻¹ in float32 of a strictly lower A [SIZE, SIZE], of 32 or 64 rows."""
    tl.static_assert(SIZE == 32 or SIZE == 64)
    blocks = tl.reshape(lower, (1, SIZE, SIZE))
    if SIZE == 32:
        inverses = _inverses_of_32(blocks, 1)
    else:
        left, corner, right = _quarters(blocks, 1, 32)
        inverses = _inverses_of_32(_alternate(left, right, 1, 32), 2)
        inverses = _join(inverses, corner, 1, 32)
    return tl.reshape(inverses, (SIZE, SIZE))


@triton.jit
def _inverses_of_32(blocks, COUNT: tl.constexpr):
    """(I + A)⁻¹ of each A [COUNT, 32, 32]."""
    left, corner, right = _quarters(blocks, COUNT, 16)
    inverses = _inverses_of_16(_alternate(left, right, COUNT, 16), 2 * COUNT)
    return _join(inverses, corner, COUNT, 16)


@triton.jit
def _inverses_of_16(blocks, COUNT: tl.constexpr):
    """(I + A)⁻¹ of each A [COUNT, 16, 16]: the smallest that products are computed of."""
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    # Of blocks of one element, and of two.
    one = tl.where(row == column, 1.0, 0.0)
    inverses = tl.where(row // 2 == column // 2, one - blocks, 0.0)
    inverses = _double(inverses, blocks, COUNT, 2)
    inverses = _double(inverses, blocks, COUNT, 4)
    return _double(inverses, blocks, COUNT, 8)


@triton.jit
def _double(inverses, blocks, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Inverses of blocks of 2 SIZE elements on the diagonal, from those of SIZE elements."""
    row = tl.arange(0, 16)[None, :, None] // SIZE
    column = tl.arange(0, 16)[None, None, :] // SIZE
    is_corner = (row == column + 1) & (row % 2 == 1)
    products = _multiply(tl.where(is_corner, blocks, 0.0), inverses, COUNT, 16)
    return inverses - _multiply(inverses, products, COUNT, 16)


@triton.jit
def _multiply(a, b, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Products [COUNT, SIZE, SIZE] with almost all digits of float32, by three of TensorFloat-32.

    As Triton's "tf32x3", without its treatment of infinite elements: half of the instructions.
    """
    high_a, low_a = _halves(a, COUNT, SIZE)
    high_b, low_b = _halves(b, COUNT, SIZE)
    product = tl.dot(high_a, low_b, input_precision="tf32")
    product = tl.dot(low_a, high_b, product, input_precision="tf32")
    product = tl.dot(high_a, high_b, product, input_precision="tf32")
    return tl.reshape(product, (COUNT, SIZE, SIZE))


@triton.jit
def _halves(values, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Numbers as sums of TensorFloat-32's, which have 13 bits less; of one matrix without a batch.

    Several warps share one matrix, but none of a batch.
    """
    if COUNT == 1:
        values = tl.reshape(values, (SIZE, SIZE))
    high = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, values - high


@triton.jit
def _quarters(blocks, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The upper left, lower left and lower right quarters of matrices [COUNT, 2 SIZE, 2 SIZE]."""
    halves = tl.reshape(blocks, (COUNT, 2, SIZE, 2, SIZE))
    upper, lower = tl.split(tl.permute(halves, (0, 2, 4, 3, 1)))
    upper_left, _ = tl.split(upper)
    lower_left, lower_right = tl.split(lower)
    return upper_left, lower_left, lower_right


@triton.jit
def _alternate(left, right, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Matrices of two tensors in turn [2 COUNT, SIZE, SIZE]."""
    pairs = tl.permute(tl.join(left, right), (0, 3, 1, 2))
    return tl.reshape(pairs, (2 * COUNT, SIZE, SIZE))


@triton.jit
def _join(inverses, corners, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The inverses of matrices [COUNT, 2 SIZE, 2 SIZE], from their lower left quarters.

    And from the inverses of their other quarters, left and right in turn [2 COUNT, SIZE, SIZE].
    """
    halves = tl.reshape(inverses, (COUNT, 2, SIZE, SIZE))
    left, right = tl.split(tl.permute(halves, (0, 2, 3, 1)))
    products = _multiply(corners, left, COUNT, SIZE)
    lower_left = -_multiply(right, products, COUNT, SIZE)
    first_columns = tl.join(left, lower_left)
    last_columns = tl.join(tl.zeros_like(right), right)
    # [COUNT, row, column, row's half, column's half].
    quarters = tl.join(first_columns, last_columns)
    whole = tl.permute(quarters, (0, 3, 1, 4, 2))
    return tl.reshape(whole, (COUNT, 2 * SIZE, 2 * SIZE))
