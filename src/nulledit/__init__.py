"""Knowledge editing of Hugging Face causal language models, in the null space of what must stay."""

from nulledit._lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
