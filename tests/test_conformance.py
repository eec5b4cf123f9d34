"""Every technique in the catalogue passes the conformance kit."""

import copy

import pytest
from torch import nn

from whet import catalog, conformance, testing
from whet.graph import surgery
from whet.graph.ledger import Grid

NAMES = list(catalog.techniques())
PAIRS = [
    (name, network)
    for name, kind in catalog.techniques().items()
    for network in dict.fromkeys([*conformance.KINDS, kind.shows])
]
AGREED: set[str] = set()  # what the runtime has agreed on in this process


@pytest.mark.parametrize(("name", "network"), PAIRS)
def test_battery(name: str, network: str) -> None:
    conformance.check(conformance.sample(name), network, AGREED)


@pytest.mark.parametrize("name", NAMES)
def test_composition(name: str) -> None:
    assert conformance.check_composition(conformance.sample(name)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_absurd_knobs_are_refused(name: str) -> None:
    tried = conformance.check_knobs(catalog.techniques()[name])
    assert tried > 0 or not set(catalog.techniques()[name].model_fields) - {"skip", "only"}


@pytest.mark.parametrize("name", NAMES)
def test_every_technique_applies_somewhere(name: str) -> None:
    tried = (
        conformance.applied(conformance.sample(name), testing.tiny_task(network))
        for network in (catalog.techniques()[name].shows, *conformance.KINDS)
    )
    assert any(work is not None for work in tried)  # up to the first


def test_a_drawing_is_all_but_the_numbers(apply) -> None:
    """Whatever the file depends on besides floats tells two networks apart."""
    task, other = testing.tiny_task("plain_cnn"), testing.tiny_task("residual_cnn")

    def drawn(*names: str) -> str | None:
        work = apply(task, *map(conformance.sample, names))
        return conformance._drawing(work.model, "plain_cnn")

    plain = drawn()
    assert plain is not None
    assert drawn("FineTune") == plain
    assert drawn("Magnitude") is None
    gridded = copy.deepcopy(task.model)
    surgery.set_grids(gridded, {"input": Grid(0.1, 0, 0, 255)})
    assert conformance._drawing(gridded, "plain_cnn") is None
    tied, turned, swapped = (copy.deepcopy(task.model) for _ in range(3))
    surgery.replace(swapped, "2", nn.ReLU6())
    tied[4].bias = tied[8].bias
    turned[3].weight.data = turned[3].weight.data.transpose(2, 3)
    others = [conformance._drawing(model, "plain_cnn") for model in (tied, turned, swapped)]
    others += [drawn("L1Filters")]
    others += [conformance._drawing(other.model, "residual_cnn")]
    assert len({plain, *others}) == 1 + len(others)
