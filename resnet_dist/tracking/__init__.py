"""Records every number of a run exactly once, whatever happens to the tracking server. The only package that imports
mlflow."""

from __future__ import annotations
