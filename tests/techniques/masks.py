"""What is masked in a network, for the tests of unstructured pruning."""

import copy

from whet import packed
from whet.rungs.layers import weights
from whet.technique import Work


def masks_of(model):
    """The mask of each layer, True for what is kept."""
    return {path: packed.support_of(module).clone() for path, module in weights(model)}


def zeros(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def watched(task, technique):
    """The work, and (step, steps, masks) after each step."""
    seen, work = [], Work(copy.deepcopy(task.model), task.model, task)
    work.tell = lambda step, steps: seen.append((step, steps, masks_of(work.model)))
    technique.apply(work)
    return work, seen
