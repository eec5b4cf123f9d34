"""Every technique in the catalogue passes the conformance kit."""

import pytest

from whet import catalog, conformance, testing

NAMES = list(catalog.techniques())
PAIRS = [
    (name, network)
    for name, kind in catalog.techniques().items()
    for network in dict.fromkeys([*conformance.KINDS, kind.shows])
]


@pytest.mark.parametrize(("name", "network"), PAIRS)
def test_battery(name: str, network: str) -> None:
    conformance.check(conformance.sample(name), network)


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
        for network in (*conformance.KINDS, catalog.techniques()[name].shows)
    )
    assert any(work is not None for work in tried)  # up to the first
