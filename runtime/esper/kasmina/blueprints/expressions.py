"""Sizes of a blueprint's nodes, written over the widths of the site: ``max(min(in, out) // 4, 4)``.

Only integers, the symbols ``in`` and ``out``, ``+ - * //``, ``min``, ``max`` and parentheses exist. The text is parsed
by the hundred lines below: nothing of it ever reaches an interpreter, so a blueprint from a stranger is only data::

    evaluate("max(in // 4, 1)", {"in": 64, "out": 10})   # 16
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MAX_EXPRESSION_LENGTH", "MAX_VALUE", "SYMBOLS", "evaluate"]

SYMBOLS = ("in", "out")
MAX_EXPRESSION_LENGTH = 128
MAX_NESTING = 16
MAX_VALUE = 1 << 40
_TOKEN = re.compile(r"\s*(?:(?P<number>\d{1,12})|(?P<word>[a-z]+)|(?P<sign>//|[-+*(),]))")
_FUNCTIONS: Mapping[str, Callable[..., int]] = {"min": min, "max": max}


def evaluate(text: str, symbols: Mapping[str, int]) -> int:
    """The value of an expression; ``//`` rounds down as in Python.

    Raises:
        InvalidInput: a word, sign or form outside the language, a division by zero, or a value beyond ``2**40``.
    """
    if len(text) > MAX_EXPRESSION_LENGTH:
        raise InvalidInput(f"expression: expected at most {MAX_EXPRESSION_LENGTH} characters, found {len(text)}")
    parser = _Parser(text, _tokens(text), symbols)
    value = parser.sum(0)
    parser.end()
    return value


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    stripped = text.rstrip()
    while at < len(stripped):
        match = _TOKEN.match(stripped, at)
        if match is None:
            raise InvalidInput(
                f"expression {text!r}: expected integers, in, out, + - * //, min, max and parentheses, "
                f"found {stripped[at:].lstrip()[:1]!r} at {at}"
            )
        tokens.append(match[0].strip())
        at = match.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens; the grammar is that of Python for the few signs that exist."""

    def __init__(self, text: str, tokens: list[str], symbols: Mapping[str, int]) -> None:
        self._text = text
        self._tokens = tokens
        self._symbols = symbols
        self._at = 0

    def end(self) -> None:
        if self._at < len(self._tokens):
            raise self._error("the end", self._tokens[self._at])

    def sum(self, depth: int) -> int:
        value = self._product(depth)
        while (sign := self._peek()) in {"+", "-"}:
            self._at += 1
            right = self._product(depth)
            value = self._bounded(value + right if sign == "+" else value - right)
        return value

    def _product(self, depth: int) -> int:
        value = self._atom(depth)
        while (sign := self._peek()) in {"*", "//"}:
            self._at += 1
            right = self._atom(depth)
            if sign == "//" and right == 0:
                raise self._error("a divisor other than zero", "0")
            value = self._bounded(value * right if sign == "*" else value // right)
        return value

    def _atom(self, depth: int) -> int:
        if depth > MAX_NESTING:
            raise self._error(f"at most {MAX_NESTING} levels of parentheses", "more")
        token = self._take("a number, a symbol or a parenthesis")
        if token.isdigit():
            return self._bounded(int(token))
        if token in self._symbols:
            return self._symbols[token]
        if token in _FUNCTIONS:
            return self._call(token, depth)
        if token == "(":  # noqa: S105  # a parenthesis, no password
            value = self.sum(depth + 1)
            self._expect(")")
            return value
        raise self._error(f"one of {', '.join(self._symbols)}, min, max, a number or '('", token)

    def _call(self, name: str, depth: int) -> int:
        self._expect("(")
        values = [self.sum(depth + 1)]
        while self._peek() == ",":
            self._at += 1
            values.append(self.sum(depth + 1))
        self._expect(")")
        # min and max of one integer are that integer, where Python's would want an iterable.
        return _FUNCTIONS[name](values)

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, expectation: str) -> str:
        if self._at >= len(self._tokens):
            raise self._error(expectation, "the end")
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, token: str) -> None:
        found = self._take(repr(token))
        if found != token:
            raise self._error(repr(token), found)

    def _bounded(self, value: int) -> int:
        if abs(value) > MAX_VALUE:
            raise self._error("a value of at most 2**40", str(value))
        return value

    def _error(self, expected: str, found: str) -> InvalidInput:
        return InvalidInput(f"expression {self._text!r}: expected {expected}, found {found!r}")
