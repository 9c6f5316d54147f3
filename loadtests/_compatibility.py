"""Judges what growth can do with one architecture: `judge(host)` gives a `Verdict`.

Every check runs the same network twice from the same random state and compares exactly; the batches are random, the
loss is the mean square of everything that the network gives.
"""

from __future__ import annotations

import io
import random
import warnings
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.blueprints import get
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.control import Action, BlendStrategy, Decision, KernelChoice, SiteKind, Stage
from esper.kasmina.growth import Growth, wrap
from esper.kasmina.local import LocalPlane
from esper.kasmina.seeds import Execution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.kasmina.signature import Signature
    from esper.kasmina.sites import Site
    from loadtests.zoo import Host

__all__ = ["Verdict", "differences", "grow", "judge", "unable"]

STEPS = 3
SEEDS = 3
_BLUEPRINT = "low_rank"


@dataclass(kw_only=True)
class Verdict:
    """What was found of one architecture; what is empty is good news."""

    name: str
    library: str
    family: str
    parameters: int = 0
    differs: list[str] = field(default_factory=list)
    """What is not bit-identical while all seeds are dormant."""
    sites: int = 0
    unable: dict[str, str] = field(default_factory=dict)
    """Sites that were listed and could not hold a seed, with the reason."""
    grown: list[str] = field(default_factory=list)
    """The sites that were grown."""
    failed: str = ""
    """What went wrong between germination and removal."""
    export: str = ""
    """Why the grown network could not be exported."""
    bare_export: str = ""
    """Why the host alone could not be exported either."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Reasons for which modules of it can not grow, and how many modules each concerns."""

    @property
    def supported(self) -> bool:
        """Everything works that works without growth."""
        works = not self.differs and not self.unable and not self.failed and bool(self.grown)
        return works and (not self.export or bool(self.bare_export))


@dataclass(frozen=True)
class _Manifest:
    signature: Signature
    parameter_count: int
    birth: str = "zero"
    causal: bool = True
    flops_per_position: int = 0


@dataclass(frozen=True)
class _Kernel:
    """A blueprint run eagerly: what a portable kernel computes, without a bundle to build."""

    signature: Signature

    @property
    def manifest(self) -> _Manifest:
        return _Manifest(self.signature, sum(p.numel() for p in self.instantiate().parameters()))

    def instantiate(self, device: torch.device | str = "cpu") -> nn.Module:
        return BlueprintModule(get(_BLUEPRINT).check(self.signature)).to(device)


