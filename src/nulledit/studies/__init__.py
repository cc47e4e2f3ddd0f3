"""The paper's experiments, and those its replications added, as commands."""
