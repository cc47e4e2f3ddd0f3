"""What happened to a model: entries, how they fold into weights, and how they are kept."""
