"""The `esper` command, and the one place that knows every service: settings of all, `esper up`, `esper serve`."""

import os

# Read by gRPC when it is first imported, so it stands here. Workers of a mesh are programs of their own: what gRPC does
# at a fork, for processes that would go on with its channels, is only noise on standard error.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
