"""Memory, time, money and disk of a plan, before anything is queued. Pure functions of shapes; no torch."""
