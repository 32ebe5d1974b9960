"""The models' operators: whichever way they take, they give what their plain definitions give."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evo_vit import ops, race
from evo_vit.compat import TORCH


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9), st.booleans(),
       st.booleans(), st.integers(0, 2 ** 16))
def test_a_linear_map_is_added_to_a_base(sizes, width_in, width_out, has_bias, transposed, seed):
    torch.manual_seed(seed)
    x, base = torch.randn(*sizes, width_in).double(), torch.randn(*sizes, width_out).double()
    if transposed:  # in memory
        x, base = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, base))
    weight, bias = torch.randn(width_out, width_in).double(), torch.randn(width_out).double() if has_bias else None
    values = [t.requires_grad_() for t in (x, weight, base, bias) if t is not None]
    before = base.detach().clone()
    results = ops.linear(x, weight, bias, base=base), base + nn.functional.linear(x, weight, bias)
    gradients = [torch.autograd.grad(result.square().sum(), values) for result in results]
    assert torch.equal(base, before) and results[0].shape == base.shape
    assert torch.allclose(*results, rtol=1e-12, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*gradients))


@pytest.mark.skipif(not race.HAS_BOTH, reason="this PyTorch has one way alone")
def test_a_convolution_is_added_to_a_base():
    torch.manual_seed(0)
    x, weight, bias, base = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 5)
    out = ops.linear(x, weight, bias, by_convolution=True, base=base)
    assert torch.allclose(out, base + nn.functional.linear(x, weight, bias), atol=1e-5)


@pytest.mark.skipif(TORCH < (1, 10), reason="this PyTorch has no autocast on a CPU")
def test_under_autocast_a_product_in_half_precision_is_added_to_a_base_in_single():
    torch.manual_seed(0)
    x, weight, bias, base = torch.randn(2, 3, 64), torch.randn(5, 64), torch.randn(5), 1 + torch.randn(2, 3, 5) / 4096
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16()
        out = ops.linear(half, weight, bias, base=base)
        product = nn.functional.linear(half, weight, bias)
    assert out.dtype is torch.float32 and product.dtype is torch.bfloat16 and torch.equal(out, base + product)


@pytest.mark.skipif(TORCH < (2, 1), reason="this PyTorch has no fused attention")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_the_class_row_beside_the_fused_attention_is_exact(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (t.transpose(1, 2) for t in torch.randn(3, 2, 17, 4, 16).to(dtype))  # (B, heads, T, width)
    assert ops._is_fused(q, v)
    _, class_attn = ops.attention(4 * q, k, v, 0.25, 15)
    exact = (q.double() @ k.double().transpose(-2, -1)).softmax(-1)[:, :, 0, 1:16]
    assert class_attn.shape == exact.shape and (class_attn.double() / exact - 1).abs().max() < tolerance
