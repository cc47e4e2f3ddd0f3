"""The command line: one thin file a command over a library call."""
