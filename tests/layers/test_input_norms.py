"""Squares of a layer's inputs, against patches that torch unfolds."""

import pytest
import torch
from torch import nn

from lightning_sparse.layers.input_norms import InputSquares


@pytest.mark.parametrize(
    "conv",
    [
        {"padding": 1, "stride": 2},
        {"groups": 2, "padding": (0, 1), "dilation": 2},
        {"groups": 4, "padding": "same", "padding_mode": "circular"},
    ],
)
def test_convolutions_square_the_patches_that_their_filters_see(conv):
    layer = nn.Conv2d(4, 8, (3, 2), **conv)
    x = torch.randn(5, 4, 9, 8)
    seen = InputSquares({"w": layer})
    layer(x)
    padding = layer.padding
    if isinstance(padding, str):  # 2 rows and 1 column, that on the right
        x, padding = nn.functional.pad(x, (0, 1, 1, 1), mode="circular"), 0
    patches = nn.functional.unfold(x, (3, 2), layer.dilation, padding, layer.stride)
    expected = patches.square().sum((0, 2)).view(layer.groups, -1)
    assert torch.allclose(seen.sums["w"], expected, rtol=1e-5)
    assert int(seen.rows["w"]) == patches.shape[0] * patches.shape[2]


def test_linear_layers_square_each_row_of_all_calls_until_the_close():
    layer = nn.Linear(3, 2)
    seen = InputSquares({"w": layer})
    x, y = torch.randn(4, 5, 3), torch.randn(6, 3)
    layer(x), layer(input=y)
    seen.close()
    layer(y)
    rows = torch.cat((x.flatten(0, 1), y))
    assert torch.allclose(seen.sums["w"], rows.square().sum(0, keepdim=True))
    assert int(seen.rows["w"]) == 26
