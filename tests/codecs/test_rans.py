"""What coded bytes may claim."""

import pytest

from whet.codecs import rans
from whet.errors import Damaged


@pytest.mark.parametrize("size", [1, 7])
def test_so_many_values_may_stand_in_so_many_bytes(size):
    most = size << 16
    assert rans.fits(most, size)
    assert not rans.fits(most + 1, size)
    assert not rans.fits(0, size)
    assert rans.claimed(bytes(size), (most,), 1) == (most, bytes(size))
    for count, head in ((most + 1, 1), (0, 1), (1, size + 1)):
        with pytest.raises(Damaged, match="cannot stand in"):
            rans.claimed(bytes(size), (count,), head)
