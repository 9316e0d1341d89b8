"""The error of everything that enters the pipeline from outside: files, names, tokenizers."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line where there is one, and the remedy."""
