"""Data sets that have a layout of their own, or are made here."""
