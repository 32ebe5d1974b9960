"""torch.npu.amp: autocast and the gradient scaler, with torch_npu's `dynamic` switch."""
import torch

try:
    from torch.amp.grad_scaler import GradScaler as _GradScaler
    from torch.amp.grad_scaler import OptState
except ImportError:  # torch 2.1 has a scaler for CUDA alone
    from torch.cuda.amp import grad_scaler
    from torch.cuda.amp.grad_scaler import OptState

    class _GradScaler(grad_scaler.GradScaler):
        def __init__(self, device, *arguments):
            grad_scaler.amp_definitely_not_available = lambda: False
            super().__init__(*arguments)

        def scale(self, outputs):
            if self._scale is None:
                self._lazy_init_scale_growth_tracker(outputs.device)
            return outputs * self._scale

        def update(self, new_scale=None):
            if new_scale is not None:
                super().update(new_scale)
                return
            found = [v for state in self._per_optimizer_states.values() for v in state["found_inf_per_device"].values()]
            if sum(value.item() for value in found):
                self._scale.mul_(self._backoff_factor)
                self._growth_tracker.zero_()
            else:
                self._growth_tracker.add_(1)
                if self._growth_tracker.item() == self._growth_interval:
                    self._scale.mul_(self._growth_factor)
                    self._growth_tracker.zero_()
            self._per_optimizer_states.clear()

    def check_and_unscale(grads, found_inf, inverse):  # nor has its CPU the operators of a scaler
        for grad in grads:
            found_inf.copy_(torch.maximum(found_inf, (~torch.isfinite(grad)).any().float()))
            grad.mul_(inverse)
else:
    check_and_unscale = torch._amp_foreach_non_finite_check_and_unscale_


class autocast(torch.autocast):
    def __init__(self, enabled=True, dtype=torch.float16, cache_enabled=True):
        super().__init__("npu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(_GradScaler):
    """With `dynamic=False` the scale stays, gradients are not checked and no step is skipped, as in torch_npu.

    An optimizer that has fused its gradients is unscaled through the fused buffers alone.
    """

    def __init__(self, init_scale=2.0 ** 16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, dynamic=True,
                 enabled=True):
        super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._dynamic = dynamic

    def unscale_(self, optimizer):
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        if getattr(optimizer, "is_fused_optimizer", False):
            optimizer._maybe_init_combined_params_and_grads()
            grads = optimizer.get_combined_grads()
        else:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        inverse = self._scale.float().reciprocal()
        found_inf = torch.zeros((), device=inverse.device)
        if self._dynamic:
            check_and_unscale(grads, found_inf, inverse)
        else:
            torch._foreach_mul_(grads, inverse)
        state["found_inf_per_device"] = {inverse.device: found_inf}
        state["stage"] = OptState.UNSCALED

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        if not self._dynamic:
            return optimizer.step(*args, **kwargs)
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)

    def update(self, new_scale=None):
        if self._dynamic or new_scale is not None:
            super().update(new_scale)
        else:
            self._per_optimizer_states.clear()
