"""What a user may set of the data plane, and what is refused with its remedy."""

import pytest

from actors.errors import ConfigError
from actors.settings import WireConfig


def test_a_chunk_that_no_call_inlines_is_refused() -> None:
    WireConfig(max_chunk_bytes=4_000_000)
    with pytest.raises(ConfigError, match="does not fit in one call") as caught:
        WireConfig(max_chunk_bytes=4_000_001)
    assert caught.value.remedy == "set wire.max_chunk_bytes to 4000000 or less"
