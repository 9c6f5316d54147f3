"""Hypothesis strategies that make any message of the contracts from its descriptor."""

import struct

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_MAX_DEPTH = 3


def _float32(value: float) -> float:
    """The value as a binary32 holds it, and 0.0 for -0.0, which the dataclass client omits as a default."""
    return struct.unpack("<f", struct.pack("<f", value))[0] + 0.0


_SCALARS = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(allow_nan=False).map(lambda value: value + 0.0),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(allow_nan=False, width=32).map(_float32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type, depth + 1)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=16)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.text(max_size=16)
    return _SCALARS[field.cpp_type]


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> Message:
    """A message of the given type with any subset of its fields set, bounds not heeded."""
    message = GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Struct":
        message.update(draw(st.dictionaries(st.text(max_size=8), st.booleans() | st.text(max_size=8), max_size=3)))
        return message
    if descriptor.full_name in {"google.protobuf.Timestamp", "google.protobuf.Duration"}:
        message.seconds = draw(st.integers(0, 2**31 - 1))
        message.nanos = draw(st.integers(0, 999_999)) * 1000  # the dataclass client holds microseconds
        return message
    for field in descriptor.fields:
        nested = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if (nested and depth >= _MAX_DEPTH) or draw(st.booleans()):
            continue
        if _is_map(field):
            entry = field.message_type.fields_by_name
            keys, values = _value(entry["key"], depth), _value(entry["value"], depth)
            getattr(message, field.name).update(draw(st.dictionaries(keys, values, max_size=3)))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_value(field, depth), max_size=3)))
        elif nested:
            getattr(message, field.name).CopyFrom(draw(_value(field, depth)))
        else:
            setattr(message, field.name, draw(_value(field, depth)))
    return message
