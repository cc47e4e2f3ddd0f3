"""Knowledge editing of Hugging Face causal language models that leaves the rest as it is."""

from nulledit._lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
