"""The loss that decides whether KD can pay: hard cross-entropy and exact forward KL from hidden states."""

from kdclimb.kernels.distill_loss import DistillLoss, DynamicNorm, distill_loss
from kdclimb.kernels.targets import DenseTeacher, Softcap, SparseTeacher

__all__ = ["DenseTeacher", "DistillLoss", "DynamicNorm", "Softcap", "SparseTeacher", "distill_loss"]
