"""Checkpoints: written whole or not at all, checked before use, and read without running code from them."""
import argparse
import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import SaveFailed, UserError
from ..learning.models import LAYER_WISE, NO_SELECTION, PLAIN, STAGE_WISE, scheduled_mode
from ..machine.processes import environment_rank
from .files import write_whole
from .unpickling import Unknown, load_safetensors, load_tensors

NEWEST, OLDER, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best_checkpoint.pth"
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")  # under which others keep their weights
EMA_KEYS = ("state_dict_ema", "ema_state_dict", "ema")
MODES = [mode + selection for mode in (STAGE_WISE, LAYER_WISE) for selection in ("", NO_SELECTION)] + [PLAIN]
# no hashes: a day (-20261126), a longer number (a time, a job), the end of a UUID
_HASH_SUFFIX = re.compile(r"(?<![0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4})-(?!\d{9,64}\.)"
                          r"(?!20\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\.)([0-9a-f]{8,64})\.\w+$")
# flags of the run that wrote a checkpoint which other commands may ask for, with the kind of their values
_SAVED_TYPES = {"model": str, "input_size": int, "data_set": str, "data_path": str, "inat_category": str,
                "prune_warmup_epoch": int, "stage_wise_epoch": int, "global_batch": int, "processes": int, "opt": str,
                "keep_ratio": (int, float)}
_DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "DIGITS")  # others name data sets that nothing here knows


class Checkpoint(NamedTuple):
    """What a file holds, where it lies, and the flag that named it: tensors and plain values, of this project or
    another."""
    content: dict
    path: str
    flag: str
    ignored: List[str] = []  # classes and functions that it names beside tensors and plain values; none was run

    def refuse(self, why: str):
        """Raises UserError: the flag, the file, and `why`."""
        raise UserError("{}: {} {}".format(self.flag, self.path, why))

    def name_ignored(self, say: Callable):
        """Says once what the file names beside tensors and plain values; nothing of it was run."""
        if self.ignored:
            say("Note: {} also holds {}{}, which are left out".format(
                self.path, ", ".join(self.ignored[:5]), " and others" if len(self.ignored) > 5 else ""))

    def weights(self, key: str = "model") -> Dict[str, torch.Tensor]:
        """The state dict under `key`, for "model" also where others keep it, or the content itself; without the
        prefixes that wrappers put before every name. Raises UserError where there is none."""
        if "program" in self.content:
            self.refuse("is an exported program, which can be evaluated and not trained on; take the checkpoint it was "
                "made from")
        state = self.content.get(key)
        if key == "model" and not isinstance(state, dict):
            found = [name for name in WEIGHT_KEYS if isinstance(self.content.get(name), dict)]
            if found:
                state = self.content[found[0]]
            elif state is None:
                state = {name: value for name, value in self.content.items() if isinstance(value, torch.Tensor)}
        if key == "model_ema" and state is None:
            state = next((self.content[name] for name in EMA_KEYS if isinstance(self.content.get(name), dict)), None)
        if isinstance(state, Unknown):
            self.refuse("holds {} under '{}' and not its weights; save model.state_dict() there".format(state.name,
                key))
        if not isinstance(state, dict) or not state or not all(
                isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
            self.refuse("holds no weights under '{}'".format(key))
        return without_prefixes(state)

    def settings(self) -> dict:
        """{flag: value} of the run that wrote the checkpoint, of those that another command may ask for, and "epoch",
        the last finished one. A missing one is left out. Raises UserError for a value of the wrong kind."""
        args = self.content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        saved = {name: args.get(name) for name in _SAVED_TYPES} if isinstance(args, dict) else {}
        saved["epoch"] = self.content.get("epoch")
        saved = {name: value for name, value in saved.items() if value is not None and not isinstance(value, Unknown)}
        if not self.recipe():  # others keep other kinds of values under these names
            saved = {name: value for name, value in ((name, _plain(value)) for name, value in saved.items())
                     if isinstance(value, _SAVED_TYPES.get(name, int))}
            if saved.get("data_set", "IMNET") not in _DATA_SETS:
                del saved["data_set"]
        for name, value in saved.items():
            if not isinstance(value, _SAVED_TYPES.get(name, int)):
                kind = _SAVED_TYPES.get(name, int)
                self.refuse("says {!r} for '{}', which is no {}; it is damaged or another kind of file".format(
                    value, name, getattr(kind, "__name__", "number")))
        return saved

    def recipe(self) -> dict:
        """{flag: value} of all flags of the run of this project that wrote the checkpoint; {} for a file of another
        origin, whose flags of the same names can mean something else."""
        args = self.content.get("args")
        ours = isinstance(args, dict) and "global_batch" in args and "log" in self.content
        return {name: value for name, value in args.items() if not isinstance(value, Unknown)} if ours else {}

    def mode(self) -> str:
        """The mode (models.scheduled_mode) in which its last epoch ran; published checkpoints, which do not say, run
        stage-wise."""
        mode = self.content.get("mode")
        if mode in MODES:
            return mode
        saved = self.settings()
        if saved.get("epoch") is None:
            return STAGE_WISE
        schedule = {key: saved[key] for key in ("prune_warmup_epoch", "stage_wise_epoch") if key in saved}
        return scheduled_mode(max(saved["epoch"], 0), **schedule)

    def classes(self) -> Optional[List[str]]:
        """The names of its classes, in the order of the classifier's outputs; None where it does not say."""
        classes = self.content.get("classes")
        if not isinstance(classes, (list, tuple)) or not classes or not all(isinstance(name, (str, int))
                for name in classes):
            return None
        return [str(name) for name in classes]

    def places_of(self, names: List[str]) -> List[int]:
        """For each of `names`, the data set's classes, the number that it has among the checkpoint's. Raises UserError,
        naming the first that it does not know, or that is the name of several."""
        own = self.classes()
        unknown = [name for name in names if name not in own]
        if unknown:
            number = names.index(unknown[0])
            self.refuse("was trained on other classes than the data set's: it does not know '{}' (class {} of {}; its "
                "own class {} is '{}'). Take the data it was trained on, or train a new classifier with --finetune".
                format(unknown[0], number, len(names), min(number, len(own) - 1), own[min(number, len(own) - 1)]))
        here, there = Counter(names), Counter(own)
        several = [name for name in names if here[name] > 1 or there[name] > 1]
        if several:
            self.refuse("has other classes than the data set, and '{}' is the name of several; give each class a name "
                        "of its own".format(several[0]))
        places = {name: place for place, name in enumerate(own)}
        return [places[name] for name in names]

    def statistics(self) -> Optional[Tuple[tuple, tuple]]:
        """(mean, deviation) by which its training images were normalised; None where it does not say."""
        if "amp_backend" in self.content or "args" in self.content and "log" in self.content:
            return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # all runs of this project
        mean, std = self.content.get("mean"), self.content.get("std")
        if isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) == 3:
            return tuple(map(float, mean)), tuple(map(float, std))
        return None


