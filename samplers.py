"""Which images a process sees when: samplers, and the feed of an epoch's updates."""
from itertools import islice
from typing import Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from fix_timm.mixup import Mixup
from runtime.errors import UserError
from runtime.keeping.state import Done
from runtime.keeping.teacher_labels import TeacherLabels
from runtime.machine.images import Images
from runtime.machine.machine import Machine
from runtime.machine.randomness import derive_seed, seed_everything
from runtime.pictures.batches import loaded

_PIECE = 65536  # indices that are Python's numbers at a time


class RASampler(Sampler):
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335), as DeiT samples it: each image comes `repeats` times
    in a row before the list is dealt out to the processes, so that its copies, augmented differently, meet in one
    global batch. An epoch is as long as without repetition, rounded down to a multiple of 256 images, which a data
    set smaller than that is not."""

    def __init__(self, dataset, num_replicas=1, rank=0, shuffle=True, repeats=3):
        self.length = len(dataset)
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.repeats = repeats
        self.epoch = 0
        rounded = self.length // 256 * 256 if self.length >= 256 else self.length
        self.num_selected = rounded // num_replicas

    def __len__(self):
        return self.num_selected

    def __iter__(self):
        return _dealt(_order(self.length, self.epoch if self.shuffle else None), self.num_selected, self.num_replicas,
                      self.rank, self.repeats)

    def set_epoch(self, epoch):
        self.epoch = epoch


class OnceSampler(torch.utils.data.DistributedSampler):
    """PyTorch's DistributedSampler, index for index, that keeps the order of 14 million images in 54 MiB where lists of
    Python's numbers take ten times as much."""

    def __iter__(self):
        seed = getattr(self, "seed", 0) + self.epoch  # PyTorch 1.5 has no seed beside the epoch
        return _dealt(_order(len(self.dataset), seed if self.shuffle else None), self.num_samples, self.num_replicas,
                      self.rank, 1)


def _order(length, seed):
    """A permutation of so many indices, drawn from `seed`, or none where that is None."""
    if seed is None:
        return np.arange(length)
    generator = torch.Generator()
    generator.manual_seed(seed)
    order = torch.randperm(length, generator=generator).numpy()
    return order.astype(np.int32) if length < 2 ** 31 else order


