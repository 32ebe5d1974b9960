"""Files of timm 0.4.12 that assume a CUDA device, written anew: imports here, and drop-in replacements over timm's."""
