"""Architectures of the zoo that growth can not serve, each with words of the reason; a test asserts that it is so."""

GAPS = {
    "hard routing": "expected a change of the shape",
    "parameters without modules": "no module with parameters",
    "torchscript": "before TorchScript compiled it",
}
"""Name to a part of the reason that growth gives.

* hard routing: a span from one expert to the next takes the rows of one for those of the other; layers grow.
* parameters without modules: there is nothing to attach to.
* torchscript: compiled code runs no hooks.
"""
