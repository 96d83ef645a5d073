"""The larger commands of the command line, each with its flags and what it prints; `cli.py` has the others."""
