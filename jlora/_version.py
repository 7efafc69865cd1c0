"""The version, once: packaging reads this file, and so does what is saved."""

__version__ = "0.1.0"
