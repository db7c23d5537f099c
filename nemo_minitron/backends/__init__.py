"""Adapters to training frameworks."""
