"""What holds of every contract: bounds beside fields, two generated clients that agree on the wire."""

import importlib
import pkgutil
import re
from pathlib import Path

import protovalidate
import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import esper_dataclasses.esper.v1 as dataclass_client
from esper import v1
from esper.v1 import health_pb2, seed_pb2, site_pb2
from tests.contracts.strategies import messages

PROTO = Path(__file__).parents[2] / "proto" / "esper" / "v1"
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


def _bounded(field: FieldDescriptor, rules: validate_pb2.FieldRules) -> bool:
    """Whether one value of a field is bounded; numbers bound themselves."""
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rules.bytes.HasField("max_len") or rules.bytes.HasField("len")
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return rules.string.HasField("max_len") or "{64}" in rules.string.pattern
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return rules.enum.defined_only or len(getattr(rules.enum, "in")) > 0
    return True


@pytest.mark.parametrize("descriptor", MESSAGES, ids=lambda d: d.name)
def test_every_unbounded_kind_of_field_has_a_bound(descriptor):
    """Each string, bytes, enum and repeated field carries a protovalidate rule that bounds it; so does each item."""
    missing = []
    for field in descriptor.fields:
        rules = _rules(field)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            bounded = rules.map.HasField("max_pairs")
            bounded &= _bounded(entry["key"], rules.map.keys) and _bounded(entry["value"], rules.map.values)
        elif field.is_repeated:
            bounded = rules.repeated.HasField("max_items") and _bounded(field, rules.repeated.items)
        else:
            bounded = _bounded(field, rules)
        if not bounded:
            missing.append(field.name)
    assert missing == []


_BLOCK = re.compile(r"^message (\w+) \{$(.*?)^\}$", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"((?:^ +// .*\n)+)^ +(?:repeated |optional )?[\w.]+ (\w+) = \d+", re.MULTILINE)
_RANGE = re.compile(r"\b[\d,]+ to [\d,]+\b|\babove \d|\bat (?:least|most) \d")
_NUMBERS = {"int32", "int64", "uint32", "uint64", "double", "float"}


def _promises() -> list[tuple[FieldDescriptor, str]]:
    """Numbers whose comment names a range, with it. Of lists only ranges of items: their number is `max_items`."""
    by_name = {descriptor.name: descriptor for descriptor in MESSAGES}
    found = []
    for file in sorted(PROTO.glob("*.proto")):
        for name, body in _BLOCK.findall(file.read_text(encoding="utf-8")):
            for comment, field_name in _FIELD.findall(body):
                field = by_name[name].fields_by_name[field_name]
                said = [text for text in _RANGE.findall(comment) if not field.is_repeated or " to " in text]
                numeric = field.message_type is None and field.enum_type is None
                numeric &= field.cpp_type not in {FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_BOOL}
                found += [(field, text) for text in said if numeric]
    return found


@pytest.mark.parametrize(("field", "said"), _promises(), ids=lambda value: getattr(value, "full_name", value))
def test_a_range_in_prose_is_a_rule(field, said):
    """What a comment promises of a number, the validator demands."""
    rules = _rules(field)
    if field.is_repeated:
        assert rules.cel, f"the comment says {said}"
        return
    kind = rules.WhichOneof("type")
    assert kind in _NUMBERS, f"the comment says {said}"
    demanded = getattr(rules, kind)
    assert demanded.WhichOneof("less_than") or demanded.WhichOneof("greater_than"), f"the comment says {said}"


def test_a_request_id_is_demanded():
    """Calls that carry one are repeated by clients on their own account: without it each repetition would count."""
    carrying = [descriptor for descriptor in MESSAGES if "request_id" in descriptor.fields_by_name]
    assert [] != carrying
    for descriptor in carrying:
        assert _rules(descriptor.fields_by_name["request_id"]).string.min_len >= 1


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [float("nan"), 1.0], []])
def test_a_column_of_fractions_may_have_gaps(values):
    """NaN stands for what was not measured."""
    assert [] == protovalidate.collect_violations(site_pb2.SiteColumns(saturation=values))
    assert [] == protovalidate.collect_violations(seed_pb2.SeedColumns(alpha=values, gain_confidence=values))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("inf"), float("-inf")])
def test_a_column_of_fractions_has_nothing_else(value):
    """A value that is no fraction is refused by name."""
    for message in (
        site_pb2.SiteColumns(saturation=[0.5, value]),
        site_pb2.SiteColumns(dead_fraction=[0.5, value]),
        seed_pb2.SeedColumns(alpha=[0.5, value]),
        health_pb2.HealthBatch(alpha=[value]),
    ):
        (violation,) = protovalidate.collect_violations(message)
        assert "fractions" == violation.proto.rule_id


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
