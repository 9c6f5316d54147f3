"""What a worker process is made of: messages, the loop over jobs, and the limits that it takes upon itself."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.mesh import _confine, _worker
from esper.mesh._frames import HEADER, FrameError, decode, encode, lengths, read_frame

KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


class TestFrames:
    @given(st.dictionaries(KEYS, VALUES | st.binary(max_size=64), max_size=5))
    def test_round_trip(self, message):
        """Every message of JSON values and bytes arrives as it was."""
        assert message == read_frame(io.BytesIO(b"".join(encode(message))).read, 1 << 20)

    @given(st.binary(max_size=64), st.binary(max_size=64))
    def test_noise_is_refused(self, text, blobs):
        """Bytes that are no message are refused as such, with no other exception."""
        with contextlib.suppress(FrameError):
            assert isinstance(decode(text, blobs), dict)

    @pytest.mark.parametrize(
        ("document", "blobs", "words"),
        [
            ([1], b"", "expected a JSON object, found list"),
            ({"\0blobs": [["a", 2]]}, b"abc", "table names 2 bytes of blobs, found 3"),
            ({"\0blobs": [["a", "many"]]}, b"", "malformed table"),
            ({"\0blobs": 3}, b"", "malformed table"),
        ],
    )
    def test_contradictions_are_refused(self, document, blobs, words):
        """A table of blobs must cover them exactly."""
        with pytest.raises(FrameError, match=words):
            decode(json.dumps(document).encode(), blobs)

    def test_deep_nesting_is_refused(self):
        """Nesting beyond the parser's depth is refused like any other nonsense."""
        with pytest.raises(FrameError, match="expected a JSON object"):
            decode(b"[" * 100_000, b"")

    @pytest.mark.parametrize("document", [{"a": "\ud800"}, {"a": [{"b": "x\udfff"}]}, {"\udc00": 1}])
    def test_halves_of_characters_are_refused(self, document):
        """A text that cannot be written as UTF-8 is refused where it comes in; whole pairs are texts like any other."""
        with pytest.raises(FrameError, match="half a surrogate pair"):
            decode(json.dumps(document).encode(), b"")
        assert {"a": "\U0001f300"} == decode(json.dumps({"a": "\U0001f300"}).encode(), b"")

    def test_limit_counts_before_reading(self):
        """A header that promises too much is refused before a byte of it is awaited."""
        with pytest.raises(FrameError, match="message of 300 bytes: expected at most 299"):
            lengths(HEADER.pack(100, 200), 299)

    def test_end_of_the_source(self):
        """A source that ends in the middle of a message has ended."""
        whole = b"".join(encode({"a": b"xyz"}))
        for length in (0, 3, len(whole) - 1):
            with pytest.raises(EOFError):
                read_frame(io.BytesIO(whole[:length]).read, 1 << 20)


class TestServe:
    @staticmethod
    def _serve(entry, *jobs):
        source = io.BytesIO(b"".join(part for job in jobs for part in encode(job)))
        sink = io.BytesIO()
        _worker.serve(source, sink, entry, 1 << 20)
        sink.seek(0)
        answers = []
        while sink.tell() < len(sink.getvalue()):
            answers.append(read_frame(sink.read, 1 << 20))
        return answers

    def test_jobs_in_order(self, tmp_path, monkeypatch):
        """Each job gets a fresh directory that is gone afterwards; progress comes before its result."""
        monkeypatch.chdir(tmp_path)

        def entry(job, report):
            Path("left").write_text("behind")
            report({"at": job["n"]})
            return {"n": job["n"], "raw": b"\0", "here": str(Path.cwd())}

        answers = self._serve(entry, {"n": 1}, {"n": 2})
        assert ["progress", "result", "progress", "result"] == [answer["type"] for answer in answers]
        assert [1, 2] == [answer["value.n"] for answer in answers if answer["type"] == "result"]
        assert b"\0" == answers[1]["value.raw"]
        assert answers[1]["value.here"] != answers[3]["value.here"]
        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("error", "memory"),
        [
            (ValueError("no"), False),
            (MemoryError(), True),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
            (RuntimeError("std::bad_alloc"), True),
            (OSError("no file called \udce4"), False),
        ],
    )
    def test_exceptions_are_described(self, tmp_path, monkeypatch, error, memory):
        """An exception is told by class, text and traceback, and as hunger where memory ran out; the next job runs."""
        monkeypatch.chdir(tmp_path)

        def entry(job, report):
            if job:
                raise error
            return {}

        failed, fine = self._serve(entry, {"fail": True}, {})
        assert "error" == failed["type"]
        assert (type(error).__name__, str(error).replace("\udce4", "?"), memory) == (
            failed["kind"],
            failed["text"],
            failed["memory"],
        )
        assert "in entry" in failed["traceback"]
        assert "result" == fine["type"]


