import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import evo_vit  # noqa: E402,F401  (first: it makes torchvision importable on a CPU-only PyTorch)
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def two_threads():
    """The same thread count in every test, whatever ran before."""
    torch.set_num_threads(2)
