"""Recipes: composition by Hydra, validation by a frozen schema, and the reference of all keys."""
