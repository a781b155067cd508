"""Damaged JPEGs, and whether all of this project's decoders are of one mind about them: `python -m data_prep.fuzz`."""
