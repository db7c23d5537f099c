"""Scores, the choice of what to keep, and the cut: functions of tensors."""
