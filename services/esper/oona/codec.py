"""Lists of byte strings packed into one: a count, the lengths, the bytes. Little-endian."""

import sys
from array import array
from collections.abc import Sequence

from esper.mesh.errors import Corrupt

__all__ = ["pack", "pack_pairs", "unpack", "unpack_pairs"]


def _numbers(code: str, values: bytes | Sequence[int]) -> "array[int]":
    numbers = array(code, values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack(parts: Sequence[bytes]) -> bytes:
    """Pack byte strings, each shorter than 4 GiB."""
    lengths = _numbers("I", [len(parts), *map(len, parts)])
    return lengths.tobytes() + b"".join(parts)


def unpack(data: bytes) -> list[bytes]:
    """Undo `pack`.

    Raises:
        Corrupt: the lengths do not add up.
    """
    count = int.from_bytes(data[:4], "little")
    begin = 4 + 4 * count
    lengths = _numbers("I", data[4:begin]) if len(data) >= begin else array("I")
    if len(lengths) != count or begin + sum(lengths) != len(data):
        raise Corrupt(f"packed list of {count} parts: expected lengths that add up to {len(data)} bytes")
    parts: list[bytes] = []
    for length in lengths:
        parts.append(data[begin : begin + length])
        begin += length
    return parts


def pack_pairs(pairs: Sequence[tuple[int, int]]) -> bytes:
    """Pack pairs of integers from 0 to 2^64 - 1."""
    return _numbers("Q", [number for pair in pairs for number in pair]).tobytes()


def unpack_pairs(data: bytes) -> tuple[tuple[int, int], ...]:
    """Undo `pack_pairs`."""
    numbers = _numbers("Q", data)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
