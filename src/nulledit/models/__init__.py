"""What the library asks of a Hugging Face causal language model."""
