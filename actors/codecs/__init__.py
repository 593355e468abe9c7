"""Codecs: how a boundary tensor becomes the bytes of a frame, and back.

One `Codec` protocol; `CODECS` holds them by name. Adding one takes its module and one line of the registry.
"""

from __future__ import annotations

from actors.codecs.bf16 import Bf16
from actors.codecs.blocks import HQ4, HQ4_STOCHASTIC, Q4, Q4_STOCHASTIC, Q8
from actors.codecs.lx import Lx
from actors.codecs.protocol import Codec
from actors.codecs.raw import Raw
from actors.codecs.tk2 import TK2, TK2_32, TK2_128, TK2_SIGN
from actors.errors import ConfigError
from actors.spec import TensorRole

_REGISTRY: tuple[Codec, ...] = (
    Raw(),
    Bf16(),
    Q8,
    HQ4,
    HQ4_STOCHASTIC,
    Q4,
    Q4_STOCHASTIC,
    TK2,
    TK2_32,
    TK2_128,
    TK2_SIGN,
    Lx(),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _REGISTRY}


def codec_for(name: str, role: TensorRole, key: str) -> Codec:
    """Return the named codec, or say which would do; `key` is the setting that named it."""
    suited = [codec.name for codec in _REGISTRY if role in codec.roles]
    if name not in suited:
        raise ConfigError(f"{key}={name} is no codec for an {role.value}", f"set {key} to one of {', '.join(suited)}")
    return CODECS[name]
