"""Healing a converted model by distillation from the dense one."""

from dyncomp.heal.loop import Healed, Trainer
from dyncomp.heal.settings import Settings

__all__ = ["Healed", "Settings", "Trainer"]
