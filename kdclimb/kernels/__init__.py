"""The loss that decides whether KD can pay: hard cross-entropy and exact forward KL from hidden states."""

from kdclimb.kernels.distill_loss import DenseTeacher, DistillLoss, DynamicNorm, Softcap, distill_loss

__all__ = ["DenseTeacher", "DistillLoss", "DynamicNorm", "Softcap", "distill_loss"]
