"""The size language: what it computes, and everything that it refuses."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.blueprints.expressions import MAX_EXPRESSION_LENGTH, evaluate
from esper.mesh.errors import InvalidInput

SYMBOLS = {"in": 48, "out": 10}

leaves = st.one_of(
    st.integers(0, 99).map(lambda n: (str(n), n)),
    st.sampled_from([("in", SYMBOLS["in"]), ("out", SYMBOLS["out"])]),
)


def _combine(children):
    def binary(drawn):
        sign, (left, a), (right, b) = drawn
        if sign == "//" and b == 0:
            return (f"({left})", a)
        functions = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}
        return (f"({left}) {sign} ({right})", functions[sign](a, b))

    def call(drawn):
        name, parts = drawn
        return (f"{name}({', '.join(p[0] for p in parts)})", {"min": min, "max": max}[name](p[1] for p in parts))

    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "//"]), children, children).map(binary),
        st.tuples(st.sampled_from(["min", "max"]), st.lists(children, min_size=1, max_size=3)).map(call),
    )


@given(st.recursive(leaves, _combine, max_leaves=6))
def test_computes_what_arithmetic_says(case):
    """Every expression has the value that Python's integers give to the same operations."""
    text, value = case
    if len(text) <= MAX_EXPRESSION_LENGTH and abs(value) < 1 << 40:
        assert value == evaluate(text, SYMBOLS)


@pytest.mark.parametrize(
    ("text", "value"),
    [("in", 48), ("2*out+1", 21), ("in - 2 - 3", 43), ("7//2*2", 6), ("max(in//4,1)", 12), (" 5 ", 5), ("min(in)", 48)],
)
def test_precedence_and_order_are_those_of_python(text, value):
    """Products bind tighter than sums, both from left to right."""
    assert value == evaluate(text, SYMBOLS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("__import__('os')", "expected integers"),
        ("in.real", "expected integers"),
        ("width", "'width'"),
        ("in in", "expected the end"),
        ("(in", "')'"),
        ("in +", "the end"),
        ("", "the end"),
        ("in // (out - 10)", "divisor other than zero"),
        ("999999999999 * 999999999999", "2**40"),
        ("999999999999 * 2 * 2", "2**40"),
        ("(" * 20 + "1" + ")" * 20, "levels"),
        ("min 3", "'('"),
        ("1" * 200, "at most 128 characters"),
        ("2 ** 3", "'*'"),
    ],
)
def test_refuses_what_is_not_in_the_language(text, complaint):
    """A refusal shows the expression's flaw, and nothing is ever executed."""
    with pytest.raises(InvalidInput) as caught:
        evaluate(text, SYMBOLS)
    assert complaint in caught.value.public
