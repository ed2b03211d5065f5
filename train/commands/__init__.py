"""The commands of `python -m train`, one module a command. Register a new one in train/__main__.py."""
