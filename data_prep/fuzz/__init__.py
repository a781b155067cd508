"""Do this project's decoders agree about damaged JPEGs? `python -m data_prep.fuzz`."""
