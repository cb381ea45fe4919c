"""The weights of a head that is trained: float32 masters, their moving average, the optimizer and its rate."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hybrid.config import TrainingConfig
from hybrid.model import HybridModel


class MasterWeights:
    """Float32 weights, their EMA and the optimizer, for a model that may compute in bfloat16."""

    def __init__(self, model: HybridModel, config: TrainingConfig):
        frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.frozen = {name: parameter.float().clone() for name, parameter in frozen.items()}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        self.ema = [master.detach().clone() for master in self.masters]
        self.config = config
        self.optimizers = self._make_optimizers(model)

    def _make_optimizers(self, model: HybridModel) -> list[torch.optim.Optimizer]:
        """AdamW, or Muon for the weights of linear layers with AdamW for the rest."""
        config, masters = self.config, dict(zip(self.names, self.masters, strict=True))
        linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        linear = [name for name in linear if name in masters and len(masters[name]) > 1]
        muon = [masters.pop(name) for name in linear] if config.optimizer == "muon" else []
        decayed = [master for master in masters.values() if master.ndim > 1]
        plain = [master for master in masters.values() if master.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        ]
        if muon:  # scaled so that AdamW's learning rate and decay serve both (Liu et al. 2025, arXiv:2502.16982)
            rate, decay = config.learning_rate, config.weight_decay
            optimizers.append(torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def add_gradients(self, gradients: Sequence[Tensor | None], share: float) -> None:
        """Add the gradients of a part's mean loss, weighted by its share of the rows; summed in float32."""
        for master, gradient in zip(self.masters, gradients, strict=True):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if gradient is not None:
                master.grad.add_(gradient, alpha=share)

    def reduce_gradients(self, accelerator: Accelerator) -> None:
        """Average the gradients over all processes."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        sizes = [gradient.numel() for gradient in gradients]
        torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(mean.split(sizes)))

    def update(self, learning_rate: float, num_updates: int) -> float:
        """One optimizer step from the gradients added up; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm, foreach=True)
        if not torch.isfinite(norm):  # before it reaches the weights, and a checkpoint
            raise FloatingPointError(
                f"the gradient is not finite at update {num_updates}: lower training.learning_rate="
                f"{self.config.learning_rate:g} and go on from the last checkpoint with --resume"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        decay = ema_decay(self.config.ema_decay, num_updates)
        torch._foreach_lerp_(self.ema, [master.detach() for master in self.masters], 1 - decay)
        self._copy_to_model(self.masters)
        return float(norm)

    @torch.no_grad()
    def _copy_to_model(self, weights: Sequence[Tensor]) -> None:
        torch._foreach_copy_([parameter.detach() for parameter in self.parameters], [w.detach() for w in weights])

    @contextmanager
    def averaged(self) -> Generator[None]:
        """The model with its EMA weights, for evaluation."""
        self._copy_to_model(self.ema)
        try:
            yield
        finally:
            self._copy_to_model(self.masters)

    def head_state(self, model: HybridModel) -> dict[str, Tensor]:
        """The state dict that is saved: EMA weights in float32, what is not trained, and buffers."""
        state = self.frozen | {name: buffer.float() for name, buffer in model.named_buffers()}
        return state | dict(zip(self.names, (weight.clone() for weight in self.ema), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        masters = [master.detach() for master in self.masters]
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"masters": masters, "ema": self.ema, "optimizers": optimizers, "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for target, source in ((self.masters, state["masters"]), (self.ema, state["ema"])):
            torch._foreach_copy_([weight.detach() for weight in target], source)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.frozen = state.get("frozen", self.frozen)
        self._copy_to_model(self.masters)


def ema_decay(longest: float, num_updates: int) -> float:
    """Decay of the moving average of weights: a short memory at first, for short runs."""
    return min(longest, (1 + num_updates) / (10 + num_updates))


def learning_rate(settings: TrainingConfig, update: int) -> float:
    """Linear warm-up, then constant, or cosine to a tenth of the peak."""
    warm = min(1.0, (update + 1) / max(1, settings.warmup_updates))
    if settings.decay == "constant":
        return settings.learning_rate * warm
    progress = max(0.0, update - settings.warmup_updates) / max(1, settings.num_updates - settings.warmup_updates)
    return settings.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))
