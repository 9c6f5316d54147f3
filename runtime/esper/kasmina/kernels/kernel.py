"""A loaded kernel and the modules that it gives: shared code, parameters of their own.

A `Kernel` is immutable and shared by all seeds that use it; `Kernel.instantiate` makes the module that a seed holds.
Its parameters are plain ``nn.Parameter`` objects under the blueprint's names (``down.weight``), so optimizers,
``state_dict`` and ``deepcopy`` see nothing unusual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from esper.kasmina._flight import FLIGHT
from esper.kasmina.blueprints.module import BlueprintModule, in_order, initial_parameters, register, torch_dtype
from esper.kasmina.kernels.attempt import Form, attempted, portable_gradients
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.kernels.bundle import Manifest, Tier
    from esper.kasmina.signature import Signature

__all__ = ["Kernel", "KernelModule"]


class Kernel:
    """A verified kernel, ready to make modules.

    Args:
        kernel_id: digest of its bundle.
        manifest: what it is.
        plan: its blueprint at its signature.
        parameters: initial values by name.
        portable: ``f(x, *parameters)``, differentiable by autograd.
        compiled: the forward and the backward function for the manifest's target, which must be this machine's; for
            tensors on another kind of device, and where it is None, the portable graph runs instead.
        nbytes: memory that it holds, for the cache's account.
    """

    def __init__(
        self,
        *,
        kernel_id: str,
        manifest: Manifest,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        portable: Callable[..., Tensor],
        compiled: tuple[Callable[..., Tensor], Callable[..., Any]] | None,
        nbytes: int,
    ) -> None:
        self.id = kernel_id
        self.manifest = manifest
        self.plan = plan
        self.portable = portable
        self.compiled = compiled
        """What runs where its target is; None where the portable graph runs instead."""
        self.fault = ""
        """What the compiled code did wrong when it was last given up; whoever reports it takes it away."""
        self._native = compiled
        self.device_type = manifest.target.partition("/")[0]
        """Kind of device whose memory the compiled functions read."""
        self.nbytes = nbytes
        self.parameter_names = tuple(spec.name for spec in manifest.parameters)
        self._parameters = {name: parameters[name] for name in self.parameter_names}

    @property
    def signature(self) -> Signature:
        """What it maps from and to."""
        return self.manifest.signature

    def output_form(self, x: Tensor) -> Form:
        """What the answer to `x` must look like."""
        shape = list(x.shape)
        shape[self.signature.layout.feature_dim] = self.signature.out_features
        return Form(tuple(shape), x.dtype, x.device)

    @property
    def running_tier(self) -> Tier:
        """The tier that runs here: portable where the compiled functions are for another machine."""
        from esper.kasmina.kernels.bundle import Tier

        return Tier.PORTABLE if self.compiled is None else Tier.STANDARD

    def fall_back(self, why: str = "") -> bool:
        """Run the portable graph from now on, with the same parameters; False where it runs already.

        Args:
            why: what the compiled code did wrong, where nobody knows yet.
        """
        running = self.compiled is not None
        self.compiled = None
        self.fault = self.fault or why
        return running

    def take_up(self) -> None:
        """Run the compiled code again, where there is some."""
        self.compiled = self._native

    def instantiate(self, device: torch.device | str = "cpu", *, seed: int | None = None) -> KernelModule:
        """A module with parameters of its own.

        Args:
            device: where the parameters live.
            seed: None takes the initial parameters of the bundle, a number draws others by the blueprint's rules.
        """
        values = self._parameters if seed is None else initial_parameters(self.plan, seed)
        return KernelModule(self, {name: value.to(device) for name, value in values.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        # Immutable and shared: copying a host copies the seeds' parameters, not machine code.
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"kernel {self.id} cannot be pickled: keep its id and state_dict, and load it again by id")

    def __repr__(self) -> str:
        return f"Kernel({self.manifest.blueprint_name} {self.signature} {self.running_tier.value} {self.id[:19]})"


class KernelModule(nn.Module):
    """``delta(x)`` by a kernel: (N, C), (N, T, C) or (N, C, H, W), features mapped, other extents kept.

    An input of another floating-point type is computed in the kernel's dtype and answered in its own, so the module may
    stand inside autocast.
    """

    def __init__(self, kernel: Kernel, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kernel = kernel
        register(self, parameters)
        self._slots = tuple(tuple(name.rsplit(".", 1)) for name in kernel.parameter_names)
        self._dtype = torch_dtype(kernel.signature.dtype)
        self._rank = kernel.signature.layout.rank
        self._feature_dim = kernel.signature.layout.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        """``delta(x)``.

        Raises:
            InvalidInput: the rank, width or kind of number of `x` is not that of the signature.
        """
        signature = self.kernel.signature
        if x.dim() != self._rank or x.shape[self._feature_dim] != signature.in_features or not x.is_floating_point():
            found = f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
            raise InvalidInput(f"kernel {self.kernel.id[:19]}: expected an input for {signature}, found {found}")
        held = [getattr(self._modules[group], leaf) for group, leaf in self._slots]
        compiled = self.kernel.compiled if x.device.type == self.kernel.device_type else None
        # torch raises when asked about autocast for tensors without memory.
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._run(compiled, x, held)
        return self._run(compiled, x, held)

    def _run(self, compiled: tuple[Callable[..., Tensor], Any] | None, x: Tensor, held: list[Any]) -> Tensor:
        inner = x if x.dtype == self._dtype else x.to(self._dtype)
        # Compiled code for a batch of nothing is not worth its risks. Where the host itself is being compiled, the
        # graph becomes a part of it, and is optimised together with what stands around it.
        if compiled is None or torch.compiler.is_compiling() or not x.numel():
            result = self.kernel.portable(in_order(inner), *held)
        else:
            result = _Compiled.apply(self.kernel, compiled, inner, *held)  # type: ignore[no-untyped-call]  # torch ships it untyped
        answer: Tensor = result if x.dtype == self._dtype else result.to(x.dtype)
        return answer

    def eager(self) -> BlueprintModule:
        """The same function in plain torch with copies of the parameters as they are: for export and comparison."""
        return BlueprintModule(self.kernel.plan, parameters=dict(self.named_parameters()))

    def extra_repr(self) -> str:
        """The kernel."""
        return repr(self.kernel)


class _Compiled(torch.autograd.Function):
    """Joins the compiled forward and backward; the backward recomputes what it needs from the forward's inputs.

    Where the compiled code raises, or gives what has another form, the portable graph gives the answer of the same call
    and runs from then on: the step is not lost.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, compiled: tuple[Any, Any], x: Tensor, *parameters: Tensor) -> Tensor:
        # Compiled code reads memory in the order in which it was traced.
        x, held = x.contiguous(), [p.contiguous() for p in parameters]
        ctx.kernel, ctx.compiled = kernel, compiled
        ctx.save_for_backward(x, *held)
        found, why = attempted(lambda: [compiled[0](x, *held)], [kernel.output_form(x)])
        if why:
            kernel.fall_back(f"forward: {why}")
            ctx.compiled = None
            return kernel.portable(in_order(x), *held)
        result: Tensor = found[0]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, saved = ctx.kernel, ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if ctx.compiled is not None:
            backward = ctx.compiled[1]
            forms = [Form.of(t) if need else None for t, need in zip(saved, wanted, strict=True)]
            FLIGHT.enter(kernel.id, "backward")
            found, why = attempted(lambda: backward(grad.contiguous(), *saved), forms)
            FLIGHT.leave()
            if not why:
                return (None, None, *(g if need else None for g, need in zip(found, wanted, strict=True)))
            kernel.fall_back(f"backward: {why}")
        return (None, None, *portable_gradients(kernel.portable, grad, saved, wanted))
