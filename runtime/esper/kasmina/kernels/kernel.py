"""A loaded kernel and the modules that it gives: shared code, parameters of their own.

A `Kernel` is immutable and shared by all seeds that use it; `Kernel.instantiate` makes the module that a seed holds.
Its parameters are plain ``nn.Parameter`` objects under the blueprint's names (``down.weight``), so optimizers,
``state_dict`` and ``deepcopy`` see nothing unusual.

What runs is either compiled code or the blueprint in plain torch, whichever was measured to be faster for the input at
hand (`esper.kasmina.kernels.pace`). Both compute the same function of the same parameters, so a module may be given
another kernel of its blueprint between two steps (`KernelModule.use`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from esper.kasmina._flight import FLIGHT
from esper.kasmina.blueprints.module import (
    BlueprintModule,
    in_order,
    initial_parameters,
    interpret,
    register,
    torch_dtype,
)
from esper.kasmina.kernels.attempt import Form, attempted, portable_gradients
from esper.kasmina.kernels.bundle import Tier
from esper.mesh.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.kernels.bundle import Manifest
    from esper.kasmina.kernels.pace import Pace
    from esper.kasmina.signature import Signature

__all__ = ["Compiled", "Kernel", "KernelModule"]


@dataclass(frozen=True, slots=True)
class Compiled:
    """Native code of a kernel; each function empties the list that it is given."""

    forward: Callable[[list[Tensor]], list[Tensor]]
    """``[x, *parameters] -> [delta, *saved]``."""
    backward: Callable[[list[Tensor]], list[Tensor]]
    """``[grad, *recalled, *saved] -> [grad_x, *grad_parameters]``."""
    recalled: tuple[int, ...]
    """Positions among the inputs of the forward of those that the backward takes."""
    pace: Pace | None = None
    """For which inputs it is to run; None: for all."""


class Kernel:
    """A verified kernel, ready to make modules.

    Args:
        kernel_id: digest of its bundle.
        manifest: what it is.
        plan: its blueprint at its signature: what runs where no compiled code does.
        parameters: initial values by name.
        compiled: native code for the manifest's target, which must be this machine's; None where there is none, and
            where it is nowhere faster.
        exported: ``f(x, *parameters)`` of the bundle's portable graph, to run in place of the plan; None as a rule,
            since torch takes longer to call it than to run most blueprints.
        nbytes: memory that it holds, for the cache's account.
    """

    def __init__(
        self,
        *,
        kernel_id: str,
        manifest: Manifest,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        compiled: Compiled | None = None,
        exported: Callable[..., Tensor] | None = None,
        nbytes: int,
    ) -> None:
        self.id = kernel_id
        self.manifest = manifest
        self.plan = plan
        self.compiled = compiled
        """What runs where its target is and it is fast; None where the portable form runs for all."""
        self.exported = exported
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

    def portable(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """``f(x, *parameters)`` without compiled code, differentiable by autograd."""
        if self.exported is not None:
            return self.exported(in_order(x), *parameters)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in zip(self.parameter_names, parameters, strict=True):
            group, leaf = name.rsplit(".", 1)
            groups.setdefault(group, {})[leaf] = value
        return interpret(self.plan, groups, x)

    @property
    def running_tier(self) -> Tier:
        """The tier that runs here: portable where no compiled code does."""
        return Tier.PORTABLE if self.compiled is None else self.manifest.tier

    def fall_back(self, why: str = "") -> bool:
        """Run the portable form from now on, with the same parameters; False where it runs already.

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

    def use(self, kernel: Kernel) -> None:
        """Compute by another kernel from the next call on; parameters, and what an optimizer knows of them, stay.

        Raises:
            Conflict: it is of another blueprint or signature, so that it would compute something else; reason
                KERNEL_DIFFERS.
        """
        ours, theirs = self.kernel.manifest, kernel.manifest
        if (ours.blueprint_id, ours.signature, ours.parameters) != (
            theirs.blueprint_id,
            theirs.signature,
            theirs.parameters,
        ):
            raise Conflict(
                f"kernel {kernel.id[:19]}: expected one of blueprint {ours.blueprint_id[:19]} for {ours.signature}, "
                f"found one of {theirs.blueprint_id[:19]} for {theirs.signature}",
                reason="KERNEL_DIFFERS",
            )
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """``delta(x)``.

        Raises:
            InvalidInput: the rank, width or kind of number of `x` is not that of the signature.
        """
        signature = self.kernel.signature
        if x.dim() != self._rank or x.shape[self._feature_dim] != signature.in_features or not x.is_floating_point():
            found = f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
            raise InvalidInput(f"kernel {self.kernel.id[:19]}: expected an input for {signature}, found {found}")
        # torch raises when asked about autocast for tensors without memory.
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._run(x)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        kernel = self.kernel
        inner = x if x.dtype == self._dtype else x.to(self._dtype)
        # Where the host itself is being compiled, the module becomes a part of its graph, and is optimised together
        # with what stands around it.
        compiled = None if kernel.compiled is None or torch.compiler.is_compiling() else kernel.compiled
        if compiled is not None and x.device.type == kernel.device_type:
            result = self._native(compiled, inner)
        elif kernel.exported is not None:
            result = kernel.exported(in_order(inner), *self._held())
        else:
            result = interpret(kernel.plan, self._groups(), inner)
        return result if x.dtype == self._dtype else result.to(x.dtype)

    def _held(self) -> list[Tensor]:
        return [getattr(self._modules[group], leaf) for group, leaf in self._slots]

    def _groups(self) -> dict[str, Mapping[str, Tensor | None]]:
        return {name: group._parameters for name, group in self._modules.items() if group is not None}  # noqa: SLF001  # keeps its order and its None

    def _native(self, compiled: Compiled, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        pace, positions = compiled.pace, x.numel() // self.kernel.signature.in_features
        # Compiled code for a batch of nothing is not worth its risks.
        if not positions or (pace is not None and not pace.chooses(positions, training=training)):
            return interpret(self.kernel.plan, self._groups(), x)
        held = self._held()
        if training:
            answer = _Compiled.apply(self.kernel, compiled, x, *held)  # type: ignore[no-untyped-call]  # torch ships it untyped
            assert isinstance(answer, Tensor)
            return answer
        return _forward(self.kernel, compiled, [x.contiguous(), *(p.contiguous() for p in held)])[0]

    def eager(self) -> BlueprintModule:
        """The same function in plain torch with copies of the parameters as they are: for export and comparison."""
        return BlueprintModule(self.kernel.plan, parameters=dict(self.named_parameters()))

    def extra_repr(self) -> str:
        """The kernel."""
        return repr(self.kernel)


def _forward(kernel: Kernel, compiled: Compiled, inputs: list[Tensor]) -> list[Tensor]:
    """Delta and what is saved; delta alone where the compiled code failed and the portable form took over."""
    # The call empties its list.
    found, why = attempted(lambda: compiled.forward(list(inputs)), [kernel.output_form(inputs[0])], more=True)
    if why:
        kernel.fall_back(f"forward: {why}")
        return [kernel.portable(*inputs)]
    return found


class _Compiled(torch.autograd.Function):
    """Joins the compiled forward and backward; what passes between them is freed with the host's graph.

    Where the compiled code raises, or gives what has another form, the portable form gives the answer of the same call
    and runs from then on: the step is not lost.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, compiled: Compiled, x: Tensor, *parameters: Tensor) -> Tensor:
        # Compiled code reads memory in the order in which it was traced.
        inputs = [x.contiguous(), *(p.contiguous() for p in parameters)]
        result, *saved = _forward(kernel, compiled, inputs)
        # All inputs, should the backward fail: they are alive anyway, but for an x that nobody else needs.
        ctx.save_for_backward(*inputs, *saved)
        ctx.kernel, ctx.compiled, ctx.count = kernel, compiled if kernel.compiled is compiled else None, len(inputs)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, compiled, tensors = ctx.kernel, ctx.compiled, ctx.saved_tensors
        inputs, saved, wanted = tensors[: ctx.count], tensors[ctx.count :], ctx.needs_input_grad[2:]
        if compiled is not None:
            forms = [Form.of(t) if need else None for t, need in zip(inputs, wanted, strict=True)]
            taken = [grad.contiguous(), *(inputs[index] for index in compiled.recalled), *saved]
            outer = FLIGHT.enter(kernel.id, "backward")
            found, why = attempted(lambda: compiled.backward(taken), forms)
            FLIGHT.leave(outer)
            if not why:
                return (None, None, *(g if need else None for g, need in zip(found, wanted, strict=True)))
            kernel.fall_back(f"backward: {why}")
        return (None, None, *portable_gradients(kernel.portable, grad, inputs, wanted))
