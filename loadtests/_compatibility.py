"""Judges what growth can do with one architecture: `judge(host)` gives a `Verdict`.

Every check runs the same network twice from the same random state and compares exactly; the batches are random, the
loss is the mean square of everything that the network gives.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.control import Action, BlendStrategy, KernelChoice, SiteKind, Stage
from esper.kasmina.seeds import Execution
from esper.mesh.errors import InvalidInput
from loadtests.zoo.training import BLUEPRINT, Kernel, Run, close, real, same

if TYPE_CHECKING:
    from esper.kasmina.sites import Site
    from loadtests.zoo import Host

__all__ = ["Verdict", "differences", "grow", "judge", "unable"]

STEPS = 3
SEEDS = 3


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
    refused: str = ""
    """Why growth refuses the whole network."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Reasons for which modules of it can not grow, and how many modules each concerns."""

    @property
    def supported(self) -> bool:
        """Everything works that works without growth."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words."""
        found = [self.refused, *(f"wrapped: {what} differ" for what in self.differs), self.failed]
        found += [f"{site}: {why}" for site, why in self.unable.items()]
        if not self.grown and not self.refused:
            found.append(f"no site: {'; '.join(self.refusals)}")
        if self.export and not self.bare_export:
            found.append(f"export: {self.export}")
        return [text for text in found if text]


def differences(host: Host) -> list[str]:
    """What of a wrapped network with dormant seeds is not, bit for bit, that of the network alone."""
    bare, wrapped = Run(host), Run(host, sample_every=1)
    found: set[str] = set()
    assert wrapped.growth is not None
    for _ in range(STEPS):
        if not same(bare.step(), wrapped.step()):
            found.add("outputs, gradients or random state")
        wrapped.boundary()
        if not same(bare.evaluate(), wrapped.evaluate()):
            found.add("evaluation")
    wrapped.growth.close()
    left, right = bare.model.state_dict(), wrapped.model.state_dict()
    if list(left) != list(right):
        found.add("keys of state_dict")
    elif not same(
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


def unable(host: Host) -> tuple[dict[str, str], int, dict[str, int]]:
    """Sites that can not hold a seed that computes and is trained, the number of sites, and reasons of refusals.

    All sites hold one at the same time: born silent, they must leave the output as it is.
    """
    run = Run(host, sample_every=0)
    assert run.growth is not None
    run.step()
    sites, wrong = run.growth.sites, {}
    reasons = Counter(refusal.reason for refusal in run.growth.refusals)
    if run.growth.counters:
        return {"": f"discovery failed: {dict(run.growth.counters)}"}, 0, dict(reasons)
    before = run.evaluate()
    attachments: list[Attachment] = []
    for site in sites:
        seed = SeedModule(Kernel(site.descriptor.signature).instantiate(), site)
        seed.mode = Execution.BLENDED
        seed.alpha.fill_(1.0)
        attachments.append(Attachment.attach(run.model, site, seed))
    if not close(before, run.evaluate()):
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
    run = Run(host, sample_every=2)
    assert run.growth is not None
    run.step()
    chosen = _choose(run.growth.sites)
    verdict.grown = [_title(site) for site in chosen]
    keys = list(run.model.state_dict())
    if not chosen:
        return
    before = run.evaluate()
    verdict.failed = _graft(run, chosen)
    if not verdict.failed and not close(before, run.evaluate()):
        verdict.failed = "grafting silent seeds changed the output"
    verdict.failed = verdict.failed or _learn(run, chosen) or _reload(run)
    if not verdict.failed:
        if export:
            verdict.export = _exported(run)
            verdict.bare_export = _exported(Run(host)) if verdict.export else ""
        refused = run.boundary(*(run.decide(site, Action.CULL) for site in chosen))
        left = list(run.model.state_dict()) != keys
        verdict.failed = "; ".join(refused) or ("a culled seed left keys in state_dict" if left else "")
    run.growth.close()


def _graft(run: Run, chosen: list[Site]) -> str:
    for site in chosen:
        run.kernels[f"sha256:{site.index:064x}"] = Kernel(site.descriptor.signature)
    run.plane.kernels.update(run.kernels)
    germinate = []
    for site in chosen:
        kernel = KernelChoice(
            kernel_id=f"sha256:{site.index:064x}",
            blueprint_name=BLUEPRINT,
            blend=BlendStrategy.IMMEDIATE,
            blend_steps=1,
            learning_rate_scale=3.0,
        )
        germinate.append(run.decide(site, Action.GERMINATE, kernel=kernel))
    refused = run.boundary(*germinate)
    refused += run.boundary(*(run.decide(site, Action.ADVANCE, to_stage=Stage.GRAFTING) for site in chosen))
    return "; ".join(refused)


def _learn(run: Run, chosen: list[Site]) -> str:
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
    moved = [index for index, seed in seeds.items() if not same(before[index], [p.detach() for p in seed.parameters()])]
    return "" if moved else "no seed learnt"


def _reload(run: Run) -> str:
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
    fresh = Run(run.host, sample_every=2)
    assert fresh.growth is not None
    fresh.growth.load_state_dict(state["growth"], kernels=run.kernels)
    fresh.model.load_state_dict(state["model"])
    fresh.optimizer.load_state_dict(state["optimizer"])
    fresh.count = run.count
    if not same(run.evaluate(), fresh.evaluate()):
        return "a loaded network gives another output"
    results = [each.step() for each in (run, fresh)]
    fresh.growth.close()
    return "" if same(*results) else "a loaded network goes on differently"


def _exported(run: Run) -> str:
    """Empty where `torch.export` gives a program that computes what the network computes; else the reason."""
    args, kwargs = run.host.batch(0)
    expected = run.evaluate()
    run.model.eval()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            program = torch.export.export(run.model, args, kwargs, strict=False)
            torch.manual_seed(2)
            found = real(program.module()(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  # whatever the exporter raises is the reason that the table shows
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    finally:
        run.model.train()
    return "" if close(expected, found) else "the exported program computes something else"


def judge(host: Host, *, export: bool = True) -> Verdict:
    """Everything about one architecture; `export` takes about as long as the rest."""
    verdict = Verdict(name=host.name, library=host.library, family=host.family)
    verdict.parameters = sum(p.numel() for p in host.make().parameters())
    try:
        verdict.differs = differences(host)
        verdict.unable, verdict.sites, verdict.refusals = unable(host)
        grow(host, verdict, export=export)
    except InvalidInput as refused:
        verdict.refused = str(refused)
    return verdict
