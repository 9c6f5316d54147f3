"""Kernels that are not what they claim to be: sound bundles whose exported graph or parameters were replaced."""

import io
from dataclasses import replace

import safetensors.torch
import torch
from torch import nn

from esper.kasmina.blueprints.catalogue import get
from esper.kasmina.blueprints.ir import Birth
from esper.kasmina.blueprints.module import BlueprintModule, initial_parameters
from esper.kasmina.kernels.build import build
from esper.kasmina.kernels.bundle import PARAMETERS, PORTABLE, Tier, kernel_id_of, pack, unpack, write_zip
from esper.kasmina.kernels.tracing import anonymous, example_input, quiet
from esper.kasmina.signature import Layout, Signature

VECTOR = Signature(Layout.VECTOR, 8, 6)
SEQUENCE = Signature(Layout.SEQUENCE, 8, 6)


class _Twisted(nn.Module):
    """The true function of a plan, and then something else."""

    def __init__(self, plan, twist):
        super().__init__()
        self._hidden = (BlueprintModule(plan),)
        self._names = [spec.name for spec in plan.parameter_specs]
        self._twist = twist

    def forward(self, x, *parameters):
        held = dict(zip(self._names, parameters, strict=True))
        return self._twist(torch.func.functional_call(self._hidden[0], held, (x,)), x, held).contiguous()


def sound(name="bottleneck_mlp", signature=VECTOR, birth=Birth.ZERO, tier=Tier.PORTABLE):
    """A kernel of the catalogue."""
    return build(get(name).with_birth(birth), signature, tier)


def twisted(twist, name="bottleneck_mlp", signature=VECTOR, *, dynamic=True, birth=Birth.ZERO):
    """A kernel whose graph computes `twist(delta, x, parameters)` where its blueprint says `delta`."""
    opened = unpack(sound(name, signature, birth))
    plan = opened.blueprint.check(signature)
    x = example_input(plan)
    held = [torch.zeros(spec.shape) for spec in plan.parameter_specs]
    free = {dim: torch.export.Dim(f"d{dim}", min=1) for dim in range(x.dim()) if dim != signature.layout.feature_dim}
    shapes = (free, (None,) * len(held)) if dynamic else None
    buffer = io.BytesIO()
    with quiet():
        program = torch.export.export(_Twisted(plan, twist), (x, *held), dynamic_shapes=shapes)
        program.example_inputs = None
        torch.export.save(anonymous(program), buffer)
    return pack(opened.manifest, {**opened.members, PORTABLE: buffer.getvalue()})


def with_parameters(change, name="bottleneck_mlp", signature=VECTOR):
    """A kernel whose initial parameters went through `change(name, tensor)`."""
    opened = unpack(sound(name, signature))
    values = initial_parameters(opened.blueprint.check(signature), opened.manifest.seed)
    changed = {key: change(key, value).contiguous() for key, value in values.items()}
    return pack(opened.manifest, {**opened.members, PARAMETERS: safetensors.torch.save(changed)})


def with_manifest(data, **changes):
    """A kernel whose manifest says something else."""
    opened = unpack(data)
    return pack(replace(opened.manifest, **changes), opened.members)


def with_entry(data, name, content):
    """A kernel whose exported graph's archive has one more entry."""
    import zipfile

    opened = unpack(data)
    with zipfile.ZipFile(io.BytesIO(opened.members[PORTABLE])) as archive:
        inner = {entry: archive.read(entry) for entry in archive.namelist()}
    return pack(opened.manifest, {**opened.members, PORTABLE: write_zip({**inner, name: content})})


def endless(delta, x, parameters):
    """A sum over more terms than anybody can wait for, all of which lie in the same four bytes."""
    return delta + x.new_ones(()).expand(1 << 60).sum() * 0


def greedy(delta, x, parameters):
    """Eight gigabytes in passing."""
    return delta + x.new_ones((1 << 31,)).sum() * 0


__all__ = [
    "SEQUENCE",
    "VECTOR",
    "endless",
    "greedy",
    "kernel_id_of",
    "sound",
    "twisted",
    "with_entry",
    "with_manifest",
    "with_parameters",
]
