"""Do this project's decoders agree about damaged JPEGs? `python -m resnet_dist.fuzz`."""
