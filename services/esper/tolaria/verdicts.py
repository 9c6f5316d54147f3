"""The honest sentences of a report: what was measured, and whether growth paid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.tolaria.statistics import Interval

__all__ = ["comparison_verdict", "reads", "run_verdict"]


def run_verdict(report: Mapping[str, Any]) -> str:
    """One or two sentences about a single run; it has no control, and says so."""
    result, growth = report["result"], report["growth"]
    accuracy = f"{100 * result['test_accuracy']:.2f} % on the test set" if result["test_accuracy"] is not None else ""
    reached = accuracy or f"a test loss of {result['test_loss']:.4f}"
    if report["arm"] != "grown":
        return f"{reached[0].upper()}{reached[1:]} with {result['final_parameters']} parameters."
    kept = [seed for seed in growth if seed["outcome"] == "fossilized"]
    size = f"{result['host_parameters']} to {result['final_parameters']} parameters"
    if not growth:
        return f"Nothing grew: {reached} with the host's {result['host_parameters']} parameters."
    if not kept:
        tried = f"Nothing that grew was kept ({len(growth)} tried)"
        return f"{tried}: {reached} with the host's {result['host_parameters']} parameters."
    names = ", ".join(f"{seed['blueprint_name']} at {seed['site']}" for seed in kept)
    return (
        f"{len(kept)} of {len(growth)} seeds stayed ({names}): from {size}, {reached}. Whether growth paid is "
        "only told beside "
        "the same host without it: use --compare."
    )


def reads(metric: str, difference: Interval) -> str:
    """What a paired difference says, in words."""
    if difference.low is None or difference.high is None:
        return "one pair: no interval"
    if not difference.excludes_zero:
        return "not told apart"
    better = difference.mean > 0 if metric == "test_accuracy" else difference.mean < 0
    return "better" if better else "worse"


def comparison_verdict(report: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether growth paid against the host, and the sentence that says so with its numbers."""
    found = {(d["arm"], d["against"], d["metric"]): d for d in report["differences"]}
    accuracy, loss = found.get(("grown", "host", "test_accuracy")), found.get(("grown", "host", "test_loss"))
    if accuracy is None or loss is None:
        return False, "No grown run has a host run of the same seed beside it: whether growth paid was not measured."
    kept = sum(seed["outcome"] == "fossilized" for run in report["growth"] for seed in run["adaptations"])
    if kept == 0:
        return False, "Growth did not pay: no seed was kept in any run."
    pays, sentence = _against_host(accuracy, loss)
    sentence += _price(report)
    static = found.get(("grown", "static", "test_accuracy"))
    if static is not None:
        sentence += (
            f" Against the static network that has the same modules from step 0 the difference is {_points(static)}"
            f" ({static['reads']})."
        )
    if accuracy["pairs"] < 10:
        few = "1 seed is" if accuracy["pairs"] == 1 else f"{accuracy['pairs']} seeds are"
        sentence += f" {few} few: take ten or more for a claim."
    return pays, sentence


def _against_host(accuracy: Mapping[str, Any], loss: Mapping[str, Any]) -> tuple[bool, str]:
    numbers = f"test accuracy {_points(accuracy)} and test loss {_nats(loss)} against the same host without growth"
    words = {accuracy["reads"], loss["reads"]}
    if words == {"better"}:
        return True, f"Growth paid: {numbers}."
    if "worse" in words:
        return False, f"Growth did not pay: {numbers}."
    if "better" in words:
        which = "accuracy" if accuracy["reads"] == "better" else "loss"
        return True, f"Growth paid in {which} only: {numbers}; the other is not told apart from no difference."
    return False, f"Growth did not pay beyond what chance explains: {numbers}."


def _price(report: Mapping[str, Any]) -> str:
    """What growth cost beside the host, in training operations: a gain that was paid for is told with its price."""
    spent = {arm["arm"]: arm["mean"]["training_flops"]["mean"] for arm in report["arms"]}
    return f" It took {spent['grown'] / spent['host']:.2g} times the host's training operations."


def _points(d: Mapping[str, Any]) -> str:
    text = f"{100 * d['mean']:+.2f} points"
    return text if d["low"] is None else f"{text} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"


def _nats(d: Mapping[str, Any]) -> str:
    text = f"{d['mean']:+.4f}"
    return text if d["low"] is None else f"{text} [{d['low']:+.4f}, {d['high']:+.4f}]"
