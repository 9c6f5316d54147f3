"""What compiled kernels cost against plain torch, and what the runtime's choice among them costs.

    python -m loadtests.bench_kernels

Prints JSON lines (`_report.py`). Every way to compile a kernel is measured beside plain torch, forward and backward,
interleaved, at the shapes at which the gauntlet judges; ratios are medians over pairs. "as run" is what a run gets: the
gauntlet's check measures the fastest variant, its figures decide for which inputs compiled code is used, and that is
measured afresh. Compiling takes minutes.
"""

import gc
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from torch import Tensor, nn

from esper.kasmina.blueprints import Birth, get
from esper.kasmina.blueprints.module import BlueprintModule, torch_dtype
from esper.kasmina.blueprints.plan import Plan
from esper.kasmina.kernels import Kernel, Target, Tier, kernel_id_of, load_candidate, load_exported, tuning, unpack
from esper.kasmina.kernels.build import build, limitations
from esper.kasmina.kernels.kernel import Compiled, KernelModule
from esper.kasmina.kernels.load import native
from esper.kasmina.kernels.pace import Pace, Shape, shape_classes
from esper.kasmina.kernels.timing import Paired, Step, interleaved, paired
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InternalError
from loadtests._report import Report
from loadtests._report import Target as Bound

CASES = (
    ("bottleneck_mlp", Signature(Layout.VECTOR, 64, 64)),
    ("gated_ffn", Signature(Layout.SEQUENCE, 64, 64)),
    ("causal_attention", Signature(Layout.SEQUENCE, 64, 64)),
    ("depthwise_separable", Signature(Layout.IMAGE, 32, 32)),
)
BUDGET_S = 4.0
LEAST, MOST = 11, 400
NO_SLOWER = Bound.below(1.05)


def main() -> None:
    """Print the figures of this machine."""
    torch.set_num_threads(1)
    report = Report("kernels", packages=("torch",))
    _by_hand(report)
    if reasons := limitations(Tier.STANDARD):
        report.not_measured("compiled / plain torch", "; ".join(reasons), unit="ratio", target=NO_SLOWER)
    else:
        for name, signature in CASES:
            _case(report, name, signature)
    if not torch.cuda.is_available():
        report.not_measured("compiled / plain torch on a GPU", "no GPU here", unit="ratio", target=NO_SLOWER)


class _Bottleneck(nn.Module):
    """The bottleneck as somebody would write it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Thin and back."""
        result: Tensor = self.out(F.gelu(self.down(self.norm(x))))
        return result


def _by_hand(report: Report) -> None:
    """A kernel without compiled code against the same module written by hand."""
    signature = Signature(Layout.VECTOR, 64, 64)
    bundle = build(get("bottleneck_mlp").with_birth(Birth.RANDOM), signature, Tier.PORTABLE)
    kernel_id = kernel_id_of(bundle)
    kernel, exported = load_candidate(bundle, kernel_id), load_exported(bundle, kernel_id)
    inner = next(spec.shape[0] for spec in kernel.plan.parameter_specs if spec.name == "down.weight")
    for batch in (1, 32, 256):
        modules = {
            "by hand": _Bottleneck(64, inner),
            "kernel": kernel.instantiate(),
            "exported graph": exported.instantiate(),
        }
        times = _times(modules, torch.randn(batch, 64))
        for name, target in (("kernel", NO_SLOWER), ("exported graph", None)):
            found = paired(times[name], times["by hand"])
            _add(report, f"{name} / module by hand, bottleneck_mlp, batch {batch}", found, times[name], target)


def _case(report: Report, name: str, signature: Signature) -> None:
    blueprint = get(name).with_birth(Birth.RANDOM)
    plan, here = blueprint.check(signature), Target.here()
    manifest = unpack(build(blueprint, signature, Tier.PORTABLE)).manifest
    values = {
        spec.name: torch.randn(spec.shape).mul(0.1).to(torch_dtype(signature.dtype)) for spec in plan.parameter_specs
    }

    def module(compiled: Compiled | None) -> KernelModule:
        kernel = Kernel(kernel_id=name, manifest=manifest, plan=plan, parameters=values, compiled=compiled, nbytes=0)
        kernel.device_type = here.device
        return KernelModule(kernel, values)

    code: dict[str, Compiled] = {}
    for variant in tuning.variants(plan, here.device):
        try:
            made = tuning.compile_variant(plan, here, variant)
        except InternalError as error:
            report.not_measured(f"{name} {signature}, {variant.name} / plain torch", error.public[:200], unit="ratio")
            continue
        code[variant.name] = Compiled(native(made.forward), native(made.backward), made.recalled)
    found: dict[str, list[Shape]] = {way: [] for way in code}
    for extents in shape_classes(plan).values():
        eager = BlueprintModule(plan, parameters=values)
        modules = {"eager": eager, **{way: module(one) for way, one in code.items()}}
        times = _times(modules, _input(plan, extents))
        for way in code:
            ratio = paired(times[way], times["eager"])
            _add(report, f"{way} / plain torch, {name} {signature}, {_said(extents)}", ratio, times[way], None)
            found[way].append(Shape(math.prod(extents), ratio.ratio, 1.0))
    best = min(found, key=lambda way: math.prod(min(shape.step, 1.0) for shape in found[way]))
    # Judged by measurements of its own: those above chose it, and so flatter it.
    judged, chosen = [], code[best]
    for extents in shape_classes(plan).values():
        times = _times({"eager": BlueprintModule(plan, parameters=values), "it": module(chosen)}, _input(plan, extents))
        ratio = paired(times["it"], times["eager"])
        judged.append(Shape(math.prod(extents), ratio.ratio, 1.0, ratio.noise))
    pace = Pace(judged)
    running = Compiled(chosen.forward, chosen.backward, chosen.recalled, pace)
    for extents in shape_classes(plan).values():
        times = _times(
            {"eager": BlueprintModule(plan, parameters=values), "it": module(running)}, _input(plan, extents)
        )
        used = best if pace.chooses(math.prod(extents), training=True) else "plain torch"
        ratio = paired(times["it"], times["eager"])
        title = f"as run / plain torch, {name} {signature}, {_said(extents)}"
        _add(report, title, ratio, times["it"], NO_SLOWER, used)
    gc.collect()


def _input(plan: Plan, extents: tuple[int, ...]) -> Tensor:
    shape = list(extents)
    shape.insert(plan.signature.layout.feature_dim, plan.signature.in_features)
    return torch.randn(shape)


def _said(extents: tuple[int, ...]) -> str:
    return " x ".join(map(str, extents))


def _times(modules: dict[str, nn.Module], x: Tensor) -> dict[str, list[float]]:
    with torch.no_grad():
        cotangent = torch.randn_like(next(iter(modules.values()))(x))
    steps = {name: Step(module, x.clone().requires_grad_(), cotangent) for name, module in modules.items()}
    return interleaved(steps, budget_s=BUDGET_S, least=LEAST, most=MOST)


def _add(report: Report, metric: str, found: Paired, times: list[float], target: Bound | None, used: str = "") -> None:
    noise, fastest, pairs = round(found.noise, 4), round(min(times), 1), len(times)
    sizes: dict[str, Any] = {"noise": noise, "step_us": fastest, "pairs": pairs} | ({"used": used} if used else {})
    report.add(metric, found.ratio, unit="ratio", target=target, **sizes)


if __name__ == "__main__":
    main()
