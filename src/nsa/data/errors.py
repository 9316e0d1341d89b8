"""The errors of everything that enters the pipeline from outside: files, names, tokenizers, the Hub."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line where there is one, and the remedy."""


class DataTimeoutError(DataError):
    """Data that did not come in time; the message names the source and the seconds."""
