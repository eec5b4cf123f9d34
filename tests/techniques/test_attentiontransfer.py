"""AttentionTransfer compares where features are large, not how large they are."""

import pytest
import torch

from whet.techniques.distill.attentiontransfer import AttentionTransfer, attention


def test_the_map_is_that_of_the_definition():
    features = torch.randn(2, 3, 4, 5)
    q = features.square().sum(dim=1).flatten(1)
    torch.testing.assert_close(attention(features, 2), q / q.norm(dim=1, keepdim=True))
    tokens = torch.randn(2, 6, 3)
    assert attention(tokens, 2).shape == (2, 6)


def test_size_and_number_of_channels_are_free():
    f = torch.randn(2, 3, 4, 4)
    doubled = torch.cat([f, f], dim=1) * 5
    assert float(AttentionTransfer().loss(doubled, f)) == pytest.approx(0, abs=1e-6)


def test_maps_that_share_no_place_are_two_apart():
    f_s, f_t = torch.zeros(2, 2, 3, 4, 4).unbind(0)
    f_s[:, :, 0], f_t[:, :, 3] = 1, 1
    assert float(AttentionTransfer().loss(f_s, f_t)) == pytest.approx(2, rel=1e-5)
