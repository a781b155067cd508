"""Estimates a run on given hardware: speed, bottleneck, failures, hours, money; see README.md."""