def _plain(value):
    """A size as one number, and a whole number as an int, however others wrote them down."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[-1], int):
        return value[-1]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str) and value.isdecimal() or isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def without_prefixes(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """`state` without what wrappers put before names, in any order: `module.` (DistributedDataParallel), `_orig_mod.`
    (the compiler), and a word such as `model.` that stands before most names; the others are then left out."""
    def bare(name):
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        while len(parts) > 1 and parts[0] == "module":
            parts = parts[1:]
        return ".".join(parts)

    state = {bare(name): value for name, value in state.items() if name != "n_averaged"}  # AveragedModel's count
    while True:
        wrapped = [word for word in _WRAPPERS if sum(name.startswith(word + ".") for name in state) > len(state) / 2]
        if not wrapped:
            return state
        start = wrapped[0] + "."  # what stands outside belongs to the program that wrote the file, not to the model
        state = {bare(name[len(start):]): value for name, value in state.items() if name.startswith(start)}


_WRAPPERS = {"model", "net", "network", "student", "backbone", "encoder", "ema", "_forward_module",
             "_fsdp_wrapped_module"}


# ----------------------------------------------------------------------------------------------------------- writing

# --- torch 1.5 writes its older file format unless told otherwise; the newer one carries checksums.
def save_checkpoint(content: dict, path: str):
    """Writes `content`, tensors and plain values, to `path`. Raises SaveFailed.

    It is put together in memory first: PyTorch's own writer, on a disk that fills up, can end the process.
    """
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=True)
    write_whole(path, lambda f: f.write(file.getbuffer()))


def save_newest(content: dict, folder: str):
    """Writes folder/checkpoint.pth; the one that was there becomes checkpoint.previous.pth."""
    newest, incoming = os.path.join(folder, NEWEST), os.path.join(folder, "checkpoint.next.pth")
    save_checkpoint(content, incoming)
    try:
        if os.path.exists(newest):
            os.replace(newest, os.path.join(folder, OLDER))
        os.replace(incoming, newest)
    except OSError as error:
        raise SaveFailed("{} could not be renamed ({})".format(incoming, error.strerror))


def export_weights(model: torch.nn.Module, path: str, metadata: dict):
    """Writes the weights as safetensors, each tensor once under its first name; `metadata` goes along as JSON."""
    from safetensors.numpy import save
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous().numpy()
    content = save(tensors, metadata={"evo_levit": json.dumps(metadata)})
    write_whole(path, lambda f: f.write(content))


# ----------------------------------------------------------------------------------------------------------- reading

def without_hash(stem: str) -> str:
    """NAME of a path NAME-HASH, which would be the hash of another file, once that ends in another way."""
    match = _HASH_SUFFIX.search(stem + ".pth")
    return stem[:match.start()] if match else stem


def file_hash(path: str) -> str:
    """The SHA-256 of the file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(2 ** 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path: str):
    """Compares a file named NAME-HASH.EXT with the start of its SHA-256; raises UserError where they differ."""
    match = _HASH_SUFFIX.search(os.path.basename(path))
    if not match:
        return
    digest = file_hash(path)
    if not digest.startswith(match.group(1)):
        raise UserError("{} is damaged or another file: its SHA-256 starts with {}, its name says {}; fetch it again"
                        .format(path, digest[:len(match.group(1))], match.group(1)))


