"""Reads the fenced blocks of a Markdown page, and what a comment above a block says about its test.

Blocks that run: `python` (a program of its own), `console` (each line after `$ `), `toml` (as `esper.toml`, checked).
A comment right above a block changes that::

    <!-- test: background until "ready at" -->   leave the command running, go on when it has printed this
    <!-- test: exit 3 -->                        the last command of the block must end with this status
    <!-- test: instead make -n demo -->          run this instead (the original takes minutes or needs the outside)
"""

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:<!-- test: (?P<test>.*?) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUNNABLE = {"python", "console", "toml"}
INERT = {"text", "json", "proto", "mermaid", "html"}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    body: str
    test: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, with continued lines joined."""
        joined = self.body.replace("\\\n", "")
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["body"], m["test"] or "", text.count("\n", 0, m.start()) + 1)
        for m in _BLOCK.finditer(text)
    ]
