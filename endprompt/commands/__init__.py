"""What the command line offers: the options of every command, and what each of them does.

A command takes what was parsed, checks it, calls one function of a room before this one, and prints what
came of it.  What takes long to import is imported inside functions: `--help`, `path`, `status` and shell
completion answer at once.  ``cli.py`` above chooses the command and turns what it raises into a line and an
exit code.
"""
