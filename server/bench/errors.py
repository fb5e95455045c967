"""What keeps a benchmark from being run."""


class BenchError(Exception):
    """The benchmark cannot be run, or nothing of it has worked; the message is one line."""