def _leaves(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output, in its order."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, dict):
        parts = list(output.values())
    elif isinstance(output, list | tuple):
        parts = list(output)
    elif is_dataclass(output):
        parts = [getattr(output, f.name) for f in fields(output)]
    else:
        parts = []
    for part in parts:
        yield from _leaves(part)


def _real(output: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(output) if leaf.is_floating_point()]


class _Run:
    """One network in training."""

    def __init__(self, host: Host, **options: Any) -> None:
        self.host = host
        self.model = host.make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.plane = LocalPlane()
        self.kernels: dict[str, _Kernel] = {}
        self.growth: Growth | None = None
        if options:
            given = {"run_id": "compatibility", "parameter_budget": 1 << 30, "settle_steps": 0, **options}
            self.growth = wrap(self.model, self.optimizer, mesh=self.plane, **given)
        self.count = 0

    def step(self) -> list[Tensor]:
        """Forward, backward, optimizer; gives outputs, gradients, and the random state that they leave."""
        torch.manual_seed(self.count)
        random.seed(self.count)
        self.optimizer.zero_grad()
        args, kwargs = self.host.batch(self.count)
        outputs = _real(self.model(*args, **kwargs))
        wanted = [leaf for leaf in outputs if leaf.requires_grad]
        loss = torch.stack([leaf.float().square().mean() for leaf in wanted]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.count += 1
        if self.growth is not None:
            self.growth.step(loss)
        state = torch.tensor([*torch.get_rng_state().tolist(), random.getrandbits(32)])
        return [*(leaf.detach() for leaf in outputs), *gradients, state]

    def evaluate(self) -> list[Tensor]:
        """Outputs of one batch in evaluation; random numbers that the network draws are the same each time."""
        args, kwargs = self.host.batch(0)
        self.model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(2)
            outputs = _real(self.model(*args, **kwargs))
        self.model.train()
        return outputs

    def boundary(self, *decisions: Decision) -> list[str]:
        """Carry decisions out; what was refused."""
        assert self.growth is not None
        report = self.growth.boundary({"loss": 1.0}, decisions=decisions)
        refused = [f"{a.decision.action}: {', '.join(map(str, a.refused))}" for a in report.applied if not a.done]
        return refused if len(report.applied) == len(decisions) else [*refused, "a decision was not carried out"]

    def decide(self, site: Site, action: Action, **more: Any) -> Decision:
        """A decision for the next boundary."""
        assert self.growth is not None
        boundary = self.growth.boundaries + 1
        return Decision(
            decision_id=f"{boundary}/{site.index}/{action}",
            boundary=boundary,
            seed=site.index,
            action=action,
            reason="BY_HAND",
            explanation="compatibility suite",
            **more,
        )


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal in every bit; a value that is not a number equals itself."""
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def differences(host: Host) -> list[str]:
    """What of a wrapped network with dormant seeds is not, bit for bit, that of the network alone."""
    bare, wrapped = _Run(host), _Run(host, sample_every=1)
    found: set[str] = set()
    assert wrapped.growth is not None
    for _ in range(STEPS):
        if not _same(bare.step(), wrapped.step()):
            found.add("outputs, gradients or random state")
        wrapped.boundary()
        if not _same(bare.evaluate(), wrapped.evaluate()):
            found.add("evaluation")
    wrapped.growth.close()
    left, right = bare.model.state_dict(), wrapped.model.state_dict()
    if list(left) != list(right):
        found.add("keys of state_dict")
    elif not _same(
        [v for v in left.values() if isinstance(v, Tensor)], [v for v in right.values() if isinstance(v, Tensor)]
    ):
        found.add("values of state_dict")
    if _types(bare.model) != _types(wrapped.model):
        found.add("types of modules")
    if wrapped.growth.counters:
        found.add(f"counters: {dict(wrapped.growth.counters)}")
    return sorted(found)


def _types(model: nn.Module) -> list[str]:
    # By name: some libraries make the class of a module when they make the module.
    return [f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()]


def _close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal up to rounding: fused paths of torch that look for hooks are not taken around a seed."""
    return len(left) == len(right) and all(
        torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def unable(host: Host) -> tuple[dict[str, str], int, dict[str, int]]:
    """Sites that can not hold a seed that computes and is trained, the number of sites, and reasons of refusals.

    All sites hold one at the same time: born silent, they must leave the output as it is.
    """
    run = _Run(host, sample_every=0)
    assert run.growth is not None
    run.step()
    sites, wrong = run.growth.sites, {}
    reasons = Counter(refusal.reason for refusal in run.growth.refusals)
    if run.growth.counters:
        return {"": f"discovery failed: {dict(run.growth.counters)}"}, 0, dict(reasons)
    before = run.evaluate()
    attachments: list[Attachment] = []
    for site in sites:
        seed = SeedModule(_Kernel(site.descriptor.signature).instantiate(), site)
        seed.mode = Execution.BLENDED
        seed.alpha.fill_(1.0)
        attachments.append(Attachment.attach(run.model, site, seed))
    if not _close(before, run.evaluate()):
        wrong["all sites"] = "silent seeds change the output"
    run.step()
    for site, attachment in zip(sites, attachments, strict=True):
        if attachment.seed.error:
            wrong[_title(site)] = attachment.seed.error
    for attachment in attachments:
        attachment.detach()
    return wrong, len(sites), dict(reasons)


def _title(site: Site) -> str:
    return f"{site.descriptor.name} ({site.descriptor.kind.value})"


def _choose(sites: tuple[Site, ...]) -> list[Site]:
    """A layer in series, a layer or block in parallel and a span, from the middle of the network."""
    groups = (
        [s for s in sites if s.descriptor.kind is SiteKind.SERIES],
        [s for s in sites if s.descriptor.kind is SiteKind.PARALLEL and s.descriptor.granularity != "span"],
        [s for s in sites if s.descriptor.granularity == "span"],
    )
    return [group[len(group) // 2] for group in groups if group]


def grow(host: Host, verdict: Verdict, *, export: bool = True) -> None:
    """Germinate, train, save, load, export and remove; what fails is written down in the verdict."""
    run = _Run(host, sample_every=2)
    assert run.growth is not None
    run.step()
    chosen = _choose(run.growth.sites)
    verdict.grown = [_title(site) for site in chosen]
    keys = list(run.model.state_dict())
    if not chosen:
        return
    before = run.evaluate()
    verdict.failed = _graft(run, chosen)
    if not verdict.failed and not _close(before, run.evaluate()):
        verdict.failed = "grafting silent seeds changed the output"
    verdict.failed = verdict.failed or _learn(run, chosen) or _reload(run)
    if not verdict.failed:
        if export:
            verdict.export = _exported(run)
            verdict.bare_export = _exported(_Run(host)) if verdict.export else ""
        refused = run.boundary(*(run.decide(site, Action.CULL) for site in chosen))
        left = list(run.model.state_dict()) != keys
        verdict.failed = "; ".join(refused) or ("a culled seed left keys in state_dict" if left else "")
    run.growth.close()


def _graft(run: _Run, chosen: list[Site]) -> str:
    for site in chosen:
        run.kernels[f"sha256:{site.index:064x}"] = _Kernel(site.descriptor.signature)
    run.plane.kernels.update(run.kernels)
    germinate = []
    for site in chosen:
        kernel = KernelChoice(
            kernel_id=f"sha256:{site.index:064x}",
            blueprint_name=_BLUEPRINT,
            blend=BlendStrategy.IMMEDIATE,
            blend_steps=1,
            learning_rate_scale=3.0,
        )
        germinate.append(run.decide(site, Action.GERMINATE, kernel=kernel))
    refused = run.boundary(*germinate)
    refused += run.boundary(*(run.decide(site, Action.ADVANCE, to_stage=Stage.GRAFTING) for site in chosen))
    return "; ".join(refused)


def _learn(run: _Run, chosen: list[Site]) -> str:
    """Two steps; every seed must have computed, and one at least must have learnt."""
    assert run.growth is not None
    seeds = {site.index: run.growth.life.runs[site.index].module for site in chosen}
    before = {index: [p.detach().clone() for p in seed.parameters()] for index, seed in seeds.items()}
    for _ in range(2):
        run.step()
    if run.growth.counters:
        return f"counters: {dict(run.growth.counters)}"
    if gone := [site for site in chosen if run.growth.life.runs[site.index].attachment is None]:
        return f"the runtime took a seed out: {run.growth.life.runs[gone[0].index].failure}"
    moved = [
        index for index, seed in seeds.items() if not _same(before[index], [p.detach() for p in seed.parameters()])
    ]
    return "" if moved else "no seed learnt"


def _reload(run: _Run) -> str:
    """What is saved and loaded into a fresh network must go on in the same bits."""
    assert run.growth is not None
    buffer = io.BytesIO()
    parts = {
        "growth": run.growth.state_dict(),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    torch.save(parts, buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    fresh = _Run(run.host, sample_every=2)
    assert fresh.growth is not None
    fresh.growth.load_state_dict(state["growth"], kernels=run.kernels)
    fresh.model.load_state_dict(state["model"])
    fresh.optimizer.load_state_dict(state["optimizer"])
    fresh.count = run.count
    if not _same(run.evaluate(), fresh.evaluate()):
        return "a loaded network gives another output"
    results = [each.step() for each in (run, fresh)]
    fresh.growth.close()
    return "" if _same(*results) else "a loaded network goes on differently"


def _exported(run: _Run) -> str:
    """Empty where `torch.export` gives a program that computes what the network computes; else the reason."""
    args, kwargs = run.host.batch(0)
    expected = run.evaluate()
    run.model.eval()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            program = torch.export.export(run.model, args, kwargs, strict=False)
            torch.manual_seed(2)
            found = _real(program.module()(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  # whatever the exporter raises is the reason that the table shows
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        run.model.train()
    return "" if _close(expected, found) else "the exported program computes something else"


def judge(host: Host, *, export: bool = True) -> Verdict:
    """Everything about one architecture; `export` takes about as long as the rest."""
    verdict = Verdict(name=host.name, library=host.library, family=host.family)
    verdict.parameters = sum(p.numel() for p in host.make().parameters())
    verdict.differs = differences(host)
    verdict.unable, verdict.sites, verdict.refusals = unable(host)
    grow(host, verdict, export=export)
    return verdict
