"""Tamiyo, the strategic controller: decides when, where and with which kernel a run grows, and what stays.

`domain` says what a policy sees, `heuristic` decides, `shield` lets only lawful decisions pass, `memory` is what
travels in ``controller_state``. `catalogue` keeps a view of the library, `store` the decisions given. The rules are
docs/tamiyo.md.
"""
