"""Reports of runs: JSON for programs, one self-contained HTML page for people.

Typical use::

    write_run_report(run_dir)                 # report.json and report.html of one run; the training process does it
    write_comparison([dir1, dir2, ...], out)  # the arms of a recipe side by side, over seeds

Both read files of the runs only, so they work on downloaded artifacts as well.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from esper.mesh.errors import InvalidInput
from esper.tolaria.rundir import read_json, write_atomic, write_json
from esper.tolaria.verdicts import comparison_verdict, reads, run_verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import jinja2

__all__ = ["ARMS", "write_comparison", "write_run_report"]

ARMS = {
    "grown": "the host, growing while it trains",
    "host": "the same host without growth",
    "static": "the host with the grown run's modules from step 0",
}
"""The arms of a comparison, in the order in which they are shown."""
_NOTES = {
    "grown": "starts as the host; modules are added while it trains, and stay only where a counterfactual on "
    "validation data "
    "says that they pay.",
    "host": "the same initial weights, the same batches, the same schedule; nothing grows. It spends fewer operations.",
    "static": "the same host and initial weights with the modules that stayed in the grown run of the same "
    "seed, there from "
    "step 0, born with the same parameters and zero output, trained at the newborns' rate for as long as the "
    "newborns were, "
    "then at the host's. It knows in advance what to grow, which no real run does.",
}
_METRICS = ("test_accuracy", "test_loss", "final_parameters", "training_flops", "training_time_s")
_PAIRS = (("grown", "host"), ("grown", "static"), ("static", "host"))


def write_run_report(run_dir: Path, *, html: bool = True) -> None:
    """Write ``report.json``, and ``report.html``, of a finished run.

    Args:
        run_dir: folder with the files that the training process writes at its end.
        html: whether to write the page too.
    """
    record = read_json(run_dir / "run.json")
    config, lineage = read_json(run_dir / "config.json"), read_json(run_dir / "lineage.json")
    history, facts = read_json(run_dir / "history.json"), read_json(run_dir / "result.json")
    data, rollbacks = facts.pop("data"), facts.pop("rollbacks")
    spec = record["spec"]
    report: dict[str, Any] = {
        "kind": "run",
        "run_id": run_dir.name,
        "recipe": spec["recipe"],
        "arm": spec["arm"],
        "seed": spec["seed"],
        "group": spec["group"],
        "reference_run_id": spec["reference_run_id"],
        "result": facts,
        "data": data,
        "rollbacks": rollbacks,
        "growth": lineage["adaptations"],
        "decisions": _weighed(lineage["decisions"], history),
        "history": history,
    }
    report["kept"] = any(seed["outcome"] == "fossilized" for seed in report["growth"])
    report["verdict"] = run_verdict(report)
    write_json(run_dir / "report.json", report)
    if html:
        from esper.tolaria.figures import curves_figure, size_figure

        page = _page(
            "run.html.j2",
            title=f"Esper run {run_dir.name}",
            report=report,
            curves=curves_figure(history, report["growth"]),
            size=size_figure(history, report["growth"]),
            config=json.dumps(config, indent=2),
        )
        write_atomic(run_dir / "report.html", page)


def write_comparison(run_dirs: Sequence[Path], out_dir: Path) -> None:
    """Write ``report.json`` and ``report.html`` that set the arms of one recipe side by side.

    Args:
        run_dirs: folders that hold the ``report.json`` of one run each.
        out_dir: created when missing.

    Raises:
        InvalidInput: COMPARISON_EMPTY or COMPARISON_MIXED, no runs, or runs of several recipes or data.
    """
    reports = [read_json(folder / "report.json") for folder in run_dirs]
    _check(reports)
    arms = [
        _arm(name, [r for r in reports if r["arm"] == name]) for name in ARMS if any(r["arm"] == name for r in reports)
    ]
    report: dict[str, Any] = {
        "kind": "comparison",
        "recipe": reports[0]["recipe"],
        "seeds": sorted({r["seed"] for r in reports}),
        "arms": arms,
        "differences": _differences(arms),
        "growth": [
            {"run_id": r["run_id"], "seed": r["seed"], "adaptations": r["growth"]}
            for r in sorted(reports, key=lambda r: int(r["seed"]))
            if r["arm"] == "grown"
        ],
    }
    report["pays"], report["verdict"] = comparison_verdict(report)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "report.json", report)
    from esper.tolaria.figures import arms_figure

    histories = {arm["arm"]: [r["history"] for r in reports if r["arm"] == arm["arm"]] for arm in arms}
    page = _page(
        "comparison.html.j2",
        title=f"Esper comparison: {report['recipe']}",
        report=report,
        curves=arms_figure(histories),
        arm_texts=ARMS,
        arm_notes={arm["arm"]: _NOTES[arm["arm"]] for arm in arms},
    )
    write_atomic(out_dir / "report.html", page)


def _weighed(decisions: Sequence[dict[str, Any]], history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decisions, which have the numbers that settled them, with the advice of their boundary, which has the others."""
    # Checkpoints of earlier versions hold boundaries without it.
    advice = {entry["boundary"]: entry.get("advice", "") for entry in history}
    return [{**decision, "advice": advice.get(decision["boundary"], "")} for decision in decisions]


def _check(reports: Sequence[dict[str, Any]]) -> None:
    if not reports:
        raise InvalidInput("comparison: expected at least one finished run, found none", reason="COMPARISON_EMPTY")
    for what, values in (
        ("recipe", {r["recipe"] for r in reports}),
        ("data", {r["data"]["digest"] for r in reports}),
    ):
        if len(values) > 1:
            raise InvalidInput(
                f"comparison: expected runs of one {what}, found {', '.join(sorted(values))}", reason="COMPARISON_MIXED"
            )


def _arm(name: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from esper.tolaria.statistics import interval

    kept = (
        "test_accuracy",
        "test_loss",
        "host_parameters",
        "final_parameters",
        "training_flops",
        "training_time_s",
        "weights_digest",
    )
    runs = [
        {"run_id": r["run_id"], "seed": r["seed"], **{key: r["result"][key] for key in kept}}
        for r in sorted(reports, key=lambda r: int(r["seed"]))
    ]
    mean = {metric: interval([run[metric] for run in runs]).document() for metric in _METRICS}
    return {"arm": name, "runs": runs, "mean": mean}


def _differences(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from esper.tolaria.statistics import paired_difference

    by_name = {arm["arm"]: arm for arm in arms}
    found = []
    for ours, theirs in _PAIRS:
        if ours not in by_name or theirs not in by_name:
            continue
        for metric in ("test_accuracy", "test_loss"):
            values = [{run["seed"]: run[metric] for run in by_name[name]["runs"]} for name in (ours, theirs)]
            difference = paired_difference(*values)
            if difference is None:
                continue
            entry = {
                "arm": ours,
                "against": theirs,
                "metric": metric,
                "pairs": difference.count,
                **difference.document(),
            }
            entry["reads"] = reads(metric, difference)
            found.append(entry)
    return found


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esper.tolaria"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.globals |= {"percent": _percent, "giga": _giga, "spread": _spread}
    return environment


def _page(template: str, **values: Any) -> bytes:
    return _environment().get_template(template).render(**values).encode()


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f} %"


def _giga(value: float) -> str:
    return f"{value / 1e9:.3g} GFLOP"


def _spread(values: dict[str, Any], factor: float, form: str, unit: str) -> str:
    text = str(form % (values["mean"] * factor)) + unit
    if values["low"] is None:
        return text
    return f"{text} [{form % (values['low'] * factor)}, {form % (values['high'] * factor)}]"
