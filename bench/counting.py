"""Exact counts of what torch does: operations, bytes, host syncs, large copies. The same on any machine."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Operations that read a value back to the host and so wait for the device.
SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim"}
# Bookkeeping without a kernel on any device, besides views.
FREE = {
    "detach",
    "detach_",
    "lift_fresh",
    "alias",
    "set_",
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
}


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations below autograd while it is entered; views, detach and prim.* are left out.

    An operator of our own counts as one, or with `open_operators` as what its Python body does; a trace
    without arithmetic (FakeTensorMode, over which this works) would else hide all of that.
    ops: name -> calls. num_bytes: bytes of tensor inputs and outputs of the counted operations.
    num_syncs: reads back to the host, which give 0 in a trace. peak_bytes: most bytes of new storages alive
    at once. num_large: operations whose new output holds `large_numel` elements or more. collectives,
    filled_bytes: calls to torch.distributed by name, and bytes of the buffers that they fill.
    """

    def __init__(self, *, large_numel: int | None = None, open_operators: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.large_numel, self.open_operators = large_numel, open_operators
        self.ops: Counter[str] = Counter()
        self.num_bytes = self.num_syncs = self.num_large = 0
        self.peak_bytes = self._alive_bytes = 0
        self.collectives: Counter[str] = Counter()
        self.filled_bytes: Counter[str] = Counter()
        self._storages: set[int] = set()

    @property
    def num_ops(self) -> int:
        """All counted operations."""
        return sum(self.ops.values())

    @property
    def num_collectives(self) -> int:
        """All calls to torch.distributed."""
        return sum(self.collectives.values())

    @property
    def collective_bytes(self) -> int:
        """All bytes that they fill."""
        return sum(self.filled_bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = OPDEFS.get(func._schema.name) if self.open_operators else None
        if operator is not None:
            with self:
                return operator._init_fn(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            out = 0
        if func.namespace == "c10d":
            # Every collective names the buffers that it fills first.
            name = func.overloadpacket.__name__
            filled = [leaf for leaf in tree_iter(args[0]) if isinstance(leaf, torch.Tensor)]
            self.collectives[name] += 1
            self.filled_bytes[name] += sum(t.numel() * t.element_size() for t in filled)
        if not func.namespace.startswith("prim"):
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        outputs = [leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        held = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in held]
        self._track(new)
        self.num_syncs += name in SYNCS
        if func.is_view or name in FREE:
            return
        self.ops[name] += 1
        self.num_bytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        if self.large_numel is not None:
            self.num_large += any(tensor.numel() >= self.large_numel for tensor in new)

    def _track(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._storages:
                continue
            self._storages.add(key)
            self._alive_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._alive_bytes -= size
