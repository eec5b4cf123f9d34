"""The root names, and what a bare import costs."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import whet

NAMES = [
    "Metric",
    "Recipe",
    "Remembered",
    "Result",
    "Task",
    "WhetError",
    "__version__",
    "apply",
    "compress",
    "load",
    "save",
    "step",
]


def test_root_names_are_frozen():
    assert sorted(whet.__all__) == NAMES
    assert len(NAMES) <= 15


def test_no_module_takes_the_place_of_a_root_name():
    modules = {info.name for info in pkgutil.iter_modules(whet.__path__)}
    assert not modules & set(whet.__all__)
    importlib.import_module("whet.runner")
    for name in NAMES:
        assert getattr(whet, name) is not None
    assert whet.step("StaticInt8").name == "StaticInt8"


def test_unknown_root_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        _ = whet.compres


@pytest.mark.parametrize(
    "module", ["whet", "whet.targets.worker", "whet.targets.launcher", "whet.targets.onnxruntime"]
)
def test_import_stays_light(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
