"""Checkpoint files: written whole or not at all, checked before use, and read without running code from them."""
import hashlib
import os
import re

import torch

from evo_vit.compat import load_tensors

from .errors import UserError

_HASH_SUFFIX = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


def save_checkpoint(checkpoint, path):
    """Writes `checkpoint` beside `path`, then renames it there, so that `path` is always a whole file."""
    partial = path + ".partial"
    with open(partial, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


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


def load_checkpoint(path, what):
    """Reads a checkpoint on the CPU: a dict of tensors and plain values.

    `what` names the file's role in messages ("--resume", say). Raises UserError for a file that is missing,
    damaged, not a checkpoint, or that fails its name's hash.
    """
    if not os.path.isfile(path):
        raise UserError("{}: there is no file {}".format(what, path))
    check_hash(path)
    try:
        checkpoint = load_tensors(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError("{}: {} cannot be read as a PyTorch checkpoint, it is damaged or another kind of file ({})"
                        .format(what, path, str(error).strip().split("\n")[0][:160] or type(error).__name__))
    if not isinstance(checkpoint, dict):
        raise UserError("{}: {} holds a {}, not a checkpoint".format(what, path, type(checkpoint).__name__))
    return checkpoint


def model_state(checkpoint, path, what, key="model"):
    """The state dict inside `checkpoint`: under `key` or "state_dict", or the checkpoint itself; DDP's prefix goes."""
    state = checkpoint.get(key)
    if state is None and key == "model":
        state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError("{}: {} holds no weights under '{}'".format(what, path, key))
    return {name[7:] if name.startswith("module.") else name: value for name, value in state.items()}


def load_weights(model, state, name, path, what):
    """model.load_state_dict(state, strict=True), with what does not fit said in one sentence (UserError)."""
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    if missing or unexpected:
        raise UserError("{}: {} is not a checkpoint of {} ({} of its tensors are missing, {} are unknown, {} for one)"
                        .format(what, path, name, len(missing), len(unexpected), (missing + unexpected)[0]))
    other = [key for key in own if own[key].shape != state[key].shape]
    classifier = [key for key in other if own[key].shape[1:] == state[key].shape[1:]]
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
