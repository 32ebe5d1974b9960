// Which operators autocast runs in which precision, where PyTorch has no lists of them to ask for (torch 2.1): those of
// CUDA's that a recipe for image classification can meet.
#pragma once

#define AT_FORALL_LOWER_PRECISION_FP(_) \
  _(_convolution, deprecated) _(_convolution) _(conv1d) _(conv2d) _(conv3d) _(matmul) _(einsum) _(mm) _(mv) _(linear) \
  _(addmm) _(addmv) _(addr) _(bmm) _(addbmm) _(baddbmm) _(scaled_dot_product_attention)

#define AT_FORALL_FP32(_) \
  _(acos) _(asin) _(cosh) _(erfinv) _(exp) _(expm1) _(log) _(log10) _(log2) _(log1p) _(reciprocal) _(rsqrt) _(sinh) \
  _(tan) _(pow, Tensor_Scalar) _(pow, Tensor_Tensor) _(pow, Scalar) _(softplus) _(layer_norm) _(native_layer_norm) \
  _(group_norm) _(cosine_similarity) _(cosine_embedding_loss) _(nll_loss) _(kl_div) _(l1_loss) _(smooth_l1_loss) \
  _(mse_loss) _(binary_cross_entropy_with_logits) _(dist) _(cdist) _(logsumexp)

#define AT_FORALL_FP32_SET_OPT_DTYPE(_) \
  _(prod) _(prod, dim_int) _(softmax, int) _(log_softmax, int) _(cumprod) _(cumsum) _(sum) _(sum, dim_IntList)

#define AT_FORALL_PROMOTE(_) \
  _(addcdiv) _(addcmul) _(atan2) _(bilinear) _(dot) _(grid_sampler) _(index_put) _(tensordot) _(scatter_add)

#define AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(_)

// the macro that registers an operator, with and without the name of an overload
#define PICK_KERNEL(_1, _2, _3, NAME, ...) NAME
#define REGISTER_KERNEL(...) \
  PICK_KERNEL(__VA_ARGS__, KERNEL_PRIVATEUSEONE2, KERNEL_PRIVATEUSEONE)(__VA_ARGS__)
