"""The teacher's file, as timm 0.4.12 wrote it, gives the same teacher under the installed timm."""
import torch
from reference import draw, images, load_json, relative_error

from runtime.keeping.checkpoint import load_checkpoint
from runtime.learning.teacher import build_teacher
from runtime.machine.machine import Machine


def test_a_teacher_saved_by_timm_0_4_12_gives_equal_outputs(tmp_path):
    facts = load_json("regnety_160_timm_0.4.12")
    state = {name: torch.zeros(shape, dtype=torch.int64) if name.endswith("num_batches_tracked")
             else torch.as_tensor(draw(name, tuple(shape))).float() for name, shape in facts["state_dict"]}
    torch.save({"model": state}, str(tmp_path / "regnety_160.pth"))
    checkpoint = load_checkpoint(str(tmp_path / "regnety_160.pth"), "--teacher-path")
    teacher = build_teacher("regnety_160", checkpoint, list("0123456789"), Machine(torch.device("cpu")), 64)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        logits = teacher(images(64).float())
    assert relative_error(logits, facts["logits"]) < 1e-5
