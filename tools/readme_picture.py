"""Draws docs/images/digits.svg, the picture of the README, from the report.json of a grown run.

    python tools/readme_picture.py .esper/reports/digits-1a2b3c4d/runs/digits-20261123-223307-e86w/report.json

The curves are those of the run's own page; on a page of its own the picture gets a ground, so that it reads on dark
screens too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from esper.tolaria.figures import curves_figure

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "digits.svg"


def main() -> None:
    """Write the picture."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    drawing = curves_figure(report["history"], report["growth"]).replace("currentColor", "#1f2328")
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    drawing = re.sub(r"(<svg\b[^>]*>)", r"\1" + ground, drawing, count=1)
    if "xmlns=" not in drawing:
        drawing = drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
