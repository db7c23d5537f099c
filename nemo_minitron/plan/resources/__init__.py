"""Estimates of the memory, time, cost and disk space of a plan. Pure functions of shapes; imports no torch."""
