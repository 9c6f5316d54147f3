"""Device operations of the runtime: blending and health, fused into one pass over memory.

    out = ops.blend(y, deltas, alphas)                                    # y + sum_i alpha_i * delta_i
    found = ops.health(y, feature_dim=1)                                  # statistics of an activation or gradient
    out, found = ops.blend_health(y, deltas, alphas, feature_dim=1)       # both

On CUDA these are Triton kernels behind `torch.library` operators, elsewhere plain torch. Nothing here waits for a
device; results stay on it. Triton is imported when the first kernel is launched.
"""

from esper.kasmina.ops._blend import blend
from esper.kasmina.ops._blend_health import blend_health
from esper.kasmina.ops._dispatch import transformed, use_kernels
from esper.kasmina.ops._health import Health, health, merge

__all__ = ["Health", "blend", "blend_health", "health", "merge", "transformed", "use_kernels"]
