"""The command line: each module holds one or a few commands that parse, call one function and print."""
