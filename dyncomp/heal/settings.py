"""The options of healing."""

from __future__ import annotations

from dataclasses import dataclass

from dyncomp.errors import RequestError
from dyncomp.sweep import has_bfloat16


@dataclass(frozen=True)
class Settings:
    """How long, what, and on what is trained; checked when it is made."""

    minutes: float = 10.0
    """Wall-clock time. The number of steps that fit is found once, by timing a step, and noted: it is part of the result."""
    steps: int = 0
    """Optimiser steps, in place of ``minutes``: two runs with equal steps and seed give identical weights."""
    lr: float = 4e-5
    """Peak learning rate of the weights (AdamW, warm-up over a twentieth of the steps, then a cosine to 2 %). What least squares fitted is
    good: SmolLM2 at 75 %, steps of 2048 tokens, gets better from the first step on at 4e-5, and worse for 80 steps at 3e-4."""
    router_lr: float = 10.0
    """Times ``lr``: the learning rate of routers."""
    vector_lr: float = 8.0
    """Times ``lr``: the learning rate of norms and biases, few numbers to which every token's gradient adds up."""
    rank: int = 0
    """0 trains weights whole; above, as low-rank adapters (LoRA) that are merged at the end."""
    batch: int = 4
    """Windows of text a step."""
    together: int = 0
    """Windows computed at once; memory grows with it. 0 is all that a process has of a batch."""
    hidden: float = 0.0
    """Weight of the squared error of a token's residual stream after each FFN, relative to its square."""
    balance: float = 0.0
    """Weight of the auxiliary load-balance loss (Switch, 2101.03961)."""
    balance_rate: float = 0.0
    """Step by which the bias of an expert moves towards equal load, without a loss (DeepSeek-V3, 2412.19437): the threshold's, or one that
    only helps to choose the best k."""
    noise: float = 0.0
    """Noise on routers' scores in training, times their standard deviation over experts (noisy top-k, 1701.06538)."""
    capacity: float = 0.0
    """Times an even share of a sequence's open gates: what an expert takes in training, the rest is dropped (Switch); 0 drops nothing."""
    z_loss: float = 0.0
    """Weight of the router z-loss (ST-MoE, 2202.08906)."""
    sparsity: float = 0.0
    """Weight of the squared difference between each FFN's active fraction and its calibrated one."""
    hold: float = 0.05
    """Rate at which thresholds follow those that would give each batch the calibrated active fraction. Gradients do not raise it:
    their part that opens gates on the whole is taken out. 0 leaves both to the gradients. All thresholds are set again at the end."""
    budget: float = 0.0
    """Operations of the layers that tokens skip, over those without routers, that training aims at: its squared difference is part of the
    loss, and layers trade what they skip. Before and after training all thresholds are moved alike to where it is met. 0 keeps each
    layer's share."""
    budget_weight: float = 100.0
    """Of that squared difference."""
    bfloat16: bool = True
    """Products in bfloat16 where the CPU has it; weights and optimiser stay in float32."""
    checkpoints: bool = False
    """Gradient checkpointing: a third more work, a fraction of the memory."""
    evaluations: int = 6
    """How often the held-out windows are looked at; the best state is kept."""
    patience: int = 3
    """Stop after so many looks in a row that were worse than the best."""

    def __post_init__(self) -> None:
        if self.steps < 0 or (self.steps == 0 and not self.minutes > 0):
            raise RequestError("heal: it needs time: minutes or steps must be positive", hint="for example minutes=10, or steps=300")
        for name in ("lr", "router_lr", "vector_lr", "batch", "evaluations", "patience"):
            if not getattr(self, name) > 0:
                raise RequestError(f"heal: {name.replace('_', '-')}={getattr(self, name):g} must be positive")
        weights = ("hidden", "balance", "balance_rate", "noise", "capacity", "z_loss", "sparsity", "hold", "budget", "budget_weight")
        for name in ("rank", "together", *weights):
            if not getattr(self, name) >= 0:
                raise RequestError(f"heal: {name.replace('_', '-')}={getattr(self, name):g} must not be negative")
        if self.budget > 1:
            raise RequestError(f"heal: a budget of {self.budget:.0%} of the operations", hint="at most 100%, for example budget=70%")
        if self.together and self.batch % self.together:
            raise RequestError(f"heal: together={self.together} does not divide batch={self.batch}")

    @property
    def half(self) -> bool:
        """Whether products are in bfloat16: asked for, and this CPU has it."""
        return self.bfloat16 and has_bfloat16()
