"""From the flags to the loaders of training and validation images, and the index of the pictures."""
import os

from datasets import Augmentation, build_dataset, build_transform  # before torch: they need torchvision

# isort: split
import torch

from runtime.machine import processes, versions
from runtime.pictures.batches import EvaluationView, TrainingView, collate
from runtime.pictures.fast import HAS_DECODER
from runtime.pictures.folders import describe_left_out
from runtime.pictures.index import Index
from runtime.pictures.remote import is_url
from samplers import ShardSampler, build_train_sampler


def open_index(args, machine, agreement):
    """The Index of the run's pictures; the processes of a machine that read the same data have it in common."""
    task = "eval" if args.eval else "labels" if args.write_teacher_labels else "train"
    where = args.data_path or ""
    where = where if is_url(where) else os.path.abspath(where)
    together = agreement.among_equal("\n".join([processes.machine_name(), task, args.data_set, where]))
    return Index(args.index_cache or args.output_dir, together, machine.say, made=bool(args.index_cache))


def build_loader(dataset, args, machine, **kwargs):
    """A DataLoader with the recipe's workers."""
    workers = args.num_workers
    if workers is None:
        workers = min(10, (os.cpu_count() or 1) // machine.world.local_size)
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, pin_memory=args.pin_mem and machine.device.type != "cpu", collate_fn=collate,
        **dict(kwargs, **versions.persistent_workers(workers)))


def _name_left_out(dataset, say):
    if getattr(dataset, "left_out", None):
        say("Note: {} holds files that are left out: {}".format(dataset.root, describe_left_out(dataset.left_out)))


def build_train_loader(args, machine, index=None):
    """The training images' loader; its data set and sampler are its attributes dataset.dataset and batch_sampler."""
    augmentation = Augmentation(*(getattr(args, name) for name in Augmentation._fields))
    transform = build_transform(True, args.data_set, args.input_size, augmentation)
    dataset = build_dataset(True, args.data_set, args.data_path, transform, args.inat_category, args.jpeg_draft,
                            index, args.image_backend)
    fast = args.image_backend == "fast"
    if fast and not HAS_DECODER:
        machine.say("Note: --image-backend fast decodes JPEGs faster, to the same pixels, where simplejpeg is "
                    "installed; pip install simplejpeg")
    _name_left_out(dataset, machine.say)
    sampler = build_train_sampler(dataset, args.batch_size, machine.world.rank, machine.world.size, args.micro_batches,
                                  args.repeated_aug, args.seed)
    return build_loader(TrainingView(dataset, keep_generators=not fast), args, machine, batch_sampler=sampler)


def build_val_loader(args, machine, index=None, places_of=lambda classes: None):
    """(the validation images' loader, of each process's share of them with --dist-eval; whether they are shared out).
    places_of(names of the classes): the number that the model has for each, None for the same."""
    dataset = build_dataset(False, args.data_set, args.data_path, build_transform(False, args.data_set,
        args.input_size), args.inat_category, index=index)
    _name_left_out(dataset, machine.say)
    shared = args.dist_eval and machine.world.size > 1
    sampler = ShardSampler(dataset, machine.world.rank, machine.world.size) if shared else None
    view = EvaluationView(dataset, args.input_size, places_of(dataset.classes))
    return build_loader(view, args, machine, batch_size=args.batch_size, sampler=sampler), shared
