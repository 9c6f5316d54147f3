"""Reports on the terminal: the same facts, and the same verdict, as the page that Tolaria writes.

Both functions take `report.json` as `esper.tolaria.report` writes it, so the figures cannot differ from the page's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["print_comparison", "print_run"]

_ARM_TEXTS = {
    "grown": "the host, growing while it trains",
    "host": "the same host without growth",
    "static": "the grown network from step 0",
}


def print_run(console: Console, report: Mapping[str, Any], html_path: Path) -> None:
    """Write the report of one run: its figures, what grew where and when, the verdict, where the page lies."""
    result = report["result"]
    console.print()
    console.print(f"[bold]{escape(report['run_id'])}[/]  {report['recipe']}, {report['arm']}, seed {report['seed']}")
    console.print(f"  test        {_score(result)} on {report['data']['test']} samples never looked at before")
    console.print(f"  parameters  {_growth_of_size(result)}")
    times = f"{_seconds(result['training_time_s'])}, prepared in {_seconds(result['preparation_time_s'])}"
    console.print(f"  training    {_flops(result['training_flops'])}, {times}")
    if report["rollbacks"]:
        console.print(f"  rollbacks   {report['rollbacks']}, because a loss or gradient was not finite")
    console.print(f"  weights     {result['weights_digest']}")
    if report["arm"] == "grown":
        _print_growth(console, report["growth"])
    _print_end(console, str(report["verdict"]), html_path)


def print_comparison(console: Console, report: Mapping[str, Any], html_path: Path) -> None:
    """Write the report of a comparison: arms, paired differences, what grew in each grown run, the verdict."""
    seeds = report["seeds"]
    console.print()
    named = ", ".join(map(str, seeds))
    plural = "seed" if len(seeds) == 1 else "seeds"
    console.print(f"[bold]{report['recipe']}[/]: {len(seeds)} {plural} ({named}), every arm on the same data and order")
    console.print()
    console.print(_arms_table(report["arms"]))
    console.print()
    console.print(_differences_table(report["differences"]))
    console.print("[dim]means with 95 % intervals (Student's t) over seeds; differences are paired by seed[/]")
    for grown in report["growth"]:
        console.print()
        console.print(f"[bold]seed {grown['seed']}[/]  {escape(grown['run_id'])}")
        _print_growth(console, grown["adaptations"])
    _print_end(console, str(report["verdict"]), html_path)


def _print_growth(console: Console, growth: Sequence[Mapping[str, Any]]) -> None:
    if not growth:
        console.print("  nothing grew")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("  WHERE", "WHAT", "WHEN", "CAME TO", "GAIN (NATS)", "PARAMETERS"):
        table.add_column(column, justify="right" if column == "PARAMETERS" else "left")
    for seed in growth:
        table.add_row(
            Text(f"  {seed['site']} ({seed['kind']})"),
            Text(str(seed["blueprint_name"])),
            _when(seed),
            Text(str(seed["outcome"]), style="green" if seed["outcome"] == "fossilized" else ""),
            _gain(seed),
            str(seed["parameters"]),
        )
    console.print(table)
    for seed in growth:
        name = f"  {seed['blueprint_name']} at {seed['site']}: "
        console.print(f"{name}kernel {seed['kernel_id'] or 'never known'}", markup=False, soft_wrap=True)
        if seed["reason"]:
            console.print(f"    {seed['reason']}", markup=False, style="dim", soft_wrap=True)


def _when(seed: Mapping[str, Any]) -> str:
    text = f"boundary {seed['germinated_boundary']} (step {seed['germinated_step']})"
    return text if seed["ended_boundary"] is None else f"{text} to {seed['ended_boundary']}"


def _gain(seed: Mapping[str, Any]) -> str:
    if seed["gain"] is None:
        return "not measured"
    return f"{seed['gain']:.4f}, at least {seed['gain_low']:.4f}"


def _arms_table(arms: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ARM", "TEST ACCURACY", "TEST LOSS", "PARAMETERS", "TRAINING", "TIME"):
        table.add_column(column, justify="left" if column == "ARM" else "right")
    for arm in arms:
        mean = arm["mean"]
        table.add_row(
            f"{arm['arm']} [dim]{_ARM_TEXTS[arm['arm']]}[/]",
            _spread(mean.get("test_accuracy"), _percent),
            _spread(mean["test_loss"], "{:.4f}".format),
            f"{mean['final_parameters']['mean']:.0f}",
            _flops(mean["training_flops"]["mean"]),
            _seconds(mean["training_time_s"]["mean"]),
        )
    return table


def _differences_table(differences: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("DIFFERENCE", "OF", "MEAN [95 % INTERVAL]", "PAIRS", "READS"):
        table.add_column(column, justify="right" if column in {"MEAN [95 % INTERVAL]", "PAIRS"} else "left")
    for found in differences:
        accuracy = found["metric"] == "test_accuracy"
        table.add_row(
            f"{found['arm']} - {found['against']}",
            str(found["metric"]).replace("_", " "),
            _spread(found, _points if accuracy else "{:+.4f}".format),
            str(found["pairs"]),
            str(found["reads"]),
        )
    return table


def _print_end(console: Console, verdict: str, html_path: Path) -> None:
    console.print()
    console.print(verdict, style="bold", markup=False)
    if html_path.exists():
        console.print(f"report: {html_path}", markup=False, soft_wrap=True)


def _spread(values: Mapping[str, Any] | None, form: Any) -> Text:
    if values is None:
        return Text("-")
    text = form(values["mean"])
    if values["low"] is not None:
        text += f" [{form(values['low'])}, {form(values['high'])}]"
    return Text(text)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.2f} points"


def _score(result: Mapping[str, Any]) -> str:
    loss = f"loss {result['test_loss']:.4f}"
    return loss if result["test_accuracy"] is None else f"{_percent(result['test_accuracy'])} ({loss})"


def _growth_of_size(result: Mapping[str, Any]) -> str:
    host, final = result["host_parameters"], result["final_parameters"]
    return f"{final}" if host == final else f"{host} of the host, {final} at the end"


def _flops(value: float) -> str:
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e6:.3g} MFLOP"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
