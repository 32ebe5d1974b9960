"""What the processes of a run tell one another between two updates."""
from typing import Callable, List, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..errors import UserError
from .processes import all_gather, all_reduce, broadcast, is_distributed


class Agreement:
    """Sums small counts over all processes, on the host: no device waits for it."""

    def __init__(self, timeout=None, ranks: Optional[Sequence[int]] = None):
        self._options = {} if timeout is None else {"timeout": timeout}
        self._group, self.rank, self._ranks = None, 0, [0]
        if is_distributed():
            self._ranks = list(range(dist.get_world_size()) if ranks is None else ranks)
            self._group = dist.new_group(self._ranks, backend="gloo", **self._options)
            self.rank = self._ranks.index(dist.get_rank()) if dist.get_rank() in self._ranks else -1

    def among_equal(self, text: str) -> "Agreement":
        """The Agreement of those processes that give the same `text`; all of them have to call this."""
        if self._group is None:
            return self
        texts, own = self.texts(text), None
        for one in sorted(set(texts)):  # every process takes part in making every group
            group = Agreement(self._options.get("timeout"), [r for r, t in zip(self._ranks, texts) if t == one])
            own = group if one == text else own
        return own

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self._group is None

    def total(self, *counts: int) -> List[int]:
        """The sums, as whole numbers."""
        if self._group is None:
            return list(counts)
        counts = torch.tensor(counts, dtype=torch.int64)
        all_reduce(counts, group=self._group)
        return counts.tolist()

    def gather(self, value: float) -> List[float]:
        """Every process's `value`, a float, in the order of their ranks."""
        if self._group is None:
            return [value]
        values = [torch.zeros(1, dtype=torch.float64) for _ in self._ranks]
        all_gather(values, torch.tensor([value], dtype=torch.float64), group=self._group)
        return [v.item() for v in values]

    def union(self, numbers) -> set:
        """The set of all processes' whole `numbers`."""
        if self._group is None:
            return set(numbers)
        longest = int(max(self.gather(len(numbers))))
        own = torch.tensor(list(numbers) + [-1] * (longest - len(numbers)), dtype=torch.int64)
        lists = [torch.zeros_like(own) for _ in self._ranks]
        all_gather(lists, own, group=self._group)
        return {number for numbers in lists for number in numbers.tolist()} - {-1}

    def texts(self, text: str) -> List[str]:
        """Every process's `text`, in the order of their ranks."""
        if self._group is None:
            return [text]
        own = text.encode("utf-8", "surrogateescape")
        longest = int(max(self.gather(len(own))))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[:len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        lengths = [int(length) for length in self.gather(len(own))]
        lists = [torch.zeros_like(padded) for _ in lengths]
        if longest:
            all_gather(lists, padded, group=self._group)
        return [bytes(values[:length].tolist()).decode("utf-8", "surrogateescape")
                      for values, length in zip(lists, lengths)]

    def all_done(self, function: Callable):
        """What function() gives on this process. Raises UserError on every process where it does so on one."""
        result, refusal = None, ""
        try:
            result = function()
        except UserError as error:
            refusal = str(error)
        refusals = self.texts(refusal)
        if any(refusals):
            first = next(rank for rank, text in enumerate(refusals) if text)
            everywhere = all(text == refusals[0] for text in refusals)
            raise UserError(refusals[first] if everywhere else "process {}: {}".format(first, refusals[first]))
        return result

    def from_process(self, source: int, content: Optional[bytes]) -> bytes:
        """The `content` of process `source`; the others give None."""
        if self._group is None:
            return content
        size = int(self.gather(0.0 if content is None else float(len(content)))[source])
        data = torch.zeros(size, dtype=torch.uint8)
        if self.rank == source:
            data = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        broadcast(data, self._ranks[source], group=self._group)
        return data.numpy().tobytes()
