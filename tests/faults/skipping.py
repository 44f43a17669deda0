"""What a row raises where the machine does not allow it: no faketime, no right to mount."""


class Impossible(Exception):
    """The row cannot be run here; says why in plain words."""
