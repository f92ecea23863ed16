"""Products on the CPU: the weights of a model's linear layers packed once, in the order oneDNN reads them in.

`torch.nn.functional.linear` repacks the whole weight in every call. With the few tokens of a decode step that costs
more than the product. `pack_linears` keeps a packed copy beside each weight, so the weights of a packed model take
twice the memory. Measured with the shapes of a 135M Llama in float32 on two AVX-512 cores, ms per step (plain /
packed): 1 token 30 / 42, 2: 30 / 38, 4: 72 / 33, 8: 88 / 38, 32: 158 / 65, 64: 163 / 110, 128: 235 / 237, 512: 696 /
827. Hence the range of rows in which the packed copy is used.
"""

from __future__ import annotations

import torch

#: Rows (tokens) for which the packed weight is used; with fewer, or more, the plain product is as fast or faster.
PACKED_ROWS = range(3, 128)

#: What oneDNN lays the packed copy out for.
_PACK_FOR_ROWS = 64


class PackedLinear(torch.nn.Module):
    """A `torch.nn.Linear` with a second, packed copy of its weight. For inference on the CPU only."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
            linear.weight.detach(), _PACK_FOR_ROWS
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input [..., in_features]`` to ``[..., out_features]``."""
        if input.numel() // self.in_features in PACKED_ROWS:
            return torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
                input, self._packed, self.bias, "none", [], ""
            )
        return torch.nn.functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_pack(model: torch.nn.Module) -> bool:
    """True where this torch has oneDNN and the model's products are of a kind that it packs on this CPU."""
    weight = next((m.weight for m in model.modules() if type(m) is torch.nn.Linear), None)
    return (
        weight is not None
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _packs_bfloat16()))
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _packs_bfloat16() -> bool:
    """Asked of torch: oneDNN refuses to lay out bfloat16 weights on a processor without AVX-512."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def packed_bytes(model: torch.nn.Module) -> int:
    """Bytes that the packed copies of this model's linear layers take."""
    return sum(m.weight.nbytes for m in model.modules() if type(m) is torch.nn.Linear)


def pack_linears(model: torch.nn.Module) -> int:
    """Puts a `PackedLinear` in the place of every `torch.nn.Linear` of the model; returns how many."""
    packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:  # not a subclass: that one may compute something else
                setattr(module, name, PackedLinear(child))
                packed += 1
    return packed
