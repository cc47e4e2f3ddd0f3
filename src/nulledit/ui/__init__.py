"""A local web page of one run: look, try, edit, undo; needs the extra `ui`."""
