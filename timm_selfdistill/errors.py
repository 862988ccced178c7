"""Exceptions whose message is a sentence for the user: what is wrong, where, and what to do."""

__all__ = ['DataError', 'counted']


def counted(number: int, noun: str) -> str:
    """Write a number of things for a message.

    >>> counted(1, 'image'), counted(1200, 'image')
    ('1 image', '1,200 images')
    """
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


class DataError(ValueError):
    """The data cannot be used as they are; the message says what, where and what to do."""
