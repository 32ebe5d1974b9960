"""Checkpoint files: written whole or not at all, checked before use, and read without running code from them."""
import argparse
import hashlib
import io
import json
import os
import re
import shutil
import zipfile

import torch

from evo_vit import compat

from .errors import UserError

NEWEST, OLDER, BEST = "checkpoint.pth", "checkpoint.previous.pth", "best_checkpoint.pth"
_HASH_SUFFIX = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


class SaveFailed(Exception):
    """A file could not be written; those written before are as they were."""


# ----------------------------------------------------------------------------------------------------------- writing

def write_whole(path, write):
    """`write(file)` beside `path`, flushed to disk, then renamed there. Raises SaveFailed, with nothing left behind."""
    partial = path + ".partial"
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if os.path.exists(partial):
            os.remove(partial)
        folder, reason = os.path.dirname(os.path.abspath(path)), error.strerror or error
        if os.path.isdir(folder):
            reason = "{}; {:,} MiB left on its disk".format(reason, shutil.disk_usage(folder).free >> 20)
        raise SaveFailed("{} could not be written ({}); what was saved before it is whole".format(path, reason))


def save_checkpoint(checkpoint, path):
    """Writes `checkpoint`, tensors and plain values, to `path`. Raises SaveFailed.

    It is put together in memory first: PyTorch's own writer, on a disk that fills up, can end the process.
    """
    content = io.BytesIO()
    compat.save(checkpoint, content)
    write_whole(path, lambda f: f.write(content.getbuffer()))


def save_newest(checkpoint, folder):
    """Writes folder/checkpoint.pth; the one that was there becomes checkpoint.previous.pth."""
    newest, incoming = os.path.join(folder, NEWEST), os.path.join(folder, "checkpoint.next.pth")
    save_checkpoint(checkpoint, incoming)
    try:
        if os.path.exists(newest):
            os.replace(newest, os.path.join(folder, OLDER))
        os.replace(incoming, newest)
    except OSError as error:
        raise SaveFailed("{} could not be renamed ({})".format(incoming, error.strerror))


def export_weights(model, path, metadata):
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

def check_hash(path):
    """Compares a file named NAME-HASH.EXT with the start of its SHA-256; raises UserError where they differ."""
    match = _HASH_SUFFIX.search(os.path.basename(path))
    if not match:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(2 ** 20), b""):
            digest.update(block)
    if not digest.hexdigest().startswith(match.group(1)):
        raise UserError("{} is damaged or another file: its SHA-256 starts with {}, its name says {}; fetch it again"
                        .format(path, digest.hexdigest()[:len(match.group(1))], match.group(1)))


def fetch(url, what):
    """The path of the file at `url` in PyTorch's cache, downloaded if it is not there yet. Raises UserError."""
    folder = os.path.join(compat.hub_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(url.split("?")[0]) or "weights")
    if not os.path.isfile(path):
        try:
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)
        except Exception as error:  # whatever the network and the disk can raise
            raise UserError("{}: {} cannot be fetched ({})".format(what, url, str(error).split("\n")[0][:160]))
    return path


def _read_safetensors(path):
    tensors, metadata = compat.load_safetensors(path)
    return dict(json.loads(metadata.get("evo_levit", "{}")), model=tensors)


def load_checkpoint(path, what):
    """Reads a checkpoint on the CPU: a dict of tensors and plain values. `path` may be a URL, and a safetensors file.

    `what` names the file's role in messages ("--resume", say). Raises UserError for a file that is missing,
    damaged, not a checkpoint, or that fails its name's hash.
    """
    if re.match(r"https?://|file://", path):
        path = fetch(path, what)
    if not os.path.isfile(path):
        raise UserError("{}: there is no file {}".format(what, path))
    check_hash(path)
    try:
        if path.endswith(".safetensors"):
            checkpoint = _read_safetensors(path)
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()  # checksums of every tensor, which torch.load does not look at
                if damaged:
                    raise ValueError("checksum of {} is wrong".format(damaged))
            checkpoint = compat.load_tensors(path)
    except ImportError:
        raise UserError("{}: {} is a safetensors file, and safetensors is not installed; pip install safetensors".format(
            what, path))
    except Exception as error:  # a damaged file can raise anything
        raise UserError("{}: {} cannot be read as a checkpoint, it is damaged or another kind of file ({})"
                        .format(what, path, " ".join(str(error).split())[:160] or type(error).__name__))
    if not isinstance(checkpoint, dict):
        raise UserError("{}: {} holds a {}, not a checkpoint".format(what, path, type(checkpoint).__name__))
    return checkpoint


