"""The laws about kernels and blueprints: every pair of states, every role."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.mesh.errors import Conflict, Forbidden
from esper.mesh.identity import Identity, Role
from esper.urza import blueprints
from esper.urza.blueprints import BlueprintState
from esper.urza.kernels import LAWFUL, KernelState, check_transition, signed_name

S = KernelState
_FINAL = {S.REJECTED, S.QUARANTINED}
roles = st.sampled_from(sorted(Role))
states = st.sampled_from(sorted(KernelState))


def test_the_table_is_the_one_of_the_contract() -> None:
    """Who may do what, spelled out a second time: a change of the law must change this test too."""
    forge, judge, operator = Role.TEZZERET, Role.URABRASK, Role.OPERATOR
    assert {
        (None, S.STAGED): {forge},
        (S.STAGED, S.VALIDATED): {judge},
        (S.STAGED, S.REJECTED): {judge},
        (S.VALIDATED, S.ARCHIVED): {operator},
        (S.VALIDATED, S.QUARANTINED): {operator, judge},
        (S.ARCHIVED, S.QUARANTINED): {operator, judge},
    } == LAWFUL


@given(before=st.none() | states, after=states, role=roles)
def test_every_pair_for_every_role(before: KernelState | None, after: KernelState, role: Role) -> None:
    """A lawful step is taken by the entitled role and by nobody else; every other step is refused to all."""
    by = Identity("somebody", role)
    entitled = LAWFUL.get((before, after), frozenset())
    if role in entitled:
        check_transition("sha256:0", before, after, by)
        return
    with pytest.raises(Forbidden if entitled else Conflict) as caught:
        check_transition("sha256:0", before, after, by)
    assert ("ROLE_NOT_ENTITLED" if entitled else "UNLAWFUL_TRANSITION") == caught.value.reason


def test_only_urabrask_leads_to_validated_and_nothing_leads_out_of_the_end() -> None:
    """VALIDATED is reached from STAGED by one role only; rejected and quarantined kernels stay what they are."""
    assert [(S.STAGED, {Role.URABRASK})] == [(a, set(who)) for (a, b), who in LAWFUL.items() if b is S.VALIDATED]
    assert not [pair for pair in product(_FINAL, KernelState) if pair in LAWFUL]


def test_the_table_of_blueprints() -> None:
    """Whoever is known may submit one; out of use and back again it is moved by operators alone."""
    active, archived = BlueprintState.ACTIVE, BlueprintState.ARCHIVED
    assert {
        (None, active): set(Role) - {Role.ANONYMOUS},
        (active, archived): {Role.OPERATOR},
        (archived, active): {Role.OPERATOR},
    } == blueprints.LAWFUL


def test_names_in_the_records() -> None:
    """A person stands with role and name, a service with its name alone, and no name is too long for its column."""
    assert "operator:alice" == signed_name(Identity("alice", Role.OPERATOR))
    assert "urabrask" == signed_name(Identity("urabrask", Role.URABRASK))
    assert 128 == len(signed_name(Identity("x" * 128, Role.CLIENT)))
