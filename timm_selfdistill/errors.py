"""Exceptions whose message is a sentence for the user: what is wrong, where, and what to do."""

__all__ = ['DataError']


class DataError(ValueError):
    """The data cannot be used as they are; the message says what, where and what to do."""
