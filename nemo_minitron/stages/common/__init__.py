"""Code that several kinds of stage share, because kinds do not import each other."""
