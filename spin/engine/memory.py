"""Memory of a training step by what it is for, counted without a GPU: for spin/plan.py."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spin.engine.distributed import DTensor, local

KINDS = ("parameters", "gradients", "optimizer", "gathered parameters", "activations", "other")


class Memory(TorchDispatchMode):
    """Tracks the size of every storage that operators return, from its allocation to its release."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (number of a storage, its bytes from now on)
        self.kinds: list[str | None] = []  # by number
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # by id: number, storage

    def __enter__(self):
        self._mode, self._resize = active_fake_mode(), torch.UntypedStorage.resize_

        def resize_(storage, size):  # not an operator; FSDP alone calls it, to gather and free parameters
            result = self._resize(storage, size)
            self._see(storage, "gathered parameters")
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls the operator again with this rank's tensors
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is self._mode:  # another one is DTensor's shape propagation
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._see(tensor.untyped_storage())
        return result

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of tensors, sharded or not, for their whole life."""
        for tensor in tensors:
            self._see(local(tensor).untyped_storage(), kind)

    def name_rest(self, kind: str) -> None:
        """Set the kind of all storages that are alive and have none."""
        for number, _ in self._live.values():
            self.kinds[number] = self.kinds[number] or kind

    def peak(self) -> dict[str, int]:
        """Bytes by kind when their sum was largest."""
        sizes: dict[int, int] = {}
        now = dict.fromkeys(KINDS, 0)
        best, most = dict(now), 0
        for number, size in self.events:
            now[self.kinds[number] or "other"] += size - sizes.get(number, 0)
            sizes[number] = size
            if (total := sum(now.values())) > most:
                best, most = dict(now), total
        return best

    def _see(self, storage, kind: str | None = None) -> None:
        key = id(storage)
        if key not in self._live:
            reference = weakref.ref(storage, lambda _: self.events.append((self._live.pop(key)[0], 0)))
            self._live[key] = (len(self.kinds), reference)
            self.kinds.append(None)
        number, _ = self._live[key]
        self.events.append((number, storage.nbytes()))
        if kind and self.kinds[number] in (None, "activations"):
            self.kinds[number] = kind
