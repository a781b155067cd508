"""Test protocols: which views of an image a trained net sees, how their scores become one, what is reported."""

from __future__ import annotations
