"""Input that cannot be used. A message says what is wrong and what to do, with settings in backticks, `lr`: scripts print the flag."""


class InputError(ValueError):
    """Bad input: the scripts print the message and exit with 2."""


class StaleDelta(InputError):
    """A delta met a base that it was not learned on, outside recycling."""


class Diverged(InputError):
    """Too many steps in a row had no finite loss or gradient."""
