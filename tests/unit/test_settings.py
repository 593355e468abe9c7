"""What a user may set of the data plane, and what is refused with its remedy."""

import pytest

from actors.errors import ConfigError
from actors.settings import WireConfig


def test_a_chunk_that_no_call_inlines_is_refused() -> None:
    WireConfig(max_chunk_bytes=4_000_000)
    with pytest.raises(ConfigError, match="does not fit in one call") as caught:
        WireConfig(max_chunk_bytes=4_000_001)
    assert caught.value.remedy == "set wire.max_chunk_bytes to 4000000 or less"


def test_a_link_may_have_codecs_of_its_own() -> None:
    wire = WireConfig(forward="q8", backward="bf16", links={"1-2": "hq4/q8"})
    assert [wire.codecs_of(stage) for stage in range(3)] == [("q8", "bf16"), ("hq4", "q8"), ("q8", "bf16")]


@pytest.mark.parametrize(
    ("link", "codecs"),
    [
        ("1-3", "q8/q8"),
        ("2-1", "q8/q8"),
        ("00-01", "q8/q8"),
        ("first", "q8/q8"),
        ("0-1", "q8"),
        ("0-1", "q8/q8/q8"),
    ],
)
def test_what_names_no_link_is_refused_with_the_form(link: str, codecs: str) -> None:
    with pytest.raises(ConfigError, match=f"wire.links.{link}") as caught:
        WireConfig(links={link: codecs})
    assert "wire.links.0-1=hq4/q8" in caught.value.remedy


@pytest.mark.parametrize("fields", [{"canary_every": -1}, {"canary_min_cosine": 1.5}, {"canary_min_cosine": -0.1}])
def test_canaries_that_cannot_be_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="canary"):
        WireConfig(**fields)