def _worker_main(directory, jobs, answers, *, memory=0):
    """Become a worker whose pipes are files."""
    os.dup2(os.open(jobs, os.O_RDONLY), 0)
    os.dup2(os.open(answers, os.O_WRONLY), 1)
    os.chdir(directory)
    sys.path.insert(0, str(Path(__file__).parent))
    here = Path(__file__).parents[2]
    specification = {
        "parent": os.getppid(),
        "directory": str(directory),
        # Where coverage writes what it saw of this process.
        "writable": [str(here), str(directory)],
        "network": False,
        "files": True,
        "warm": "worker_jobs:warm",
        "entry": "worker_jobs:do",
        "memory": memory,
        "file_bytes": 1 << 30,
        "limit": 1 << 20,
    }
    _worker.main(json.dumps(specification))


def test_main_serves_until_its_input_ends(tmp_path):
    """A worker says that it is ready and under which limits, does its jobs, and ends with its input."""
    (tmp_path / "jobs").write_bytes(b"".join(part for job in ({"do": "echo", "n": 1},) for part in encode(job)))
    (tmp_path / "answers").touch()
    process = multiprocessing.get_context("spawn").Process(
        target=_worker_main,
        args=(tmp_path, tmp_path / "jobs", tmp_path / "answers"),
        kwargs={"memory": 1 << 30},
    )
    process.start()
    process.join(60)
    assert 0 == process.exitcode
    with (tmp_path / "answers").open("rb") as file:
        ready, result = read_frame(file.read, 1 << 20), read_frame(file.read, 1 << 20)
    assert "ready" == ready["type"]
    assert {"parent death: SIGKILL", "memory: address space"} <= set(ready["held"])
    assert (1, True) == (result["value.n"], result["value.warm"])


