import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import evo_vit  # noqa: E402,F401  (first: it makes torchvision importable on a CPU-only PyTorch)
import pytest  # noqa: E402
import torch  # noqa: E402

import commands  # noqa: E402


@pytest.fixture(autouse=True)
def two_threads():
    """The same thread count in every test, whatever ran before."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """Real pictures in ImageNet's layout: 26 digits of each class to train on, 6 to validate."""
    return commands.write_digits(tmp_path_factory.mktemp("digits"), classes=10, train=26, val=6)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, digit_folder):
    """A teacher's checkpoint, trained by main.py for an epoch."""
    out = tmp_path_factory.mktemp("teacher")
    commands.succeed("--model", "regnety_002", "--distillation-type", "none", "--epochs", 1, "--data-path",
                     digit_folder, "--output_dir", out)
    return str(out / "best_checkpoint.pth")


@pytest.fixture(scope="session")
def student(tmp_path_factory, digit_folder, teacher):
    """(output folder, what was printed) of a student that main.py distilled, an epoch in either mode, with the
    published augmentation."""
    out = tmp_path_factory.mktemp("student")
    printed = commands.succeed(
        "--model", "EvoLeViT_128S", "--teacher-model", "regnety_002", "--teacher-path", teacher, "--epochs", 2,
        "--stage-wise-epoch", 1, "--model-ema-decay", 0.9, "--data_path", digit_folder, "--output-dir", out)
    return str(out), printed
