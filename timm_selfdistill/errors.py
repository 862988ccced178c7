"""Exceptions that the user of the data meets."""

__all__ = ['DataError']


class DataError(ValueError):
    """The data cannot be used as they are; the message says what, where and what to do."""
