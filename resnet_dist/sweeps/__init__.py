"""Sweeps as plain data: space -> points -> recipes -> ledger -> ranking -> report. No Ray, no MLflow, no torch."""

from __future__ import annotations
