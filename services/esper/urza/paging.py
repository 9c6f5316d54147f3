"""Keyset pages: a token names the last entry seen, so a page costs the same wherever it lies and none is skipped."""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Generic, TypeVar

from esper.mesh.errors import InvalidInput

__all__ = ["DEFAULT_PAGE", "MAX_PAGE", "Page", "page_limit", "read_token", "write_token"]

DEFAULT_PAGE = 100
MAX_PAGE = 1000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Page(Generic[_T]):
    """Some entries, newest first."""

    entries: tuple[_T, ...]
    """At most as many as were asked for."""

    more: bool
    """Whether older ones follow."""


def page_limit(asked: int) -> int:
    """Entries of a page: 0 means the default."""
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def _fingerprint(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest()[:16]


def write_token(sequence: int, query: str) -> str:
    """The token of the page that follows the entry with this number, for this query."""
    raw = json.dumps([sequence, _fingerprint(query)], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def read_token(token: str, query: str) -> int | None:
    """The number after which a page begins; None for the first page.

    Raises:
        InvalidInput: PAGE_TOKEN_INVALID when it was not made here, or for another query.
    """
    if not token:
        return None
    try:
        sequence, fingerprint = json.loads(
            base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        )
    except (ValueError, TypeError, binascii.Error):
        sequence, fingerprint = None, ""
    if type(sequence) is not int or not 0 < sequence < 1 << 63 or fingerprint != _fingerprint(query):
        raise InvalidInput(
            "page_token: expected the next_page_token of the same query, found another text",
            reason="PAGE_TOKEN_INVALID",
        )
    return sequence
