"""What works on the ledger of a sweep, finished or not: ranking, figures, report, comparison, the next space."""

from __future__ import annotations
