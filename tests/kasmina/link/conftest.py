"""Links to scripted services."""

from dataclasses import replace

import pytest

from esper.kasmina.kernels.signing import SigningKey
from esper.kasmina.link import MeshLink
from esper.mesh.testing import serve
from tests.kasmina.link.scripts import FAST, SIGNATURE, ScriptedTamiyo, ScriptedUrza
from tests.services.tamiyo.tamiyo_worlds import make_hello


@pytest.fixture
def make_link():
    """Links that are closed with the test."""
    links = []

    def make(target, **keywords):
        link = MeshLink(target, **({"settings": FAST} | keywords))
        links.append(link)
        return link

    yield make
    for link in links:
        link.close(0.5)


@pytest.fixture
async def scripted():
    """A scripted controller and its address."""
    service = ScriptedTamiyo()
    async with serve(service) as (server, _):
        service.target = server.target
        yield service


@pytest.fixture(scope="module")
def bundle():
    """A real portable kernel for vectors of width 8."""
    from esper.kasmina.blueprints.catalogue import get
    from esper.kasmina.kernels.build import build
    from esper.kasmina.kernels.bundle import Tier

    return build(get("low_rank"), SIGNATURE, Tier.PORTABLE)


@pytest.fixture
async def library(bundle):
    """A scripted library with one kernel, and its address."""
    service = ScriptedUrza(bundle, SigningKey.generate())
    async with serve(service, ScriptedTamiyo()) as (server, _):
        service.target = server.target
        yield service


@pytest.fixture
def open_link(library, make_link, tmp_path):
    """A link to the scripted library."""

    def make(**settings):
        link = make_link(library.target, cache_dir=tmp_path / "cache", settings=replace(FAST, **settings))
        link.open(make_hello())
        return link

    return make
