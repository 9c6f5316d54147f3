"""Messages between a pool and its workers: one JSON object and raw bytes, length first. Never a pickle.

A worker runs code of strangers. What it sends is data to be judged, so the format can express nothing else: a header
of 8 bytes (lengths of the JSON and of all blobs), the JSON, the blobs. Bytes may stand as values of the top level.
"""

import json
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["HEADER", "FrameError", "decode", "encode", "lengths", "read_frame"]

HEADER = struct.Struct(">II")
_BLOBS = "\0blobs"
"""Key of the table of blobs; a NUL keeps it apart from every name that a job could use."""
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Perhaps half a surrogate pair: a text with a single one can be neither logged nor sent on."""


class FrameError(ValueError):
    """The other side does not keep to the format."""


def encode(message: Mapping[str, Any]) -> list[bytes]:
    """Render a message as pieces to be written one after the other; blobs are not copied.

    Raises:
        TypeError: a value is neither JSON nor, at the top level, bytes.
    """
    blobs = {key: value for key, value in message.items() if isinstance(value, bytes)}
    document = {key: value for key, value in message.items() if key not in blobs}
    if blobs:
        document[_BLOBS] = [[key, len(value)] for key, value in blobs.items()]
    text = json.dumps(document, separators=(",", ":")).encode()
    return [HEADER.pack(len(text), sum(map(len, blobs.values()))), text, *blobs.values()]


def lengths(header: bytes, limit: int) -> tuple[int, int]:
    """Lengths of JSON and blobs.

    Raises:
        FrameError: together they exceed `limit` bytes.
    """
    text, blobs = HEADER.unpack(header)
    if text + blobs > limit:
        raise FrameError(f"message of {text + blobs} bytes: expected at most {limit}")
    return text, blobs


def decode(text: bytes, blobs: bytes) -> dict[str, Any]:
    """Read a message.

    Raises:
        FrameError: no JSON object, a text that is not Unicode, or its table does not cover the blobs exactly.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"message: expected a JSON object, found {error}") from error
    if not isinstance(message, dict):
        raise FrameError(f"message: expected a JSON object, found {type(message).__name__}")
    if _HALF.search(text) and not _encodable(message):
        raise FrameError("message: expected texts of Unicode, found half a surrogate pair")
    table = message.pop(_BLOBS, [])
    at = 0
    try:
        for key, length in table:
            message[str(key)] = blobs[at : at + int(length)]
            at += int(length)
    except (TypeError, ValueError) as error:
        raise FrameError(f"message: malformed table of blobs: {error}") from error
    if at != len(blobs):
        raise FrameError(f"message: table names {at} bytes of blobs, found {len(blobs)}")
    return message


def _encodable(message: dict[str, Any]) -> bool:
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def read_frame(read: Callable[[int], bytes], limit: int) -> dict[str, Any]:
    """Read one message from a blocking source.

    Raises:
        EOFError: the source ended.
        FrameError: not a message of this format.
    """

    def exactly(count: int) -> bytes:
        parts = []
        while count:
            part = read(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    text, blobs = lengths(exactly(HEADER.size), limit)
    return decode(exactly(text), exactly(blobs))
