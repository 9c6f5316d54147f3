"""What the library gives for a kernel id, and how its verdict is written to disk."""

from __future__ import annotations

import base64
import json
from typing import NamedTuple

from esper.kasmina.kernels.signing import SignedVerdict

__all__ = ["Fetched", "verdict_from_json", "verdict_to_json"]


class Fetched(NamedTuple):
    """What the library gives for a kernel id."""

    bundle: bytes
    verdict: SignedVerdict | None


def verdict_to_json(verdict: SignedVerdict) -> str:
    """One line of JSON."""
    coded = {key: base64.b64encode(getattr(verdict, key)).decode() for key in ("statement", "signature")}
    return json.dumps(coded | {"key_id": verdict.key_id})


def verdict_from_json(text: str) -> SignedVerdict:
    """Read `verdict_to_json`.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    document = json.loads(text)
    statement, signature = (base64.b64decode(document[key], validate=True) for key in ("statement", "signature"))
    return SignedVerdict(statement, signature, str(document["key_id"]))
