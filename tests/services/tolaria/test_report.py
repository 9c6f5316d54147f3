"""Reports: honest sentences, right intervals, pages that stand alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from scipy import stats  # type: ignore[import-untyped]  # ships no types

from esper.mesh.errors import InvalidInput
from esper.tolaria.report import write_comparison, write_run_report
from esper.tolaria.statistics import interval, paired_difference
from esper.tolaria.verdicts import comparison_verdict, reads, run_verdict

if TYPE_CHECKING:
    from pathlib import Path

SEED = {
    "seed": 3,
    "site": "body",
    "kind": "parallel",
    "blueprint_name": "conv_bottleneck",
    "kernel_id": "sha256:" + "ab" * 32,
    "outcome": "fossilized",
    "parameters": 280,
    "germinated_boundary": 1,
    "ended_boundary": 3,
    "germinated_step": 10,
    "ended_step": 30,
    "gain": 0.12,
    "gain_low": 0.05,
    "reason": "gain <b>0.12</b>",
}
DECISION = {
    "boundary": 1,
    "action": "germinate",
    "site": "body",
    "reason": "SATURATED",
    "explanation": "width 4 is used up",
}


def write_run(folder: Path, arm: str, seed: int, accuracy: float, loss: float, *, growth=(), data: str = "d") -> Path:
    """Files of a finished run, with its report."""
    folder.mkdir(parents=True)
    spec = {"recipe": "digits", "arm": arm, "seed": seed, "group": "g", "reference_run_id": ""}
    history = [
        {
            "boundary": b,
            "epoch": float(b),
            "train_loss": 1.0 / b,
            "validation_loss": 1.1 / b,
            "validation_accuracy": 0.9,
            "parameters": 1000 + 100 * b,
            "training_flops": 1e9 * b,
            "advice": f"4 kernels fitted at boundary {b}.",
        }
        for b in (1, 2, 3)
    ]
    result = {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "validation_loss": loss,
        "validation_accuracy": accuracy,
        "host_parameters": 1000,
        "final_parameters": 1280 if growth or arm == "static" else 1000,
        "training_flops": 3e9,
        "training_time_s": 12.5,
        "preparation_time_s": 41.25,
        "kernel_ids": [s["kernel_id"] for s in growth],
        "weights_digest": "sha256:" + "cd" * 32,
        "data": {"digest": data, "train": 10, "validation": 5, "test": 5},
        "rollbacks": 0,
    }
    lineage = {"adaptations": list(growth), "decisions": [DECISION] if growth else []}
    files = {"run": {"spec": spec}, "config": {"seed": seed}, "history": history, "result": result, "lineage": lineage}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_run_report(folder)
    return folder


class Page(HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loads += [
            value for key, value in attrs if key in {"src", "href", "xlink:href"} and not value.startswith("#")
        ]
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loads += [
            value for key, value in attrs if key in {"src", "href", "xlink:href"} and not value.startswith("#")
        ]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


def test_the_page_of_a_run_stands_alone_and_tells_what_grew(tmp_path):
    """No foreign address, plots inline, every decision with its explanation, data escaped."""
    folder = write_run(tmp_path / "digits-1", "grown", 0, 0.97, 0.1, growth=[SEED])
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert [] == page.loads
    assert [] == page.open
    assert 2 == text.count("<svg ")
    for expected in (
        "conv_bottleneck",
        "width 4 is used up",
        "4 kernels fitted at boundary 1",
        "at least 0.0500",
        "1 of 1 seeds stayed",
        "97.00 %",
        "41.2 s",
    ):
        assert expected in text
    assert "gain &lt;b&gt;0.12" in text
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text


def test_without_a_page_only_json_is_written(tmp_path):
    """artifacts.html = false."""
    folder = write_run(tmp_path / "digits-1", "host", 0, 0.9, 0.3)
    (folder / "report.html").unlink()
    write_run_report(folder, html=False)
    assert not (folder / "report.html").exists()
    assert "run" == json.loads((folder / "report.json").read_text())["kind"]


@pytest.mark.parametrize(
    ("arm", "growth", "text"),
    [
        ("host", [], "95.00 % on the test set with 1000 parameters"),
        ("grown", [], "Nothing grew"),
        ("grown", [{**SEED, "outcome": "culled"}], "Nothing that grew was kept (1 tried)"),
        ("grown", [SEED], "use --compare"),
    ],
)
def test_a_single_run_claims_nothing_that_it_cannot_know(tmp_path, arm, growth, text):
    """One run has no control."""
    folder = write_run(tmp_path / "r", arm, 0, 0.95, 0.2, growth=growth)
    assert text in run_verdict(json.loads((folder / "report.json").read_text()))


def compare(tmp_path: Path, grown, host, static=None, *, growth=(SEED,)) -> dict:
    """A comparison of (accuracy, loss) per seed."""
    folders = []
    for arm, values in (("grown", grown), ("host", host), ("static", static or [])):
        for seed, (accuracy, loss) in enumerate(values):
            grew = growth if arm == "grown" else ()
            folders.append(write_run(tmp_path / f"{arm}-{seed}", arm, seed, accuracy, loss, growth=grew))
    write_comparison(folders, tmp_path / "out")
    found: dict = json.loads((tmp_path / "out" / "report.json").read_text())
    return found


HOST = [(0.90, 0.30), (0.91, 0.29), (0.92, 0.28)]
BETTER = [(0.95, 0.20), (0.961, 0.19), (0.972, 0.18)]


def test_growth_that_paid_is_said_to_have_paid_with_its_numbers(tmp_path):
    """Both intervals exclude zero; few seeds are called few."""
    found = compare(tmp_path, BETTER, HOST, BETTER)
    assert found["pays"]
    assert found["verdict"].startswith("Growth paid: test accuracy +5.10 points [")
    assert "3 seeds are few" in found["verdict"]
    assert "(not told apart)" in found["verdict"]
    assert ["grown", "host", "static"] == [arm["arm"] for arm in found["arms"]]
    text = (tmp_path / "out" / "report.html").read_text()
    assert [] == Page(text).loads
    assert "conv_bottleneck" in text


@pytest.mark.parametrize(
    ("grown", "growth", "text"),
    [
        (HOST, (SEED,), "did not pay beyond what chance explains"),
        ([(0.80, 0.5), (0.81, 0.49), (0.82, 0.48)], (SEED,), "Growth did not pay: test accuracy -10.00 points"),
        (BETTER, ({**SEED, "outcome": "culled"},), "no seed was kept in any run"),
        ([(0.95, 0.30), (0.961, 0.29), (0.972, 0.28)], (SEED,), "Growth paid in accuracy only"),
    ],
)
def test_growth_that_did_not_pay_is_said_not_to_have_paid(tmp_path, grown, growth, text):
    """The sentence follows the numbers, whatever was hoped for."""
    found = compare(tmp_path, grown, HOST, growth=growth)
    assert text in found["verdict"]
    assert found["pays"] == text.startswith("Growth paid")


def test_without_a_host_run_nothing_is_claimed(tmp_path):
    """Growth against nothing is no measurement."""
    found = compare(tmp_path, BETTER, [])
    assert not found["pays"]
    assert "was not measured" in found["verdict"]


def test_one_seed_has_no_interval(tmp_path):
    """A single pair shows its difference and no bounds."""
    found = compare(tmp_path, BETTER[:1], HOST[:1])
    assert all(d["low"] is None for d in found["differences"])
    assert "1 seed is few" in found["verdict"]
    assert "beyond what chance explains" in found["verdict"]


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    """Other data, or nothing at all."""
    one = write_run(tmp_path / "a", "grown", 0, 0.9, 0.3)
    other = write_run(tmp_path / "b", "host", 0, 0.9, 0.3, data="other")
    with pytest.raises(InvalidInput, match="one data"):
        write_comparison([one, other], tmp_path / "out")
    with pytest.raises(InvalidInput, match="at least one"):
        write_comparison([], tmp_path / "out")


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.31, 0.29, 0.35], list(map(float, range(12)))])
def test_intervals_are_those_of_students_t(values):
    """Against scipy."""
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert pytest.approx((low, high)) == (found.low, found.high)


def test_differences_are_paired_by_seed():
    """Only seeds that both have count, and what they share cancels."""
    found = paired_difference({0: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 8.0, 3: 0.0})
    assert (1.0, 1.0, 1.0, 2) == (found.mean, found.low, found.high, found.count)
    assert found.excludes_zero
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert "better" == reads("test_accuracy", found)
    assert "worse" == reads("test_loss", found)


def test_a_comparison_without_static_runs_says_nothing_of_them():
    """The verdict names only what was measured."""
    difference = {
        "arm": "grown",
        "against": "host",
        "mean": 0.1,
        "low": 0.05,
        "high": 0.15,
        "pairs": 12,
        "reads": "better",
    }
    report = {
        "arms": [{"arm": arm, "mean": {"training_flops": {"mean": f}}} for arm, f in (("grown", 6e9), ("host", 2e9))],
        "differences": [{**difference, "metric": "test_accuracy"}, {**difference, "metric": "test_loss"}],
        "growth": [{"adaptations": [SEED]}],
    }
    pays, sentence = comparison_verdict(report)
    assert pays
    assert "static" not in sentence
    assert "3 times the host's training operations" in sentence
    assert not re.search("few", sentence)
