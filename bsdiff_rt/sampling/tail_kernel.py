"""What a step does behind the denoiser, as one Triton kernel. Triton comes with torch for CUDA."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def finish(x_t, out, x0, x0_previous, z, row, pixels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Do the equations of `sampler.step` behind the denoiser, for BLOCK pixels.

    Args:
        x_t, out, x0, x0_previous, z: images of a `StepBuffers`, float32.
        row: the current row of the table: t, P, Q, A, B, C, S.
        pixels: number of pixels of all images together.
        BLOCK: a power of two.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pixels
    x = tl.load(x_t + place, mask=inside)
    predicted = tl.load(out + place, mask=inside)
    # x0 = clamp(P x_t + Q out, -1, 1) + 0 out
    estimate = tl.load(row + 1) * x + tl.load(row + 2) * predicted
    estimate = tl.clamp(estimate, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL) + 0.0 * predicted
    # x_t = A x_t + B x0 + C x0_previous + S z
    x = tl.load(row + 3) * x + tl.load(row + 4) * estimate
    x += tl.load(row + 5) * tl.load(x0_previous + place, mask=inside)
    x += tl.load(row + 6) * tl.load(z + place, mask=inside)
    tl.store(x_t + place, x, mask=inside)
    tl.store(x0 + place, estimate, mask=inside)
    tl.store(x0_previous + place, estimate, mask=inside)
