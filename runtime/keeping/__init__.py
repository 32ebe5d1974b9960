"""What a run keeps on disk, and what it reads from there."""
import evo_vit  # noqa: F401  (before timm and torchvision)
