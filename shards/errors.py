"""What a user did that cannot work, as opposed to a defect of ours."""


class UserError(ValueError):
    """One line for the user: the values, the rule, a way out.

    The command line prints it without a traceback and exits with 2; every other exception except
    OSError is a defect and keeps its traceback.
    """


def show_bytes(size: float) -> str:
    """Bytes in the unit that fits, three digits: `12.3 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.0f} {unit}" if size >= 100 * scale else f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"
