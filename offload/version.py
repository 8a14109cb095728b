"""The version, in its one place; setup.py reads it from here and a test compares the changelog with it."""

__version__ = "0.1.0"
