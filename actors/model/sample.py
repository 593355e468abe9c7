"""Text from a whole model: one token after another, drawn from what the model predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.errors import ConfigError
from actors.model.decoder import DecoderStage


@torch.no_grad()
def generate(
    model: DecoderStage,
    prompt_T: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eos: int | None,
) -> Tensor:
    """Return the prompt followed by up to `max_new_tokens` tokens, [T] on the CPU; it ends early after `eos`.

    Temperature 0 takes the likeliest token each time; `top_k` 0 and `top_p` 1 leave every token possible. The
    model must hold all layers. Each token runs the last `max_positions` tokens anew: there is no cache of keys
    and values, for this is a look at a model in training and not a server. Raises ConfigError on a bad setting.
    """
    assert model.is_first
    assert model.is_last
    if prompt_T.numel() == 0:
        raise ConfigError("the prompt holds no token", "give a prompt of one token or more")
    if max_new_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"cannot sample with max_new_tokens={max_new_tokens}, temperature={temperature}, "
            f"top_k={top_k}, top_p={top_p}",
            "set the first three to 0 or more, and top_p above 0, up to 1",
        )
    device = next(model.parameters()).device
    # Drawn on the CPU, so that a seed gives the same text on every kind of device.
    generator = torch.Generator().manual_seed(seed)
    tokens_T = prompt_T.cpu()
    for _ in range(max_new_tokens):
        window_BT = tokens_T[None, -model.spec.max_positions :].to(device)
        logits_V = model(window_BT)[0, -1].float().cpu()
        token = next_token(logits_V, temperature, top_k, top_p, generator)
        tokens_T = torch.cat((tokens_T, tokens_T.new_tensor([token])))
        if token == eos:
            break
    return tokens_T


def next_token(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Return a token drawn from the `top_k` likeliest and, of these, the fewest that hold `top_p` of the mass.

    Top-k: Fan et al., arXiv 1805.04833. Top-p (nucleus): Holtzman et al., arXiv 1904.09751.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    num_kept = min(top_k, logits_V.numel()) if top_k else logits_V.numel()
    sorted_logits, sorted_tokens = (logits_V / temperature).topk(num_kept)
    shares = sorted_logits.softmax(dim=-1)
    # A token stays while those before it hold less than top_p, so the likeliest always stays.
    shares[shares.cumsum(dim=-1) - shares >= top_p] = 0.0
    return int(sorted_tokens[torch.multinomial(shares, 1, generator=generator)])
