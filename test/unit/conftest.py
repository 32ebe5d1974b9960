import signal

import commands

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run, so that what fails is the fault of the change, however slow or large the examples are.
settings.register_profile("recipe", deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("recipe")

# A shell starts its background jobs so that they, and what they start, ignore it; tests stop runs by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread():
    """The same thread count in every test, whatever ran before; as many tests run at a time as there are cores."""
    torch.set_num_threads(1)


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
