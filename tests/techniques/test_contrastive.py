"""Contrastive tells an image's pair from those of the others."""

import math

import pytest
import torch

from whet.rungs.teaching import Heard
from whet.techniques.distill.contrastive import Contrastive, contrast, pooled


def test_nothing_known_costs_the_logarithm_of_the_batch():
    same = torch.ones(8, 5)
    assert float(contrast(same, same, 0.1)) == pytest.approx(math.log(8), rel=1e-5)


def test_pairs_that_are_alike_cost_nothing_and_swapped_ones_much():
    u = torch.eye(4)
    assert float(contrast(3 * u, u, 0.01)) == pytest.approx(0, abs=1e-6)
    assert float(contrast(u.flip(0), u, 0.01)) > 50


def test_both_directions_count():
    u, v = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(contrast(u, v, 0.5), contrast(v, u, 0.5))


def test_features_are_averaged_over_places():
    image, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3)
    torch.testing.assert_close(pooled(image), image.mean(dim=(2, 3)))
    torch.testing.assert_close(pooled(tokens), tokens.mean(dim=1))


def test_the_maps_learn_to_tell_images_apart():
    shown, wanted = {"a": torch.randn(8, 6, 2, 2)}, {"a": torch.randn(8, 9, 2, 2)}
    heard = Heard(None, None, None, shown, wanted)
    maps = Contrastive().between(None, heard)
    optimizer = torch.optim.Adam(maps.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = maps(heard)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * math.log(8)
