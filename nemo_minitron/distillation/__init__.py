"""Distillation losses: functions of tensors."""
