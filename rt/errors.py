"""Errors for unusable input. A message says what is wrong and what to do. Settings are in backticks (`lr`); scripts print the flag."""


class InputError(ValueError):
    """Bad input. The scripts print the message and exit with code 2."""


class StaleDelta(InputError):
    """A delta was used, outside recycling, on a base that it was not learned on."""


class Diverged(InputError):
    """Too many steps in a row had a loss or gradient that was not finite."""
