"""The kinds of stage, one folder for each, and what they share."""
