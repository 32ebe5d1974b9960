"""The models' operators: whichever way they take, they give what their plain definitions give."""
import pytest
import torch

from evo_vit import ops
from evo_vit.compat import TORCH


@pytest.mark.skipif(TORCH < (2, 1), reason="this PyTorch has no fused attention")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_the_class_row_beside_the_fused_attention_is_exact(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (t.transpose(1, 2) for t in torch.randn(3, 2, 17, 4, 16).to(dtype))  # (B, heads, T, width)
    assert ops._is_fused(q, v)
    _, class_attn = ops.attention(4 * q, k, v, 0.25, 15)
    exact = (q.double() @ k.double().transpose(-2, -1)).softmax(-1)[:, :, 0, 1:16]
    assert class_attn.shape == exact.shape and (class_attn.double() / exact - 1).abs().max() < tolerance
