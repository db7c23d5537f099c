"""Arithmetic of alignment: preference losses, and what is measured of aligned models."""
