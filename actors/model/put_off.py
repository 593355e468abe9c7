"""Linear layers whose weight gradients may be made later than the gradients of their inputs.

A backward is then two halves (zero bubble, Qi et al., arXiv 2401.10241): the first makes what the stage before waits
for, the second is one matrix product for each layer, put off until there is time. The same products as autograd's,
added in the same order, so weights' gradients are the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Product(NamedTuple):
    """A weight's gradient of one microbatch, yet to be made: its layer's input and its output's gradient."""

    weight: nn.Parameter
    input_XI: Tensor
    grad_XO: Tensor

    def made(self) -> Tensor:
        """Return the gradient, [O, I], as autograd makes it."""
        return self.grad_XO.t().mm(self.input_XI).to(self.weight.dtype)


class PutOff:
    """What the layers of one stage put off while it is open."""

    def __init__(self) -> None:
        self._products: list[Product] | None = None
        # What autocast keeps for products that are not made apart: a weight's cast, for all microbatches of a step.
        self._casts: dict[nn.Parameter, Tensor] = {}

    def cast(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Return a weight in another dtype, without gradient: the same until `forget_casts`."""
        if weight not in self._casts:
            self._casts[weight] = weight.detach().to(dtype)
        return self._casts[weight]

    def forget_casts(self) -> None:
        """Cast anew from now on: weights are about to change."""
        self._casts.clear()

    @property
    def is_open(self) -> bool:
        return self._products is not None

    def open(self) -> None:
        """From now on weight gradients are put off."""
        self._products = []

    def close(self) -> list[Product]:
        """Return what was put off since it was opened."""
        products, self._products = self._products, None
        assert products is not None, "it was not open"
        return products

    def add(self, product: Product) -> None:
        assert self._products is not None, "it is not open"
        self._products.append(product)


class Linear(nn.Linear):
    """A linear layer without bias; `put_off`, where a stage sets it, takes its weight gradients while it is open."""

    put_off: PutOff | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.put_off is None or not torch.is_grad_enabled():
            return super().forward(input)
        return _Apart.apply(input, self.weight, self.put_off)  # pyright: ignore[reportReturnType]


class _Apart(torch.autograd.Function):
    """A matrix product whose two gradients are made apart."""

    @staticmethod
    def forward(ctx: Any, input_BTI: Tensor, weight_OI: nn.Parameter, put_off: PutOff) -> Tensor:
        device_type = input_BTI.device.type
        ctx.put_off, ctx.weight = put_off, weight_OI
        cast_OI = weight_OI
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            input_BTI, cast_OI = input_BTI.to(dtype), put_off.cast(weight_OI, dtype)
        ctx.save_for_backward(input_BTI, cast_OI)
        return functional.linear(input_BTI, cast_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_BTO,) = grads
        input_BTI, cast_OI = ctx.saved_tensors
        # Detached, else what is put off would keep the whole graph, and with it the stage's input and its gradient.
        input_BTI = input_BTI.detach()
        product = Product(ctx.weight, input_BTI.flatten(0, -2), grad_BTO.flatten(0, -2))
        grad_BTI = None
        if ctx.needs_input_grad[0]:
            grad_BTI = product.grad_XO.mm(cast_OI).unflatten(0, grad_BTO.shape[:-1])
        if ctx.put_off.is_open:
            ctx.put_off.add(product)
            return grad_BTI, None, None
        return grad_BTI, product.made(), None


def add_gradients(products: list[Product]) -> None:
    """Make the weight gradients that were put off and add each to what its weight has."""
    with torch.no_grad():
        for product in products:
            weight, grad_OI = product.weight, product.made()
            if weight.grad is None:
                weight.grad = grad_OI
            else:
                weight.grad += grad_OI
