"""Recipes: composed by Hydra, validated by a frozen schema."""
