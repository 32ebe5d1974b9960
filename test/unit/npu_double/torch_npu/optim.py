"""torch_npu.optim.NpuFusedAdamW: AdamW on one flat buffer of parameters and one of gradients for each group.

As in torch_npu the buffers are made once, from the parameters that have a gradient by then: a parameter whose first
gradient comes later is never updated. Gradients cannot be set to None.
"""
import math

import torch


def _combine(tensors):
    """One buffer that holds all of `tensors`, which become views of it; None for none."""
    if not tensors:
        return None
    buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
    offset = 0
    for tensor in tensors:
        tensor.data = buffer[offset:offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    return buffer


class NpuFusedAdamW(torch.optim.Optimizer):
    is_fused_optimizer = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad))
        self.is_params_grads_combined = False
        self._combined = []

    @torch.no_grad()
    def _maybe_init_combined_params_and_grads(self):
        if self.is_params_grads_combined:
            return
        combined = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.dtype not in (torch.float32, torch.float16):
                    raise TypeError("Fused optimizer's parameters must be either float32 or float16")
            states = [self.state[p] for p in params]
            for p, state in zip(params, states):
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            combined.append((params, _combine(params), _combine([p.grad for p in params]),
                             _combine([state["exp_avg"] for state in states]),
                             _combine([state["exp_avg_sq"] for state in states])))
        if any(params for params, *_ in combined):
            self._combined = combined
            self.is_params_grads_combined = True

    def get_combined_grads(self):
        return [grads for _, _, grads, _, _ in self._combined if grads is not None]

    @torch.no_grad()
    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._maybe_init_combined_params_and_grads()
        for grads in self.get_combined_grads():
            grads.zero_()

    @torch.no_grad()
    def step(self, closure=None):
        self._maybe_init_combined_params_and_grads()
        for group, (params, values, grads, exp_avg, exp_avg_sq) in zip(self.param_groups, self._combined):
            if values is None:
                continue
            for p in params:
                self.state[p]["step"] += 1
            step = self.state[params[0]]["step"]
            beta1, beta2 = group["betas"]
            values.mul_(1 - group["lr"] * group["weight_decay"])
            exp_avg.mul_(beta1).add_(grads, alpha=1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
            denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** step)).add_(group["eps"])
            values.addcdiv_(exp_avg, denominator, value=-group["lr"] / (1 - beta1 ** step))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.is_params_grads_combined = False
