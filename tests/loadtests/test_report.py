"""What benchmarks print and what becomes of it."""

import io
import json

from loadtests._report import Report, Target
from loadtests.write_performance import section


def test_what_was_not_measured_says_so():
    """A missing figure is null in the line and spelt out on the page; it neither meets nor misses its target."""
    stream = io.StringIO()
    report = Report("ops", stream=stream)
    report.add("there", 2.0, unit="ratio", target=Target.above(0.9), seeds=1)
    report.not_measured("away", "no CUDA device", unit="ratio", target=Target.above(0.9))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [2.0, None] == [line["value"] for line in lines]
    assert [True, None] == [line["met"] for line in lines]
    assert [] == report.missed
    page = section("ops", lines)
    assert "| there | 2 ratio | >= 0.9 | yes | seeds 1 |" in page
    assert "| away | not measured | >= 0.9 |  | no CUDA device |" in page
