"""What users call: an editor with all that can be asked of it, and the run that it is kept in."""
