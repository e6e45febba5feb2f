"""The count of one top-k over several layers."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse.rules import select

scores_of_layers = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4)


@given(scores_of_layers, st.data())
def test_counts_of_the_global_top_k_are_those_of_one_over_all_layers(layers, draw):
    """With ties, and layer by layer; the earlier position wins."""
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    among = [torch.tensor(draw.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))) for s in scores]
    k = draw.draw(st.integers(0, sum(map(select.count, among))))
    whole = select.top_k(torch.cat(scores), k, among=torch.cat(among))
    expected = [int(part.sum()) for part in whole.split([len(s) for s in scores])]
    assert select.count_global_top_k(iter(scores), k, among) == expected


@given(scores_of_layers, st.data())
def test_counts_of_the_global_top_k_keep_what_each_layer_needs(layers, draw):
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    among = [torch.ones(len(s), dtype=torch.bool) for s in scores]
    least = [draw.draw(st.integers(0, len(s))) for s in scores]
    k = draw.draw(st.integers(sum(least), sum(map(len, scores))))
    sure = [select.top_k(s, n) for s, n in zip(scores, least, strict=True)]
    rest = select.top_k(torch.cat(scores), k - sum(least), among=~torch.cat(sure))
    expected = [n + int(p.sum()) for n, p in zip(least, rest.split([len(s) for s in scores]), strict=True)]
    assert select.count_global_top_k(scores, k, among, least) == expected


@given(st.lists(st.integers(-1, 4), max_size=40), st.data())
def test_the_largest_of_blocks_are_those_of_the_whole(scores, draw):
    """With ties, of which the earlier position wins, and marks of what is no candidate."""
    whole = torch.tensor(scores, dtype=torch.float32)
    edges = [0, *sorted(draw.draw(st.lists(st.integers(0, len(scores)), max_size=5))), len(scores)]
    blocks = [(a, whole[a:b]) for a, b in pairwise(edges)]
    above = draw.draw(st.sampled_from([-1.0, 0.0, 2.0]))
    candidates = whole > above
    k = draw.draw(st.integers(0, select.count(candidates)))
    expected = select.top_k(whole, k, among=candidates).nonzero().squeeze(1)
    for asked in {k, 50} if k == select.count(candidates) else {k}:
        positions, values = select.largest(blocks, asked, above)
        assert torch.equal(positions, expected)
        assert torch.equal(values, whole[expected])
