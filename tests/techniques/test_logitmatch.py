"""LogitMatch is the squared error of centred scores, the limit of Distill for high temperatures."""

import torch

from whet.techniques.distill.distill import divergence
from whet.techniques.distill.logitmatch import LogitMatch, centred


def test_what_all_scores_share_counts_for_nothing():
    z = torch.randn(8, 5)
    shift = torch.randn(8, 1)
    torch.testing.assert_close(LogitMatch().loss(z + shift, z, None), torch.tensor(0.0))
    assert float(LogitMatch().loss(z * 2, z, None)) > 0.1


def test_it_is_the_limit_of_the_divergence():
    z_s, z_t = torch.randn(8, 5).double(), torch.randn(8, 5).double()
    limit = LogitMatch().loss(z_s, z_t, None) / 2
    torch.testing.assert_close(divergence(z_s, z_t, 1e4), limit, rtol=1e-3, atol=0)


def test_centred_rows_have_mean_zero():
    torch.testing.assert_close(centred(torch.randn(8, 5)).mean(dim=1), torch.zeros(8))
