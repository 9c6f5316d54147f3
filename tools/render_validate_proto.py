"""Render `third_party/buf/validate/validate.proto` from the descriptor inside the pinned protovalidate wheel.

protovalidate ships the descriptor of its options but not their source, and nothing is fetched at build time. This
writes the source back, without comments and without the rules' own CEL definitions (the validator carries those), so
that `buf` can compile contracts that use the options. Run by `make gen`; the result is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf import descriptor_pb2
from protovalidate._gen.buf.validate import validate_pb

HEADER = """\
// Rendered by tools/render_validate_proto.py from the descriptor that protovalidate ships. Do not edit.
// Copyright (c) 2023-2026 Buf Technologies, Inc. Licensed under the Apache License, Version 2.0.

"""
_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {v: k.removeprefix("TYPE_").lower() for k, v in _FIELD.Type.items()}


def _field(field: descriptor_pb2.FieldDescriptorProto, pad: str, *, proto2: bool) -> str:
    kind = field.type_name or _TYPES[field.type]
    label = {1: "optional ", 2: "required ", 3: "repeated "}[field.label]
    implicit = field.HasField("oneof_index") or (not proto2 and label == "optional ")
    if implicit and not field.proto3_optional:
        label = ""
    default = f" [default = {field.default_value}]" if field.HasField("default_value") else ""
    return f"{pad}{label}{kind} {field.name} = {field.number}{default};\n"


def _enum(enum: descriptor_pb2.EnumDescriptorProto, pad: str) -> str:
    alias = f"{pad}  option allow_alias = true;\n" if enum.options.allow_alias else ""
    values = "".join(f"{pad}  {value.name} = {value.number};\n" for value in enum.value)
    reserved = "".join(f"{pad}  reserved {r.start} to {r.end};\n" for r in enum.reserved_range)
    return f"{pad}enum {enum.name} {{\n{alias}{reserved}{values}{pad}}}\n"


def _message(message: descriptor_pb2.DescriptorProto, pad: str, *, proto2: bool) -> str:
    inner = pad + "  "
    out = [f"{pad}message {message.name} {{\n"]
    out += [_enum(enum, inner) for enum in message.enum_type]
    out += [_message(nested, inner, proto2=proto2) for nested in message.nested_type]
    out += [f"{inner}reserved {_range(r.start, r.end - 1)};\n" for r in message.reserved_range]
    out += [f'{inner}reserved "{name}";\n' for name in message.reserved_name]
    out += [f"{inner}extensions {_range(r.start, r.end - 1)};\n" for r in message.extension_range]
    oneofs: dict[int, list[str]] = {}
    for field in message.field:
        if field.HasField("oneof_index") and not field.proto3_optional:
            group = oneofs.setdefault(field.oneof_index, [])
            group.append(_field(field, inner + "  ", proto2=proto2))
        else:
            out.append(_field(field, inner, proto2=proto2))
    for index, fields in oneofs.items():
        out.append(f"{inner}oneof {message.oneof_decl[index].name} {{\n{''.join(fields)}{inner}}}\n")
    out.append(f"{pad}}}\n")
    return "".join(out)


def _range(start: int, end: int) -> str:
    if start == end:
        return str(start)
    return f"{start} to {'max' if end >= 536870911 else end}"


def render() -> str:
    """The whole source text of buf/validate/validate.proto."""
    file = descriptor_pb2.FileDescriptorProto.FromString(validate_pb.desc().proto.to_binary())
    proto2 = file.syntax in {"", "proto2"}
    out = [HEADER, f'syntax = "{file.syntax or "proto2"}";\n\n', f"package {file.package};\n\n"]
    out += [f'import "{name}";\n' for name in file.dependency]
    out.append("\n")
    for extension in file.extension:
        out.append(f"extend {extension.extendee} {{\n{_field(extension, '  ', proto2=True)}}}\n")
    out += [_enum(enum, "") for enum in file.enum_type]
    out += [_message(message, "", proto2=proto2) for message in file.message_type]
    return "".join(out)


def main() -> None:
    """Write the file below the folder given as the only argument."""
    target = Path(sys.argv[1]) / "buf" / "validate" / "validate.proto"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
