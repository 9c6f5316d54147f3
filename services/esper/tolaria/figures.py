"""Plots of the reports as inline SVG that is readable on light and on dark pages.

Lines and texts take the page's colour (``currentColor``); only data has colours of its own, chosen to be told apart
on both grounds and by people who do not see all colours.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

__all__ = ["ARM_COLOURS", "arms_figure", "curves_figure", "size_figure"]

ARM_COLOURS = {"grown": "#1b9e77", "host": "#d95f02", "static": "#7570b3"}
_TRAIN, _VALIDATION, _ACCURACY = "#8c8c8c", "#1f77b4", "#1b9e77"
_EVENT_COLOURS = {"germinated": "#1f77b4", "fossilized": "#1b9e77", "culled": "#d62728", "rolled_back": "#d62728"}
_INK = "#010203"
"""Stands for the page's own colour while matplotlib draws; replaced afterwards."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "esper",
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def curves_figure(history: Sequence[Mapping[str, Any]], growth: Sequence[Mapping[str, Any]]) -> str:
    """Losses and accuracy per epoch, with a line where a seed germinated, was fossilized or left."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5))
        top, bottom = figure.subplots(2, 1, sharex=True)
        epochs = [entry["epoch"] for entry in history]
        _line(top, epochs, [entry["train_loss"] for entry in history], _TRAIN, "training loss")
        _line(top, epochs, [entry["validation_loss"] for entry in history], _VALIDATION, "validation loss")
        top.set_yscale("log")
        top.set_ylabel("loss (nats)")
        _line(
            bottom, epochs, [100 * entry["validation_accuracy"] for entry in history], _ACCURACY, "validation accuracy"
        )
        bottom.set_ylabel("accuracy (%)")
        bottom.set_xlabel("epoch")
        for axes in (top, bottom):
            _mark_growth(axes, history, growth)
            axes.legend(frameon=False, fontsize=8)
        return _svg(figure, "Loss and accuracy over the epochs, with the moments of growth")


def size_figure(history: Sequence[Mapping[str, Any]], growth: Sequence[Mapping[str, Any]]) -> str:
    """Parameters and training operations over the epochs."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.2))
        left, right = figure.subplots(1, 2)
        epochs = [entry["epoch"] for entry in history]
        left.step(epochs, [entry["parameters"] for entry in history], where="post", color=_VALIDATION)
        left.set_ylabel("parameters")
        left.set_ylim(bottom=0)
        right.plot(epochs, [entry["training_flops"] / 1e9 for entry in history], color=_VALIDATION)
        right.set_ylabel("training operations (GFLOP)")
        for axes in (left, right):
            axes.set_xlabel("epoch")
            _mark_growth(axes, history, growth)
            _plain(axes)
        return _svg(figure, "Parameters and training operations over the epochs")


def arms_figure(arms: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    """Validation accuracy and loss of every run, one colour per arm; `arms` maps an arm to its runs' histories."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.4))
        left, right = figure.subplots(1, 2)
        for arm, histories in arms.items():
            for number, history in enumerate(histories):
                epochs = [entry["epoch"] for entry in history]
                label = arm if number == 0 else None
                colour = ARM_COLOURS.get(arm, _TRAIN)
                _line(left, epochs, [100 * e["validation_accuracy"] for e in history], colour, label)
                _line(right, epochs, [e["validation_loss"] for e in history], colour, label)
        left.set_ylabel("validation accuracy (%)")
        right.set_ylabel("validation loss (nats)")
        right.set_yscale("log")
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.legend(frameon=False, fontsize=8)
        return _svg(figure, "Validation accuracy and loss of every run")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str | None) -> None:
    axes.plot(x, y, color=colour, linewidth=1.4, label=label)
    _plain(axes)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.5)


def _mark_growth(axes: Axes, history: Sequence[Mapping[str, Any]], growth: Sequence[Mapping[str, Any]]) -> None:
    epoch_of = {entry["boundary"]: entry["epoch"] for entry in history}
    for seed in growth:
        marks = [("germinated", seed["germinated_boundary"])]
        if seed["outcome"] in _EVENT_COLOURS:
            marks.append((seed["outcome"], seed["ended_boundary"]))
        for kind, boundary in marks:
            if boundary in epoch_of:
                style = ":" if kind == "germinated" else "--"
                axes.axvline(epoch_of[boundary], color=_EVENT_COLOURS[kind], linestyle=style, linewidth=1)


def _svg(figure: Figure, title: str) -> str:
    figure.patch.set_visible(False)
    figure.tight_layout()
    buffer = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Title": title})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Sized by the page, not by matplotlib's points.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
