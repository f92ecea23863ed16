"""A device that is not there: tensors that say they are somewhere else and hold their values on the host, and a count
of what would cross between the two.

A copy to it counts as sent, a copy from it as a wait, and so does whatever makes the host read a value of it: `item`,
`nonzero`, an index of bools. Torch's own operators run; what they do to data is theirs.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device("meta")  # a kind that needs no driver, and that torch leaves alone

#: Whose result has a size, or is a number, that only the device knows.
_READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
}
_INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class There(torch.Tensor):
    """A tensor on the device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the device outside of `Counter`")


class Counter(TorchDispatchMode):
    """Runs torch's operators on tensors of both places, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = (args, kwargs)
        from_there = tree_any(lambda x: isinstance(x, There), given)
        to = kwargs.get("device")
        there = from_there if to is None else torch.device(to).type == DEVICE.type
        if func is aten.copy_.default:
            there = isinstance(args[0], There)
            crosses = there != isinstance(args[1], There)
        elif func is aten._to_copy.default:
            crosses = there != from_there
        else:
            crosses = False
            hosts = [x for x in _tensors(given) if not isinstance(x, There) and x.dim()]
            if from_there and func in _INDEXES:  # torch sends an index by itself
                self.sent += [str(func)] * len(hosts)
            elif func.namespace != "pagedcore":  # ours look for themselves; a cache may stay on the host
                assert not (from_there and hosts), f"{func} takes tensors of both places"
        if crosses:
            (self.sent if there else self.waits).append(str(func))
        if from_there and (func in _READS or (func in _INDEXES and any(_is_mask(x) for x in args[1] or ()))):
            self.waits.append(str(func))
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        args, kwargs = tree_map_only(There, lambda x: x.here, (args, kwargs))
        if func is aten.histc.default:
            args = (args[0].float(), *args[1:])  # which the CPU does not count integers by
        out = func(*args, **kwargs)
        if not there:
            return out
        if func._schema.name.endswith("_"):
            return given[0][0]  # in place
        return tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out)


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, tree)
    return found


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def move(module: torch.nn.Module) -> None:
    """Puts what a module holds on the device, in place."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            for name, tensor in list(held.items()):
                if isinstance(tensor, torch.Tensor):
                    held[name] = put(tensor.detach())


def put(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device, which is not counted."""
    return There(tensor.clone())
