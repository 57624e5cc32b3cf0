"""What a user did that cannot work, as opposed to a defect of ours."""


class UserError(ValueError):
    """One line for the user: the values, the rule, a way out.

    The command line prints it without a traceback and exits with 2; every other exception except
    OSError is a defect and keeps its traceback.
    """
