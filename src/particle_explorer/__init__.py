"""Explore single-particle images by content, with pose set apart."""

__version__ = "0.1.0"
