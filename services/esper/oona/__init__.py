"""Oona, the message bus: partitioned topics, order per key, at-least-once delivery, durable before acknowledged.

The floor plan: `records`, `partitioner`, `window`, `sequencer`, `cursor` and `group` are pure logic; `store` is the
seam to the outside and `sqlite_log` (over `database`) its embedded edition; `broker` and `subscriptions` join log and
groups; `servicer` and `convert` are the border to the contracts; `service` builds it all. Semantics stand in
docs/oona.md.
"""
