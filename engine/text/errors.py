"""What can be wrong with a chat. Mistakes in a tokenizer's files are `weights.errors.CheckpointError`."""


class TemplateError(ValueError):
    """A chat cannot be turned into a prompt; the message is one line.

    There is no template, the template refused the messages (`raise_exception`), rendering failed, or the result is too
    long.
    """
