"""LabelSmoothing is cross-entropy against softened labels, whatever the teacher says."""

import torch

from whet.techniques.distill.labelsmoothing import LabelSmoothing


def test_the_loss_is_that_of_the_definition():
    z, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    soft = torch.full((6, 4), 0.2 / 4)
    soft[torch.arange(6), y] += 0.8
    expected = -(soft * torch.log_softmax(z, dim=1)).sum(dim=1).mean()
    for teacher in (torch.randn(6, 4), torch.zeros(6, 4)):
        torch.testing.assert_close(LabelSmoothing(epsilon=0.2).loss(z, teacher, y), expected)


def test_it_takes_the_place_of_the_tasks_own_loss():
    assert LabelSmoothing().labels == 0
