"""The one exception that means: the person, not the program, can mend this."""


class UserError(ValueError):
    """A mistake in what was asked for: one line that names the values and the way out.

    The command line prints the message alone and exits with status 2; every other exception is
    a defect of ours and keeps its traceback.
    """
