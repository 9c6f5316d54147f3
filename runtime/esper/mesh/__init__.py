"""What every Esper process links: settings, logging, errors, identity, channels and the server factory.

Import the module that is needed, never the package alone, so that a process pays only for what it uses::

    from esper.mesh.errors import NotFound
    from esper.mesh.server import MeshServer
    from esper.mesh.channel import open_channel

`esper.mesh.errors` and `esper.mesh.settings` do not import grpc, so that the core of a service can use them.
"""
