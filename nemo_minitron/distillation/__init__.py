"""Distillation losses and the teacher cache: functions of tensors."""
