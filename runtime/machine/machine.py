"""Where a run computes: one value that is the same for everything in it."""
from typing import List, NamedTuple

import torch

from ..printing import say
from .devices import synchronize
from .images import Images, normalize
from .precision import Precision
from .processes import World, sum_over_processes


class Machine(NamedTuple):
    """The device, this process's place among all, the number format, and the memory format of images and
    convolutions."""
    device: torch.device
    world: World = World()
    precision: Precision = Precision()
    channels_last: bool = False

    def say(self, text: str):
        """The first process prints `text`."""
        if self.world.is_main:
            say(text)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` on the device, in the memory format."""
        module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def images(self, pixels: Images) -> torch.Tensor:
        """A batch's bytes as normalised images (B, 3, H, W) on the device."""
        return normalize(pixels, self.device, self.channels_last)

    def sum(self, *numbers) -> List[float]:
        """Each number summed over all processes."""
        return sum_over_processes(numbers, self.device)

    def synchronize(self):
        """Waits for all work queued on the device."""
        synchronize(self.device)
