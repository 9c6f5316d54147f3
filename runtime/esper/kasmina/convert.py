"""Control vocabulary <-> contracts: one pair of functions for every type of ``esper.kasmina.control``, without torch.

Decisions and states travel as `esper.v1` messages and live as frozen dataclasses; this is the only place where one
becomes the other::

    message = boundary_state_to_proto(state)
    assert boundary_state_from_proto(message) == state      # up to binary32 in the columns, see below

What the wire holds that the dataclasses do not show: columns of statistics are binary32 with NaN for None; times are
whole nanoseconds; ``ready`` is the absence of a blocked gate where one lies ahead; a reason of a gate that the contract
does not know travels as OTHER; free texts beyond their bound are cut (names and reasons for people, never identifiers).
"""

from esper.kasmina._convert_base import (
    GATE_BLOCKS,
    counterfactual_from_proto,
    counterfactual_to_proto,
    signature_from_proto,
    signature_to_proto,
    site_from_proto,
    site_health_from_proto,
    site_health_to_proto,
    site_to_proto,
)
from esper.kasmina._convert_decision import (
    advice_from_proto,
    advice_to_proto,
    decision_from_proto,
    decision_to_proto,
    field_report_from_proto,
    field_report_to_proto,
    kernel_choice_from_proto,
    kernel_choice_to_proto,
)
from esper.kasmina._convert_run import (
    boundary_state_from_proto,
    boundary_state_to_proto,
    health_from_proto,
    health_to_proto,
    run_hello_from_proto,
    run_hello_to_proto,
    seeds_from_proto,
    seeds_to_proto,
)

__all__ = [
    "GATE_BLOCKS",
    "advice_from_proto",
    "advice_to_proto",
    "boundary_state_from_proto",
    "boundary_state_to_proto",
    "counterfactual_from_proto",
    "counterfactual_to_proto",
    "decision_from_proto",
    "decision_to_proto",
    "field_report_from_proto",
    "field_report_to_proto",
    "health_from_proto",
    "health_to_proto",
    "kernel_choice_from_proto",
    "kernel_choice_to_proto",
    "run_hello_from_proto",
    "run_hello_to_proto",
    "seeds_from_proto",
    "seeds_to_proto",
    "signature_from_proto",
    "signature_to_proto",
    "site_from_proto",
    "site_health_from_proto",
    "site_health_to_proto",
    "site_to_proto",
]
