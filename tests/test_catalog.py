"""The catalogue finds what is there and names what is nearest."""

import pytest

from whet import catalog, optional
from whet.errors import BadInput, TargetFailed, nearest
from whet.technique import Technique, card, knobs


def test_every_technique_has_a_card_and_described_knobs():
    assert len(catalog.techniques()) >= 8
    for name, kind in catalog.techniques().items():
        assert name == kind.__name__
        assert kind.__module__.endswith(f".{name.lower()}"), "one technique a file"
        assert card(kind).startswith(f"{name}: ")
        assert "Helps when:" in card(kind)
        assert "Needs:" in card(kind)
        assert all("default" in facts for facts in knobs(kind).values())
        assert catalog.technique(name) == kind()


def test_abstract_techniques_are_not_in_it():
    assert not {"Technique", "WeightTechnique", "ScoreTechnique"} & set(catalog.techniques())
    assert all(issubclass(kind, Technique) for kind in catalog.techniques().values())


def test_techniques_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        catalog.technique("Magnitude").amount = 0.9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("L1Filter", "Did you mean L1Filters"),
        ("SVD", "Did you mean Svd"),
        ("", "Known are: AdaRound, "),
        ("../x", "Known are"),
    ],
)
def test_unknown_technique(name: str, words: str):
    with pytest.raises(BadInput, match=f"is not a technique. {words}"):
        catalog.technique(name)


KNOWN = r"'tpu' is not one. Known are: executorch, inductor, onnxruntime"


def test_unknown_target():
    with pytest.raises(BadInput, match=r"choose a target: 'onnx' is not one. Did you mean onnxrun"):
        catalog.target("onnx")
    with pytest.raises(BadInput, match=KNOWN):
        catalog.target("tpu")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("executorch", "executorch", r"'whet\[executorch\]'"),
        ("inductor", "torch", "whet"),
        ("onnxruntime", "onnxruntime", "whet"),
        ("openvino", "openvino", r"'whet\[openvino\]'"),
    ],
)
def test_target_that_is_not_installed_says_what_brings_it(
    name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(catalog, "installed", lambda each: each != package)
    words = rf"the package {package} is not installed. Run: pip install {install}\."
    with pytest.raises(TargetFailed, match=words):
        catalog.target(name)
    assert name not in [target.name for target in catalog.present()]


def test_optional_packages(monkeypatch: pytest.MonkeyPatch):
    assert optional.require("json", "none").dumps(1) == "1"
    monkeypatch.setattr(optional, "installed", lambda package: False)
    with pytest.raises(TargetFailed, match=r"use sklearn.x: .*Run: pip install 'whet\[demo\]'"):
        optional.require("sklearn.x", "demo")
    assert optional.version("no-such-distribution") == "not installed"


def test_nearest():
    assert nearest("amuont", ["amount", "scope"]) == "Did you mean amount?"
    assert nearest("zzz", ["b", "a"]) == "Known are: a, b."
