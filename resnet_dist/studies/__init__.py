"""The papers' claims on a laptop: small runs and measurements, each an MLflow run with tables and figures."""

from __future__ import annotations
