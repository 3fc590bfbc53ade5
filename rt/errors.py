"""What is wrong with what came from outside, as one sentence."""


class InputError(ValueError):
    """Bad input from outside. The message is one sentence: what, where, what to do; scripts print it and exit with 2."""


class StaleDelta(InputError):
    """A delta met a base that it was not learned on, outside recycling."""


class Diverged(InputError):
    """More than MOST_SKIPPED steps in a row had no finite loss or gradient."""
