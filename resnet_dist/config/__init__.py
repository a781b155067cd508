"""Recipes, profiles and search spaces: YAML read into frozen, strict models. Imports neither torch nor ray."""

from __future__ import annotations
