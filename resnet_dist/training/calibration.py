"""How far a net's confidence is its accuracy: expected calibration error (Guo et al. 2017, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Samples by confidence, the largest class probability: bin m of M holds confidences in (m/M, (m+1)/M]."""

    num_samples: tuple[int, ...]
    """By bin."""
    confidence_sums: tuple[float, ...]
    num_right: tuple[int, ...]

    @property
    def ece(self) -> float:
        """Expected calibration error, percent: mean over samples of |accuracy - mean confidence| of their bin."""
        gaps = (abs(right - confidence) for right, confidence in zip(self.num_right, self.confidence_sums, strict=True))
        return 100.0 * sum(gaps) / sum(self.num_samples)


def calibration_row(logits: Tensor, labels: Tensor) -> Tensor:
    """One batch: float64 [3 * NUM_BINS], (samples, sum of confidences, right) of every bin. `logits` [N, C].

    A sample with a NaN or infinite logit is wrong with confidence 0.
    """
    finite = logits.isfinite().all(dim=1)
    confidence, answers = logits.double().where(finite[:, None], 0.0).softmax(dim=1).max(dim=1)
    confidence = confidence.where(finite, 0.0)
    bins = (torch.ceil(confidence * NUM_BINS) - 1).clamp(0, NUM_BINS - 1).long()
    columns = torch.stack([torch.ones_like(confidence), confidence, ((answers == labels) & finite).double()], dim=1)
    return (
        torch.zeros((NUM_BINS, 3), dtype=torch.float64, device=logits.device).index_add_(0, bins, columns).reshape(-1)
    )


def calibration_of(total: Tensor) -> Calibration:
    """From the sum of all batches' rows."""
    rows = total.reshape(NUM_BINS, 3).tolist()
    return Calibration(
        tuple(int(n) for n, _, _ in rows), tuple(c for _, c, _ in rows), tuple(int(r) for _, _, r in rows)
    )
