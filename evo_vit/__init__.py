"""Evo-LeViT models. Importing this package registers them with timm: timm.create_model("EvoLeViT_256")."""
from . import compat  # noqa: F401  (first: it makes torchvision, and so timm, importable on a CPU-only PyTorch)
from .evo_levit import EvoLeViT, TokenState

__all__ = ["EvoLeViT", "TokenState"]
