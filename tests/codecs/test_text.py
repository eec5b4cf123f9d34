"""The text codec: every text comes back, what headers say is cheap, damage is told."""

import hashlib
import json
import random

import pytest
import torch
from torch import nn

from whet import artifact
from whet.codecs import text
from whet.codecs.choice import smallest, thorough
from whet.container import HEAD, Opened
from whet.errors import Damaged

CHANCE, ENCODE = random.Random(0), text.encode


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"a",
        b"\0" * 300,
        b'{"tensors":[["0.weight","float32",[10,5],32]]}',
        bytes(range(256)) * 3,
        CHANCE.randbytes(2000),
        text.WORDS[1000:1200],
        b"abcdefghijklmnop" * 20 + b"!" + b"abcdefghijklmnop" * 3,
    ],
    ids=lambda said: str(said[:12]),
)
def test_every_text_comes_back(said: bytes):
    data = text.encode(said)
    assert data is not None
    assert text.decode(data) == said


def test_what_was_seen_is_cheap_and_what_was_not_costs_little_more_than_itself():
    def size(said: bytes) -> int:
        return len(text.encode(said) or b"")

    assert size(text.SAMPLE) < 12
    assert size(text.WORDS[500:1500]) < 40
    assert size(CHANCE.randbytes(2000)) < 2100


def test_the_model_learns_nothing_from_one_text_for_the_next():
    first = text.encode(b'"new words":[5,6,7]')
    text.encode(b'"new words":[5,6,7]' * 20)
    assert text.encode(b'"new words":[5,6,7]') == first


def test_bytes_are_those_of_every_machine():
    """A writer of the first version wrote these."""
    said = json.dumps({"tensors": [[f"layer{k}.weight", "float32", [k]] for k in range(40)]})
    data = text.encode(said.encode())
    assert data is not None
    assert hashlib.sha256(data).hexdigest()[:16] == "1e77dfed343b8e14"


def test_a_text_that_is_too_long_or_says_too_little_is_left_to_others():
    said = CHANCE.randbytes(text.MOST_TEXT)
    assert text.decode(text.encode(said) or b"") == said
    assert text.encode(said + b"a") is None
    assert text.encode(b"\0" * text.MOST_TEXT) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        (text.MOST_TEXT + 1).to_bytes(2, "little") + b"abcdefgh",
        b"\2\0" + b"x" * 40,
        (text.encode(CHANCE.randbytes(100)) or b"")[:50],
    ],
)
def test_what_was_not_written_so_is_refused(data: bytes):
    with pytest.raises(Damaged):
        text.decode(data)


def test_a_lying_length_is_bounded_by_its_bytes():
    with pytest.raises(Damaged, match=f"claims {text.MOST_TEXT + 1} bytes"):
        text.decode((text.MOST_TEXT + 1).to_bytes(2, "little") + b"x" * 9000)
    with pytest.raises(Damaged, match="guesses more bits"):
        text.decode(text.MOST_TEXT.to_bytes(2, "little") + b"\0")


def test_a_header_that_is_guessed_badly_is_deflated(monkeypatch: pytest.MonkeyPatch):
    model, example = nn.Linear(4, 2).eval(), (torch.ones(1, 4),)
    for more, coding in ((0, 1), (500, 0)):
        monkeypatch.setattr(text, "encode", lambda said, more=more: ENCODE(said) + b"x" * more)
        assert HEAD.unpack_from(artifact.encode(model, example, thorough))[2] == coding


def test_altered_bytes_give_another_text_or_are_refused():
    said = b'{"tensors":[["0.weight","float32",[10,5],32],["0.bias","float32",[10],32]]}' * 2
    data, refused = text.encode(said) or b"", 0
    for _ in range(40):
        bad = bytearray(data)
        bad[CHANCE.randrange(len(bad))] ^= 1 << CHANCE.randrange(8)
        try:
            assert text.decode(bytes(bad)) != said
        except Damaged:
            refused += 1
    assert refused > 5


def test_slow_codecs_write_headers_so_and_fast_ones_do_not():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    example = (torch.ones(1, 4),)
    small, fast = (artifact.encode(model, example, way) for way in (thorough, smallest))
    assert [HEAD.unpack_from(data)[2] for data in (small, fast)] == [1, 0]
    assert Opened(small).description == Opened(fast).description
    assert Opened(small).header_bytes < 0.75 * Opened(fast).header_bytes
    for into in (None, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))):
        assert torch.equal(artifact.decode(small, into)(*example), model(*example))
    wide = nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)])
    header = json.dumps(Opened(artifact.encode(wide, (torch.ones(1, 2),))).description).encode()
    assert len(header) > text.MOST_TEXT
    assert HEAD.unpack_from(artifact.encode(wide, (torch.ones(1, 2),), thorough))[2] == 0
