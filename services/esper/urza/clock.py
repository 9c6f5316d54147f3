"""Time as the library stores it: microseconds since the epoch, as one integer that every database orders alike."""

from datetime import UTC, datetime, timedelta

__all__ = ["from_micros", "micros"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def micros(moment: datetime) -> int:
    """An aware moment as microseconds since the epoch, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_micros(value: int) -> datetime:
    """Microseconds since the epoch as an aware moment in UTC, exactly."""
    return _EPOCH + timedelta(microseconds=value)
