import copy
import pickle

import pytest
import torch

from lightning_sparse.compat.generators import OwnGenerator


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_where_the_generator_is_and_leaves_it_there(copied):
    generator = OwnGenerator()
    generator.manual_seed(3)
    torch.rand(5, generator=generator)
    again = copied(generator)
    ahead = torch.rand(5, generator=again)
    assert isinstance(again, OwnGenerator)
    assert torch.equal(torch.rand(5, generator=generator), ahead)
