"""The identity of training processes: a file that the service keeps fresh and that they read before they call.

They outlive the service and run for longer than a token is valid, so neither can a token be given to them once and for
all, nor may they hold the secret that signs tokens. The file is the owner's alone, as that secret's is.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["TokenReader", "TokenWriter"]

_log = get_logger(__name__)


class TokenWriter:
    """The service's side.

    Args:
        path: the file.
        source: gives a token that is valid for a while; a new one in good time.
    """

    def __init__(self, path: Path, source: Callable[[], str]) -> None:
        self.path = path
        self._source = source
        self._written = ""

    def renew(self) -> None:
        """Write the token where the source gives another one; a disk that is full is tried again the next time."""
        token = self._source()
        if token == self._written:
            return
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(token)
            staged.replace(self.path)
        except OSError as error:
            staged.unlink(missing_ok=True)
            _log.warning("token of training processes not renewed", path=str(self.path), error=str(error))
        else:
            self._written = token


class TokenReader:
    """The process's side: call it for the newest token."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""

    def __call__(self) -> str:
        """The token as it stands in the file, or the one before it while the file cannot be read."""
        try:
            self._last = self._path.read_text(encoding="utf-8")
        except OSError as error:
            _log.warning("token not readable", path=str(self._path), error=str(error))
        return self._last
