"""A command's surroundings, for both packages: environment, import path, signals, exit codes, Ray."""
