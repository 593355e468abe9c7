"""The shape of a decoder: what every stage, the planner and a checkpoint agree on.

PURE: no torch, no file. Sizes follow from the published Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling for contexts longer than it was first trained on."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_positions < 1:
            raise ConfigError(
                f"model.rope_scaling has factor={self.factor}, original_max_positions={self.original_max_positions}",
                "set model.rope_scaling.factor above 0 and model.rope_scaling.original_max_positions to 1 or more",
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"model.rope_scaling has low_freq_factor={self.low_freq_factor}, "
                f"high_freq_factor={self.high_freq_factor}",
                "set 0 < model.rope_scaling.low_freq_factor < model.rope_scaling.high_freq_factor",
            )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer: embedding, `num_layers` blocks, a norm and an untied head."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 4
    ffn_size: int = 704
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    init_std: float = 0.02
    # A Hugging Face folder whose weights training starts from; its own shape replaces the one above.
    init_from: str | None = None
    # Give a tied head its own copy of the embedding at import: a tied pair would span a thin link.
    untie: bool = False

    def __post_init__(self) -> None:
        counts = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "max_positions")
        for key in counts:
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key} is {getattr(self, key)}", f"set model.{key} to 1 or more")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ConfigError(
                f"model.rope_theta is {self.rope_theta} and model.norm_eps is {self.norm_eps}", "set both above 0"
            )
        if self.hidden_size % self.num_heads or self.head_size % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} does not split into {self.num_heads} heads of even size",
                "set model.hidden_size to a multiple of 2 * model.num_heads",
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
                "set model.num_kv_heads to a divisor of model.num_heads",
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def layer_params(self) -> int:
        """Parameters of one block: attention, SwiGLU and two norms."""
        kv_size = self.num_kv_heads * self.head_size
        attention = 2 * self.hidden_size * self.hidden_size + 2 * self.hidden_size * kv_size
        return attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size

    @property
    def embedding_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def head_params(self) -> int:
        """The head's matrix and the norm before it."""
        return self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_params(self) -> int:
        return self.embedding_params + self.num_layers * self.layer_params + self.head_params

    def stage_params(self, start: int, stop: int) -> int:
        """Parameters of layers [start, stop), with the embedding and the head where they belong."""
        ends = (self.embedding_params if start == 0 else 0) + (self.head_params if stop == self.num_layers else 0)
        return (stop - start) * self.layer_params + ends
