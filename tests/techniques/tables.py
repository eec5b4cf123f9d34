"""The tables on a network's weights, for the tests of techniques that make weights share values."""

import itertools
from dataclasses import replace

import torch

from whet import packed
from whet.rungs.layers import weights
from whet.technique import Technique
from whet.testing import tiny_task


def tables_of(model):
    """The table form of each layer that has one, by path."""
    found = {}
    for path, module in weights(model):
        form = packed.form_of(module)
        for part in form.modules() if form is not None else ():
            if isinstance(part, packed.Lookup):
                found[path] = part
    return found


def pairs(task, model):
    """(path, rows before, rows now, mask) of each layer with a table; rows are [out, d]."""
    old = dict(weights(task.model))
    for path in tables_of(model):
        now = model.get_submodule(path)
        mask = packed.support_of(now).flatten(1)
        yield path, old[path].weight.detach().flatten(1), now.weight.detach().flatten(1), mask


def losses(apply, *techniques):
    """The loss on the training data that each technique alone leaves of a tiny transformer."""
    task, found = replace(tiny_task("transformer"), validation=None), []
    for technique in techniques:
        model = apply(task, technique).model.eval()
        with torch.no_grad():
            found.append(sum(float(task.loss(model(x), y)) for x, y in task.train))
    return found


def error(a, b):
    return float((a.double() - b.double()).square().sum())


def spoilers():
    """Techniques that make a form which a table may not stand on or under."""

    class Makes(Technique):
        def apply(self, work):
            raise NotImplementedError

    for form in (packed.Affine, packed.Grouped, packed.Lookup):
        yield type(f"Makes{form.__name__}", (Makes,), {"makes": frozenset({form})})()


def lloyd(values, centres, steps):
    """k-means in plain Python, for values; a centre without members stays."""
    values, centres = values.double().tolist(), centres.double().tolist()
    for _ in range(steps):
        members = [[] for _ in centres]
        for v in values:
            members[min(range(len(centres)), key=lambda j: (v - centres[j]) ** 2)].append(v)
        pairs = zip(centres, members, strict=True)
        centres = [sum(m) / len(m) if m else c for c, m in pairs]
    return torch.tensor(centres)


def best_of_signs(row):
    """The least error of alpha b over all b in {-1, 1}^n and all alpha."""
    n = len(row)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)))
    alpha = signs @ row / n
    return float((row - alpha[:, None] * signs).square().sum(dim=1).min())
