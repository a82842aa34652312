"""Logits that `token_loss(in_place=True)` has overwritten with their gradient: who reads that memory again is refused.

Known by its storage, and the rows in it: through any view, `detach()` or `.data`. A copy (`+ 0`, `clone`), a NumPy
array or a kernel of someone else's that reads what has been overwritten is not seen. Whoever fills the memory anew
through a tensor that counts its versions makes it logits again.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .checks import refuse


class _Rows(NamedTuple):
    """Rows in a storage: counted in elements, of itemsize bytes."""

    itemsize: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def extent(self) -> tuple[int, int]:
        """The bytes from the first element to behind the last."""
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return self.offset * self.itemsize, (last + 1) * self.itemsize

    def bounds(self) -> Tensor:
        """(2, T): where each row begins and ends, in bytes, in order; as if the vocabulary had unit stride."""
        starts = torch.tensor([self.offset])
        for n, step in zip(self.shape[:-1], self.stride[:-1], strict=True):
            starts = (starts[:, None] + step * torch.arange(n)).flatten()
        width = 1 + (self.shape[-1] - 1) * self.stride[-1]
        return torch.stack([starts, starts + width]).sort().values * self.itemsize

    def meets(self, other: _Rows) -> bool:
        (a, b), (c, d) = self.extent(), other.extent()
        if b <= c or d <= a:
            return False
        (starts, ends), theirs = self.bounds(), other.bounds()
        # Of the rows that begin before one of theirs ends, the last must end before it begins.
        place = torch.searchsorted(starts, theirs[1]) - 1
        return bool(((place >= 0) & (ends[place.clamp(min=0)] > theirs[0])).any())


class _Overwritten(NamedTuple):
    storage: StorageWeakRef
    tensor: ReferenceType[Tensor]  # whose version its views share
    version: int
    rows: list[_Rows]


_found: dict[int, _Overwritten] = {}


def _rows_of(logits: Tensor) -> _Rows:
    return _Rows(logits.element_size(), int(logits.storage_offset()), tuple(logits.shape), logits.stride())


def _unseen(logits: Tensor) -> bool:
    # Inference tensors count no versions; a subclass may have no storage of its own.
    plain = type(logits) in (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or not plain or logits.is_inference() or not logits.numel()


def mark_overwritten(logits: Tensor) -> None:
    if _unseen(logits):
        return
    # Other threads may do so too.
    for key in [k for k, x in list(_found.items()) if x.storage.expired()]:
        _found.pop(key, None)
    storage, version = logits.untyped_storage(), logits._version
    known = _found.get(storage._cdata)
    # The write has moved the version by one. By more, and someone has filled the memory again.
    kept = known.rows if known is not None and known.version + 1 == version else []
    tensor = ref(logits if logits._base is None else logits._base)
    _found[storage._cdata] = _Overwritten(StorageWeakRef(storage), tensor, version, [*kept, _rows_of(logits)])


def refuse_overwritten(logits: Tensor) -> None:
    if not _found or _unseen(logits):
        return
    known = _found.get(logits.untyped_storage()._cdata)
    if known is None or known.storage.expired():
        return
    # Views and detach() share a counter; that of `.data` begins at 0.
    tensor = known.tensor()
    if max(logits._version, 0 if tensor is None else tensor._version) > known.version:
        return
    rows = _rows_of(logits)
    if any(rows.meets(x) for x in known.rows):
        refuse("logits", "logits that hold their gradient, after token_loss(in_place=True)", "logits")
