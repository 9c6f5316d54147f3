"""What holds of every contract: bounds beside fields, two generated clients that agree on the wire."""

import importlib
import pkgutil

import protovalidate
import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import esper_dataclasses.esper.v1 as dataclass_client
from esper import v1
from tests.contracts.strategies import messages

MODULES = [
    importlib.import_module(f"esper.v1.{module.name}")
    for module in pkgutil.iter_modules(v1.__path__)
    if module.name.endswith("_pb2")
]
SERVICES = [service for module in MODULES for service in module.DESCRIPTOR.services_by_name.values()]


def _nested(descriptor: Descriptor) -> list[Descriptor]:
    inner = [d for d in descriptor.nested_types if not d.GetOptions().map_entry]
    return [descriptor, *(deep for d in inner for deep in _nested(d))]


MESSAGES = sorted(
    (d for module in MODULES for top in module.DESCRIPTOR.message_types_by_name.values() for d in _nested(top)),
    key=lambda d: d.full_name,
)


def _rules(field: FieldDescriptor) -> validate_pb2.FieldRules:
    return field.GetOptions().Extensions[validate_pb2.field]


@pytest.mark.parametrize("descriptor", MESSAGES, ids=lambda d: d.name)
def test_every_unbounded_kind_of_field_has_a_bound(descriptor):
    """Each string, bytes, enum and repeated field of the contracts carries a protovalidate rule that bounds it."""
    missing = []
    for field in descriptor.fields:
        rules = _rules(field)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            bounded = rules.map.HasField("max_pairs")
        elif field.is_repeated:
            bounded = rules.repeated.HasField("max_items")
        elif field.type == FieldDescriptor.TYPE_BYTES:
            bounded = rules.bytes.HasField("max_len") or rules.bytes.HasField("len")
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            bounded = rules.string.HasField("max_len") or "{64}" in rules.string.pattern
        elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            bounded = rules.enum.defined_only or len(getattr(rules.enum, "in")) > 0
        else:
            bounded = True
        if not bounded:
            missing.append(field.name)
    assert missing == []


@pytest.mark.parametrize("descriptor", MESSAGES, ids=lambda d: d.name)
def test_rules_compile(descriptor):
    """The rules of each message are understood by the validator: an empty message is judged, not an error."""
    protovalidate.collect_violations(GetMessageClass(descriptor)())


@pytest.mark.parametrize("descriptor", MESSAGES, ids=lambda d: d.name)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_both_clients_speak_the_same_wire(descriptor, data):
    """Bytes of the protobuf client, read and written again by the dataclass client, are the same message."""
    original = data.draw(messages(descriptor))
    mirror = getattr(dataclass_client, descriptor.name)
    echoed = bytes(mirror.parse(original.SerializeToString()))
    assert type(original).FromString(echoed) == original


def test_every_rpc_has_its_own_request_and_response():
    """No message is shared by two RPCs, so that each may grow by itself."""
    used = [m for s in SERVICES for method in s.methods for m in (method.input_type.name, method.output_type.name)]
    assert sorted(set(used)) == sorted(used)


def test_services_are_those_of_the_design():
    """The contracts name exactly the services of the founding step."""
    expected = {f"esper.v1.{name}Service" for name in ("Oona", "Urza", "Tezzeret", "Urabrask", "Tamiyo", "Tolaria")}
    assert expected == {service.full_name for service in SERVICES}