def _dealt(order, count, replicas, rank, repeats):
    """Yields the `count` indices of process `rank`, of the list that repeats each of `order`, dealt out to all."""
    for start in range(0, count, _PIECE):
        # place p of the list with repetitions holds image order[p // repeats]; behind its end it begins again
        places = np.arange(start, min(start + _PIECE, count), dtype=np.int64) * replicas + rank
        yield from order[places % (len(order) * repeats) // repeats].tolist()


class TrainingBatchSampler(Sampler):
    """The training batches of one process that stands for as many as there are `samplers`: each of them is asked for a
    batch in turn, so len(samplers) successive batches, an update's, hold what as many processes would have had.

    Items are (index, seed): how an image is augmented depends on `seed` (the run's), the epoch, and the image's place
    in the epoch alone, so an epoch can be entered in its middle (`set_epoch`).
    """

    def __init__(self, samplers, batch_size, seed=0, replicas=1, first_replica=0):
        self.samplers = samplers
        self.batch_size = batch_size
        self.seed = seed
        self.replicas = replicas
        self.first_replica = first_replica
        self.updates = min(len(sampler) for sampler in samplers) // batch_size
        self.epoch = self.done = 0

    def __len__(self):
        return (self.updates - self.done) * len(self.samplers)

    def __iter__(self):
        iterators = [iter(sampler) for sampler in self.samplers]
        for iterator in iterators:  # what is done already
            for _ in islice(iterator, self.done * self.batch_size):
                pass
        for update in range(self.done, self.updates):
            for number, iterator in enumerate(iterators):
                batch = []
                for i, index in enumerate(islice(iterator, self.batch_size)):
                    place = (update * self.batch_size + i) * self.replicas + self.first_replica + number
                    batch.append((index, derive_seed(self.seed, self.epoch, place)))
                yield batch

    def set_epoch(self, epoch, done=0):
        """The next iteration is `epoch`, from its update `done` on."""
        self.epoch, self.done = epoch, done
        for sampler in self.samplers:
            sampler.set_epoch(epoch)


def build_train_sampler(
    dataset,
    batch_size: int,
    rank: int,
    world_size: int,
    accum_steps: int = 1,
    repeated_aug: bool = True,
     seed: int = 0) -> TrainingBatchSampler:
    """The training batches of process `rank`; raises UserError where the data set is too small for one update."""
    kind = RASampler if repeated_aug else OnceSampler
    replicas = world_size * accum_steps
    first = rank * accum_steps
    sampler = TrainingBatchSampler(
        [kind(dataset, num_replicas=replicas, rank=first + i, shuffle=True) for i in range(accum_steps)],
        batch_size, seed, replicas, first)
    if not sampler.updates:
        raise UserError("{} training images do not fill one global batch of {} x {}; lower --batch-size or "
            "--accum-steps".format(len(dataset), batch_size, replicas))
    return sampler


class ShardSampler(Sampler):
    """Every `world_size`-th index from `rank` on: over all processes each image exactly once, none repeated."""

    def __init__(self, dataset, rank, world_size):
        self.indices = range(rank, len(dataset), world_size)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


# ----------------------------------------------------------------------------------------------------- the feed

class Batch(NamedTuple):
    """A micro-batch on the host."""
    pixels: Images
    labels: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64, in the data set
    damaged: list  # (index, path, class, reason) of each file in whose place another one came
    seed: int  # from which it is mixed and the model draws
    taught: Optional[torch.Tensor]  # what the teacher said, where that is stored


class Feed:
    """An epoch's updates, each a list of the micro-batches of which it is made, in the order of `loader`.

    loader: batches of pictures.batches.collate, of the TrainingView of a data set. sampler: the TrainingBatchSampler in
    it.
    mixup: Mixup or None. labels: stored teacher labels, whose crops then are drawn.
    """

    def __init__(self, loader: DataLoader, sampler: TrainingBatchSampler, mixup: Optional[Mixup] = None,
                 labels: Optional[TeacherLabels] = None):
        self.loader = loader
        self.sampler = sampler
        self.mixup = mixup
        self.labels = labels

    @property
    def accum_steps(self) -> int:
        """Micro-batches of an update."""
        return len(self.sampler.samplers)

    @property
    def updates_in_epoch(self) -> int:
        return self.sampler.updates

    def updates(self, epoch: int, done: Done = Done()) -> Iterator[Tuple[int, List[Batch]]]:
        """Yields (number of the update in the epoch, its micro-batches), without those that are done."""
        crops = epoch if self.labels is None else self.labels.crop_epoch(epoch)
        self.sampler.set_epoch(crops, done.updates)
        batches = []
        for number, (pixels, labels, indices, damaged) in enumerate(loaded(self.loader)):
            update, step = done.updates + number // self.accum_steps, number % self.accum_steps
            replica = self.sampler.first_replica + step
            taught = None if self.labels is None else self.labels.batch(crops, replica, update)
            batches.append(Batch(pixels, labels, indices, damaged, derive_seed(self.sampler.seed, crops, update,
                replica), taught))
            if len(batches) == self.accum_steps:
                yield update, batches
                batches = []

    def on(self, machine: Machine, batch: Batch):
        """(images (B, 3, H, W), targets, what the teacher said or None) of a micro-batch on the machine's device,
        mixed. From here on random numbers come from the batch's seed: call it just before the forward pass that they
        are for."""
        images, targets = machine.images(batch.pixels), batch.labels.to(machine.device, non_blocking=True)
        seed_everything(batch.seed)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        taught = None if batch.taught is None else batch.taught.to(machine.device, non_blocking=True)
        return images, targets, taught

    def names(self, batches: List[Batch]) -> List[str]:
        """The files of an update's pictures."""
        return [self.loader.dataset.name(index) for batch in batches for index in batch.indices.tolist()]
