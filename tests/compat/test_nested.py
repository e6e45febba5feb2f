"""The tensors within a batch, an output or an optimizer's state."""

from collections import OrderedDict, UserDict, namedtuple

import torch

from lightning_sparse.compat.nested import tensors

Output = namedtuple("Output", "logits extra")


def test_the_tensors_of_nested_lists_tuples_and_mappings_come_in_order():
    a, b, c, d, e = torch.arange(5).unbind()
    thing = Output([a, {"x": b, "y": "text"}], (UserDict(z=c), OrderedDict(w=[None, d], v=e), 3))
    assert [x.item() for x in tensors(thing)] == [0, 1, 2, 3, 4]


def test_a_tensor_is_its_own_and_other_things_hold_none():
    x = torch.ones(2)
    assert next(tensors(x)) is x
    assert [list(tensors(thing)) for thing in (None, 1, "text", object(), [], {})] == [[]] * 6
