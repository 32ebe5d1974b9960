"""What is trained, and by what: models, optimiser, clipping, average, teacher."""
import evo_vit  # noqa: F401  (before timm and torchvision)
