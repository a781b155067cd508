"""Hyperparameter sweeps: space -> points -> recipes -> trials on Ray Tune -> ledger -> ranking, report, next space."""

from __future__ import annotations
