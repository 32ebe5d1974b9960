"""Picture files, read safely, and what is shown to people."""
import evo_vit  # noqa: F401  (before timm and torchvision)
