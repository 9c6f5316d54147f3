"""Architectures with random weights from public libraries, for the compatibility suite; nothing is downloaded.

    from loadtests.zoo import HOSTS
    host = HOSTS["bert"]
    model, (args, kwargs) = host.make(), host.batch(0)

Libraries are imported when the first of their hosts is built.
"""

from loadtests.zoo import graphs, language, plain, signals, unusual, vision
from loadtests.zoo._host import Host

__all__ = ["HOSTS", "Host"]

HOSTS: dict[str, Host] = {
    host.name: host
    for group in (plain.HOSTS, unusual.HOSTS, graphs.HOSTS, language.HOSTS, signals.HOSTS, vision.HOSTS)
    for host in group
}
"""Name to architecture."""
