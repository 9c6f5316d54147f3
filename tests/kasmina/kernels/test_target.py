"""Names of machines."""

import pytest
import torch

from esper.kasmina.kernels import Target
from esper.mesh.errors import InvalidInput


def test_this_machine_has_a_name_that_can_be_read_back():
    """A target survives its text, and two looks at this machine agree."""
    here = Target.here()
    assert here == Target.parse(str(here)) == Target.here()
    assert str(here).startswith("cpu/")
    assert torch.__version__.startswith(here.torch)


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu/x86_64/avx2/2.13", "cpu/x86_64/avx2/torch-2.13/more", "a b/x/y/torch-2"]
)
def test_other_texts_are_refused(text):
    """A target has four parts of plain characters."""
    with pytest.raises(InvalidInput, match="target"):
        Target.parse(text)


def test_a_device_that_is_not_here_is_refused():
    """There is no target for hardware that the process cannot see."""
    with pytest.raises(InvalidInput, match="expected cpu"):
        Target.here("tpu")


def test_the_compiler_is_held_to_the_capability():
    """Machines with one target string can run one another's kernels: no instruction beyond the named ones is used."""
    assert "x86-64-v4" == Target("cpu", "x86_64", "avx512", "2.13").march
    assert "x86-64-v3" == Target("cpu", "x86_64", "avx2", "2.13").march
    assert Target("cpu", "aarch64", "default", "2.13").march is None
    assert Target("cuda", "nvidia", "sm_90", "2.13").march is None
