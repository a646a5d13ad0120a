"""The command line: one module a command, each loaded only when its command is called."""
