"""Objectives with a teacher: logits, hidden states, teacher correction and teacher caches."""
