"""The exceptions that mean: the person, or whoever starts processes, can mend this."""


class UserError(ValueError):
    """A mistake in what was asked for: one line that names the values and the way out.

    The command line prints the message alone and exits with `exit_code`; every other exception is
    a defect of ours and keeps its traceback.
    """

    exit_code = 2


class HostsLostError(UserError):
    """Another process of the run is not there, or no longer.

    Nothing is to be mended: the same command, started again everywhere, goes on.
    """

    exit_code = 75
