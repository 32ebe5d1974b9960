"""Evo-ViT models. Importing this package registers them with timm: timm.create_model("EvoLeViT_256"),
timm.create_model("evo_deit_small_patch16_224")."""
from . import compat  # noqa: F401  (first: it makes torchvision, and so timm, importable on a CPU-only PyTorch)
from .evo_deit import EvoDeiT
from .evo_levit import EvoLeViT
from .tokens import TokenState

__all__ = ["EvoDeiT", "EvoLeViT", "TokenState"]
