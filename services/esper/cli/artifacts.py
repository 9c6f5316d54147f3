"""Files of a run, fetched over the contract: the same whether the mesh is on this machine or elsewhere."""

import hashlib
from pathlib import Path, PurePosixPath

from esper.cli.connection import Mesh
from esper.mesh.errors import Corrupt, InvalidInput
from esper.v1 import tolaria_service_pb2

__all__ = ["fetch", "fetch_all"]

_DOWNLOAD_LIMIT_S = 600.0


def fetch(mesh: Mesh, run_id: str, name: str, folder: Path, *, prefix: str = "") -> Path:
    """Download one file of a run below a folder, complete or not at all; `prefix` of its name is left out there.

    Raises:
        Corrupt: the bytes that arrived do not have the digest that was announced.
    """
    path = _inside(folder, name.removeprefix(prefix))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    running = hashlib.sha256()
    announced = ""
    request = tolaria_service_pb2.DownloadArtifactRequest(run_id=run_id, name=name)
    with staged.open("wb") as file:
        for part in mesh.tolaria.DownloadArtifact(request, timeout=_DOWNLOAD_LIMIT_S):
            if part.HasField("chunk"):
                running.update(part.chunk.data)
                file.write(part.chunk.data)
            elif part.HasField("digest"):
                announced = part.digest.digest
    found = f"sha256:{running.hexdigest()}"
    if found != announced:
        staged.unlink()
        raise Corrupt(f"{name} of {run_id}: expected {announced or 'a digest at the end'}, found {found}")
    staged.replace(path)
    return path


def fetch_all(
    mesh: Mesh, run_id: str, folder: Path, *, prefix: str = "", names: frozenset[str] | None = None
) -> list[Path]:
    """Download the files of a run whose name begins with `prefix` (and is one of `names`) below a folder."""
    request = tolaria_service_pb2.ListArtifactsRequest(run_id=run_id)
    listed = mesh.tolaria.ListArtifacts(request, timeout=mesh.timeout).artifacts
    wanted = [a.name for a in listed if a.name.startswith(prefix) and (names is None or a.name in names)]
    return [fetch(mesh, run_id, name, folder, prefix=prefix) for name in wanted]


def _inside(folder: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise InvalidInput(f"artifact name: expected a path below the run's folder, found {name!r}")
    return folder.joinpath(*pure.parts)
