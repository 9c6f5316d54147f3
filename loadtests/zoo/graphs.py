"""Graph networks of `torch_geometric`, and modules of `lightning`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loadtests.zoo._host import Host, library, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtests.zoo._host import Batch

__all__ = ["HOSTS"]

_NODES, _EDGES = 10, 24


def _graph(generator: torch.Generator) -> dict[str, Any]:
    return {
        "x": torch.randn(_NODES, 6, generator=generator),
        "edge_index": torch.randint(0, _NODES, (2, _EDGES), generator=generator),
    }


def _attributed(generator: torch.Generator) -> dict[str, Any]:
    return {**_graph(generator), "edge_attr": torch.randn(_EDGES, 3, generator=generator)}


def _batched(generator: torch.Generator) -> dict[str, Any]:
    return {**_graph(generator), "batch": torch.arange(_NODES) // 5}


def _typed(generator: torch.Generator) -> dict[str, Any]:
    return {**_graph(generator), "edge_type": torch.randint(0, 2, (_EDGES,), generator=generator)}


def _molecules(generator: torch.Generator) -> dict[str, Any]:
    return {
        "0": torch.randint(1, 9, (_NODES,), generator=generator),
        "1": torch.randn(_NODES, 3, generator=generator),
        "2": torch.arange(_NODES) // 5,
    }


def _heterogeneous(generator: torch.Generator) -> dict[str, Any]:
    nodes = {name: torch.randn(_NODES, 6, generator=generator) for name in ("user", "item")}
    edges = {
        ("user", "buys", "item"): torch.randint(0, _NODES, (2, _EDGES), generator=generator),
        ("item", "bought", "user"): torch.randint(0, _NODES, (2, _EDGES), generator=generator),
    }
    return {"x_dict": nodes, "edge_index_dict": edges}


def _basic(name: str, model: str, **options: Any) -> Host:
    def build() -> nn.Module:
        made = getattr(library("torch_geometric.nn"), model)
        host: nn.Module = made(6, 8, num_layers=2, out_channels=3, dropout=0.1, **options)
        return host

    return Host(name, "torch-geometric", "graph", build, _graph)


class _Edges(nn.Module):
    """Two convolutions that are given more than nodes and edges, and a readout."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(width, 3)

    def forward(self, x: Tensor, edge_index: Tensor, **more: Tensor) -> Tensor:
        x = torch.relu(self.first(x, edge_index, **more))
        logits: Tensor = self.head(torch.relu(self.second(x, edge_index, **more)))
        return logits


def _layers(name: str, layer: str, draw: Batch = _graph, **options: Any) -> Host:
    def build() -> nn.Module:
        made = getattr(library("torch_geometric.nn"), layer)
        return _Edges(made(6, 8, **options), made(8, 8, **options))

    return Host(name, "torch-geometric", "graph", build, draw)


class _Pooled(nn.Module):
    """Graphs in a batch, each pooled to one vector."""

    def __init__(self) -> None:
        super().__init__()
        geometric = library("torch_geometric.nn")
        self.conv, self.norm, self.head = geometric.GCNConv(6, 8), geometric.GraphNorm(8), nn.Linear(8, 2)
        self._pool = geometric.global_mean_pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        logits: Tensor = self.head(self._pool(torch.relu(self.norm(self.conv(x, edge_index), batch)), batch))
        return logits


class _Hetero(nn.Module):
    """Convolutions over dictionaries of node types."""

    def __init__(self) -> None:
        super().__init__()
        geometric = library("torch_geometric.nn")
        relations = [("user", "buys", "item"), ("item", "bought", "user")]
        self.conv = geometric.HeteroConv({edge: geometric.SAGEConv((6, 6), 8) for edge in relations})
        self.norm = geometric.HeteroDictLinear(8, 8, types=["user", "item"])
        self.head = nn.Linear(8, 2)

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[tuple[str, str, str], Tensor]) -> Tensor:
        x = self.norm(self.conv(x_dict, edge_index_dict))
        logits: Tensor = self.head(torch.relu(x["user"]))
        return logits


def _unet() -> nn.Module:
    host: nn.Module = library("torch_geometric.nn").GraphUNet(6, 8, 3, depth=2)
    return host


def _schnet() -> nn.Module:
    host: nn.Module = library("torch_geometric.nn").SchNet(
        hidden_channels=8,
        num_filters=8,
        num_interactions=2,
        num_gaussians=8,
        interaction_graph=_everyone,
    )
    return host


def _everyone(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of atoms of a molecule, and its distance: the library's own search needs an extension."""
    edges = ((batch[:, None] == batch[None]) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=1)


class _GraphTransformer(nn.Module):
    """Messages along edges beside attention over all nodes."""

    def __init__(self) -> None:
        super().__init__()
        geometric = library("torch_geometric.nn")
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(geometric.GPSConv(8, geometric.GCNConv(8, 8), heads=2) for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edge_index)
        logits: Tensor = self.head(x)
        return logits


def _gin_edges() -> nn.Module:
    geometric = library("torch_geometric.nn")
    maps = [nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 8)) for n in (6, 8)]
    return _Edges(geometric.GINEConv(maps[0], edge_dim=3), geometric.GINEConv(maps[1], edge_dim=3))


def _lightning(build: Callable[[type[Any]], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build(library("lightning").LightningModule)


def _classifier(base: type[Any]) -> nn.Module:
    class Classifier(base):  # type: ignore[misc]  # the base is known at run time only
        """As in the first page of its documentation."""

        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return logits

    return Classifier()


def _autoencoder(base: type[Any]) -> nn.Module:
    class LitAutoEncoder(base):  # type: ignore[misc]  # the base is known at run time only
        """Encoder and decoder handed in."""

        def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
            super().__init__()
            self.encoder, self.decoder = encoder, decoder

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            code = self.encoder(x.flatten(1))
            return {"code": code, "decoded": self.decoder(code)}

    encoder = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    return LitAutoEncoder(encoder, nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 64)))


_GRAPHS = (
    _basic("gcn", "GCN"),
    _basic("graph sage", "GraphSAGE"),
    _basic("gin", "GIN"),
    _basic("gat", "GAT"),
    _basic("gat v2", "GAT", v2=True),
    _basic("edge cnn", "EdgeCNN"),
    _basic("gcn with jumping knowledge", "GCN", jk="cat"),
    _layers("graph transformer", "TransformerConv", _attributed, edge_dim=3),
    _layers("relational gcn", "RGCNConv", _typed, num_relations=2),
    _layers("chebyshev", "ChebConv", K=2),
    _layers("topology adaptive", "TAGConv"),
    Host("gine (edge features)", "torch-geometric", "graph", _gin_edges, _attributed),
    Host("gps (messages and attention)", "torch-geometric", "graph", _GraphTransformer, _graph),
    Host("pooled graphs", "torch-geometric", "graph", _Pooled, _batched),
    Host("heterogeneous graph", "torch-geometric", "graph", _Hetero, _heterogeneous),
    Host("graph u-net", "torch-geometric", "graph", _unet, _graph),
    Host("schnet", "torch-geometric", "molecules", _schnet, _molecules),
)
_MODULES = (
    Host("lightning classifier", "lightning", "feed-forward", _lightning(_classifier), numbers("0", 4, 1, 8, 8)),
    Host("lightning autoencoder", "lightning", "autoencoder", _lightning(_autoencoder), numbers("0", 4, 1, 8, 8)),
)

HOSTS = (*_GRAPHS, *_MODULES)
