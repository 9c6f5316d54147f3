"""Which services there are. Apart from `settings`, so that `esper --help` needs not import them all."""

__all__ = ["SERVICES"]

SERVICES = ("oona", "urza", "tezzeret", "urabrask", "tamiyo", "tolaria")
"""Every service, in the order in which they start: what others lean on comes first."""
