"""One checkpoint for all processes of a run, also where each machine has a disk of its own."""
import hashlib
import io
import os
import tempfile
from typing import Callable, Optional

import torch

from ..machine.agreement import Agreement
from .checkpoint import Checkpoint, file_hash
from .unpickling import load_tensors


def _fingerprint(checkpoint: Optional[Checkpoint]) -> str:
    """Where a checkpoint stands, and a hash of its weights; the same for equal ones on every machine."""
    if checkpoint is None:
        return "no checkpoint"
    content, digest = checkpoint.content, hashlib.sha256()
    if "program" in content:
        digest.update(file_hash(checkpoint.path).encode())
    else:
        for name, tensor in sorted(checkpoint.weights().items()):
            digest.update(name.encode() + tensor.detach().double().contiguous().numpy().tobytes())
    epoch, progress = content.get("epoch"), content.get("progress") or {}
    where = "the end of epoch {}".format(epoch) if not progress else "epoch {}, image {}".format(
        epoch + 1 if isinstance(epoch, int) else epoch, progress.get("images"))
    return "{} ({})".format(where, digest.hexdigest()[:12])


def same_for_all(load: Callable[[], Optional[Checkpoint]], agreement: Agreement, say: Callable) -> Optional[Checkpoint]:
    """What `load()` gives, the same on every process: where they differ, the first process's, or under torchrun
    --max-restarts that of the process which is the furthest; `say` names it.

    Raises UserError on every process where it does so on one of them.
    """
    checkpoint = agreement.all_done(load)
    if agreement.alone:
        return checkpoint
    found = agreement.texts(agreement.all_done(lambda: _fingerprint(checkpoint)))
    if all(one == found[0] for one in found):
        return checkpoint
    other = next(rank for rank, one in enumerate(found) if one != found[0])
    source = 0
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        # the job starts again by itself, with the machines that are left: what one of them knows is not lost
        places = agreement.gather(_progress(checkpoint))
        source = places.index(max(places))
    say("Note: the processes found different checkpoints: process 0 {}, process {} {}; all go on from process {}'s".
        format(found[0], other, found[other], source))
    return _from_process(source, checkpoint, agreement) if found[source] != "no checkpoint" else None


def _progress(checkpoint):
    """How far a checkpoint is, as a number: its finished epochs and, behind the point, what of the next one is done."""
    if checkpoint is None:
        return -1.0
    epoch, progress = checkpoint.content.get("epoch"), checkpoint.content.get("progress") or {}
    images = float(progress.get("images", 0))
    return (epoch if isinstance(epoch, int) else -1) + images / (images + 1e9)


def _from_process(source, checkpoint, agreement):
    content = None
    if agreement.rank == source:
        file = io.BytesIO()
        torch.save((checkpoint.content, checkpoint.path, checkpoint.flag), file, _use_new_zipfile_serialization=True)
        content = file.getvalue()
    content = agreement.from_process(source, content)
    if agreement.rank == source:
        return checkpoint
    with tempfile.NamedTemporaryFile() as f:
        f.write(content)
        f.flush()
        (content, path, flag), _ = load_tensors(f.name)
    return Checkpoint(content, path, flag)
