"""How runs start: the command line, sampling and evaluation from it, local and cluster launchers."""
