"""A run: its folder and pages, the limits that its model must keep, its checks and comparisons."""

from nulledit._lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
