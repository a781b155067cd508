"""What a command runs in, for both packages: environment, import path, signals, exit codes, Ray."""
