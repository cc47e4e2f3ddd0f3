"""A run for agents: tools of the Model Context Protocol that ask, check and, if allowed, edit."""
