"""The page of faults is made from what the program prints."""

from __future__ import annotations

from loadtests._fault_rows import Row
from loadtests._faults import Found, Trial
from loadtests.faults import GROUPS, line
from loadtests.write_faults import page


def _row(where: str, **said: object) -> Row:
    return Row(where, "raises", lambda: (Trial(), lambda _: None), **said)


def test_the_page_says_what_the_lines_say():
    """A row for each fault, whatever reaches the loop, and the log without what differs from run to run."""
    kernel_id = "sha256:" + "ab" * 32
    found = Found(log=[f"kernel fault: {kernel_id} took 31.4 ms", "again", "again"], circuits={"code": {}})
    lines = [line(group, _row(f"Part.{group}"), found) for group in GROUPS]
    lines[0] = line("kernel", _row("compiled forward", answer="portable"), found)
    lines[1]["host_differs_from_step"] = 3
    text = page(lines)
    assert "**5 faults; in 1 of them" in text
    assert (
        "| compiled forward | raises | 0 | 0 | portable graph | `kernel fault: sha256:ababab took ... ms` and 1 more"
        in text
    )
    assert "| `Part.control plane` | raises | from step 3 |" in text
    assert "| `Part` | `part` | 0 |" in text


def test_a_row_tells_everything_that_is_not_as_it_must_be():
    """Nothing found where a kernel's fault is expected: each check speaks."""
    row = _row("x", answer="identity", kind="raised", circuit="kernel", says="it", counts="it", missed=1)
    assert 7 <= len(row.problems(Found(escaped="Oops", differs=2)))
    assert [] == _row("x").problems(Found())
    assert ["expected 'no' to escape: ''"] == _row("x", escapes="no").problems(Found())