def _confined(directory, results):
    """Take every limit, and tell what is still possible."""
    told = {
        "death": _confine.die_with_parent(os.getppid()),
        "files": _confine.restrict_files(
            readable=[Path("/usr"), Path("/proc"), Path("/no/such/path"), Path(os.devnull)],
            writable=[directory, Path(__file__).parents[2]],
        ),
        "network": _confine.forbid_calls(network=False),
        "privileges": _confine.drop_privileges(),
        "memory": _confine.limit_address_space(256 << 20),
    }
    attempts = {
        "socket": socket.socket,
        "read": lambda: Path("/etc/hostname").read_text(),
        "allowed read": lambda: list(Path("/usr").iterdir()),
        "write": lambda: Path("/tmp/esper-should-not-exist").write_text("x"),
        "own write": lambda: (directory / "own").write_text("x"),
        "allocate": lambda: bytearray(1 << 30),
        "signal": lambda: os.kill(os.getppid(), 0),
        "leave": os.setsid,
        "change owner": lambda: os.chown(directory / "own", 12345, 12345),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            told[f"can {name}"] = True
        except (OSError, MemoryError):
            told[f"can {name}"] = False
    results.send(told)


def test_limits_hold_as_claimed(tmp_path):
    """Each limit that is claimed refuses what it says, and leaves the rest."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_confined, args=(tmp_path, send))
    process.start()
    assert receive.poll(60)
    told = receive.recv()
    process.join(30)
    assert told["death"]
    assert told["memory"]
    assert not told["can allocate"]
    assert told["can own write"]
    assert told["can allowed read"]
    assert told["network"] is not told["can socket"]
    assert told["network"] is not told["can leave"]
    assert told["privileges"]
    assert not told["can change owner"]
    for forbidden in ("read", "write"):
        assert told["files"] is not told[f"can {forbidden}"]


class TestClaims:
    """Where the machine enforces nothing, nothing is claimed."""

    def test_other_systems(self, monkeypatch):
        """Elsewhere than on Linux no limit is claimed."""
        monkeypatch.setattr(sys, "platform", "darwin")
        assert not _confine.die_with_parent(os.getppid())
        assert not _confine.forbid_calls(network=False)
        assert not _confine.restrict_files(readable=(), writable=())
        assert not _confine.drop_privileges()

    def test_other_processors(self, monkeypatch):
        """A processor whose numbers of system calls are not known gets no filter."""
        monkeypatch.setattr(_confine.platform, "machine", lambda: "vax")
        assert not _confine.forbid_calls(network=False)

    @pytest.mark.parametrize("answers", [(-1,), (1, -1)])
    def test_refusing_kernels(self, monkeypatch, answers):
        """A kernel without Landlock, or one that refuses it, is told from one that grants it."""
        replies = iter(answers)

        class Libc:
            def syscall(self, *_):
                return next(replies)

            def prctl(self, *_):
                return -1

        monkeypatch.setattr(_confine, "_libc", Libc)
        assert not _confine.restrict_files(readable=(), writable=())
        assert not _confine.forbid_calls(network=False)

    def test_landlock_without_its_last_step(self, monkeypatch):
        """Rules that could be made but not put in force are no limit."""
        reader, writer = os.pipe()
        os.close(writer)
        replies = iter((7, reader))

        class Libc:
            def syscall(self, *_):
                return next(replies)

            def prctl(self, *_):
                return -1

        monkeypatch.setattr(_confine, "_libc", Libc)
        assert not _confine.restrict_files(readable=(), writable=())
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(reader)

    def test_memory_that_cannot_be_limited(self, monkeypatch):
        """A limit that the system refuses is not claimed."""

        def refuse(*_):
            raise ValueError("not allowed to raise maximum limit")

        monkeypatch.setattr(resource, "setrlimit", refuse)
        assert not _confine.limit_address_space(1)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_refuses_what_it_names(machine):
    """The seccomp program, run by hand: named calls, foreign numberings and foreign architectures are refused."""
    arch, place = _confine._ARCHITECTURES[machine]
    assert set(_confine._NUMBERS) == {*_confine._FORBIDDEN, *_confine._NETWORK}
    numbers = tuple({pair[place] for pair in _confine._NUMBERS.values()})
    assert len(numbers) == len(_confine._NUMBERS)
    code = _confine._filter(arch, numbers)
    program = [struct.unpack_from("HBBI", code, at) for at in range(0, len(code), 8)]

    def verdict(number, architecture):
        at = accumulator = 0
        while True:
            operation, if_true, if_false, value = program[at]
            at += 1
            if operation == _confine._LOAD:
                accumulator = architecture if value == 4 else number
            elif operation == _confine._EQUAL:
                at += if_true if accumulator == value else if_false
            elif operation == _confine._AT_LEAST:
                at += if_true if accumulator >= value else if_false
            else:
                return value

    assert all(verdict(number, arch) == _confine._REFUSE for number in numbers)
    assert {_confine._ALLOW} == {verdict(number, arch) for number in range(500) if number not in numbers}
    assert _confine._REFUSE == verdict(0x40000000 | 41, arch)
    assert _confine._REFUSE == verdict(0, 0x40000003)


def _orphan(pid):
    _confine.die_with_parent(pid)


def test_orphan_ends_at_once():
    """A process whose parent is another than it was told ends before it does anything."""
    process = multiprocessing.get_context("spawn").Process(target=_orphan, args=(1,))
    process.start()
    process.join(30)
    assert 1 == process.exitcode
    assert signal.SIGKILL != process.exitcode
