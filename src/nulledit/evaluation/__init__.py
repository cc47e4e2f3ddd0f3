"""What a model makes of facts, of other text, and of itself: scores, answers, perplexity, KL."""

from nulledit._lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
