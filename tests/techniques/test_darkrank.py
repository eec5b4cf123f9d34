"""DarkRank's orders are those of the definition, and the teacher's order is the minimum."""

import math
from itertools import permutations

import pytest
import torch

from whet.techniques.distill.darkrank import DarkRank, likelihood, scores, soft


def probability(s, order):
    """P(pi), written out."""
    p, rest = 1.0, list(order)
    for i in order:
        p *= float(s[i].exp() / sum(s[k].exp() for k in rest))
        rest.remove(i)
    return p


def test_the_likelihood_is_that_of_the_definition():
    s = torch.randn(4).double()
    orders = list(permutations(range(4)))
    got = likelihood(s[torch.tensor(orders)]).exp()
    expected = torch.tensor([probability(s, order) for order in orders]).double()
    torch.testing.assert_close(got, expected)
    assert float(got.sum()) == pytest.approx(1)


def test_soft_is_the_divergence_over_all_orders():
    s_s, s_t = torch.randn(4).double(), torch.randn(4).double()
    expected = 0.0
    for order in permutations(range(4)):
        p, q = probability(s_t, order), probability(s_s, order)
        expected += p * torch.log(torch.tensor(p / q)).item()
    assert float(soft(s_s[None], s_t[None])) == pytest.approx(expected)
    assert float(soft(s_t[None], s_t[None])) == pytest.approx(0, abs=1e-9)


def test_scores_leave_the_query_out():
    e = torch.nn.functional.normalize(torch.randn(3, 5), dim=1)
    s = scores(e, alpha=2.0, beta=3.0)
    expected = -2 * (e[0] - e[1:]).norm(dim=1) ** 3
    torch.testing.assert_close(s[0], expected)


@pytest.mark.parametrize("batch", [3, 16, 64])
def test_an_order_of_what_is_equally_alike_is_one_of_all(batch):
    """Images at right angles to each other: -log P / n = log(n!) / n, which grows like log n."""
    n = batch - 1
    loss = DarkRank(match="hard").loss(torch.eye(batch), torch.randn(batch, 4))
    assert float(loss) == pytest.approx(math.lgamma(n + 1) / n, rel=1e-5)


@pytest.mark.parametrize("match", ["hard", "soft"])
def test_learning_it_brings_the_teachers_order(match):
    """`hard` puts the teacher's order first of all, `soft` makes all orders as likely."""
    teacher = torch.randn(5, 4)
    student = torch.randn(5, 4, requires_grad=True)
    technique = DarkRank(match=match)
    optimizer = torch.optim.Adam([student], lr=0.03)
    first = technique.loss(student, teacher).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = technique.loss(student, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    s_s, s_t = (scores(e.detach(), 3.0, 3.0) for e in (student, teacher))
    assert float((s_s.argsort(dim=1) == s_t.argsort(dim=1)).float().mean()) > 0.9
