"""The decoder that is trained: consecutive Llama blocks, with the embedding and the head where they belong.

Llama (Touvron et al., arXiv 2302.13971) with grouped-query attention (Ainslie et al., arXiv 2305.13245).
Parameter names and the rotary convention are Hugging Face's, so weights interchange without permutation.
Shapes: B batch, T sequence, D hidden, H query heads, J key-value heads, K head size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from actors.model.put_off import Linear, PutOff
from actors.model.spec import ModelSpec

# A target that counts neither in the loss nor in the number of targets.
IGNORED_TARGET = -100


class DecoderStage(nn.Module):
    """Layers [layer_start, layer_stop); the first stage adds the embedding, the last the norm and the head.

    Parameters start uninitialised: `actors.model.init.initialise` or `actors.model.huggingface.load_weights`
    fills them. On the "meta" device a stage has names and shapes but no memory. There is no dropout.
    """

    rope_frequencies: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layer_start: int,
        layer_stop: int,
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        assert 0 <= layer_start < layer_stop <= spec.num_layers
        self.spec = spec
        self.layer_start = layer_start
        self.layer_stop = layer_stop
        self.activation_checkpointing = activation_checkpointing
        # By way of the meta device, so that neither time nor random numbers go into values that are replaced.
        # Registered in the model's own order, which named_global_parameters promises.
        with torch.device("meta"):
            if self.is_first:
                self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
            self.layers = nn.ModuleDict({str(layer): Block(spec) for layer in range(layer_start, layer_stop)})
            if self.is_last:
                self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
                self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.to_empty(device=device)
        self.register_buffer("rope_frequencies", rope_frequencies(spec).to(device), persistent=False)

    @property
    def is_first(self) -> bool:
        return self.layer_start == 0

    @property
    def is_last(self) -> bool:
        return self.layer_stop == self.spec.num_layers

    def forward(self, hidden_or_tokens: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Return hidden_BTD, or logits_BTV on the last stage.

        `hidden_or_tokens` is tokens_BT (integers) on the first stage and hidden_BTD on the others.
        `documents_BT` numbers the document of each token, and attention then stays within a document; None is
        plain causal attention.
        """
        hidden_BTD = self.embed_tokens(hidden_or_tokens) if self.is_first else hidden_or_tokens
        rotation_TK = self._rotation(hidden_BTD.shape[1])
        mask_B1TT = None if documents_BT is None else document_mask(documents_BT, compute_dtype(hidden_BTD))
        for block in self.layers.values():
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden_BTD = checkpoint(
                    block, hidden_BTD, rotation_TK, mask_B1TT, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_BTD = block(hidden_BTD, rotation_TK, mask_B1TT)
        return self.lm_head(self.norm(hidden_BTD)) if self.is_last else hidden_BTD

    def put_off_weight_gradients(self) -> PutOff:
        """Let backwards put off the blocks' weight gradients, and return where they do; those of the ends are not."""
        put_off = PutOff()
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.put_off = put_off
        return put_off

    def named_global_parameters(self) -> dict[str, nn.Parameter]:
        """Return this stage's parameters by their name in the whole model, in the model's own order."""
        return {
            name if name.startswith("lm_head.") else f"model.{name}": parameter
            for name, parameter in self.named_parameters()
        }

    def _rotation(self, num_positions: int) -> Rotation:
        """Return the cosine and the signed sine of every position, each [T, K], in float32."""
        positions_T = torch.arange(num_positions, device=self.rope_frequencies.device)
        angles = positions_T[:, None] * self.rope_frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


Rotation = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One pre-norm block: attention and SwiGLU, each added to the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.self_attn = Attention(spec)
        self.mlp = SwiGLU(spec)
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)

    def forward(self, hidden_BTD: Tensor, rotation_TK: Rotation, mask_B1TT: Tensor | None) -> Tensor:
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), rotation_TK, mask_B1TT)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_size = spec.head_size
        self.queries_per_kv = spec.num_heads // spec.num_kv_heads
        kv_size = spec.num_kv_heads * spec.head_size
        self.q_proj = Linear(spec.hidden_size, spec.hidden_size)
        self.k_proj = Linear(spec.hidden_size, kv_size)
        self.v_proj = Linear(spec.hidden_size, kv_size)
        self.o_proj = Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, hidden_BTD: Tensor, rotation_TK: Rotation, mask_B1TT: Tensor | None) -> Tensor:
        q_BHTK = rotate(self._heads(self.q_proj(hidden_BTD)), rotation_TK)
        k_BJTK = rotate(self._heads(self.k_proj(hidden_BTD)), rotation_TK)
        v_BJTK = self._heads(self.v_proj(hidden_BTD))
        grouped = self.queries_per_kv > 1
        if grouped and mask_B1TT is not None:
            # CUDA's fused kernels take a mask or grouped heads, not both; the fallback needs T * T memory.
            k_BJTK = k_BJTK.repeat_interleave(self.queries_per_kv, dim=1)
            v_BJTK = v_BJTK.repeat_interleave(self.queries_per_kv, dim=1)
            grouped = False
        out_BHTK = functional.scaled_dot_product_attention(
            q_BHTK, k_BJTK, v_BJTK, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, enable_gqa=grouped
        )
        return self.o_proj(out_BHTK.transpose(1, 2).flatten(-2))

    def _heads(self, projected: Tensor) -> Tensor:
        """View [B, T, heads * K] as [B, heads, T, K], without a copy."""
        return projected.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Shazeer, arXiv 2002.05202."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, spec.ffn_size)
        self.up_proj = Linear(spec.hidden_size, spec.ffn_size)
        self.down_proj = Linear(spec.ffn_size, spec.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Return the rotary angle per position of each pair of a head's elements, [K / 2], float32.

    Su et al., arXiv 2104.09864; `spec.rope_scaling` slows the low ones as Llama 3.1 does, arXiv 2407.21783.
    """
    exponents = torch.arange(0, spec.head_size, 2, dtype=torch.float32) / spec.head_size
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    # Pairs that turn often over the original context are kept, those that turn seldom slowed, others blended.
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept_share = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return kept_share * frequencies + (1.0 - kept_share) * frequencies / scaling.factor


def rotate(x_BHTK: Tensor, rotation_TK: Rotation) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle; the sine comes signed by half."""
    cos_TK, signed_sin_TK = rotation_TK
    swapped_BHTK = x_BHTK.roll(x_BHTK.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BHTK * cos_TK, swapped_BHTK, signed_sin_TK).type_as(x_BHTK)


def document_mask(documents_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores, [B, 1, T, T]: 0 where a query (row) may see a key, else -inf.

    A query sees keys that are no later than it and of its document. Additive and in the dtype of the scores, for
    of a boolean mask attention makes, and keeps for the backward pass, an additive one in every layer.
    """
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    seen_BTT = same_BTT & torch.ones_like(same_BTT[0]).tril()
    return torch.zeros_like(seen_BTT, dtype=dtype).masked_fill_(~seen_BTT, -math.inf)[:, None]


def compute_dtype(hidden_BTD: Tensor) -> torch.dtype:
    """Return the dtype in which matrices multiply: autocast's where it is on, else the input's own."""
    device_type = hidden_BTD.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_BTD.dtype


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the sum of the cross-entropies in nats, a float32 scalar.

    Targets of IGNORED_TARGET are left out. A sum, not a mean: the step divides by all of its targets.
    """
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )
