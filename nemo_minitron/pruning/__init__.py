"""Score, decide, cut: functions of tensors."""