def load_newest(folder, say):
    """(checkpoint, path) of the newest good one in `folder`, or (None, None) where there is none at all.

    A damaged newest one is named and the older taken. Raises UserError where both are damaged.
    """
    paths = [os.path.join(folder, name) for name in (NEWEST, OLDER)]
    paths = [path for path in paths if os.path.exists(path)]
    for number, path in enumerate(paths):
        try:
            return load_checkpoint(path, "--resume auto"), path
        except UserError as error:
            if number == len(paths) - 1:
                raise
            say("Warning: {}; going on from the older {}".format(error, paths[number + 1]))
    return None, None


def model_state(checkpoint, path, what, key="model"):
    """The state dict inside `checkpoint`: under `key` or "state_dict", or the checkpoint itself; DDP's prefix goes."""
    state = checkpoint.get(key)
    if state is None and key == "model":
        state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError("{}: {} holds no weights under '{}'".format(what, path, key))
    return {name[7:] if name.startswith("module.") else name: value for name, value in state.items()}


_SAVED_TYPES = {"model": str, "input_size": int, "data_set": str, "data_path": str, "inat_category": str,
                "prune_warmup_epoch": int, "stage_wise_epoch": int, "global_batch": int, "processes": int}


def saved_settings(checkpoint, path, what):
    """{name: value} of the arguments a checkpoint was trained with that another run may ask for, and "epoch", the last
    finished one. A missing one is left out. Raises UserError for a value of the wrong kind."""
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    saved = {name: args.get(name) for name in _SAVED_TYPES} if isinstance(args, dict) else {}
    saved["epoch"] = checkpoint.get("epoch")
    saved = {name: value for name, value in saved.items() if value is not None}
    for name, value in saved.items():
        if not isinstance(value, _SAVED_TYPES.get(name, int)):
            raise UserError("{}: {} says {!r} for '{}', which is no {}; it is damaged or another kind of file".format(
                what, path, value, name, _SAVED_TYPES.get(name, int).__name__))
    return saved


def load_weights(model, state, name, path, what):
    """model.load_state_dict(state, strict=True), with what does not fit said in one sentence (UserError).

    A tensor that the model has under two names may stand under one of them in `state`.
    """
    own = model.state_dict()
    by_tensor = {}
    for key, value in own.items():
        by_tensor.setdefault((value.data_ptr(), value.shape), []).append(key)
    for keys in by_tensor.values():
        present = [key for key in keys if key in state]
        if present and own[keys[0]].numel():
            state = dict({key: state[present[0]] for key in keys}, **state)
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    if missing or unexpected:
        raise UserError("{}: {} is not a checkpoint of {} ({} of its tensors are missing, {} are unknown, {} for one)"
                        .format(what, path, name, len(missing), len(unexpected), (missing + unexpected)[0]))
    other = [key for key in own if own[key].shape != state[key].shape]
    classifier = [key for key in other if own[key].dim() and own[key].shape[1:] == state[key].shape[1:]
                  and re.search(r"head|classifier|fc\.", key)]
    if other and classifier == other:
        raise UserError("{}: {} was trained on {} classes but {} are needed here (the classes of the data set)"
                        .format(what, path, state[other[0]].shape[0], own[other[0]].shape[0]))
    if other:
        raise UserError("{}: {} does not fit {} at this size: {} is {} there and {} here".format(
            what, path, name, other[0], tuple(state[other[0]].shape), tuple(own[other[0]].shape)))
    model.load_state_dict(state)


def adapt_for_finetuning(state, model):
    """A copy of `state` that `model` can start from: heads of another class count are left out, position embeddings
    of another grid are resized (bicubic), as DeiT does. Returns it and the names of the tensors left out."""
    own, adapted, left_out = model.state_dict(), {}, []
    for key, value in state.items():
        if key not in own:
            left_out.append(key)
        elif value.shape == own[key].shape:
            adapted[key] = value
        elif key.split(".")[-1] == "poss" and value.shape[-1] == own[key].shape[-1]:
            adapted[key] = _resize_position_embedding(value, own[key].shape[1])
        else:
            left_out.append(key)
    return adapted, left_out


def _resize_position_embedding(poss, length):
    """(1, 1 + n * n, C) -> (1, length, C): the class token's stays, the grid is interpolated."""
    old, new = int((poss.shape[1] - 1) ** 0.5), int((length - 1) ** 0.5)
    grid = poss[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat((poss[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)), dim=1)
