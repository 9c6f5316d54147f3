"""The exception tree, its catalogue, and the way over the wire and back."""

import pickle
import subprocess
import sys

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from esper.mesh import errors
from esper.mesh.errors import (
    CATALOGUE,
    Code,
    EsperError,
    FieldViolation,
    InternalError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    Unavailable,
    error_class,
    from_rpc_error,
    from_status,
    to_status,
)

CHILDREN = sorted(EsperError.__subclasses__(), key=lambda kind: kind.code)
LEAVES = [kind for kind in CHILDREN if kind.__module__.startswith("esper.mesh._errors")]


def test_catalogue_covers_every_code_but_unknown_with_one_class_each() -> None:
    """Every canonical code that a server may send has exactly one class, and every class one code."""
    assert set(Code) - {Code.UNKNOWN} == set(CATALOGUE)
    assert set(LEAVES) == set(CATALOGUE.values())
    assert len(LEAVES) == len({kind.code for kind in LEAVES})


@pytest.mark.parametrize("code", list(Code))
def test_codes_are_those_of_grpc(code: Code) -> None:
    """Our numbers and names are gRPC's."""
    assert getattr(grpc.StatusCode, code.name).value[0] == code


def test_docstring_draws_every_class_beside_its_code() -> None:
    """The tree in the module's docstring is the tree in the code."""
    for kind in LEAVES:
        assert any(kind.__name__ in line and kind.code.name in line for line in errors.__doc__.splitlines()), kind


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_has_exactly_one_error_info(kind: type[EsperError]) -> None:
    """Each class leaves with its code, its default reason and our domain."""
    status = to_status(kind("the thing was expected, nothing was found"))
    infos = [detail for detail in status.details if detail.Is(ErrorInfo.DESCRIPTOR)]
    info = ErrorInfo.FromString(infos[0].value)
    assert (int(kind.code), 1, "esper", kind.default_reason) == (status.code, len(infos), info.domain, info.reason)


def test_round_trip_keeps_everything_public() -> None:
    """What a server raises is what a client catches."""
    sent = LimitExceeded(
        "queue is full",
        reason="QUEUE_FULL",
        metadata={"size": "10"},
        violations=[FieldViolation("a.b[2]", "must be small", "int32.lt")],
        retry_after_s=1.5,
        private="the disk is /dev/sda",
    )
    status = to_status(sent)
    back = from_status(status)
    assert type(back) is LimitExceeded
    assert ("queue is full", "QUEUE_FULL", {"size": "10"}, sent.violations, 1.5, None) == (
        back.public, back.reason, back.metadata, back.violations, back.retry_after_s, back.private,
    )  # fmt: skip
    assert b"/dev/sda" not in status.SerializeToString()


def test_details_are_bad_request_and_retry_info() -> None:
    """Violations and delays use google.rpc's own messages, which every client knows."""
    status = to_status(InvalidInput("no", violations=[FieldViolation("x", "y")], retry_after_s=0.25))
    kinds = [detail.TypeName() for detail in status.details]
    assert [m.DESCRIPTOR.full_name for m in (ErrorInfo, BadRequest, RetryInfo)] == kinds


def test_internal_error_leaks_nothing_but_its_request_id() -> None:
    """Text, metadata and violations of a defect stay on the server."""
    sent = InternalError(
        "row 7 of secrets.db", metadata={"path": "/var", "request_id": "r1"}, violations=[FieldViolation("f", "leak")]
    )
    raw = to_status(sent).SerializeToString()
    assert "internal error" == from_status(Status.FromString(raw)).public
    assert {"request_id": "r1"} == from_status(Status.FromString(raw)).metadata
    assert not [word for word in (b"secrets.db", b"/var", b"leak") if word in raw]


def test_oversized_errors_are_cut_to_fit_trailing_metadata() -> None:
    """Prose, metadata and lists of any size still fit gRPC's 8 KiB, details counted in base64."""
    sent = InvalidInput(
        "ä" * 5000,
        metadata={f"key_{i}": "v" * 5000 for i in range(50)},
        violations=[FieldViolation("f" * 500, "d" * 500, "r" * 500) for _ in range(100)],
    )
    status = to_status(sent)
    back = from_status(status)
    assert status.ByteSize() * 4 / 3 + len(status.message.encode()) < 8192
    assert back.public.endswith("…")
    assert 1 <= len(back.violations) < 100
    assert 1 <= len(back.metadata) < 50


def test_foreign_domain_does_not_pass_as_our_reason() -> None:
    """A proxy's ErrorInfo keeps its code but does not set our reason."""
    status = Status(code=int(Code.UNAVAILABLE), message="upstream")
    status.details.add().Pack(ErrorInfo(reason="KERNEL_NOT_FOUND", domain="googleapis.com"))
    assert ("UNAVAILABLE", {}) == (from_status(status).reason, from_status(status).metadata)


def test_reason_must_be_upper_snake() -> None:
    """A reason that programs could not branch on is refused where it is raised."""
    with pytest.raises(ValueError, match=r"UPPER_SNAKE.*'kernel not found'"):
        NotFound("x", reason="kernel not found")


def test_errors_survive_pickling() -> None:
    """An error crosses the border of a worker process with all it carries, private text included."""
    sent = NotFound("x", reason="GONE", metadata={"a": "b"}, violations=[FieldViolation("f", "d")], private="p")
    back = pickle.loads(pickle.dumps(sent))
    assert (NotFound, sent.__reduce__()[1:]) == (type(back), back.__reduce__()[1:])


def test_numbers_that_nobody_defined_become_internal() -> None:
    """A status code from the future is a defect, not a crash of the client."""
    assert (InternalError, InternalError, NotFound) == (error_class(99), error_class(2), error_class(5))


class _Plain(grpc.RpcError, grpc.Call):
    """An error of gRPC's own making, without details."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return None

    initial_metadata = is_active = time_remaining = cancel = add_callback = trailing_metadata


_Plain.__abstractmethods__ = frozenset()


def test_errors_without_details_keep_code_and_text() -> None:
    """Connection refused and the like become the class of their code."""
    error = from_rpc_error(_Plain(grpc.StatusCode.UNAVAILABLE, "connection refused"))
    assert (Unavailable, "connection refused", "UNAVAILABLE") == (type(error), error.public, error.reason)
    assert "DEADLINE_EXCEEDED" in from_rpc_error(_Plain(grpc.StatusCode.DEADLINE_EXCEEDED, None)).public


def test_an_rpc_error_without_any_status_is_internal() -> None:
    """A bare RpcError (a stub's own defect) does not raise while it is being read."""
    assert isinstance(from_rpc_error(grpc.RpcError("odd")), InternalError)


def test_importing_the_tree_imports_neither_grpc_nor_protobuf() -> None:
    """The pure core of a service may raise our errors without the transport."""
    code = "import sys, esper.mesh.errors; print([m for m in ('grpc', 'google.protobuf', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == out.stdout.strip()
