"""SimilarityPreserving compares the likeness of images, whatever the features are."""

import pytest
import torch

from whet.techniques.distill.similaritypreserving import SimilarityPreserving, similarity


def test_the_similarity_is_that_of_the_definition():
    f = torch.randn(4, 3, 2, 2)
    rows = f.reshape(4, -1)
    gram = rows @ rows.T
    torch.testing.assert_close(similarity(f), gram / gram.norm(dim=1, keepdim=True))


def test_turned_features_lose_nothing():
    f = torch.randn(4, 12)
    turned = 3 * f @ torch.linalg.qr(torch.randn(12, 12))[0]
    loss = SimilarityPreserving().loss(turned.reshape(4, 3, 2, 2), f.reshape(4, 3, 2, 2))
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(SimilarityPreserving().loss(torch.randn(4, 12), f)) > 1e-3


def test_the_loss_is_a_mean_over_pairs():
    f_s, f_t = torch.randn(5, 7), torch.randn(5, 9)
    expected = (similarity(f_s) - similarity(f_t)).square().mean()
    torch.testing.assert_close(SimilarityPreserving().loss(f_s, f_t), expected)
