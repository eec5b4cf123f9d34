"""The text codec: each byte of a header is guessed from those before it; only surprise is written.

    p = 1 / (1 + exp(-sum_i w_i st(p_i)))      the guess of a bit, as in `contexts`

The contexts are the last 0, 1, 2, 3, 4 and 6 bytes, the word so far, and the byte that stood behind
the last place where the same 5 bytes stood. The text begins behind that of `words` and `SAMPLE`, so
that the first byte is guessed well. It takes 0.25 ms a byte in both directions, so it is for short
texts alone.

    2 bytes   length of the text, little-endian
    ...       the bits, by the coder of `contexts`

Source: Mahoney 2005, Adaptive Weighing of Context Models for Lossless Data Compression.
"""

from __future__ import annotations

import copy
from functools import cache

from whet.codecs.contexts import Coder, Guess, Reader, Writer, most_guesses
from whet.codecs.words import WORDS
from whet.errors import Damaged

MOST_TEXT = 1 << 13
ORDERS = (0, 1, 2, 3, 4, 6)
ALIKE, MOST_ALIKE = 5, 24  # bytes that find an earlier place, and those that count
WORD = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")
# what headers hold that `WORDS` lacks; it does not change either
SAMPLE = (
    b'{"tensors":[["0.weight//codes","int32",[40],3],["0.weight//scale","float32",[],32],["0.weigh'
    b't//mask","uint8",[20,1,5,5],1,"context",20],["0.bias//codes","int32",[20],3],["0.bias//scale'
    b'","float32",[],32],["2.weight//codes","int32",[300],4,"curve",100],["2.weight//scale","float'
    b'32",[],32],["2.weight//mask","uint8",[64,200],1,"curve",300],["2.bias","float32",[64],32,"pl'
    b'anes",250]],"rest":["raw",60],"structure":{"edits":[{"kind":"take","path":"0.weight","argume'
    b'nts":{"dim":0,"count":20}},{"kind":"take","path":"0.bias","arguments":{"dim":0,"count":20}},'
    b'{"kind":"take","path":"2.weight","arguments":{"dim":1,"count":64}}],"grids":{},"constants":{'
    b'},"forms":{"0.weight":{"spec":{"form":"Sparse","inner":{"form":"Affine","bits":3,"symmetric"'
    b':true,"axis":null,"inner":{"form":"Dense"}}},"shape":[20,1,5,5]},"0.bias":{"spec":{"form":"A'
    b'ffine","bits":3,"symmetric":true,"axis":null,"inner":{"form":"Dense"}},"shape":[20]},"2.weig'
    b'ht":{"spec":{"form":"Sparse","inner":{"form":"Affine"'
)


class Silent:
    """Neither writes nor reads: the model learns from a text that both sides have."""

    def code(self, p: int, bit: int) -> int:
        return bit


class Model:
    """What has been seen so far, and the guess of the next byte."""

    def __init__(self, coder: Coder) -> None:
        self.guess = Guess(coder)
        self.seen = bytearray()
        self.places: dict[bytes, int] = {}  # where ALIKE bytes last ended
        self.word = 0
        self.at, self.alike = 0, 0  # the place that is like the end, and how far back

    def byte(self, value: int) -> int:
        """Code a byte, or read it."""
        said = self.seen[self.at] if self.alike else -1
        tail = self.seen[-max(ORDERS) :]
        past = [int.from_bytes(tail[len(tail) - k :], "big") for k in ORDERS]
        node = 1  # the bits of the byte so far, behind a 1
        for k in range(7, -1, -1):
            contexts = [each << 8 | node for each in (*past, self.word)]
            follows = (said | 256) >> k + 1 == node
            contexts.append(self.alike << 1 | said >> k & 1 if follows else 0)
            node = node << 1 | self.guess.bit("text", tuple(contexts), value >> k & 1)
        self._remember(node & 255, said)
        return node & 255

    def _remember(self, byte: int, said: int) -> None:
        found = byte == said
        self.at, self.alike = self.at + found, min(self.alike + 1, MOST_ALIKE) if found else 0
        self.seen.append(byte)
        key = bytes(self.seen[-ALIKE:])
        if not self.alike and key in self.places:
            self.at, self.alike = self.places[key], ALIKE
        self.places[key] = len(self.seen)
        # the last bytes tell words apart as well as all do
        self.word = (self.word << 8 | byte) & (1 << 96) - 1 if byte in WORD else 0

    def behind(self, coder: Coder) -> Model:
        """A model that has learned the same, on another coder."""
        twin = copy.copy(self)
        twin.seen, twin.places = self.seen.copy(), self.places.copy()
        twin.guess = self.guess.on(coder)
        return twin


@cache
def learned() -> Model:
    """The model behind the text that both sides have."""
    model = Model(Silent())
    for byte in WORDS + SAMPLE:
        model.byte(byte)
    return model


def encode(text: bytes) -> bytes | None:
    """Write a text; None where it is too long."""
    if len(text) > MOST_TEXT:
        return None
    coder = Writer()
    model = learned().behind(coder)
    for byte in text:
        model.byte(byte)
    data = coder.finish()
    fits = coder.count <= most_guesses(data)
    return len(text).to_bytes(2, "little") + data if fits else None


def decode(data: bytes) -> bytes:
    """Read what `encode` wrote.

    Raises:
        Damaged: it is not what `encode` writes.
    """
    count = int.from_bytes(data[:2], "little")
    if len(data) < 2 or count > MOST_TEXT:
        raise _damaged(f"it claims {count} bytes of at most {MOST_TEXT}")
    coder = Reader(data[2:])
    model = learned().behind(coder)
    text = bytes(model.byte(0) for _ in range(count))
    if coder.at < len(coder.data) or coder.at > len(coder.data) + 4:
        raise _damaged("its bits do not end where its text does")
    return text


def _damaged(found: str) -> Damaged:
    return Damaged("decode a header", found, "The file is damaged; get it again from its source.")
