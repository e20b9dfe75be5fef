"""The command line: parse, call, print. One file a command; no tensor is touched here."""
