"""Files that were written once are read for ever: the same names, values and outputs.

They are of version 2 of the format. None is ever written anew, whatever becomes of the writers;
what the format learns gets files of its own (golden/add.py).
"""

import json
import struct
from pathlib import Path

import pytest
import torch

from golden.add import add, said
from golden.networks import Conv, Normed, Row
from whet import artifact, container, packed
from whet.codecs.choice import CODECS
from whet.codecs.raw import DTYPES
from whet.container import DEFLATED, GUESSED, HEAD, SAME_BITS, Opened
from whet.graph.ledger import ledger
from whet.packed.stored import FORMS

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.whet"))
FRESH = {
    "floats": Conv,
    "cut": Conv,
    "runs": Conv,
    "counts": Conv,
    "forms": lambda: Row(6, 8),
    "entropy": lambda: Row(1, 40),
    "contexts": lambda: Row(1, 40),
    "hashed": lambda: Row(1, 40),
    "plain_weights": Normed,
}


def golden(name):
    """The bytes and what is to be read from them."""
    wanted = json.loads((FOLDER / f"{name}.json").read_text())
    return (FOLDER / f"{name}.whet").read_bytes(), wanted


@pytest.mark.parametrize("name", NAMES)
def test_names_and_values_of_all_tensors(name):
    data, wanted = golden(name)
    assert struct.unpack_from("<8sH", data) == (b"\x89WHET\r\n\x1a", 2)
    assert len(data) < 1000
    found = {key: said(tensor) for key, tensor in Opened(data).tensors()}
    assert list(found) == list(wanted["tensors"])
    assert found == wanted["tensors"]


@pytest.mark.parametrize("name", FRESH)
@torch.no_grad()
def test_outputs_without_the_class_and_with_it(name):
    data, wanted = golden(name)
    inputs, outputs = torch.tensor(wanted["inputs"]), torch.tensor(wanted["outputs"])
    for into in (None, FRESH[name]()):
        found = artifact.decode(data, into)(inputs)
        torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-6)
    assert float(outputs.abs().max()) > 0.01


@torch.no_grad()
def test_forms_and_edits_come_back():
    model = artifact.decode(golden("forms")[0], Row(6, 8))
    described = Opened(golden("forms")[0]).description["structure"]["forms"]
    assert len(described) == len(model) == 6
    for k, layer in enumerate(model):
        form = packed.form_of(layer)
        assert form.spec() == described[f"{k}.weight"]["spec"]
        assert torch.equal(form.dense(), layer.weight)
    cut = artifact.decode(golden("cut")[0], Conv())
    assert cut.conv.weight.shape == (2, 2, 3, 3)
    assert type(cut.norm) is torch.nn.Identity
    assert ledger(cut).grids


def test_every_codec_form_and_type_has_a_file():
    codecs, kinds, types = set(), set(), set()
    for name in NAMES:
        opened = Opened(golden(name)[0])
        codecs |= {entry.codec or "raw" for entry in opened.entries.values()}
        types |= {entry.dtype for entry in opened.entries.values()}
        if name in FRESH:
            model = artifact.decode(golden(name)[0], FRESH[name]())
            kinds |= {
                kind.__name__ for *_, form in packed.forms(model) for kind in packed.kinds(form)
            }
    assert codecs == set(CODECS)
    assert {HEAD.unpack_from(golden(name)[0])[2] for name in NAMES} == {DEFLATED, GUESSED}
    assert kinds == set(FORMS)
    assert types >= {*SAME_BITS, *DTYPES}


def test_a_file_that_is_there_stays(monkeypatch, tmp_path):
    monkeypatch.setattr("golden.add.FOLDER", tmp_path)
    add("new", container.encode({}, [("x", torch.ones(2), 32)]))
    assert json.loads((tmp_path / "new.json").read_text())["tensors"]["x"][:2] == [
        "torch.float32",
        [2],
    ]
    with pytest.raises(FileExistsError):
        add("new", container.encode({}, []))
