"""The one exception that the command line turns into a line of text and exit status 2."""


class UserError(ValueError):
    """Something the user gave cannot work; the message says what is wrong and what to do."""
