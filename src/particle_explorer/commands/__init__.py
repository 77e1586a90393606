"""The commands of the command line: one small class each, one file for each kind of work."""
