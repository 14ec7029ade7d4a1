"""The command line: arguments and words; the work is done by the packages below it."""
