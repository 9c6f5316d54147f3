"""Tells others when the host's parameters become other ones, and keeps copies of the host in its shape.

An average of the weights, a teacher or a target network is a second network with the parameters of the first. When a
seed's module comes or goes, it must come or go there too: by `Structure.follow` where the second network is a deep
copy, by a listener where it is a table of tensors.
"""

from __future__ import annotations

import copy as copying
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from esper.kasmina.attach import Attachment, SeedModule, child_name, owner_of
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from esper.kasmina._seed import SeedRun
    from esper.kasmina.control import Stage
    from esper.kasmina.sites import Site

__all__ = ["Change", "ChangeKind", "Structure"]

_log = get_logger("esper.kasmina.growth")


class ChangeKind(StrEnum):
    """What happened to a seed's module."""

    ATTACHED = "attached"
    """Its parameters are the host's from now on."""
    MOVED = "moved"
    """It entered another stage; the parameters are the same."""
    DETACHED = "detached"
    """Its parameters have gone."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a host's modules."""

    kind: ChangeKind
    seed: int
    stage: Stage
    """Of the seed, after it."""
    parameters: tuple[str, ...]
    """Names of the seed's parameters in ``model.named_parameters()``."""


class Structure:
    """The modules that seeds have in one host.

    Args:
        model: the host.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._listeners: list[Callable[[Change, SeedRun], None]] = []

    def listen(self, listener: Callable[[Change, SeedRun], None]) -> Callable[[], None]:
        """Call `listener` after each change; the answer ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def follow(self, copy: nn.Module, runs: Iterable[SeedRun]) -> Callable[[], None]:
        """Have a deep copy of the host follow every change; the answer ends that.

        Args:
            copy: made by ``copy.deepcopy`` of the host, at any time; the seeds that it lacks it gets now.
            runs: the lives that are not over, in the order of their hooks.
        """
        twins = _Twins(copy)
        for run in runs:
            if run.attachment is not None:
                twins.adopt(run.site, run.attachment.seed)
        return self.listen(twins.changed)

    def tell(self, kind: ChangeKind, run: SeedRun, stage: Stage, parameters: tuple[str, ...]) -> None:
        """Call every listener; one that fails is logged, and neither training nor growth stops."""
        change = Change(kind, run.index, stage, parameters)
        for listener in list(self._listeners):
            try:
                listener(change, run)
            except Exception:  # noqa: BLE001  # the user's own code; the log has the traceback
                _log.exception("listener failed", kind=kind.value, seed=run.index)

    def parameters(self, seed: int) -> tuple[str, ...]:
        """Names of a seed's parameters in the host."""
        part = f"{child_name(seed)}."
        return tuple(name for name, _ in self._model.named_parameters() if part in name)


class _Twins:
    """The seeds of a copy of the host."""

    def __init__(self, copy: nn.Module) -> None:
        self._copy = copy
        self._attachments: dict[int, Attachment] = {}

    def adopt(self, site: Site, seed: SeedModule) -> None:
        """Take over a seed that was copied with the host: its hooks came along, the handles to remove them did not."""
        target, source = self._copy.get_submodule(site.target), self._copy.get_submodule(site.source)
        owner, name = owner_of(target), child_name(site.index)
        twin = getattr(owner, name, None)
        if twin is None:
            self._attach(site, seed)
            return
        for hooks in (target._forward_hooks, source._forward_pre_hooks):  # noqa: SLF001  # no public way to list them
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is twin]:
                del hooks[key]
        delattr(owner, name)
        self._attachments[site.index] = Attachment.attach(self._copy, site, twin)

    def _attach(self, site: Site, seed: SeedModule) -> None:
        twin = copying.deepcopy(seed)
        # The host's is a view of what all seeds share on the device.
        twin.alpha = seed.alpha.detach().clone()
        device = next((p.device for p in self._copy.get_submodule(site.target).parameters()), None)
        self._attachments[site.index] = Attachment.attach(self._copy, site, twin.to(device))

    def changed(self, change: Change, run: SeedRun) -> None:
        """Do to the copy what was done to the host."""
        if change.kind is ChangeKind.DETACHED:
            attachment = self._attachments.pop(run.index, None)
            if attachment is not None:
                attachment.detach()
            return
        assert run.attachment is not None
        seed = run.attachment.seed
        if change.kind is ChangeKind.ATTACHED:
            self._attach(run.site, seed)
        twin = self._attachments[run.index].seed
        twin.mode = seed.mode
        twin.alpha.copy_(seed.alpha)