# --- torch 1.5 has no torch.hub.get_dir().
def hub_dir() -> str:
    """Folder of what PyTorch's hub has downloaded ($TORCH_HOME/hub)."""
    if hasattr(torch.hub, "get_dir"):
        return torch.hub.get_dir()
    home = os.environ.get("TORCH_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch"))
    return os.path.join(os.path.expanduser(home), "hub")


def fetch(url: str, flag: str) -> str:
    """The path of the file at `url` in PyTorch's cache, downloaded if it is not there yet. Raises UserError.

    PyTorch keeps files by the last part of their address alone. Here this holds for a name with a hash in it, which is
    checked; another one gets the address's own hash in front, and a file that was kept before is told."""
    folder, name = os.path.join(hub_dir(), "checkpoints"), os.path.basename(url.split("?")[0]) or "weights"
    checked = _HASH_SUFFIX.search(name)
    if not checked:
        name = "{}-{}".format(hashlib.sha256(url.encode()).hexdigest()[:12], name)
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        if not checked and environment_rank() == 0:
            print("{}: {} was fetched before; delete {} to fetch it again".format(flag, url, path), flush=True)
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)
        except Exception as error:  # whatever the network and the disk can raise
            raise UserError("{}: {} cannot be fetched ({})".format(flag, url, str(error).split("\n")[0][:160]))
    return path


def local_file(path: str, flag: str) -> str:
    """The checked file that `path` names: itself, or what a URL gives. Raises UserError for a file that is missing or
    that fails its name's hash."""
    if re.match(r"https?://|file://", path):
        path = fetch(path, flag)
    if not os.path.isfile(path):
        hint = "; to go on with the run in a folder use --output_dir and --resume auto" if os.path.isdir(path) else ""
        raise UserError("{}: there is no file {}{}".format(flag, path, hint))
    check_hash(path)
    return path


def _one_line(error):
    """An error's text without line breaks and terminal colours, shortened at a word."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."


def is_torchscript(path: str) -> bool:
    """Whether `path` is a TorchScript program, which lies in a zip archive as checkpoints do, under any name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_checkpoint(path: str, flag: str) -> Checkpoint:
    """Reads a checkpoint on the CPU: a dict of tensors and plain values. `path` may be a URL, and a safetensors file.

    `flag` names the file's role in messages ("--resume", say). Raises UserError for a file that is missing,
    damaged, not a checkpoint, or that fails its name's hash.
    """
    path = local_file(path, flag)
    if path.endswith((".onnx", ".pt2")) or is_torchscript(path):
        raise UserError("{}: {} is an exported program, which main.py --eval alone takes; name the checkpoint that it "
                        "was made from".format(flag, path))
    try:
        if path.endswith(".safetensors"):
            content, unknown = load_safetensors(path), set()
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()  # checksums of every tensor, which torch.load does not look at
                if damaged:
                    raise ValueError("checksum of {} is wrong".format(damaged))
            content, unknown = load_tensors(path)
    except ImportError:
        raise UserError(
            "{}: {} is a safetensors file, and safetensors is not installed; pip install safetensors".format(flag,
            path))
    except Exception as error:  # a damaged file can raise anything
        raise UserError("{}: {} cannot be read as a checkpoint, it is damaged or another kind of file ({})"
                        .format(flag, path, _one_line(error)))
    if not isinstance(content, dict):
        kind = content.name if isinstance(content, Unknown) else type(content).__name__
        raise UserError("{}: {} holds a {}, not a checkpoint".format(flag, path, kind))
    return Checkpoint(content, path, flag, sorted(unknown))


def load_newest(folder: str, say) -> Optional[Checkpoint]:
    """The newest good checkpoint in `folder`, or None where there is none at all.

    A damaged newest one is named and the older taken. Raises UserError where both are damaged.
    """
    paths = [os.path.join(folder, name) for name in (NEWEST, OLDER)]
    paths = [path for path in paths if os.path.exists(path)]
    for number, path in enumerate(paths):
        try:
            return load_checkpoint(path, "--resume auto")
        except UserError as error:
            if number == len(paths) - 1:
                raise
            say("Warning: {}; going on from the older {}".format(error, paths[number + 1]))
    return None
