"""The ranks of one run as one: decided once, applied by all, or by none.

`Ranks` speaks over a gloo group of its own, on the host: nothing here touches a device or the streams of the training's
own collectives. All ranks must call the same methods in the same order, which they do as long as they run the same
program. Every collective has a deadline; a rank that does not come to one ends the run with `RankLost`, as it would
end in the next backward anyway.

`renew_reducers` makes ``DistributedDataParallel`` reduce what growth added or took away, by a reducer made anew, as the
wrapper itself does when it is unpickled: buckets, ``no_sync``, unused parameters and communication hooks work on
newborns as on all others.
"""

from __future__ import annotations

import gc
import pickle
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.mesh.errors import Conflict, EsperError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup, Work

__all__ = ["ALONE", "RankLost", "Ranks", "Vote", "join", "renew_reducers", "unwrapped"]

T = TypeVar("T")


class RankLost(Unavailable):
    """A rank of the run did not come to a collective in time: no other can go on as if it had."""


class Vote:
    """A sum over ranks that is under way.

    Args:
        sums: what is summed in place.
        work: None where it is the sum already.
    """

    def __init__(self, sums: Tensor, work: Work | None) -> None:
        self._sums = sums
        self._work = work

    def result(self) -> list[float]:
        """The sums, as soon as every rank has voted.

        Raises:
            RankLost: one did not in time.
        """
        if self._work is not None:
            _meet(self._work.wait)
            self._work = None
        sums: list[float] = self._sums.tolist()
        return sums


class Ranks:
    """The processes that train one model; this process alone where no group is given.

    Args:
        group: of the training; every member makes its own `Ranks` at the same point of the program.
        timeout_s: of every collective.
        early: True where no group could be known yet.
    """

    def __init__(self, group: ProcessGroup | None = None, timeout_s: float = 300.0, *, early: bool = False) -> None:
        self.rank, self.size = 0, 1
        self._early = early
        self._control: ProcessGroup | None = None
        if group is not None and dist.get_world_size(group) > 1:
            members = dist.get_process_group_ranks(group)
            self.rank, self.size = dist.get_rank(group), len(members)
            self._first = members[0]
            self._control = dist.new_group(
                members, timedelta(seconds=timeout_s), "gloo", use_local_synchronization=True
            )

    @property
    def alone(self) -> bool:
        """True where there is nobody to agree with."""
        return self._control is None

    def check(self) -> None:
        """See that nobody came who would have to agree.

        Raises:
            Conflict: ``torch.distributed`` was initialised after this process had begun to grow alone.
        """
        if self._early and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise Conflict(
                "growth: expected wrap() after torch.distributed.init_process_group, found it before: ranks would grow "
                "apart; wrap() later, or with distributed=False where each rank trains a model of its own",
                reason="WRAPPED_EARLY",
            )

    @property
    def leads(self) -> bool:
        """True on the rank that speaks for all."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; its results by rank.

        Raises:
            Exception: what it raised here; where it raised on another rank only, a `Conflict` that says so.
            RankLost: a rank did not come.
        """
        if self._control is None:
            return [action()]
        failure: Exception | None = None
        try:
            told: tuple[str, T | None] = ("", action())
        except Exception as error:  # noqa: BLE001  # whatever it is, the others must hear of it before it goes on its way
            failure, told = error, (_sentence(error), None)
        heard = self._gather(told)
        if failure is not None:
            raise failure
        if wrong := [f"rank {rank}: {why}" for rank, (why, _) in enumerate(heard) if why]:
            raise Conflict("; ".join(wrong), reason="OTHER_RANK")
        return [result for _, result in heard]

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on the leading rank, and give its result to all.

        Raises:
            Exception: as `together`.
        """
        return self.together(lambda: action() if self.leads else None)[0]  # type: ignore[return-value]  # of the leader

    def _gather(self, told: tuple[str, Any]) -> list[tuple[str, Any]]:
        try:
            data = pickle.dumps(told)
        except Exception as error:  # noqa: BLE001  # of whatever a user's object raises
            data = pickle.dumps((f"it can not be told to others: {_sentence(error)}", None))
        heard: list[Any] = [None] * self.size
        _meet(lambda: dist.all_gather_object(heard, data, self._control))
        # Bytes of the processes of this very run, over its own group.
        return [pickle.loads(item) for item in heard]  # noqa: S301

    def vote(self, values: Sequence[float] | Tensor) -> Vote:
        """Begin to sum over ranks; nobody waits until the result is asked for."""
        sums = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
        if self._control is None:
            return Vote(sums, None)
        started: list[Work | None] = []
        _meet(lambda: started.append(dist.all_reduce(sums, group=self._control, async_op=True)))
        return Vote(sums, started[0])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over ranks in the place of each tensor; whole numbers stay."""
        if self._control is None:
            return
        for tensor in tensors:
            if tensor.is_floating_point():
                mean = tensor.detach().to("cpu", torch.float64)
                _meet(partial(dist.all_reduce, mean, group=self._control))
                tensor.detach().copy_(mean / self.size)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Put the leading rank's values in the place of each tensor."""
        if self._control is None:
            return
        for tensor in tensors:
            held = tensor.detach().to("cpu", copy=True)
            _meet(partial(dist.broadcast, held, self._first, group=self._control))
            tensor.detach().copy_(held)


ALONE = Ranks()


def _sentence(error: Exception) -> str:
    return error.public if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"


def _meet(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:  # of the deadline, and of a lost connection
        raise RankLost(f"ranks of the run: expected all to come, found {error!s:.300}", reason="RANK_LOST") from error


def unwrapped(model: nn.Module) -> tuple[nn.Module, ProcessGroup | None]:
    """The user's module inside ``DistributedDataParallel``, and the wrapper's group; `model` itself otherwise."""
    if isinstance(model, DistributedDataParallel):
        return model.module, model.process_group
    return model, None


def join(group: ProcessGroup | None, *, wanted: bool, timeout_s: float) -> Ranks:
    """The ranks of this run: of `group`, else of the default group where there is one.

    Args:
        group: of the training, where it is known.
        wanted: False where this process is to grow alone.
        timeout_s: of every collective.
    """
    if not wanted:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(early=True)
    return Ranks(group or dist.group.WORLD, timeout_s)


def renew_reducers(model: nn.Module) -> int:
    """Have every wrapper around `model` reduce the gradients of all that learns in it now; returns how many there are.

    To be called between two iterations, on all ranks.
    """
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    around = [w for w in wrappers if any(module is model for module in w.module.modules())]
    for wrapper in around:
        _renew(wrapper)
    return len(around)


def _renew(wrapper: Any) -> None:
    """As ``DistributedDataParallel.__setstate__`` does it; torch offers no public way."""
    parameters, sparse = wrapper._build_params_for_reducer()  # noqa: SLF001
    names = wrapper._build_debug_param_to_name_mapping(parameters)  # noqa: SLF001
    wrapper.reducer._remove_autograd_hooks()  # noqa: SLF001
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)  # noqa: SLF001
    if wrapper.static_graph:
        # It is learnt in the first iteration.
        wrapper._static_graph_delay_allreduce_enqueued = False  # noqa: SLF001
        wrapper.reducer._set_static_graph()  # noqa: SLF001
        wrapper.logger._set_static_graph()  # noqa: SLF001
    for hook, state in wrapper._comm_hooks:  # noqa: SLF001
        dist._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]  # noqa: SLF001
