"""Ascend's fused optimiser, as apex names it."""
from torch_npu import optim


class NpuFusedAdamW(optim.NpuFusedAdamW):
    is_npu_fused_optimizer = True
